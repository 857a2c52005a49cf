"""The analysis on nets small enough to check by hand."""

import networkx as nx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune


class Apply(nn.Module):
    """A module made of layers and a function that uses them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def groups(net, size=8, channels=3, batch=1):
    analysis = fxprune.analyze(net.double(), torch.randn(batch, channels, size, size).double())
    return analysis, {g.name: len(g) for g in analysis.groups}


def residual():
    return Apply(
        lambda m, x: m.head(m.stem(x) + m.second(F.relu(m.first(m.stem(x))))),
        stem=nn.Conv2d(3, 6, 1),
        first=nn.Conv2d(6, 4, 3, padding=1),
        second=nn.Conv2d(4, 6, 3, padding=1),
        head=nn.Conv2d(6, 2, 1),
    )


def test_a_residual_add_couples_its_producers():
    analysis, found = groups(residual())
    assert found == {"stem": 6, "first": 4}
    coupled = analysis.group("stem")
    assert coupled.residual
    assert [s.tensor for s in coupled.producers] == ["stem.weight", "second.weight"]
    assert not analysis.group("first").residual
    assert analysis.group("second.bias") is coupled


def test_outputs_keep_their_channels():
    analysis, found = groups(residual())
    assert "head" not in found
    assert "outputs of the model" in analysis.frozen["output"]
    with pytest.raises(fxprune.PlanError, match="outputs of the model keep their channels"):
        analysis.plan({"head": [0]})


def test_a_module_called_twice_is_one_producer():
    net = Apply(
        lambda m, x: m.head(m.shared(F.relu(m.shared(m.stem(x))))),
        stem=nn.Conv2d(3, 5, 1),
        shared=nn.Conv2d(5, 5, 1),
        head=nn.Conv2d(5, 2, 1),
    )
    _, found = groups(net)
    assert found == {"stem": 5}


def test_a_group_is_named_after_its_first_producer_and_found_by_its_tensors():
    analysis, _ = groups(residual())
    for name in ("stem", "stem.weight", "second.bias"):
        plan = analysis.plan({name: [0, 5]})
        assert {s.tensor: s.keep for s in plan.slices} == {
            "stem.weight": (0, 5),
            "stem.bias": (0, 5),
            "first.weight": (0, 5),
            "second.weight": (0, 5),
            "second.bias": (0, 5),
            "head.weight": (0, 5),
        }


def test_an_unknown_operation_freezes_and_names_itself():
    net = Apply(
        lambda m, x: m.head(torch.renorm(m.stem(x), 2, 1, 1.0)),
        stem=nn.Conv2d(3, 5, 1),
        head=nn.Conv2d(5, 2, 1),
    )
    analysis, found = groups(net)
    assert found == {}
    assert "no rule for `renorm`" in analysis.frozen["renorm"]
    assert "test_groups.py:" in analysis.frozen["renorm"]


def test_a_constant_made_for_a_whole_shape_follows_the_cut():
    def whole(m, x):
        y = m.stem(x)
        return m.head(y + torch.ones(y.shape, dtype=y.dtype))

    net = Apply(whole, stem=nn.Conv2d(3, 5, 1), head=nn.Conv2d(5, 2, 1))
    analysis, found = groups(net)
    assert found == {"stem": 5}
    x = torch.randn(1, 3, 8, 8).double()
    pruned = fxprune.apply(net, analysis.plan({"stem": [1, 4]}), x)
    masked = fxprune.mask(net, pruned.plan)
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-12, atol=1e-12)


def test_a_size_used_as_a_number_keeps_its_value():
    net = Apply(
        lambda m, x: m.head(m.stem(x) / m.stem(x).shape[1] ** 0.5),
        stem=nn.Conv2d(3, 4, 1),
        head=nn.Conv2d(4, 2, 1),
    ).double()
    x = torch.randn(1, 3, 8, 8).double()
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.5))
    masked = fxprune.mask(net, pruned.plan)
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-12, atol=1e-12)


def test_whole_groups_or_the_same_positions_whichever_leaves_more():
    many = Apply(
        lambda m, x: m.head(m.grouped(m.stem(x))),
        stem=nn.Conv2d(3, 12, 1),
        grouped=nn.Conv2d(12, 12, 3, padding=1, groups=6),
        head=nn.Conv2d(12, 2, 1),
    )
    few = Apply(
        lambda m, x: m.head(m.grouped(m.stem(x))),
        stem=nn.Conv2d(3, 12, 1),
        grouped=nn.Conv2d(12, 24, 3, padding=1, groups=2),
        head=nn.Conv2d(24, 2, 1),
    )
    assert groups(many)[1] == {"stem": 6}  # six groups of 2 live or die whole
    assert groups(few)[1] == {"stem": 6, "grouped": 12}  # positions of 2 groups of 6 and 12


def test_depthwise_follows_its_producer_and_is_not_scored():
    net = Apply(
        lambda m, x: m.head(m.depthwise(m.stem(x))),
        stem=nn.Conv2d(3, 8, 1),
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        head=nn.Conv2d(8, 2, 1),
    )
    analysis, found = groups(net)
    assert found == {"stem": 8}
    assert [s.tensor for s in analysis.group("stem").producers] == ["stem.weight"]
    plan = analysis.plan({"stem": [1, 3]})
    roles = {(s.tensor, s.dim): s.role for s in plan.slices}
    assert roles[("depthwise.weight", 0)] == "out"
    assert ("depthwise.weight", 1) not in roles


def test_concatenation_does_not_merge_groups():
    net = Apply(
        lambda m, x: m.head(m.norm(torch.cat([m.a(x), m.b(x)], 1))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 5, 1),
        norm=nn.BatchNorm2d(9),
        head=nn.Conv2d(9, 2, 1),
    )
    analysis, found = groups(net)
    assert found == {"a": 4, "b": 5}
    plan = analysis.plan({"b": [0, 4]})
    assert plan.keep("norm.weight", 0) == (0, 1, 2, 3, 4, 8)


def test_broadcasting_a_single_channel_does_not_couple_it():
    net = Apply(
        lambda m, x: m.head(m.stem(x) * torch.sigmoid(m.map(x))),
        stem=nn.Conv2d(3, 5, 1),
        map=nn.Conv2d(3, 1, 1),
        head=nn.Conv2d(5, 2, 1),
    )
    analysis, found = groups(net)
    assert found == {"stem": 5}
    assert any("broadcast over many" in why for why in analysis.frozen.values())


def test_every_piece_of_a_split_keeps_a_channel():
    def halves(m, x):
        a, b = m.stem(x).chunk(2, 1)
        return torch.cat([m.left(a), m.right(b)], 1)

    net = Apply(
        halves,
        stem=nn.Conv2d(3, 6, 1),
        left=nn.Conv2d(3, 2, 1),
        right=nn.Conv2d(3, 2, 1),
    )
    net.stem.weight.data[:3] *= 1e-3  # the whole first piece scores lowest
    x = torch.randn(1, 3, 8, 8)
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.66))
    kept = pruned.plan.keep("stem.weight", 0)
    assert len(kept) == 2
    assert min(kept) < 3 <= max(kept)
    with pytest.raises(fxprune.PlanError, match="nothing of a part"):
        fxprune.analyze(net, x).plan({"stem": [3, 4, 5]})


def test_a_piece_across_two_groups_keeps_a_channel():
    def across(m, x):
        y = torch.cat([m.a(x), m.b(x)], 1)
        return m.head(y[:, :3]), m.middle(y[:, 3:5]), m.tail(y[:, 5:])

    net = Apply(
        across,
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 1),
        head=nn.Conv2d(3, 2, 1),
        middle=nn.Conv2d(2, 2, 1),
        tail=nn.Conv2d(3, 2, 1),
    )
    with torch.no_grad():
        net.a.weight[3] *= 1e-3
        net.b.weight[0] *= 1e-3
    pruned = fxprune.compile(net, torch.randn(1, 3, 8, 8), method=fxprune.methods.L1(ratio=0.5))
    assert pruned.plan.keep("middle.weight", 1) in ((0,), (1,))


def test_to_networkx_carries_the_flow_and_the_groups():
    analysis, _ = groups(residual())
    graph = analysis.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.nodes["add"]["groups"] == ["stem"]
    assert graph.nodes["add"]["shape"] == (1, 6, 8, 8)
    assert nx.has_path(graph, "x", "output")


def test_the_table_names_groups_and_reasons():
    text = str(groups(residual())[0])
    for word in ("2 prunable groups", "stem", "first", "outputs of the model"):
        assert word in text


def test_ids_do_not_grow_with_pixels_or_batches():
    analysis, _ = groups(residual(), size=64, batch=8)
    for label in analysis.flow.labels.values():
        if label is not None:
            assert label.ids.numel() <= 6


def test_a_piece_that_no_layer_reads_alone_keeps_a_channel_too():
    def pooled(m, x):
        a, b = m.stem(x).split(3, 1)
        return m.head(torch.cat([F.max_pool2d(a, 3, 1, 1), b], 1))

    net = Apply(pooled, stem=nn.Conv2d(3, 6, 1), head=nn.Conv2d(6, 2, 1))
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(fxprune.PlanError, match="nothing of a part"):
        fxprune.analyze(net, x).plan({"stem": [3, 4, 5]})
    net.stem.weight.data[:3] *= 1e-3
    assert min(fxprune.compile(net, x, budget=0.4).plan.keep("stem.weight", 0)) < 3


def test_meeting_the_input_freezes_and_says_why():
    net = Apply(
        lambda m, x: m.head(x + m.stem(x)), stem=nn.Conv2d(3, 3, 1), head=nn.Conv2d(3, 2, 1)
    )
    analysis, found = groups(net)
    assert found == {}
    assert "it meets a tensor whose channels cannot be cut" in analysis.frozen["add"]


def test_channels_coupled_in_the_original_stay_coupled_in_later_cuts():
    """After the first cut two groups of one channel are left, which alone would look independent."""

    def shuffled(m, x):
        y = m.stem(m.first(x))
        b, _, h, w = y.shape
        return m.head(y.view(b, 2, 6, h, w).transpose(1, 2).sin().reshape(b, 12, h, w))

    net = Apply(
        shuffled, first=nn.Conv2d(3, 8, 1), stem=nn.Conv2d(8, 12, 1), head=nn.Conv2d(12, 2, 1)
    )
    x = torch.randn(1, 3, 8, 8)
    once = fxprune.apply(net, fxprune.analyze(net, x).plan({"stem": [2, 8]}), x)
    twice = fxprune.compile(once, x, method=fxprune.methods.L1(ratio=0.5))
    again = fxprune.apply(net, twice.plan, x)
    assert torch.equal(twice(x), again(x))
    assert twice.plan.keep("stem.weight", 0) == (2, 8)
