"""Recurrent layers lose hidden units and inputs; tables of embeddings lose width."""

import pytest
import torch
from oracle import flops, masked, relative_error
from test_law import random_plan
from torch import nn

import fxprune

KINDS = [nn.LSTM, nn.GRU, nn.RNN]


class Sequence(nn.Module):
    """A recurrent layer between two linears, read at every step and at the end."""

    def __init__(self, kind, **options):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.cell = kind(8, 5, **options)
        wide = 10 if options.get("bidirectional") else 5
        self.steps, self.end = nn.Linear(wide, 3), nn.Linear(5, 3)

    def forward(self, x):
        out, last = self.cell(self.first(x).relu())
        last = last[0] if isinstance(last, tuple) else last
        return self.steps(out), self.end(last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "num_layers": 2},
        {"bidirectional": True, "num_layers": 2},
        {"bias": False},
    ],
    ids=["one", "two", "both ways", "no bias"],
)
def test_hidden_units_and_inputs_go(kind, options):
    torch.manual_seed(0)
    net = Sequence(kind, **options).double().eval()
    x = torch.randn(4, 3, 6).double()
    analysis = fxprune.analyze(net, x)
    assert {g.name: len(g) for g in analysis.groups} == {"first": 8, "cell": 5}
    for seed in range(4):
        plan = random_plan(analysis, seed)
        pruned = fxprune.apply(net, plan, x)
        reference = masked(net, plan.to_dict())
        for given in (x, torch.randn(7, 2, 6).double()):
            assert relative_error(reference(given), pruned(given)) <= 1e-9
        assert round(flops(pruned, x)) == plan.metrics["macs_after"]
        assert sum(p.numel() for p in pruned.parameters()) == plan.metrics["params_after"]
        sum(y.sum() for y in pruned.train()(x)).backward()
        cell = pruned.get_submodule("cell")
        assert cell.hidden_size == cell.weight_hh_l0.shape[1]
        assert cell.input_size == cell.weight_ih_l0.shape[1]


def test_a_state_that_is_given_keeps_the_layer_whole():
    class Given(Sequence):
        def forward(self, x):
            out, _ = self.cell(self.first(x), torch.zeros(1, x.shape[1], 5).to(x))
            return self.steps(out)

    analysis = fxprune.analyze(Given(nn.GRU), torch.randn(4, 3, 6))
    assert not analysis.groups
    assert "a state given" in " ".join(analysis.frozen.values())


class Words(nn.Module):
    """Words and places, a layer of attention, a head that may share the table of words."""

    def __init__(self, tied):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.block(self.words(tokens) + self.places(places)))


def test_the_width_of_embeddings_goes():
    torch.manual_seed(0)
    net = Words(tied=False).double().eval()
    x = torch.randint(11, (2, 5))
    analysis = fxprune.analyze(net, x)
    assert analysis.group("words").kind == "embedding"
    assert {"words.weight", "places.weight"} <= set(analysis.group("words").members)
    for seed in range(4):
        plan = random_plan(analysis, seed)
        pruned = fxprune.apply(net, plan, x)
        reference = masked(net, plan.to_dict())
        for given in (x, torch.randint(11, (3, 4))):
            assert relative_error(reference(given), pruned(given)) <= 1e-9
        assert pruned.get_submodule("words").embedding_dim == pruned.get_parameter("words.weight").shape[1]  # fmt: skip


def test_a_table_that_is_read_in_two_ways_keeps_its_width():
    net, x = Words(tied=True).double().eval(), torch.randint(11, (2, 5))
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.4), progress=False)
    assert pruned.get_parameter("words.weight").shape == (11, 8)
    assert any("two ways" in note.why for note in pruned.plan.frozen)
