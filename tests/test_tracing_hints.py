"""Tracing with hints: Python may decide by sizes, sizes stay free, attention is taken apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune import TraceError
from fxprune.graph import op_name
from fxprune.hints import to_meta
from fxprune.trace import trace


def distinct(model: nn.Module) -> nn.Module:
    """Every parameter and statistic its own value, float64, eval mode."""
    generator = torch.Generator().manual_seed(0)
    for t in [*model.parameters(), *model.buffers()]:
        if t.is_floating_point():
            t.data = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 0.6 + 0.2
            t.data *= 1 if t.dim() < 2 else t.shape[-1] ** -0.5
    return model.double().eval()


def graph_of(model: nn.Module, *inputs: object) -> GraphModule:
    """The traced graph as a module with the model's own layers."""
    traced = trace(model, inputs)
    holder = copy.deepcopy(model)
    for name, value in traced.constants.items():
        setattr(holder, name, value)
    for node in traced.graph.nodes:
        assert node.op == "output" or "val" in node.meta
        assert "where" in node.meta
    return GraphModule(holder, traced.graph)


def plain(forward: object) -> nn.Module:
    """A model with a convolution and whatever follows."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.table = nn.Parameter(torch.rand(4, 12))

        def forward(self, x: Tensor) -> object:
            return forward(self, self.conv(x))  # type: ignore[operator]

    return distinct(Plain())


def unpacked(m: nn.Module, x: Tensor) -> Tensor:
    b, c, *rest = x.shape
    return x.reshape(b, c, rest[0] * rest[1]).transpose(1, 2).reshape(*x.shape[:-3], -1, c)


def padded_to_even(m: nn.Module, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    return F.pad(x, (0, max(w % 4, 0), 0, max(h % 4, 1)))


def window_mask(m: nn.Module, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    mask = x.new_zeros((h, w))
    for i, part in enumerate((slice(0, -2), slice(-2, None))):
        mask[part, part] = i + 1
    return x + mask


def positions(m: nn.Module, x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    return x * rows[:, None] + torch.zeros((1, x.shape[-1]), dtype=x.dtype)


def filled_table(m: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros(x.shape[-1], 2, dtype=x.dtype)
    table[:, 1] = torch.tensor(2.5)
    return x * table.sum(1)


def asked_about(m: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    assert isinstance(x.shape[0], int)
    assert isinstance(x.shape, tuple)
    assert not isinstance(x, nn.Parameter)
    assert not hasattr(x, "no_such_thing")
    assert len(x.shape) == x.dim() == 4
    assert x.shape[1] != -1
    return x.relu() if x.is_floating_point() else x


def parsed_only(m: nn.Module, x: Tensor) -> Tensor:
    return torch.roll(torch.reshape(x, (x.shape[0], x.shape[1], -1)), (x.size(2), 1), (1, 2))


FREE = [unpacked, padded_to_even, window_mask, positions, filled_table, asked_about, parsed_only]


@pytest.mark.parametrize("forward", FREE, ids=lambda f: f.__name__)
def test_sizes_stay_free(forward):
    model = plain(forward)
    graph = graph_of(model, torch.rand(1, 3, 6, 8, dtype=torch.float64))
    assert "_assert" not in {op_name(node) for node in graph.graph.nodes}
    for shape in ((1, 3, 6, 8), (3, 3, 6, 8), (2, 3, 9, 5)):
        x = torch.rand(shape, dtype=torch.float64)
        assert torch.equal(graph(x), model(x))


def by_batch(m: nn.Module, x: Tensor) -> Tensor:
    return x.relu() if x.shape[0] > 2 else x.sigmoid()


def by_truth(m: nn.Module, x: Tensor) -> Tensor:
    pad = (4 - x.shape[-1] % 4) % 4
    return F.pad(x, (0, pad)) if pad else x.sin()


def by_count(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([x[..., i].sin() * i for i in range(x.shape[-1])])


def by_int(m: nn.Module, x: Tensor) -> Tensor:
    return x * int(x.shape[-1] ** 0.5)


def by_float(m: nn.Module, x: Tensor) -> Tensor:
    return x * float(x.shape[-1])


def by_rows(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([row.relu() for row in x.transpose(0, 3)])


def by_length(m: nn.Module, x: Tensor) -> Tensor:
    return x * len(x.transpose(0, 3))


def by_pieces(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([piece.sum(-1) for piece in x.split(2, -1)])


def by_unbound(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([piece * 2 for piece in x.unbind(-1)])


DECIDED = [
    by_batch,
    by_truth,
    by_count,
    by_int,
    by_float,
    by_rows,
    by_length,
    by_pieces,
    by_unbound,
]


@pytest.mark.parametrize("forward", DECIDED, ids=lambda f: f.__name__)
def test_inputs_that_decide_otherwise_are_refused(forward):
    model = plain(forward)
    graph = graph_of(model, torch.rand(1, 3, 6, 8, dtype=torch.float64))
    x = torch.rand(1, 3, 6, 8, dtype=torch.float64)
    assert torch.equal(graph(x), model(x))
    if forward is by_truth:
        other = torch.rand(1, 3, 6, 10, dtype=torch.float64)
    elif forward is by_batch:
        other = torch.rand(3, 3, 6, 8, dtype=torch.float64)
    else:
        other = torch.rand(1, 3, 6, 18, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"takes another way .* at `.*` in test_tracing_hints"):
        graph(other)


def test_decisions_are_written_down_once():
    def twice(m: nn.Module, x: Tensor) -> Tensor:
        y = x.relu() if x.shape[0] > 2 else x.sigmoid()
        return y if x.shape[0] > 2 else y.sin()

    graph = graph_of(plain(twice), torch.rand(1, 3, 6, 8, dtype=torch.float64))
    assert [op_name(node) for node in graph.graph.nodes].count("_assert") == 1


def test_the_graph_with_its_checks_compiles_and_exports():
    model = plain(by_truth)
    x = torch.rand(2, 3, 6, 8, dtype=torch.float64)
    graph = graph_of(model, x)
    exported = torch.export.export(graph, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    y = torch.rand(5, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(exported.module()(y), model(y))
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(y), model(y))


def test_data_decides_nothing():
    for forward in (
        lambda m, x: x if x.sum() > 0 else -x,
        lambda m, x: x * int(x.sum()),
        lambda m, x: x[: x.sum().item()],
        lambda m, x: x * len(list(torch.nonzero(x > 0))),
    ):
        with pytest.raises(TraceError):
            trace(plain(forward), (torch.rand(1, 3, 6, 8, dtype=torch.float64),))


def test_a_dtype_that_decides_is_noted():
    def by_dtype(m: nn.Module, x: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.float16 else x.relu()

    notes = trace(plain(by_dtype), (torch.rand(1, 3, 6, 8, dtype=torch.float64),)).notes
    assert any("forward decides by dtype" in note for note in notes)


def test_operations_without_a_meta_form():
    def counted(m: nn.Module, x: Tensor) -> Tensor:
        return x.relu() * torch.unique(x.detach().round()).numel()

    model = plain(counted)
    x = torch.rand(2, 3, 6, 8, dtype=torch.float64)
    graph = graph_of(model, x)
    assert torch.equal(graph(x * 3), model(x * 3))


def test_a_probability_of_dropping_may_follow_the_mode():
    def dropping(m: nn.Module, x: Tensor) -> Tensor:
        q = x.flatten(2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3 if m.training else 0.0)

    traced = trace(plain(dropping), (torch.rand(1, 3, 6, 8, dtype=torch.float64),))
    assert list(traced.mode_flags.values()) == [{"dropout_p": (0.0, 0.3)}]


# Attention

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 4, 12, 3


class Attends(nn.Module):
    """nn.MultiheadAttention called in one way."""

    def __init__(self, cross: bool, call: dict[str, object], **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)  # type: ignore[arg-type]
        self.cross, self.call = cross, call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> object:
        named = dict(zip(("attn_mask", "key_padding_mask"), masks, strict=False))
        named = {name: mask for name, mask in named.items() if mask.numel() > 1}
        given = (q, k, v) if self.cross else (q, q, q)
        return self.attention(*given, **named, **self.call)


def attention_inputs(
    cross: bool, batched: bool, batch_first: bool, kdim: int, vdim: int
) -> list[Tensor]:
    """Queries, keys and values as the options ask for them."""
    keys = KEYS if cross else QUERIES
    found = []
    for length, width in ((QUERIES, WIDTH), (keys, kdim), (keys, vdim)):
        x = torch.rand(BATCH, length, width, dtype=torch.float64)
        found.append(x[0] if not batched else x if batch_first else x.transpose(0, 1))
    return found


OPTIONS: list[dict[str, object]] = [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 7, "vdim": 9}, {"kdim": 7, "bias": False},
]  # fmt: skip
MASKS = ["", "bool", "float", "heads", "padding", "float padding", "both"]


@pytest.mark.parametrize(
    ("options", "mask"),
    [(options, mask) for options in OPTIONS for mask in (MASKS if not options else ("", "both"))],
    ids=str,
)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one sample"])
def test_attention_is_taken_apart(options, mask, batched):
    for cross in (True,) if "kdim" in options else (False, True):
        for call in ({"average_attn_weights": cross}, {"need_weights": False}):
            check_attention(options, mask, batched, cross, batched and cross, call)


def check_attention(options, mask, batched, cross, batch_first, call):
    model = distinct(Attends(cross, call, batch_first=batch_first, **options))
    kdim, vdim = options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    inputs = attention_inputs(cross, batched, batch_first, kdim, vdim)
    keys = KEYS if cross else QUERIES
    given = torch.rand(BATCH * HEADS if batched else HEADS, QUERIES, keys, dtype=torch.float64)
    padding = torch.arange(keys).expand(BATCH, keys) >= keys - 1 - torch.arange(BATCH)[:, None] % 2
    padding = padding if batched else padding[0]
    nothing = torch.zeros(1)
    masks = {
        "": [],
        "bool": [given[0] > 0.8],
        "float": [given[0]],
        "heads": [given],
        "padding": [nothing, padding],
        "float padding": [nothing, padding.double() * -2.5],
        "both": [given[0], padding.double() * -2.5],
    }[mask]
    graph = graph_of(model, *inputs, *masks)
    assert not any(n.op == "call_module" and n.target == "attention" for n in graph.graph.nodes)
    names = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    assert names <= dict(model.named_parameters()).keys()
    for training in (False, True):
        ours, theirs = (
            graph.train(training)(*inputs, *masks),
            model.train(training)(*inputs, *masks),
        )
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
        if call.get("need_weights", True):
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_attention(need_weights):
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    call = {"is_causal": True, "need_weights": need_weights}
    model = distinct(Attends(False, call, batch_first=True))
    x = torch.rand(BATCH, QUERIES, WIDTH, dtype=torch.float64)
    graph = graph_of(model, x, x, x, mask)
    y = torch.rand(BATCH + 1, QUERIES, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(graph(y, y, y, mask)[0], model(y, y, y, mask)[0])


def test_batch_and_tokens_of_attention_stay_free():
    for call in ({}, {"need_weights": False}):
        model = distinct(Attends(True, call, batch_first=True, add_bias_kv=True))
        graph = graph_of(model, *attention_inputs(True, True, True, WIDTH, WIDTH))
        q = torch.rand(2, 9, WIDTH, dtype=torch.float64)
        k = torch.rand(2, 8, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(graph(q, k, k * 2)[0], model(q, k, k * 2)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_attention_follows_the_mode(need_weights):
    model = distinct(Attends(False, {"need_weights": need_weights}, dropout=0.25))
    x = torch.rand(QUERIES, BATCH, WIDTH, dtype=torch.float64)
    traced = trace(model, (x, x, x))
    ((flags,),) = (traced.mode_flags.values(),)
    assert flags == ({"training": (False, True)} if need_weights else {"dropout_p": (0.0, 0.25)})


def test_attention_with_hooks_stays_whole():
    model = Attends(False, {})
    model.attention.register_forward_hook(lambda m, given, out: out)
    x = torch.rand(QUERIES, BATCH, WIDTH)
    traced = trace(model, (x, x, x))
    assert traced.hooked == {"attention"}
    assert any(n.op == "call_module" and n.target == "attention" for n in traced.graph.nodes)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformers_are_traced_through(batch_first, norm_first):
    model = nn.Transformer(
        WIDTH, HEADS, 2, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    distinct(model)
    source = torch.rand(3, 3, WIDTH, dtype=torch.float64)
    target = torch.rand(3, 3, WIDTH, dtype=torch.float64)
    graph = graph_of(model, source, target)
    kinds = {type(graph.get_submodule(str(n.target))) for n in graph.graph.nodes if n.op == "call_module"}  # fmt: skip
    assert nn.MultiheadAttention not in kinds
    assert nn.TransformerEncoderLayer not in kinds
    for length in (3, 5):
        source = torch.rand(3, length, WIDTH, dtype=torch.float64)
        source = source if batch_first else source.transpose(0, 1).contiguous()
        torch.testing.assert_close(graph(source, source * 2), model(source, source * 2))


def test_what_forward_keeps_is_computed_in_each_mode():
    def keeps(m: nn.Module, x: Tensor) -> Tensor:
        if getattr(m, "kept", None) is None:
            m.kept = torch.arange(x.shape[-1], dtype=x.dtype)
        return x * m.kept

    model = plain(keeps)
    graph = graph_of(model, torch.rand(1, 3, 6, 8, dtype=torch.float64))
    assert not hasattr(model, "kept")
    x = torch.rand(2, 3, 6, 8, dtype=torch.float64)
    assert torch.equal(graph(x), model(x))


def test_tracing_runs_nothing_for_real():
    model = plain(lambda m, x: x.relu() if x.shape[0] > 1 else x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced = trace(model, (torch.rand(1, 3, 6, 8, dtype=torch.float64),))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(
        v.device.type == "meta"
        for v in (n.meta["val"] for n in traced.graph.nodes)
        if isinstance(v, Tensor)
    )
    assert to_meta(3) == 3


class Caching(nn.Module):
    """Keeps what it computes in a dict of its own, as layers with a cache of biases do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.cache, self.seen = {}, [[]]

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.conv(x).mean()
        self.seen[0].append(x)
        return self.conv(x) + self.cache["bias"]


def test_a_cache_that_forward_fills_is_given_back_empty():
    net = Caching().eval()
    fxprune.analyze(net, torch.randn(1, 3, 4, 4))
    assert net.cache == {}
    assert net.seen == [[]]
