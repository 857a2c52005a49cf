"""Networks that a third reading of the analysis got wrong: zero that does not stay zero, and more.

Each is cut at random and compared with the masked original at other batches, or stays as it is
where no plan could say what the cut network computes.
"""

import pytest
import torch
from oracle import masked, relative_error
from test_law import random_plan
from torch import nn
from torch.nn import functional as F

import fxprune

BOUND = 1e-9


class Net(nn.Module):
    """Linear layers `q`, `k` (6 -> 8) and `o` (5 -> 3), parts of one's own, and a forward."""

    def __init__(self, body, outputs=5, **parts):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(outputs, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body
        torch.manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) * 0.5 + 0.1)
        self.double().eval()

    def forward(self, x):
        return self.body(self, x)


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def law(net):
    """Random plans obey the law at other batches; returns how many slices they have."""
    analysis = fxprune.analyze(net, X)
    count = 0
    for seed in range(4):
        plan = random_plan(analysis, seed)
        pruned = fxprune.apply(net, fxprune.Plan.from_json(plan.to_json()), X)
        reference = masked(net, plan.to_dict())
        for x in (X, X[:1], torch.cat([X, -X])):
            assert relative_error(reference(x), pruned(x)) <= BOUND
        count += len(plan.slices)
    return count


def score(net, q, k):
    """Every query meets every key; keys never give zero, so the queries have to."""
    return net.o(q @ F.softplus(k).transpose(1, 2))


# ---- zero that does not stay zero ---------------------------------------------------------------


def add(q):
    q.add_(1.0)


def exponential(q):
    q.exp_()


def entry(q):
    q[:, 0] = 1.0


def part(q):
    q[:, :2].add_(1.0)


def filled(q):
    q.view(-1, 8)[:2].fill_(1.0)


@pytest.mark.parametrize("write", [add, exponential, entry, part, filled])
def test_queries_written_in_place_are_not_zero(write):
    def body(net, x):
        q = net.q(x)
        write(q)
        return score(net, q, net.k(x))

    assert law(Net(body)) == 0


def test_queries_written_by_a_layer_in_place_are_not_zero():
    def body(net, x):
        q = net.q(x)
        net.act(q)
        return score(net, q, net.k(x))

    assert law(Net(body, act=nn.Hardsigmoid(inplace=True))) == 0
    assert law(Net(body, act=nn.ReLU(inplace=True))) > 0


def test_queries_written_in_place_after_they_are_read_count_as_they_were():
    def body(net, x):
        q = net.q(x)
        y = score(net, q, net.k(x))
        q.add_(1.0)
        return y

    assert law(Net(body)) > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda q: F.hardtanh(q, 0.5, 1.0),
        lambda q: torch.add(q, other=1.0),
        lambda q: torch.add(input=q, other=1.0),
        lambda q: torch.cat(tensors=[F.softplus(q)], dim=-1),
    ],
)
def test_options_by_name_and_bounds_count(change):
    assert law(Net(lambda net, x: score(net, change(net.q(x)), net.k(x)))) == 0


def test_a_scale_of_positions_zeroes_no_channels():
    def body(net, x):
        return score(net, F.softplus(net.q(x)) * net.p, net.k(x))

    assert law(Net(body, p=parameter(5, 1))) == 0
    assert law(Net(body, p=parameter(8))) > 0


def test_a_scale_that_no_plan_can_name_zeroes_nothing():
    def body(net, x):
        return score(net, F.softplus(net.q(x)) * net.p, net.k(x))

    class Unsaved(Net):
        def __init__(self):
            super().__init__(body)
            self.register_buffer("p", torch.rand(8, dtype=torch.float64), persistent=False)

    assert law(Unsaved()) == 0

    def made(net, x):
        return score(net, F.linear(x, net.w), net.k(x))

    class Made(Net):
        def __init__(self):
            super().__init__(made)
            self.register_buffer("w", torch.rand(8, 6, dtype=torch.float64), persistent=False)

    assert law(Made()) == 0


def test_slopes_of_a_prelu_are_no_scale():
    def body(net, x):
        return score(net, net.a(net.q(x).transpose(1, 2)).transpose(1, 2), net.k(x))

    net = Net(body, a=nn.PReLU(8))
    assert law(net) > 0
    plan = random_plan(fxprune.analyze(net, X), 0)
    assert {s.role for s in plan.slices if s.tensor == "q.weight"} == {"in"}


