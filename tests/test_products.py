"""Products of activations: attention in the forms in which users write it, einsum, bilinear maps."""

import math
import random

import pytest
import torch
from oracle import flops, masked, relative_error
from test_law import random_plan
from torch import nn
from torch.nn import functional as F

import fxprune

BOUND = 1e-9
DIM, HEADS, TOKENS = 12, 3, 5


def distinct(net: nn.Module, seed: int = 0) -> nn.Module:
    """The same network in float64 and eval mode with every entry of every parameter its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.5 + 0.1)
    return net.double().eval()


def assert_law(net, plan, pruned, *inputs):
    reference = masked(net, plan.to_dict())
    for x in inputs:
        assert relative_error(reference(x), pruned(x)) <= BOUND
    assert flops(pruned, inputs[0]) == plan.metrics["macs_after"]
    assert sum(p.numel() for p in pruned.parameters()) == plan.metrics["params_after"]


def check(net, x=None, scope="all"):
    """Random plans and a budget obey the law at two batch sizes; returns the analysis."""
    net = distinct(net)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64) if x is None else x.double()
    more = torch.cat([x, x.flip(-1) * 0.7])
    analysis = fxprune.analyze(net, x, scope=scope)
    for seed in range(4):
        plan = random_plan(analysis, seed)
        again = fxprune.Plan.from_json(plan.to_json())
        assert_law(net, plan, fxprune.apply(net, again, x), x, more)
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.5), scope=scope)
    assert pruned.plan.slices
    assert_law(net, pruned.plan, pruned, x, more)
    return analysis


def kinds(analysis):
    return {g.name: (g.kind, len(g)) for g in analysis.groups}


class Fused(nn.Module):
    """One linear for queries, keys and values; `core` multiplies them."""

    def __init__(self, core, heads=HEADS, bias=True):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=bias)
        self.proj = nn.Linear(DIM, DIM)
        self.core, self.heads = core, heads

    def forward(self, x):
        x = F.gelu(self.inner(x))
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(self.core(q, k, v).transpose(1, 2).reshape(b, n, -1))


def by_hand(q, k, v):
    attention = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return attention.softmax(dim=-1) @ v


def by_einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, -1), v)


def by_torch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def cosine(q, k, v):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return torch.softmax(scores * 7.0, dim=-1) @ v


def of_channels(q, k, v):
    scores = q.transpose(-2, -1) @ k
    return (scores.softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)


CORES = [by_hand, by_einsum, by_torch, cosine, of_channels]


@pytest.mark.parametrize("core", CORES, ids=lambda f: f.__name__)
def test_whole_heads_are_units_in_every_form(core):
    found = kinds(check(Fused(core)))
    assert found["qkv"] == ("heads", HEADS)
    assert found["inner"] == ("mlp", DIM)


@pytest.mark.parametrize("core", [by_hand, by_einsum, by_torch], ids=lambda f: f.__name__)
def test_dimensions_of_all_heads_are_units_when_asked_for(core):
    analysis = check(Fused(core), scope=["all", "head-dims"])
    assert kinds(analysis)["qkv"] == ("head-dims", DIM // HEADS)


@pytest.mark.parametrize("core", [by_hand, by_einsum, by_torch], ids=lambda f: f.__name__)
def test_one_head_loses_dimensions_and_the_scale_stays(core):
    analysis = check(Fused(core, heads=1))
    assert len(analysis.group("qkv")) == DIM
    roles = {s.tensor: s.role for s in analysis.slots if s.dim == 0}
    assert roles["qkv.weight"] == roles["qkv.bias"] == "in"


class Split(nn.Module):
    """Three linears; what lies between a query and the product is drawn."""

    def __init__(self, between=None, heads=HEADS):
        super().__init__()
        self.query, self.key = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.value, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 4)
        self.between = between or nn.Identity()
        self.heads = heads

    def forward(self, x):
        def heads(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = heads(self.between(self.query(x))), heads(self.key(x).sigmoid()), heads(self.value(x))  # fmt: skip
        scores = (q @ k.mT) * 0.3
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU(), nn.LayerNorm(DIM)], ids=["none", "relu", "norm"])  # fmt: skip
def test_what_maps_zero_to_zero_lets_dimensions_go(between):
    analysis = check(Split(between, heads=1))
    assert len(analysis.group("query")) == DIM


def test_a_query_that_is_not_zero_where_it_is_cut_keeps_its_dimensions():
    analysis = check(Split(nn.Sigmoid(), heads=1))
    assert [g.name for g in analysis.groups] == ["value"]
    assert "would not be zero" in " ".join(analysis.frozen.values())
    assert kinds(check(Split(nn.Sigmoid())))["query"] == ("heads", HEADS)


class Grouped(nn.Module):
    """Four heads of queries share two of keys and values."""

    def __init__(self):
        super().__init__()
        self.query, self.kv, self.proj = nn.Linear(DIM, 12), nn.Linear(DIM, 12), nn.Linear(12, 3)

    def forward(self, x):
        q = self.query(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 3)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def test_grouped_queries_go_with_the_head_that_serves_them():
    assert kinds(check(Grouped()))["query"] == ("heads", 2)


class Tokens(nn.Module):
    """Patches, a class token, positions, a bias per head and pair, blocks with residuals."""

    def __init__(self, blocks=2):
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, DIM))
        self.register_token = nn.Parameter(torch.zeros(1, 2, DIM))
        self.position = nn.Parameter(torch.zeros(1, 7, DIM))
        self.table = nn.Parameter(torch.zeros(9, HEADS))
        self.register_buffer("index", torch.randint(9, (7, 7)))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * blocks))
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(DIM, 20) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(20, DIM) for _ in range(blocks))
        self.scale = nn.ParameterList(nn.Parameter(torch.zeros(DIM)) for _ in range(blocks))
        self.head = nn.Linear(DIM, 5)

    def attention(self, i, x):
        b, n, c = x.shape
        q, k, v = self.qkv[i](x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) * 0.4 + bias.unsqueeze(0)
        return self.out[i]((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        first = torch.cat([self.cls, self.register_token], 1).expand(x.shape[0], -1, -1)
        x = torch.cat([first, x], dim=1) + self.position
        for i in range(len(self.qkv)):
            x = x + self.scale[i] * self.attention(i, self.norms[2 * i](x))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x[:, 0])


def test_tokens_positions_and_biases_follow_the_embedding_and_the_heads():
    analysis = check(Tokens(), torch.randn(2, 3, 4, 4))
    found = kinds(analysis)
    assert found["patches"] == ("embedding", DIM)
    assert found["up.0"] == found["up.1"] == ("mlp", 20)
    assert ("heads", HEADS) in found.values()
    members = analysis.group("patches").members
    assert {"cls", "register_token", "position", "scale.0", "norms.0.weight"} <= set(members)
    assert "table" in " ".join(m for g in analysis.groups for m in g.members if g.kind == "heads")


class Written(nn.Module):
    """Positions that are summed in place before they meet the tokens."""

    def __init__(self, view):
        super().__init__()
        self.space, self.time = (
            nn.Parameter(torch.zeros(TOKENS, DIM)),
            nn.Parameter(torch.zeros(DIM)),
        )
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, 2)
        self.view = view

    def forward(self, x):
        place = self.space.repeat_interleave(1, dim=0)
        if self.view:
            place[1:].add_(self.time.expand(TOKENS - 1, -1))
        else:
            place.add_(self.time.expand(TOKENS, -1))
        return self.last(self.first(x) + place)


@pytest.mark.parametrize("view", [False, True])
def test_positions_that_are_written_in_place(view):
    net = distinct(Written(view))
    if view:
        with pytest.raises(fxprune.PlanError, match="written into a part"):
            fxprune.compile(net, torch.randn(1, TOKENS, DIM).double())
    else:
        assert "time" in check(net).group("first").members


@pytest.mark.parametrize(
    ("scope", "cut", "left"),
    [
        (["heads"], {"qkv.0.weight", "qkv.1.weight", "table"}, {"up.0.weight", "position"}),
        (["mlp"], {"up.0.weight", "up.1.bias"}, {"qkv.0.weight", "position"}),
        (["embedding"], {"patches.weight", "position", "cls"}, {"up.0.bias"}),
        (["up.1"], {"up.1.weight"}, {"up.0.weight", "qkv.0.weight"}),
    ],
)
def test_scope_says_what_is_cut(scope, cut, left):
    net, x = distinct(Tokens()), torch.randn(1, 3, 4, 4).double()
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.4), scope=scope)
    tensors = {s.tensor for s in pruned.plan.slices}
    assert cut <= tensors
    assert not left & tensors


class Torchs(nn.Module):
    """torch's own attention layer, of one sequence or of two."""

    def __init__(self, cross=False, **options):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **options)
        self.cross = cross
        self.fc = nn.Linear(DIM, 2)

    def forward(self, x):
        y = self.inner(x).relu()
        other = y.flip(1) if self.cross else y
        return self.fc(y + self.attention(y, other, other, need_weights=False)[0])


