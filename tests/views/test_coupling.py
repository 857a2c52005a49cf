"""The graph of the groups and its drawing: all of it there, nothing over anything else."""

import json
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import networkx as nx
import pytest
import torch
from browser import NAMES, Browser, find
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import nn

import fxprune
from fxprune import zoo
from fxprune.coupling import shares_of_macs
from fxprune.groups import KINDS
from fxprune.views import coupling as view
from fxprune.views.coupling import draw_coupling, lay_out

SVG = "{http://www.w3.org/2000/svg}"


class Small(nn.Module):
    """A stage that an addition couples, a gate, a branch that is read late, and a frozen part."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 4, 1)
        self.open = nn.Conv2d(4, 8, 1)
        self.odd = nn.Conv2d(8, 5, 1)
        self.last = nn.Conv2d(13, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.a(x).relu())
        gated = x * self.open(self.gate(x).relu()).sigmoid()
        return self.last(torch.cat([gated, torch.cumsum(self.odd(x), 1)], 1))


@pytest.fixture(scope="module")
def small():
    return fxprune.analyze(Small(), torch.zeros(1, 3, 4, 4))


def test_nodes_are_the_groups_and_what_is_frozen(small):
    graph = small.coupling()
    assert list(graph) == [*(g.name for g in small.groups), "odd", "last"]
    assert graph.nodes["stem"] == {
        "kind": "stage",
        "width": 8,
        "units": 8,
        "free": 8,
        "residual": True,
        "members": small.group("stem").members,
        "producers": ("stem", "b", "open"),
        "steps": (0, 2, 4),
        "frozen": None,
    }
    assert "cumsum" in graph.nodes["odd"]["frozen"]
    assert graph.nodes["odd"]["kind"] == "frozen"
    assert graph.nodes["last"]["frozen"] == "outputs of the model keep their channels"


def test_edges_are_the_layers_that_read_and_make(small):
    found = {(a, b): layers for a, b, layers in small.coupling().edges(data="layers")}
    assert found == {
        ("stem", "a"): ("a",),
        ("a", "stem"): ("b",),
        ("stem", "gate"): ("gate",),
        ("gate", "stem"): ("open",),
        ("stem", "odd"): ("odd",),
        ("stem", "last"): ("last",),
    }


def test_a_layer_that_reads_and_makes_the_same_group():
    class Net(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[2](x + self[1](x))

    net = Net(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    analysis = fxprune.analyze(net, torch.zeros(1, 3))
    assert set(analysis.coupling().edges) == {("0", "0"), ("0", "2")}
    check(analysis.coupling())


def test_every_class_that_is_read_makes_an_edge():
    """Against the slots, layer by layer, in a network of concatenations."""
    analysis = fxprune.analyze(zoo.resnet20(), torch.zeros(1, 3, 16, 16))
    graph = analysis.coupling()
    seen = set()
    for slot in analysis.slots:
        module = slot.tensor.rpartition(".")[0]
        if slot.role == "in":
            read = {g.name for g in analysis.groups if set(g.classes) & set(analysis.classes(slot.ids))}  # fmt: skip
            seen |= {(name, module) for name in read}
    assert {(a, layer) for a, _, layers in graph.edges(data="layers") for layer in layers} == seen
    assert all(
        layer in graph.nodes[b]["producers"]
        for _, b, layers in graph.edges(data="layers")
        for layer in layers
    )


def test_shares_of_macs(small):
    """Counted by hand: multiply-adds per pixel."""
    total = 8 * 27 + 6 * 72 + 8 * 54 + 4 * 8 + 8 * 4 + 5 * 8 + 2 * 13
    shares = shares_of_macs(small)
    assert shares["a"] == pytest.approx((6 * 72 + 8 * 54) / total)
    assert shares["gate"] == pytest.approx((32 + 32) / total)
    assert shares["stem"] == pytest.approx((total - 5 * 2) / total)


# ---- the drawing


def overlap(a, b, apart=0.0):
    return (
        a[0] < b[2] + apart and b[0] < a[2] + apart and a[1] < b[3] + apart and b[1] < a[3] + apart
    )


def check(graph):
    """What holds of every layout; returns it."""
    plan = lay_out(graph)
    boxes = [(b.x, b.y, b.right, b.y + b.height) for b in plan.boxes]
    bars = [(b.x, b.top, b.x + view._BAR, b.bottom) for b in plan.bars]
    for one, other in combinations([*boxes, *bars], 2):
        assert not overlap(one, other, 1.0)
    for x, y, right, bottom in [*boxes, *bars]:
        assert x >= 0
        assert y > 60
        assert right <= plan.width
        assert bottom <= plan.height
    layers = [(b.node, b.layer) for b in plan.boxes]
    assert sorted(layers) == sorted(
        (n, layer) for n, v in graph.nodes(data=True) for layer in v["producers"]
    )
    heads = [b.node for b in plan.boxes if b.role != "port"]
    assert sorted(heads) == sorted(graph)  # each node once
    for b in plan.boxes:
        inside = b.width - 2 * view._PAD
        text = view._NAME * cell_len(b.label) + view._DETAIL * cell_len(b.detail)
        assert text <= inside + 1e-6
        assert all(view._DETAIL * cell_len(line) <= inside for line in b.lines)
        assert len(b.lines) <= view._REASON
    for bar in plan.bars:
        half = view._DETAIL * cell_len(bar.label) / 2
        for y in bar.labels:
            assert bar.top <= y - half
            assert y + half <= bar.bottom
        assert all(b - a >= 2 * half for a, b in pairwise(bar.labels))
    read = sum(len(layers) for _, _, layers in graph.edges(data="layers"))
    made = sum(len(v["producers"]) for n, v in graph.nodes(data=True) if n in {b.node for b in plan.bars})  # fmt: skip
    assert sum(w.arrow for w in plan.wires) == read + made
    for wire in plan.wires:
        for (a, b), (c, d) in pairwise(wire.points):
            assert a == c or b == d  # upright or level
            line = (min(a, c), min(b, d), max(a, c), max(b, d))
            assert not any(overlap(line, box, -0.01) for box in boxes)
            assert line[2] <= plan.width
    return plan


@st.composite
def graphs(draw):
    """Any graph of groups: widths, layers in any order, reads of anything by anything."""
    count = draw(st.integers(1, 7))
    texts = st.text(max_size=60)
    names = draw(st.lists(texts, min_size=count, max_size=count, unique=True))
    graph = nx.DiGraph()
    steps = draw(st.permutations(range(4 * count)))
    for i, name in enumerate(names):
        frozen = draw(st.none() | st.text(max_size=300))
        many = 1 if frozen is not None else draw(st.integers(1, 4))
        own = sorted(steps[4 * i : 4 * i + many])
        width = draw(st.integers(1, 10**6))
        graph.add_node(
            name,
            kind=draw(st.sampled_from([*KINDS])),
            width=width,
            units=draw(st.integers(1, width)),
            free=draw(st.integers(1, width)),
            residual=draw(st.booleans()) and frozen is None,
            members=tuple(draw(st.lists(texts, max_size=4))),
            producers=(name, *(f"{name}{k}" for k in range(1, many))),
            steps=tuple(own),
            frozen=frozen,
        )
    free = [n for n in names if graph.nodes[n]["frozen"] is None]
    for target in names:
        for layer in graph.nodes[target]["producers"]:
            for source in draw(st.lists(st.sampled_from(free), unique=True)) if free else ():
                known = graph.edges[source, target]["layers"] if graph.has_edge(source, target) else ()  # fmt: skip
                graph.add_edge(source, target, layers=(*known, layer))
    return graph


@given(graphs(), st.text(max_size=80))
def test_any_graph_is_drawn_without_overlaps(graph, title):
    check(graph)
    text = draw_coupling(graph, title)
    assert text == draw_coupling(graph.copy(), title)
    root = ET.fromstring(text.encode("utf-8", "replace"))
    assert root.tag == f"{SVG}svg"
    shown = root.findall(f".//{SVG}g[@data-group]")
    assert len(shown) == sum(len(v["producers"]) for _, v in graph.nodes(data=True))


def test_an_attention():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 8), net, nn.Linear(8, 3))
    graph = fxprune.analyze(model, torch.zeros(1, 5, 6)).coupling()
    check(graph)
    assert all(graph.nodes[n]["kind"] in {*KINDS, "frozen"} for n in graph)


@pytest.mark.parametrize("name", ["resnet56", "vgg16_bn"])
def test_networks_of_the_zoo(name):
    analysis = fxprune.analyze(zoo.build(name), torch.zeros(1, 3, 32, 32))
    plan = check(analysis.coupling())
    residual = {g.name for g in analysis.groups if g.residual}
    assert {bar.node for bar in plan.bars} == residual
    (last,) = [b for b in plan.boxes if b.role == "frozen"]
    assert last is plan.boxes[-1]
    assert last.lines[0].startswith("outputs of the model")
    again = fxprune.analyze(zoo.build(name), torch.zeros(1, 3, 32, 32))
    assert draw_coupling(again.coupling()) == draw_coupling(analysis.coupling())


def test_a_network_without_groups():
    analysis = fxprune.analyze(nn.Sequential(nn.ReLU()), torch.zeros(1, 3))
    assert "0 groups" in draw_coupling(analysis.coupling())
    check(analysis.coupling())


def test_names_are_escaped(small, tmp_path):
    graph = nx.relabel_nodes(small.coupling(), {"stem": '<b>&"x', "a": "\x1b[31m"})
    graph.nodes["odd"]["frozen"] = "</text>"
    text = draw_coupling(graph, "<i>\ud800")
    assert "\x1b" not in text
    assert "<b>" not in text
    root = ET.fromstring(text.encode("utf-8", "replace"))
    shown = [t.text for t in root.iter(f"{SVG}text")]
    assert {'<b>&"x', "\\x1b[31m", "</text>"} <= set(shown)


def test_a_file_is_written_whole_or_not_at_all(small, tmp_path):
    small.to_svg(tmp_path / "drawn.svg")
    text = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    assert text == draw_coupling(small.coupling(), "Small")
    with pytest.raises(FileNotFoundError):
        small.to_svg(tmp_path / "no" / "drawn.svg")


def test_words_of_a_group():
    def words(**values):
        facts = {"kind": "channels", "width": 32, "units": 32, "free": 32, "members": ("a.weight",)}
        return view._details({**facts, "frozen": None, **values})

    assert words() == ["32 ch"]
    assert words(members=("a.weight", "b.weight", "b.bias")) == ["32 ch", "2 layers"]
    assert words(units=16, free=16) == ["16 of 32 ch"]
    assert words(units=8) == ["8 units", "32 ch"]
    assert words(units=4, kind="heads") == ["4 heads", "32 ch"]
    assert words(kind="stage") == ["32 ch"]
    assert words(units=1, kind="embedding") == ["embedding", "1 unit", "32 ch"]
    assert words(frozen="why") == ["32 ch"]


MEASURE = """(() => {
  const out = [];
  for (const g of document.querySelectorAll("g[data-group]")) {
    const s = g.querySelector(".shape").getBoundingClientRect();
    let last = s.left;
    for (const t of g.querySelectorAll("text")) {
      const r = t.getBoundingClientRect();
      if (r.left < s.left || r.right > s.right || r.top < s.top || r.bottom > s.bottom + 1)
        out.push(t.textContent);
    }
    const [name, detail] = [...g.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    if (detail && detail.top < name.bottom && detail.left < name.right + 4) out.push(g.textContent);
  }
  const page = document.documentElement.getBoundingClientRect();
  for (const t of document.querySelectorAll("text"))
    if (t.getBoundingClientRect().right > page.right) out.push(t.textContent);
  return JSON.stringify(out);
})()"""


@pytest.mark.skipif(find() is None, reason=f"none of {', '.join(NAMES)} starts here")
def test_texts_stay_inside_in_a_browser(tmp_path, small):
    long = "block.with.a.name.that.never.ends" * 3
    graph = small.coupling()
    graph.nodes["odd"]["frozen"] = f"`{long}` is read in a way that cannot be cut ({long}/x.py:12)"
    named = nx.relabel_nodes(graph, {"stem": long, "a": "層" * 30})
    with Browser() as browser:
        for dark in (False, True):
            (tmp_path / "drawn.svg").write_text(draw_coupling(named, long), encoding="utf-8")
            page = browser.open(tmp_path / "drawn.svg", width=900, dark=dark)
            assert json.loads(page.run(MEASURE)) == []
            assert page.messages == []
            corner = page.picture()[-3, 3]
            assert (corner.mean() < 60) == dark