@pytest.mark.parametrize(
    "finite",
    [
        lambda q: q / q.norm(dim=1, keepdim=True),
        lambda q: q * q.square().mean(1, keepdim=True).rsqrt(),
        lambda q: q * q.square().mean(1, keepdim=True) ** -0.5,
    ],
)
def test_zero_times_infinity_is_not_finite(finite):
    assert law(Net(lambda net, x: score(net, finite(net.q(x)), net.k(x)))) == 0


def test_a_functional_transposed_convolution_makes_its_second_dimension():
    def body(net, x):
        q = F.conv_transpose1d(x.transpose(1, 2), net.w, net.b).transpose(1, 2)
        return score(net, q, net.k(x))

    assert law(Net(body, w=parameter(6, 8, 1), b=parameter(8))) > 0


# ---- parameters that are read along an axis -----------------------------------------------------


@pytest.mark.parametrize(
    "computed",
    [
        lambda p: p.softmax(-1),
        lambda p: p.cumsum(-1),
        lambda p: p.tril(),
        lambda p: F.normalize(p, dim=-1),
    ],
)
def test_a_parameter_whose_entries_mix_stays_whole(computed):
    net = Net(lambda net, x: net.o(net.q(x) * computed(net.p)), 8, p=parameter(5, 8))
    assert law(net) == 0


def test_a_parameter_whose_other_axis_mixes_is_cut():
    net = Net(lambda net, x: net.o(net.q(x) * net.p.softmax(0)), 8, p=parameter(5, 8))
    assert law(net) > 0


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(4, 8)])
def test_latents_through_a_norm(norm):
    net = Net(lambda net, x: net.o(net.q(x) + net.n(net.p)), 8, p=parameter(5, 8), n=norm)
    assert law(net) > 0


def test_a_shared_norm_that_also_reads_inputs_stays_whole():
    def body(net, x):
        return net.o(net.n(net.q(x))) + net.n(F.pad(x, (1, 1)))[..., :3]

    for norm in (nn.LayerNorm(8), nn.GroupNorm(1, 8)):
        flat = isinstance(norm, nn.GroupNorm)

        def reading(net, x, flat=flat):
            return body(net, x) if not flat else body(net, x.flatten(0, 1)).unflatten(0, (-1, 5))

        assert law(Net(reading, 8, n=norm)) == 0


def test_a_weight_that_is_not_saved_keeps_its_columns():
    class Unsaved(Net):
        def __init__(self):
            super().__init__(lambda net, x: F.linear(net.q(x), net.w))
            self.register_buffer("w", torch.rand(3, 8, dtype=torch.float64), persistent=False)

    assert law(Unsaved()) == 0


# ---- calls whose arguments torch's parser tries as numbers first --------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda q: torch.pow(q, 2),
        lambda q: torch.where(q > 0, q, 0.5),
        lambda q: torch.remainder(q, 2.0),
        lambda q: torch.float_power(q, 2).to(q.dtype),
        lambda q: torch.clamp(q, 0.0, 1.0) if isinstance(q, torch.Tensor) else None,
    ],
)
def test_torch_parses_proxies_as_what_they_are(call):
    assert law(Net(lambda net, x: net.o(call(net.q(x))), 8)) > 0


# ---- views, and two ways of cutting -------------------------------------------------------------


def test_steps_of_channels_that_are_written_in_place_stay_views():
    def body(net, x):
        y = net.q(x)
        y[:, :, ::2].mul_(2.0)
        return net.o(y)

    assert law(Net(body, 8)) == 0
    assert law(Net(lambda net, x: net.o(net.q(x)[..., ::2]), 4)) > 0


class GroupedQueries(nn.Module):
    """Four heads of queries, two of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 3).transpose(1, 2)
        k, v = (t.view(b, n, 2, 3).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


def test_whole_heads_then_dimensions_of_heads_is_refused():
    torch.manual_seed(0)
    net = GroupedQueries().double().eval()
    first = fxprune.compile(net, X, method=fxprune.methods.L1(ratio=0.5))
    with pytest.raises(fxprune.PlanError, match="whole heads"):
        fxprune.compile(first, X, method=fxprune.methods.L1(ratio=0.5), scope="head-dims")
