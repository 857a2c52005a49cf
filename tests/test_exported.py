"""The second front end: what torch.export captures is the same kind of graph, over the user's names."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import masked, relative_error
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxprune
from fxprune import exported
from fxprune.cost import Cost
from fxprune.exported import trace_exported
from fxprune.graph import op_name
from fxprune.groups import analyze_traced
from fxprune.pipeline import Progress, cut
from fxprune.planning import write_plan
from fxprune.trace import trace

BOUND = 1e-9


def distinct(net):
    """Every parameter and statistic its own, float64, eval mode."""
    net = net.double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for name, b in net.named_buffers():
            if "running" in name:
                b.copy_(torch.rand_like(b) + 0.5)
    return net


def image(batch=1, size=16):
    return torch.randn(batch, 3, size, size).double()


def run(traced, *inputs):
    """The captured graph on other inputs."""
    root = copy.copy(traced.model)
    root.__dict__ = {**vars(root), **traced.constants}
    return torch.fx.GraphModule(root, traced.graph)(*inputs)


def assert_same(traced, *inputs):
    with torch.no_grad():
        given, found = traced.model(*inputs), run(traced, *inputs)
    assert type(given) is type(found)
    for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(found), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def pruned(traced, share=3):
    """Every third class of every group removed; the plan and the network."""
    analysis = analyze_traced(traced)
    keep = analysis.everything()
    for group in analysis.groups:
        keep[group.classes[::share]] = False
    for piece in analysis.pieces:
        if not keep[piece].any():
            keep[piece[0]] = True
    plan = write_plan(analysis, keep, Cost.of(analysis), method={"name": "manual"})
    return plan, cut(analysis, plan, keep, Progress(False), check=True, notes=[])


def assert_law(traced, *inputs):
    plan, small = pruned(traced)
    assert plan.slices, "nothing was cut: the law would hold trivially"
    assert plan.metrics["macs_after"] < plan.metrics["macs_before"]
    reference = masked(traced.model, plan.to_dict())
    for x in inputs:
        assert relative_error(reference(x), small(x)) <= BOUND
    assert set(small.state_dict()) <= set(traced.model.state_dict())
    return small


def words(traced):
    return [n.op if n.op in ("placeholder", "output", "get_attr") else
            type(traced.module(n)).__name__ if n.op == "call_module" else op_name(n)
            for n in traced.graph.nodes]  # fmt: skip


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return F.relu(x + self.drop(self.bn(self.conv(x))), inplace=True)


class Refused(nn.Module):
    """Numpy on shapes, isinstance, a state that is a dict, numbers of the data's device."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.weight = nn.Parameter(torch.randn(8, 6, 1, 1))
        self.register_buffer("scale", torch.rand(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        self.state = state = {"features": self.stem(x), "seen": 0}
        if not isinstance(state["features"], torch.Tensor):
            raise TypeError("a tensor is wanted")
        for block in self.blocks:
            state["features"] = block(state["features"])
            state["seen"] += 1
        y = F.conv2d(state["features"], self.weight)
        assert int(np.prod(y.shape[1:2])) == 8
        y = y * self.scale.view(1, -1, 1, 1) + torch.tensor(0.5, dtype=x.dtype)
        b, c, h, w = y.shape
        tokens = y.reshape(b, c, h * w).transpose(1, 2)
        tokens = F.dropout(tokens, 0.2, training=self.training)
        return self.head(tokens.mean(1) / state["seen"])


@pytest.fixture
def refused():
    return trace_exported(distinct(Refused()), (image(),), "numpy")


def test_the_graph_is_the_model_at_every_size(refused):
    for batch, size in ((1, 16), (3, 16), (2, 24)):
        assert_same(refused, image(batch, size))
    assert refused.front_end == "export"
    assert "captured by torch.export, since symbolic tracing refused: numpy" in refused.notes
    assert "sizes that may change: axes 0, 2, 3 of the input" in refused.notes


def test_layers_and_tensors_keep_their_names(refused):
    named = [str(n.target) for n in refused.graph.nodes if n.op == "call_module"]
    assert named == ["stem", *(f"blocks.{i}.{layer}" for i in range(2) for layer in ("conv", "bn", "drop")), "head"]  # fmt: skip
    read = {str(n.target) for n in refused.graph.nodes if n.op == "get_attr"}
    assert read == {"weight", "scale", "_tensor_constant0"}
    assert list(refused.constants) == ["_tensor_constant0"]
    for node in refused.graph.nodes:
        assert "val" in node.meta
        if node.op.startswith("call_") and isinstance(node.meta["val"], torch.Tensor):
            assert node.meta["where"].startswith(f"{__file__}:")


def test_what_is_cut_obeys_the_law(refused):
    small = assert_law(refused, image(), image(3), image(2, 24))
    assert small.report.front_end == "export"
    assert small.stem.out_channels < 6
    small.train()
    before = (
        small.blocks_0_bn if hasattr(small, "blocks_0_bn") else small.get_submodule("blocks.0.bn")
    )
    mean = before.running_mean.clone()
    small(image(4)).sum().backward()
    assert int(before.num_batches_tracked) == 1
    assert not torch.equal(mean, before.running_mean)
    assert not torch.equal(small(image(2)), small(image(2)))  # dropout drops again
    program = torch.export.export(small.eval(), (image(2),)).module()
    x = image(2)
    assert relative_error(small(x), program(x)) <= BOUND


def test_the_model_is_left_as_it_was():
    net = distinct(Refused()).train()
    net.blocks[0].eval()
    modes = [m.training for m in net.modules()]
    attributes = [dict(vars(m)) for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = image()
    noise = torch.get_rng_state()
    trace_exported(net, (x,), "")
    assert [m.training for m in net.modules()] == modes
    assert [dict(vars(m)) for m in net.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(noise, torch.get_rng_state())


class Plain(nn.Module):
    """What both front ends take, written in many ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.act = nn.GELU()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pos = nn.Parameter(torch.randn(1, 64, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        y = self.conv(x)
        a, b = y.chunk(2, dim=1)
        y = torch.cat([F.silu(a), b * 2], dim=1)
        y = F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0, mode="nearest")
        y = F.pad(y, (0, 0, 0, 0)) + F.adaptive_avg_pool2d(y, 1)
        t = y.flatten(2).permute(0, 2, 1) + self.pos
        t = self.act(self.norm(t))
        t = t + self.attend(t, t, t, need_weights=False)[0] + self.attend(t, t, t)[0]
        t = F.layer_norm(t, (8,), eps=1e-6)
        t = torch.einsum("bnc,bmc->bnm", t, t).softmax(-1) @ t
        return self.fc(t[:, 1:].mean(dim=1)), t[:, 0]


def test_the_words_are_those_of_symbolic_tracing():
    net = distinct(Plain())
    x = image(1, 8)
    symbolic, exported = trace(net, (x,)), trace_exported(net, (x,), "")
    sizes = {"size", "getattr", "getitem"}  # tuples of pieces and shapes are taken apart elsewhere
    checks = {"_assert", "eq", "floordiv", "mul"}  # of the size that `pos` has
    ours = [w for w in words(exported) if w not in sizes | checks]
    assert sorted(ours) == sorted(w for w in words(symbolic) if w not in sizes | checks)
    assert not [n for n in exported.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    for given in (x, image(3, 8)):  # attention is taken apart: equal to rounding
        assert relative_error(net(given), run(exported, given)) <= 1e-14


class Indices(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, tokens, extra):
        y, (h, _) = self.lstm(self.embed(tokens))
        y = y[:, self.order] + extra["bias"][0]
        z = torch.arange(y.shape[1], device=y.device).to(y.dtype)
        y[:, :, 1:3] = 0
        y = y.clone()
        y[..., 0].mul_(2)
        return {"y": y[:, ::2, -3:], "h": (h[-1], z.view(1, -1, 1) * y), "n": None}


def test_indices_containers_and_in_place():
    net = distinct(Indices())
    inputs = (torch.randint(0, 10, (2, 3)), {"bias": [torch.randn(5).double()], "unused": None})
    traced = trace_exported(net, inputs, "")
    assert_same(traced, *inputs)
    assert_same(traced, torch.randint(0, 10, (4, 3)), inputs[1])
    targets = [n.target for n in traced.graph.nodes]
    assert "lstm" in targets
    assert getattr in targets  # the device follows the input
    assert not any(isinstance(v, torch.device) for n in traced.graph.nodes for v in n.kwargs.values())  # fmt: skip


class Several(nn.Module):
    """Any number of inputs, and what eval mode counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *others):
        self.calls.add_(1)
        return self.conv(x) + sum(self.conv(other) for other in others) * self.calls


def test_any_number_of_inputs_and_counting_buffers():
    net = distinct(Several())
    traced = trace_exported(net, (image(), image(), image()), "")
    assert float(net.calls) == 0
    assert any("axes 0 of input 0, 2 of input 0, 3 of input 0, 0 of" in n for n in traced.notes)
    inputs = image(2, 8), image(2, 8), image(2, 8)
    expected = copy.deepcopy(net)(*inputs)
    assert torch.equal(run(traced, *inputs), expected)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layers(self.embed(x.flatten(2).transpose(1, 2))).mean(1))


def test_attention_drops_in_train_mode_only():
    traced = trace_exported(distinct(Encoder()), (image(1, 4),), "")
    assert list(traced.mode_flags.values()) == [{"dropout_p": (0.0, 0.1)}]
    assert not [n for n in traced.notes if "in train mode" in n]
    assert_law(traced, image(1, 4), image(2, 4))


class Functional(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(6)
        self.frozen = frozen
        self.aux = nn.Conv2d(6, 2, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        bn = self.bn
        follows = self.training and not self.frozen
        y = self.conv(x)
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, follows)
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


@pytest.mark.parametrize("frozen", [False, True])
def test_functional_batch_norm_follows_the_mode_if_the_model_does(frozen):
    traced = trace_exported(distinct(Functional(frozen)), (image(),), "")
    assert traced.dropped == {"aux"}
    assert "branches that exist only in training were dropped: aux" in traced.notes
    assert len(traced.mode_flags) == (0 if frozen else 1)
    small = assert_law(traced, image(), image(2, 8))
    norm = small.get_buffer("bn.running_mean").clone()
    small.train()(image(4))
    assert torch.equal(norm, small.get_buffer("bn.running_mean")) == frozen


class Differs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = F.dropout(self.a(x), 0.5, self.training)
        return self.b(y * 2 if self.training else y + y)


def test_another_train_mode_is_named_and_dropout_still_follows():
    traced = trace_exported(distinct(Differs()), (image(),), "")
    (note,) = [n for n in traced.notes if "in train mode" in n]
    assert "computes different things in train and eval mode" in note
    assert list(traced.mode_flags.values()) == [{2: (False, True)}]
    assert_law(traced, image())


class Fixed(nn.Module):
    def __init__(self, batch):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.batch = batch

    def forward(self, x):
        y = self.conv(x)
        return torch.stack([y[i].mean() for i in range(y.shape[0] * self.batch)])


def test_a_loop_over_the_batch_fixes_it_to_that_of_the_example():
    for batch in (1, 3):
        traced = trace_exported(distinct(Fixed(1)), (image(batch),), "")
        assert_same(traced, image(batch))
        assert run(traced, image(batch)).shape == (batch,)
        assert any("axes 2, 3 of the input; the others are" in note for note in traced.notes)


class Same(nn.Module):
    """Padding that depends on sizes, layer after layer: formulas of sizes grow."""

    def __init__(self, depth):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, stride=2) for _ in range(depth)])

    def forward(self, x):
        for conv in self.convs:
            more = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
            x = conv(F.pad(x, (more // 2, more - more // 2) * 2))
        return x


def test_sizes_with_long_formulas_are_fixed(monkeypatch):
    net = distinct(Same(2))
    for effort, axes in ((20_000, "0, 2, 3"), (100, "0")):
        monkeypatch.setattr(exported, "EFFORT", effort)
        traced = trace_exported(net, (image(1, 32),), "")
        assert_same(traced, image(3, 32))
        assert any(
            note.startswith(f"sizes that may change: axes {axes} of") for note in traced.notes
        )
    assert ShapeEnv.simplify.__name__ != "counted"


class Modal(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.body = body

    def forward(self, x):
        return self.body(self.conv(x))


def autocast(y):
    with torch.autocast("cpu", torch.bfloat16):
        return y @ y.mT


def no_autocast(y):
    with torch.autocast("cpu", enabled=False):
        return y @ y.mT


def quiet(y):
    with torch.no_grad():
        scale = y.mean()
    return y * scale


def test_contexts_inside_forward():
    with pytest.raises(fxprune.TraceError, match=r"under torch\.autocast"):
        trace_exported(distinct(Modal(autocast)), (image(),), "")
    for body, name in ((quiet, "no_grad"), (no_autocast, "autocast(enabled=False)")):
        traced = trace_exported(distinct(Modal(body)), (image(),), "")
        assert_same(traced, image(2))
        assert any(f"`torch.{name}` inside forward ({__file__}:" in note for note in traced.notes)


def test_what_export_refuses_is_named_with_the_line():
    net = distinct(Modal(lambda y: y if y.sum() > 0 else -y))
    with pytest.raises(fxprune.TraceError, match="cannot be exported") as caught:
        trace_exported(net, (image(),), "")
    assert f"{__file__}:" in str(caught.value)


class Answer(SimpleNamespace):
    pass


def test_results_of_other_classes_are_refused_or_made_again():
    traced = trace_exported(distinct(Modal(lambda y: torch.max(y, 1))), (image(),), "")
    assert_same(traced, image(2))
    with pytest.raises(fxprune.TraceError, match="cannot be exported"):
        trace_exported(distinct(Modal(lambda y: Answer(y=y))), (image(),), "")


def test_hooks_of_layers_stay_with_them():
    net = distinct(Refused())
    seen = []
    net.stem.register_forward_hook(lambda m, args, out: seen.append(out) or out * 2)
    traced = trace_exported(net, (image(),), "")
    assert traced.hooked == {"stem"}
    assert len([n for n in traced.graph.nodes if n.target == "stem"]) == 1
    assert_same(traced, image(2))


def test_compile_through_the_second_door(monkeypatch):
    def refusing(model, inputs):
        try:
            raise fxprune.TraceError("Refused cannot be traced: no", where="here")
        except fxprune.TraceError as error:
            return trace_exported(model, inputs, str(error).splitlines()[0])

    monkeypatch.setattr("fxprune.groups.trace", refusing)
    net, x = distinct(Refused()), image()
    small = fxprune.compile(net, x, budget=0.5, progress=False)
    assert small.report.front_end == "export"
    assert any("refused: Refused cannot be traced: no" in note for note in small.report.notes)
    assert relative_error(masked(net, small.plan.to_dict())(x), small(x)) <= BOUND
    again = fxprune.apply(net, fxprune.Plan.from_json(small.plan.to_json()), x)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in small.state_dict().items())
    smaller = fxprune.compile(small, x, budget=0.5, progress=False)
    assert relative_error(masked(net, smaller.plan.to_dict())(x), smaller(x)) <= BOUND
