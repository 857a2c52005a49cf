"""Files that are damaged, foreign or altered: never a wrong network, never a foreign error."""

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Residual, X, conv, net, refused, untouched
from torch import nn

import fxprune
from fxprune import CheckpointError, FxPruneError, OptionTypeError, PlanError, checkpoint
from fxprune.checkpoint import read_tensors, write_tensors


@pytest.fixture
def saved(tmp_path) -> Path:
    fxprune.save(fxprune.compile(net().eval(), X, progress=False), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def load_refused(path: Any, kind: type[FxPruneError], *parts: str, model: Any = None) -> None:
    model = model or net()
    with untouched(model):
        refused(kind, lambda: fxprune.load(path, model), *parts)


def test_files_that_are_missing(tmp_path):
    load_refused(tmp_path / "none.safetensors", CheckpointError, "none.safetensors", "no such file")
    load_refused(tmp_path, CheckpointError, "directory")
    load_refused("", CheckpointError, "not a path")
    load_refused(3.5, CheckpointError, "not a path")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    load_refused(saved, CheckpointError, "net.safetensors")


def test_flipped_bits_are_always_noticed(saved):
    data = saved.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 40)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        saved.write_bytes(bytes(changed))
        load_refused(saved, CheckpointError, "net.safetensors")


def test_foreign_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    load_refused(tmp_path / "foreign.safetensors", CheckpointError, "fxprune")
    torch.save(net().state_dict(), tmp_path / "net.pt")
    load_refused(tmp_path / "net.pt", CheckpointError, "net.pt")
    (tmp_path / "text.safetensors").write_text("hello, this is no file of tensors at all")
    load_refused(tmp_path / "text.safetensors", CheckpointError, "text.safetensors")


def test_a_file_of_ours_without_a_plan(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(3)}, {"step": 3})
    load_refused(
        tmp_path / "other.safetensors", CheckpointError, "holds no valid plan", "fxprune.save"
    )


def test_files_of_another_architecture(saved):
    load_refused(saved, PlanError, "another architecture", "0.weight (missing)", model=Residual())


def test_a_file_whose_tensors_do_not_fit_its_plan(saved, tmp_path):
    header, tensors = read_tensors(saved)
    for edit in ({"0.bias": torch.zeros(1)}, {"extra": torch.zeros(1)}, {"0.bias": None}):
        changed = {k: t for k, t in {**tensors, **edit}.items() if t is not None}
        write_tensors(tmp_path / "edited.safetensors", changed, header)
        load_refused(
            tmp_path / "edited.safetensors", CheckpointError, "does not fit", next(iter(edit))
        )


def test_a_bad_input_spec_in_a_file(saved, tmp_path):
    header, tensors = read_tensors(saved)
    for spec in ({"shape": [-1, 3], "dtype": "float32"}, {"shape": "all", "dtype": "float32"}, {"shape": [1], "dtype": "nn"},
                 {"shape": [1], "dtype": "float32", "more": 1}, {"shape": [True], "dtype": "float32"}, {"shape": [1], "dtype": "quint8"}, [], 3, None):  # fmt: skip
        write_tensors(tmp_path / "edited.safetensors", tensors, {**header, "inputs": [spec]})
        load_refused(tmp_path / "edited.safetensors", CheckpointError, "holds no valid plan")


def test_an_input_spec_of_a_petabyte_is_not_allocated(saved, tmp_path):
    header, tensors = read_tensors(saved)
    spec = {"shape": [1 << 20, 3, 1 << 14, 1 << 14], "dtype": "float32"}
    write_tensors(tmp_path / "edited.safetensors", tensors, {**header, "inputs": [spec]})
    load_refused(tmp_path / "edited.safetensors", CheckpointError, "input")


@pytest.mark.parametrize("name", ["0.weight", "1.num_batches_tracked"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.complex64])
def test_a_tensor_of_another_kind_of_number_does_not_fit(saved, tmp_path, name, dtype):
    header, tensors = read_tensors(saved)
    write_tensors(
        tmp_path / "edited.safetensors", {**tensors, name: tensors[name].to(dtype)}, header
    )
    load_refused(tmp_path / "edited.safetensors", CheckpointError, f"does not fit: `{name}` is")


@pytest.mark.parametrize(
    "edit",
    [{"front_end": 3}, {"front_end": {"a": 1}}, {"inputs": {"shape": [1]}}, {"inputs": "x"},
     {"inputs": [{"shape": [0, 1 << 62, 1 << 62], "dtype": "float32"}]},
     {"inputs": [{"shape": [1] * 70, "dtype": "float32"}]}, {"more": 1}],
)  # fmt: skip
def test_headers_that_no_save_writes(saved, tmp_path, edit):
    header, tensors = read_tensors(saved)
    write_tensors(tmp_path / "edited.safetensors", tensors, {**header, **edit})
    load_refused(tmp_path / "edited.safetensors", CheckpointError, "holds no valid plan")


def test_inputs_that_a_file_describes_take_no_memory(saved, tmp_path):
    """24 GB in all, were they made."""
    header, tensors = read_tensors(saved)
    spec = {"shape": [1 << 17, 3, 128, 128], "dtype": "float32"}
    write_tensors(tmp_path / "edited.safetensors", tensors, {**header, "inputs": [spec]})
    model = net().double()
    loaded = fxprune.load(tmp_path / "edited.safetensors", model)
    assert loaded(X).shape == (2, 4, 8, 6)
    assert loaded.origin.inputs[0].shape == tuple(spec["shape"])


