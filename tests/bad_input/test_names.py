"""Names of layers come from users: wherever they are shown they are text, never markup or control."""

import io
import json
import re

import markupsafe
import pytest
import torch
from refusals import Between, X, check_law, conv, l1, net, untouched
from rich.console import Console
from torch import nn

import fxprune
from fxprune import FxPruneError, PlanError
from fxprune.plan import Note
from fxprune.report import Report

MARKUP = [
    "[bold red]", "[/]", "[link=file:///etc/passwd]x[/link]", "<script>alert(1)<", "&lt;b&gt;",
    "' onload='x", "{{ 7*7 }}", "{% raw %}", "$x^2$", "für", "名前", "🙂", "a" * 300, "%s %n", "-rf", "~",
]  # fmt: skip
ESCAPED = ["\x1b[31mred", "a\u202eb", "a\tb", "\u200b", "x\rfxprune: error"]


def named(*names: str) -> nn.Module:
    """A layer of each name, one after the other."""

    def forward(m, h):
        for name in names:
            h = m.parts[name](h)
        return h

    return Between(forward, parts=nn.ModuleDict({name: conv(8, 8) for name in names}))


def in_colour(shown: object) -> str:
    """What rich prints, its own codes taken out."""
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=500).print(shown)
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())


@pytest.mark.filterwarnings("ignore:Glyph")  # of matplotlib: its font has no such letter
def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path):
    model = named(*MARKUP)
    pruned = check_law(model, X)
    report = pruned.report
    report.notes += MARKUP + ESCAPED  # notes quote users too
    report.frozen += [Note(text, text) for text in MARKUP + ESCAPED]
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    texts = [str(report), in_colour(report), str(fxprune.analyze(model, X.double()))]
    for text in texts:
        assert not {"\x1b", "\u202e", "\t", "\r"} & set(text)
    for name in MARKUP:
        shown = name if len(name) < 40 else name[:8]
        assert all(f"parts.{shown}" in text for text in texts), name
        assert f"parts.{markupsafe.escape(shown)}" in page, name
    assert Report.from_json(report.to_json()).groups == report.groups
    fxprune.save(pruned, tmp_path / "net.safetensors")
    loaded = fxprune.load(tmp_path / "net.safetensors", model)
    assert {f"parts.{name}.weight" for name in MARKUP} <= set(loaded.state_dict())
    assert loaded.plan.to_json() == pruned.plan.to_json()


@pytest.mark.parametrize("name", ESCAPED)
def test_names_that_would_move_the_cursor_are_refused_in_plain_words(name):
    model = named(name)
    with untouched(model), pytest.raises(FxPruneError) as e:
        fxprune.compile(model, X, progress=False)
    assert "".join(str(e.value).splitlines()).isprintable()
    assert "rename" in str(e.value)


def test_names_of_a_plan_are_shown_without_control_characters():
    """A plan may hold what no model has: its names reach errors and nothing else."""
    document = fxprune.compile(net(), X, method=l1(0.5), progress=False).plan.to_dict()
    for name in [*ESCAPED, "../../etc/passwd", "x\nfix: run this", "\ud7ff\uffff", "a" * 10**6]:
        document["slices"][0]["tensor"] = name
        plan = fxprune.Plan.from_json(json.dumps(document))
        assert plan.slices[0].tensor == name
        with pytest.raises(PlanError) as e:
            fxprune.apply(net(), plan, X)
        assert len(str(e.value).splitlines()) == 4
        assert len(str(e.value)) < 20_000
        assert "".join(str(e.value).splitlines()).isprintable()


@pytest.mark.parametrize("name", ["..", "a.b", "a/../b"])
def test_torch_allows_no_dots_in_names(name):
    """So a path as a name can only come from a file, where it names nothing."""
    with pytest.raises(KeyError):
        named(name)


class Deep(nn.Module):
    """Two convolutions, sixty dictionaries deep."""

    def __init__(self):
        super().__init__()
        self.deep: nn.Module = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
        for _ in range(60):
            self.deep = nn.ModuleDict({"block_of_the_backbone": self.deep})

    def forward(self, x):
        inner = self.deep
        while isinstance(inner, nn.ModuleDict):
            inner = inner["block_of_the_backbone"]
        return inner(x)


def test_long_paths_of_nested_modules_fit_everywhere(tmp_path):
    pruned = fxprune.compile(Deep(), X, progress=False)
    assert max(len(line) for line in str(pruned.report).splitlines()) <= 200
    fxprune.save(pruned, tmp_path / "net.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "net.safetensors", Deep())(X), pruned(X))
