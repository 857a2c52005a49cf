"""What front ends must not miss: a graph refuses an input that forward would treat otherwise."""

from collections import OrderedDict, defaultdict, deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import TraceError
from fxprune.exported import trace_exported
from fxprune.trace import trace


class Net(nn.Module):
    """Two convolutions and whatever follows."""

    def __init__(self, after, **attributes):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.after = after
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x, *more):
        return self.after(self, self.b(self.a(x).relu()), *more)


def image(*shape):
    return torch.rand(shape, dtype=torch.float64)


def net(after, **attributes):
    torch.manual_seed(0)
    return Net(after, **attributes).double().eval()


def graph_of(model, *inputs, by=trace):
    traced = by(model, inputs) if by is trace else by(model, inputs, "")
    for name, value in traced.constants.items():
        model.__dict__[name] = value
    return GraphModule(model, traced.graph)


def looked_up(m, y):
    return y * 2 if y.shape[-1] in {16, 32} else y


def looked_up_in_a_table(m, y):
    return y * {8: 3.0, 16: 2.0}.get(y.shape[-1], 1.0)


def written_out(m, y):
    return y * 2 if f"{y.shape[-1]:d}" == "16" else y


def one_less(m, y):
    return y * 2 if y.shape[-2] - y.shape[-1] == -8 else y


def counted(m, y):
    return y * len(y.split(4, 3))


def some_pieces(m, y):
    return sum(piece for piece in y.split(4, 3)[1:])


def backwards(m, y):
    return sum(row * (i + 1) for i, row in enumerate(reversed(y.unbind(3))))


DECIDE = [looked_up, looked_up_in_a_table, written_out, one_less, counted, some_pieces, backwards]


@pytest.mark.parametrize("after", DECIDE, ids=lambda f: f.__name__)
def test_python_that_decides_by_sizes(after):
    model = net(after)
    graph = graph_of(model, image(2, 3, 8, 8))
    for same in (image(2, 3, 8, 8), image(5, 3, 8, 8)):
        assert torch.equal(graph(same), model(same))
    with pytest.raises(AssertionError, match="takes another way for an input of this size"):
        graph(image(2, 3, 8, 16))


def test_keys_that_outlive_the_tracing_are_nobodys():
    kept = {}

    def remembered(m, y):
        key = y.shape[-1]
        if key not in kept:
            kept[key] = torch.arange(y.shape[-1], dtype=y.dtype)
        return y * kept[key]

    model, x = net(remembered), image(2, 3, 8, 8)
    graph = graph_of(model, x)
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("word", [None, True, False, "twice"])
def test_words_among_the_inputs_are_taken_literally(word):
    def by_word(m, y, word):
        return y * 2 if word is not None and word is not False else y

    model, x = net(by_word), image(2, 3, 8, 8)
    graph = graph_of(model, x, word)
    assert torch.equal(graph(x, word), model(x, word))
    with pytest.raises(AssertionError, match="traced for"):
        graph(x, "another")


