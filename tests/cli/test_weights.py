"""Weights from files: what trainers write, and every way in which it does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from fxprune import zoo
from fxprune.cli.weights import load_weights, read_weights
from fxprune.errors import CheckpointError, OptionError


def small():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


@pytest.fixture
def state():
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in small().state_dict().items()}  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_what_trainers_write(wrap, suffix, state, tmp_path):
    torch.save(wrap(state), tmp_path / f"w{suffix}")
    model = small()
    load_weights(model, tmp_path / f"w{suffix}")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    model = small()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[0].weight, state["0.weight"])


def test_tensors_that_do_not_fit_are_named_and_nothing_is_changed(state, tmp_path):
    model, path = small(), tmp_path / "w.pth"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state["0.weight"] = torch.zeros(3, 1, 1, 1)
    state["fc.weight"] = state.pop("1.bias")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="the weights do not fit this Sequential") as error:
        load_weights(model, path)
    assert error.value.why == (
        "missing: 1.bias; unexpected: fc.weight; "
        "of another shape: 0.weight is (3, 1, 1, 1), not (2, 1, 1, 1)"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_long_lists_are_cut(tmp_path):
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"conv1\.weight, .* and 9[0-9] more"):
        load_weights(zoo.resnet20(), tmp_path / "w.pt")


def test_another_number_of_classes_is_told(tmp_path):
    torch.save(zoo.resnet20(num_classes=10, width=8).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="--set num_classes=N"):
        load_weights(zoo.resnet20(num_classes=3, width=8), tmp_path / "w.pt")


def test_a_pruned_network_is_told(tmp_path):
    pruned = fxprune.compile(zoo.resnet20(width=8), torch.zeros(1, 3, 8, 8), verify=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="it is a pruned network"):
        load_weights(zoo.resnet20(width=8), tmp_path / "net.safetensors")


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_no_code_is_unpickled(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        read_weights(tmp_path / "w.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"12345678{}")
    (tmp_path / "w.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "empty.pth").touch()
    for name in ("w.safetensors", "w.pt", "empty.pth"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_weights(tmp_path / name)
    torch.save({"lr": 0.1, "w": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="it holds a float under `lr`"):
        read_weights(tmp_path / "w.pth")
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="it holds a list"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(OptionError, match="its name must end in"):
        read_weights(tmp_path / "w.bin")
    with pytest.raises(OptionError, match="there is no file"):
        read_weights(tmp_path / "gone.pth")


def test_a_wrapper_that_holds_itself(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="it holds a int under `epoch`"):
        read_weights(tmp_path / "w.pt")


def test_names_are_strings(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="it holds the name 0, which is no string"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(2, 2).to_sparse(), "it is sparse_coo"),
        (torch.zeros(2, 2, device="meta"), "it is on the meta device, without numbers"),
    ],
)
def test_tensors_that_are_not_plain(tensor, why, tmp_path):
    torch.save({"0.weight": tensor}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"`0\.weight` is no plain tensor") as error:
        read_weights(tmp_path / "w.pt")
    assert error.value.why == why


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_other_kinds_of_numbers_do_not_fit(dtype, state, tmp_path):
    state["0.weight"] = state["0.weight"].to(dtype)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="do not fit") as error:
        load_weights(small(), tmp_path / "w.pt")
    name = str(dtype).removeprefix("torch.")
    assert error.value.why == f"of another kind: 0.weight is {name}, not float32"


def test_messages_have_no_colours(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("\x1b[1mbold\x1b[0m\nmore")

    torch.save({}, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(CheckpointError) as error:
        read_weights(tmp_path / "w.pt")
    assert error.value.why == "ValueError: bold"
