"""Models by name: each form, what is refused, and that a user's file is imported as a script is."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from fxprune import cli, zoo
from fxprune.cli import specs
from fxprune.errors import FxPruneError, OptionError, UnsupportedOpError


def test_a_network_of_the_zoo():
    model = specs.build("zoo:resnet20", {"width": 8, "num_classes": 4})
    assert isinstance(model, zoo.CifarResNet)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
    assert not model.training


def test_a_network_of_torchvision():
    model = specs.build("torchvision:squeezenet1_1", {"num_classes": 3})
    assert type(model).__name__ == "SqueezeNet"
    assert model.classifier[1].out_channels == 3


def test_timm_is_optional(monkeypatch):
    monkeypatch.setattr(specs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedOpError, match="needs the package timm") as error:
        specs.build("timm:convnext_tiny")
    assert error.value.fix == "pip install timm"
    assert specs.known("timm:conv") == []


FILE = """
from neighbour import WIDTH
from torch import nn

class Net(nn.Module):
    def __init__(self, width=WIDTH, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1, bias=bias)

def make(width=WIDTH, bias=True):
    return Net(width, bias)

def needs(width):
    return Net(width)

def fails():
    raise RuntimeError("no luck")

def text():
    return "net"

ready = Net(5)
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 7\n")
    path = tmp_path / "net.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop("neighbour", None)


def test_a_file_and_its_neighbour(net):
    before = list(sys.path), set(sys.modules)
    model = specs.build(f"{net}:make")
    assert model.conv.out_channels == 7
    assert sys.path == before[0]
    new = {name for name in set(sys.modules) - before[1] if "net" in name}
    assert all(name.startswith("_fxprune_model_net_") for name in new)
    assert specs.build(f"{net}:make", {"width": 3, "bias": False}).conv.bias is None
    assert specs.build(f"{net}:Net").conv.out_channels == 7  # a class makes modules, too
    assert specs.build(f"{net}:ready").conv.out_channels == 5


@pytest.mark.parametrize(
    ("factory", "options", "kind", "text"),
    [
        ("mkae", {}, OptionError, "has no function `mkae`\n.*it defines Net, make, needs"),
        ("needs", {}, OptionError, "missing a required argument: 'width'"),
        ("make", {"depth": 1}, OptionError, "unexpected keyword argument 'depth'"),
        (
            "fails",
            {},
            FxPruneError,
            r"(?s)`fails` of net.py fails.*net.py:\d+.*RuntimeError: no luck",
        ),
        ("text", {}, FxPruneError, "returned a str"),
    ],
)
def test_what_a_factory_can_do_wrong(net, factory, options, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        specs.build(f"{net}:{factory}", options)


def test_a_file_that_cannot_be_imported(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import torch\nraise ImportError('nothing here')\n")
    with pytest.raises(FxPruneError, match=r"bad\.py cannot be imported") as error:
        specs.build(f"{path}:make")
    assert error.value.where == f"{path}:2"
    assert not any("_fxprune_model_bad" in name for name in sys.modules)
    with pytest.raises(OptionError, match="there is no file"):
        specs.build(f"{tmp_path / 'none.py'}:make")


@pytest.mark.parametrize(
    ("spec", "fix"),
    [
        ("resnet56", "did you mean zoo:resnet56?"),
        ("resnet65", "did you mean zoo:resnet56?"),
        ("net.py", "name the function that makes the model: net.py:make_model"),
        ("zoo:", None),
        ("huggingface:x", None),
        ("net.py:a-b", None),
    ],
)
def test_names_of_no_form(spec, fix):
    with pytest.raises(OptionError, match="names no model") as error:
        specs.build(spec)
    assert error.value.fix == fix
    assert "torchvision:resnet50" in error.value.why


def test_names_that_a_library_does_not_know():
    with pytest.raises(OptionError, match="did you mean 'resnet56'"):
        specs.build("zoo:resnet65")
    with pytest.raises(
        OptionError, match="torchvision has no model `resnet51`; did you mean resnet"
    ):
        specs.build("torchvision:resnet51")
    with pytest.raises(OptionError, match="takes no option 'depth'"):
        specs.build("zoo:resnet20", {"depth": 3})


def test_options_are_values():
    words = ["width=32", "p=0.5", "bias=false", "act=relu", "x=None", "e=1e-3", "s=a=b"]
    assert specs.options_of(words) == {
        "width": 32,
        "p": 0.5,
        "bias": False,
        "act": "relu",
        "x": None,
        "e": 1e-3,
        "s": "a=b",
    }
    for bad in (["width"], ["=3"], ["a.b=3"]):
        with pytest.raises(OptionError, match="makes no sense"):
            specs.options_of(bad)
    with pytest.raises(OptionError, match="given twice"):
        specs.options_of(["a=1", "a=2"])


def test_slugs():
    assert specs.slug("zoo:resnet56") == "resnet56"
    assert specs.slug("a/b.py:make_net") == "make_net"
    assert specs.slug("torchvision:segmentation/fcn") == "segmentation-fcn"


def test_names_for_the_shell():
    assert specs.known("") == ["zoo:", "torchvision:", "timm:"]
    assert specs.known("zoo:resnet1") == ["zoo:resnet110"]
    assert "torchvision:resnet50" in specs.known("torchvision:res")
    assert specs.known("path:") == []


def test_the_command_line_tells_it_in_one_line(capsys):
    assert cli.main(["analyze", "resnet56"]) == 2
    assert capsys.readouterr().err == (
        "fxprune: error: `resnet56` names no model; at: MODEL; because: a model is written "
        "zoo:resnet56, torchvision:resnet50, timm:convnext_tiny or path/to/file.py:factory; "
        "fix: did you mean zoo:resnet56?\n"
    )


def test_an_instance_is_no_factory(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("from torch import nn\nnet = nn.Linear(2, 3)\n")
    assert isinstance(specs.build(f"{path}:net"), nn.Linear)