@pytest.mark.parametrize("cross", [False, True])
def test_torchs_attention_loses_whole_heads(cross):
    found = kinds(check(Torchs(cross)))
    assert found["attention"] == ("heads", HEADS)
    assert found["inner"][0] == "embedding"


class Queries(nn.Module):
    """Learned queries in a residual stream, read by a norm and a linear before anything meets them."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 4, DIM))
        self.norm, self.q = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.kv, self.proj, self.fc = (
            nn.Linear(DIM, 2 * DIM),
            nn.Linear(DIM, DIM),
            nn.Linear(DIM, 2),
        )

    def forward(self, x):
        def heads(t):
            return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        k, v = self.kv(x).chunk(2, -1)
        q = self.q(self.norm(self.queries)).expand(x.shape[0], -1, -1)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        return self.fc(self.queries + self.proj(y.transpose(1, 2).flatten(2)))


def test_learned_queries_are_part_of_their_stream():
    found = check(Queries())
    assert kinds(found)["proj"] == ("mlp", DIM)
    assert "queries" in found.group("proj").members


class Experts(nn.Module):
    """Stacked weights: every head of a token stream has a map of its own."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(DIM, 12)
        self.maps = nn.Parameter(torch.zeros(4, 3, 5))
        self.out = nn.Linear(20, 2)

    def forward(self, x):
        y = self.into(x).unflatten(-1, (4, 3))
        return self.out(torch.einsum("bnhd,hde->bnhe", y, self.maps).flatten(2))