OPENED: list[str] | None = None  # paths, while somebody looks


@pytest.fixture(scope="module")
def opened() -> Callable[[], Any]:
    """A context that lists all files that Python opens, removes, links or runs inside it."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if OPENED is not None and event.partition(".")[0] in ("open", "os", "shutil", "subprocess"):
            OPENED.append(f"{event} {args[:2]}")

    sys.addaudithook(watch)  # there is no way to take it off

    @contextlib.contextmanager
    def context() -> Iterator[list[str]]:
        global OPENED
        OPENED = []
        try:
            yield OPENED
        finally:
            OPENED = None

    return context


EVIL = ["../../evil", "/etc/passwd", "~/evil", "file:///etc/passwd", "$(touch evil)", "`evil`", "C:\\evil",
        "__import__('os').system('touch evil')", "{0.__class__}", "%s%n", "\x00evil", "evil\n", "e" * 300]  # fmt: skip


def test_nothing_that_a_file_names_is_opened(saved, tmp_path, opened):
    """Names that are paths, links, code or formats, at every place of a file that holds a name."""
    header, tensors = read_tensors(saved)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "evil")
    names = [*EVIL, str(link)]
    notes = [{"node": name, "why": name} for name in names]
    words = {"name": names[0], "callable": names, "options": dict.fromkeys(names, names)}
    edits = [{"frozen": notes, "inexact": notes, "method": words, "scope": names, "fxprune_version": names[0],
              "fingerprint": {"tensors": header["plan"]["fingerprint"]["tensors"], "graph": names[0]}}]  # fmt: skip
    for name in names:
        edits.append({"slices": [{**s, "tensor": name} for s in header["plan"]["slices"][:1]]})
        edits.append({"folds": [{"conv": name, "bn": name, "compactor": False}]})
    path = tmp_path / "edited.safetensors"
    plan = {**header["plan"], **edits[0]}
    write_tensors(path, tensors, {**header, "front_end": str(link), "plan": plan})
    with opened() as events:
        loaded = fxprune.load(path, net())
        repr(loaded.report)
        assert loaded.plan.to_dict() == plan
        for edit in edits[1:]:
            write_tensors(path, tensors, {**header, "plan": {**header["plan"], **edit}})
            with pytest.raises(FxPruneError):
                fxprune.load(path, net())
        write_tensors(path, {**tensors, **dict.fromkeys(names, torch.zeros(1))}, header)
        with pytest.raises(CheckpointError, match="does not fit"):
            fxprune.load(path, net())
    ours = [e for e in events if path.name in e or ".fxprune-tmp-" in e]
    assert len(ours) > 2 * len(edits)  # the hook does see files
    assert not [e for e in events if "evil" in e or "passwd" in e or str(link) in e]
    assert {p.name for p in tmp_path.iterdir()} == {path.name, link.name, saved.name}


def test_the_dtype_comes_from_the_file(saved):
    for dtype in (torch.float64, torch.float16):
        model = net().to(dtype)
        with untouched(model):
            loaded = fxprune.load(saved, model)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert loaded.eval()(X).dtype == torch.float32


def test_flags_and_modes_come_from_the_model(saved):
    model = net().train()
    model[0].weight.requires_grad_(False)
    loaded = fxprune.load(saved, model)
    assert not loaded.get_submodule("0").weight.requires_grad
    assert loaded.get_submodule("3").weight.requires_grad
    assert loaded.training


def test_what_cannot_be_saved(tmp_path):
    for value in (net(), net().state_dict(), None, "net"):
        refused(OptionTypeError, lambda: fxprune.save(value, tmp_path / "x.safetensors"), "save was given a")  # fmt: skip # noqa: B023
    pruned = fxprune.compile(net(), X, progress=False)
    for path in (tmp_path / "none" / "x.safetensors", tmp_path, 3, ""):
        refused(CheckpointError, lambda: fxprune.save(pruned, path))  # noqa: B023
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_save_keeps_the_old_file(saved, monkeypatch, call):
    """A disk that is found to be full when the file is synced or renamed."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = saved.read_bytes()
    pruned = fxprune.compile(net(), X, budget=0.3, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        error = refused(
            CheckpointError, lambda: fxprune.save(pruned, saved), "No space left", "unchanged"
        )
    fxprune.save(pruned, saved.with_name("other"))
    assert f"{saved.with_name('other').stat().st_size} bytes are needed, " in error.why
    assert "are free" in error.why
    saved.with_name("other").unlink()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_file_larger_than_the_process_may_write(saved):
    """RLIMIT_FSIZE, as `ulimit -f` sets it: the system refuses in the middle of the write."""
    before = saved.read_bytes()
    wide = nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 4))
    pruned = fxprune.compile(wide, X, progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        refused(CheckpointError, lambda: fxprune.save(pruned, saved), "File too large", "bytes are needed", "ulimit -f")  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_what_a_killed_save_left_is_removed_by_the_next(saved):
    stale = saved.with_name(checkpoint._temp_prefix(saved) + "0123456789abcdef.safetensors")
    stale.write_bytes(saved.read_bytes()[:100])
    fxprune.save(fxprune.load(saved, net()), saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