BY_EXPORT = {
    "compared": (lambda m, y: y * 2 if y.shape[-1] > 10 else y, (2, 3, 8, 16)),
    "odd": (lambda m, y: y * 2 if y.shape[-1] % 2 else y, (2, 3, 8, 9)),
    "batch": (lambda m, y: y * 2 if y.shape[0] > 2 else y, (3, 3, 8, 8)),
    "one": (lambda m, y: y * 2 if y.shape[0] == 1 else y, (1, 3, 8, 8)),
    "whole": (lambda m, y: y * int(y.shape[-1]), (2, 3, 8, 9)),
    "loop": (lambda m, y: sum(y * (i + 1) for i in range(y.shape[-1] // 4)), (2, 3, 8, 16)),
    "pieces": (lambda m, y: sum(p.mean(3) for p in y.split(4, 3)), (2, 3, 8, 16)),
    "clamped": (lambda m, y: y[..., :6] / y[..., :6].shape[-1], (2, 3, 8, 4)),
    "square": (lambda m, y: y.mT if y.shape[-1] == y.shape[-2] else y, (2, 3, 8, 9)),
    "table": (lambda m, y: y * {8: 2}.get(y.shape[-1], 1), (2, 3, 8, 16)),
}


@pytest.mark.parametrize("name", BY_EXPORT)
def test_an_export_refuses_other_sizes(name):
    after, shape = BY_EXPORT[name]
    model = net(after)
    graph = graph_of(model, image(2, 3, 8, 8), by=trace_exported)
    x = image(2, 3, 8, 8)
    assert torch.equal(graph(x), model(x))
    with pytest.raises(AssertionError, match="exported for other sizes"):
        graph(image(*shape))


def test_an_export_of_one_sample_that_is_special():
    model, x = net(lambda m, y: y * 2 if y.shape[0] == 1 else y), image(1, 3, 8, 8)
    graph = graph_of(model, x, by=trace_exported)
    assert torch.equal(graph(x), model(x))
    with pytest.raises(AssertionError, match="exported for other sizes"):
        graph(image(3, 3, 8, 8))


def test_an_export_stays_open_where_nothing_decides():
    model = net(lambda m, y: F.interpolate(y, (y.shape[2] * 2, 7)).reshape(y.shape[0], -1, 7))
    graph = graph_of(model, image(1, 3, 8, 8), by=trace_exported)
    for shape in ((1, 3, 8, 8), (4, 3, 5, 12), (2, 3, 1, 1)):
        x = image(*shape)
        assert torch.equal(graph(x), model(x))


def test_an_export_that_fails_prints_nothing(capfd):
    with pytest.raises(TraceError):
        trace_exported(net(lambda m, y: y if y.sum() > 0 else -y), (image(2, 3, 8, 8),), "")
    assert capfd.readouterr() == ("", "")


def noise(m, y):
    if m.training:
        y.mul_(torch.rand_like(y))
    return y + 1


def masked_rows(m, y):
    if m.training:
        y[:, :, :2] = 0
    return y + 1


def part(m, y):
    if m.training:
        y[:, :2].zero_()
    return y + 1


def dropped(m, y):
    if m.training:
        F.dropout(y, 0.5, True, inplace=True)
    return y + 1


def by_layer(m, y):
    if m.training:
        m.drop(y)
    return y + 1


@pytest.mark.parametrize("after", [noise, masked_rows, part, dropped, by_layer])
def test_what_only_training_changes_in_place_is_refused(after):
    model = net(after, drop=nn.Dropout(inplace=True))
    with pytest.raises(TraceError, match="different things in train and eval mode"):
        trace(model, (image(2, 3, 8, 8),))


def test_an_auxiliary_branch_may_work_in_place_on_its_own():
    def auxiliary(m, y):
        if m.training:
            return y + 1, F.relu(m.head(y), inplace=True).clamp_(0, 1)
        return y + 1

    traced = trace(net(auxiliary, head=nn.Conv2d(4, 2, 1)), (image(2, 3, 8, 8),))
    assert traced.dropped == {"head"}


@pytest.mark.parametrize("in_place", [True, False])
def test_counters_count_in_the_pruned_network(in_place):
    def counts(m, y):
        if in_place:
            m.n.add_(1)
        else:
            m.n = m.n + 1
        return y * m.n

    model = net(counts, n=torch.zeros((), dtype=torch.float64))
    x = image(2, 3, 8, 8)
    pruned = fxprune.compile(model, x, method="l1", budget=0.5, progress=False)
    assert pruned.a.out_channels < 8
    assert float(model.n) == float(pruned.n) == 0
    first, second = pruned(x), pruned(x)
    torch.testing.assert_close(second, 2 * first)
    assert float(pruned.n) == 2


def test_a_buffer_that_grows_is_refused_and_given_back():
    def grows(m, y):
        m.n = torch.cat([m.n, m.n])
        return y * m.n.sum()

    model = net(grows, n=torch.ones(2, dtype=torch.float64))
    before = model.n
    with pytest.raises(TraceError, match="another shape"):
        trace(model, (image(2, 3, 8, 8),))
    assert model.n is before


def test_what_forward_stores_is_named():
    def adds(m, y):
        m.last, m.calls = y, m.calls + 1
        return y

    notes = trace(net(adds, calls=0, last=None), (image(2, 3, 8, 8),)).notes
    assert any("forward stores `calls`, `last` on the model" in note for note in notes), notes


def test_containers_of_all_kinds_are_given_back():
    def keeps(m, y):
        m.queue.append(y)
        m.lists["y"].append(y)
        m.ordered["y"] = y
        m.state.y = y
        type(m).shared["y"] = y
        return y

    held = {"queue": deque(maxlen=2), "lists": defaultdict(list), "ordered": OrderedDict()}
    model = net(keeps, **held, state=SimpleNamespace())
    type(model).shared = {}
    try:
        fxprune.analyze(model, image(2, 3, 8, 8))
        assert not any([*held.values(), vars(model.state), type(model).shared])
    finally:
        del type(model).shared


Pair = namedtuple("Pair", "one two")


@pytest.mark.parametrize("by", [trace, trace_exported])
@pytest.mark.parametrize("kind", [OrderedDict, dict, Pair])
def test_results_keep_their_class(kind, by):
    make = (lambda y: Pair(y, y * 2)) if kind is Pair else (lambda y: kind(one=y, two=y * 2))
    model, x = net(lambda m, y: make(y)), image(2, 3, 8, 8)
    found, expected = graph_of(model, x, by=by)(x), model(x)
    assert type(found) is type(expected) is kind
    assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(expected)))


def test_a_pruned_backbone_returns_an_ordered_dict():
    model = net(lambda m, y: OrderedDict(out=y, aux=y * 2))
    pruned = fxprune.compile(model, image(2, 3, 8, 8), method="l1", budget=0.5, progress=False)
    assert pruned.a.out_channels < 8
    result = pruned(image(3, 3, 8, 8))
    assert type(result) is OrderedDict
    assert list(result) == ["out", "aux"]


def test_the_example_is_not_written_into():
    def writes(m, y, z):
        z += 1
        return y * z.sum()

    model, x, z = net(writes), image(2, 3, 8, 8), torch.zeros(2, 1, dtype=torch.int64)
    fxprune.compile(model, (x, z), method="l1", budget=0.5, progress=False)
    assert not z.any()


def test_ctrl_c_inside_forward_puts_everything_back():
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            self.seen = self.conv(x)
            raise KeyboardInterrupt

    call, smallest, model = nn.Module.__call__, max, Stops().double()
    with pytest.raises(KeyboardInterrupt):
        fxprune.analyze(model, image(2, 3, 8, 8))
    assert nn.Module.__call__ is call
    assert max is smallest
    assert model.training
    assert not hasattr(model, "seen")