def test_entries_of_a_stacked_weight_are_units():
    assert kinds(check(Experts()))["into"] == ("experts", 4)


class Stacked(nn.Module):
    """One map per block, whose outputs are summed: the last axis of a stacked weight makes channels."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(7, 2)
        self.maps = nn.Parameter(torch.zeros(2, 6, 7))

    def forward(self, x):
        y = self.first(x).sigmoid().unflatten(-1, (2, 6))
        return self.last(torch.einsum("bngc,gcd->bnd", y, self.maps))


def test_any_axis_of_a_weight_can_make_channels():
    assert len(check(Stacked()).group("maps")) == 7


class Mixed(nn.Module):
    """A weight of einsum in both directions, and a sum of products with what is no parameter."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(DIM, 7)), nn.Parameter(torch.zeros(9, 7))
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(9, 2)

    def forward(self, x):
        y = torch.einsum("bnc,cd->bnd", self.first(x), self.down).relu()
        return self.last(y @ self.up.t())


def test_weights_of_products_are_linear_maps():
    analysis = check(Mixed())
    assert {g.name: len(g) for g in analysis.groups} == {"first": DIM, "down": 7, "up": 9}


class TokenMixing(nn.Module):
    """A linear over tokens, between two of channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens = nn.Linear(DIM, DIM), nn.Linear(TOKENS, TOKENS)
        self.fc = nn.Linear(DIM, 3)

    def forward(self, x):
        y = self.embed(x)
        return self.fc(y + self.tokens(y.transpose(1, 2)).transpose(1, 2))


def test_a_map_over_tokens_keeps_the_channels_prunable():
    analysis = check(TokenMixing())
    assert kinds(analysis)["embed"] == ("embedding", DIM)


def test_random_stacks_of_attention_obey_the_law():
    rng = random.Random(3)
    for _ in range(6):
        net = nn.Sequential(*(Fused(rng.choice(CORES), rng.choice([1, 2, 3, 6])) for _ in range(2)))
        check(net)
