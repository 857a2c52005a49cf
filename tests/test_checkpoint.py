"""Files are whole or absent, equal content is equal bytes, and every damage is noticed."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import safetensors.torch
import torch

from fxprune import checkpoint
from fxprune.checkpoint import atomic_path, atomic_write, read_tensors, write_tensors
from fxprune.errors import CheckpointError

HEADER = {
    "plan": {"seed": 0, "scope": "all", "é": ["\u2028", 1.5, None, True]},
    "front": "symbolic",
}


def tensors(seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, 5, generator=gen)
    return {
        "conv.weight": x,
        "conv.bias": x[:, 0, 0, 0].double(),
        "bn.num_batches_tracked": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "mask": x[0, 0] > 0,
        "half": x.half()[0],
        "brain": x.bfloat16()[1],
        "byte": torch.arange(5, dtype=torch.uint8),
        "small": torch.arange(-3, 4, dtype=torch.int8),
        "ключ": torch.arange(3, dtype=torch.int32),
    }


def same(a, b):
    assert list(a) == sorted(b)
    for name, t in a.items():
        u = b[name].detach().cpu()
        assert t.dtype == u.dtype
        assert t.shape == u.shape
        assert torch.equal(t, u), name


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    error = caught.value
    assert error.where
    assert error.why
    assert error.fix
    # without the path: pytest's holds the test's name, which is no evidence
    text = "\n".join(n for n in str(error).split("\n") if not n.startswith("  where:"))
    for word in words:
        assert word in text, text
    return text


def raw_file(path, header, data=b""):
    """A safetensors file with any JSON in front."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    write_tensors(path, tensors(), HEADER)
    return path


# ---- tensors: round trip ------------------------------------------------------------------------


def test_round_trip(saved):
    header, read = read_tensors(saved)
    assert header == HEADER
    same(read, tensors())
    assert [p.name for p in saved.parent.iterdir()] == ["net.safetensors"]


def test_what_is_read_is_writable_and_independent_of_the_file(saved):
    _, read = read_tensors(saved)
    saved.write_bytes(b"")
    for t in read.values():
        t.zero_()


def test_same_bytes_every_time_in_any_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write_tensors(first, tensors(), HEADER)
    write_tensors(first, tensors(), HEADER)
    backwards = dict(reversed(HEADER.items()))
    backwards["plan"] = dict(reversed(HEADER["plan"].items()))
    write_tensors(second, dict(reversed(tensors().items())), backwards)
    assert first.read_bytes() == second.read_bytes()


def test_the_safetensors_library_reads_it_and_sees_one_metadata_key(saved):
    same(dict(sorted(safetensors.torch.load_file(saved).items())), tensors())
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"fxprune"}
    inner = json.loads(metadata["fxprune"])
    assert len(inner.pop("sha256")) == 64
    assert inner == HEADER
    canonical = json.dumps(json.loads(metadata["fxprune"]), sort_keys=True, separators=(",", ":"))
    assert metadata["fxprune"] == canonical


def test_tensors_are_aligned_in_the_file(saved):
    raw = saved.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    document = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, entry in document.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors()[name].element_size() == 0


@pytest.mark.parametrize("dtype", checkpoint.DTYPES.values(), ids=str)
def test_every_dtype_bit_for_bit(tmp_path, dtype):
    raw = torch.arange(48, dtype=torch.uint8)
    t = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    write_tensors(tmp_path / "f", {"t": t, "scalar": t[0], "none": t[:0]}, {})
    read = read_tensors(tmp_path / "f")[1]
    assert {u.dtype for u in read.values()} == {dtype}
    assert torch.equal(read["t"].view(torch.uint8), t.view(torch.uint8))
    assert read["scalar"].shape == ()
    assert read["none"].shape == (0,)


def test_every_dtype_the_library_knows_is_known_here_by_the_same_name():
    assert all(safetensors.torch._TYPES[tag] == dtype for tag, dtype in checkpoint.DTYPES.items())


def test_strided_shared_and_grad_tensors(tmp_path):
    x = torch.randn(2, 3, 4, 5)
    given = {
        "last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "step": x[..., ::2],
        "expanded": torch.ones(1).expand(3, 2),
        "one": x,
        "tied": x,
        "window": x[1:],
        "parameter": torch.nn.Parameter(x),
        "grown": torch.nn.Parameter(x) * 2,
        "negated": torch.view_as_complex(x[..., :2].contiguous()).conj().imag,
        "conjugated": torch.view_as_complex(x[..., :2].contiguous()).conj(),
    }
    write_tensors(tmp_path / "f", given, {})
    read = read_tensors(tmp_path / "f")[1]
    same(read, given)
    assert all(t.is_contiguous() and not t.requires_grad for t in read.values())
    x.zero_()
    assert read["one"].abs().sum() > 0


def test_no_tensors_at_all(tmp_path):
    write_tensors(tmp_path / "f", {}, {"a": (1, 2)})
    assert read_tensors(tmp_path / "f") == ({"a": [1, 2]}, {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: writes CUDA tensors")
def test_cuda_tensors_give_the_same_bytes(tmp_path):
    write_tensors(tmp_path / "a", tensors(), HEADER)
    write_tensors(tmp_path / "b", {k: v.cuda() for k, v in tensors().items()}, HEADER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_digest_tells_contents_apart_that_a_plain_concatenation_would_not():
    def digest(**given):
        return checkpoint._digest(given, "{}")

    a, b = torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)
    digests = [
        digest(x=torch.cat([a, b])),
        digest(x=torch.cat([a, b])[None]),
        digest(x=torch.cat([a, b]).view(torch.int8)),
        digest(x=torch.cat([a, b]).view(torch.int16)),
        digest(y=torch.cat([a, b])),
        digest(x=a, y=b),
        digest(x=b, y=a),
    ]
    assert len(set(digests)) == len(digests)


# ---- tensors: what cannot be written ------------------------------------------------------------


class NoBytes(torch.Tensor):
    def full_tensor(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantized"),
        (lambda: torch.ones(2, dtype=torch.complex128), "the file format has no complex128"),
        (lambda: torch.ones(1).as_subclass(NoBytes), "sharded"),
        (lambda: torch.ones([1] * 65), "65 dimensions"),
        (lambda: [1.0], "it is a list, not a tensor"),
        (lambda: None, "NoneType"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore")  # of torch, about quantized and sparse tensors
def test_tensors_that_are_refused(saved, make, word):
    bad = make()
    before = saved.read_bytes()
    write = lambda: write_tensors(saved, {"good": torch.ones(1), "bad.one": bad}, {})  # noqa: E731
    refused(write, "cannot save tensor `bad.one`", word, "fix:")
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "word"),
    [(3, "not int"), ("__metadata__", "keeps that name"), ("a\ud800", "UTF-8 cannot hold it")],
)
def test_names_that_are_refused(tmp_path, name, word):
    refused(lambda: write_tensors(tmp_path / "f", {name: torch.ones(1)}, {}), word)


DEEP: dict = {}
for _ in range(80):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"a": float("nan")}, "`header.a` is nan"),
        ({"a": [{"b": -float("inf")}]}, "`header.a[0].b` is -inf"),
        ({"a": {1, 2}}, "something that JSON can hold"),
        ({"a": torch.ones(1)}, "something that JSON can hold"),
        ({1: "a"}, "`a key of header` is 1"),
        ({"a": {"1": 0, 1: 0}}, "`a key of header.a` is 1"),
        ({"a": "\ud800"}, "UTF-8"),
        ({"a": 10**5000}, "a huge integer"),
        (DEEP, "levels deep"),
        ({"sha256": "0"}, "`sha256`"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_headers_that_are_refused(tmp_path, header, word):
    refused(lambda: write_tensors(tmp_path / "f", {}, header), "cannot save", word)
    assert not list(tmp_path.iterdir())


def test_header_too_large_for_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", 1000)
    refused(lambda: write_tensors(tmp_path / "f", {}, {"a": "x" * 1000}), "allows 1000")


# ---- tensors: what cannot be read ---------------------------------------------------------------


def test_missing_file(tmp_path):
    refused(lambda: read_tensors(tmp_path / "no"), "cannot read `no`", "no such file", "check the")


def test_directory_and_pipe(tmp_path):
    refused(lambda: read_tensors(tmp_path), "it is a directory")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: read_tensors(tmp_path / "pipe"), "not a regular file")


@pytest.mark.parametrize("path", [3, None, "", "a\0b"], ids=repr)
def test_not_a_path(path):
    refused(lambda: read_tensors(path), "this is not a path")
    refused(lambda: write_tensors(path, {}, {}), "this is not a path")


def test_permission_denied(saved, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused(lambda: read_tensors(saved), "Permission denied", "permissions")


def test_every_changed_byte_is_noticed(saved):
    """Seeded: 200 places anywhere, each changed to another value."""
    rng = random.Random(0)
    good = saved.read_bytes()
    for _ in range(200):
        at = rng.randrange(len(good))
        bad = bytearray(good)
        bad[at] ^= rng.randrange(1, 256)
        saved.write_bytes(bad)
        refused(lambda: read_tensors(saved), "cannot read")


def test_every_bit_of_the_first_part_is_checked(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, {"t": torch.ones(3)}, {"a": 1})
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            path.write_bytes(bad)
            refused(lambda: read_tensors(path), "cannot read")
    blank = good.index(b" ", 8)  # padding: other white space is JSON too, but not what we write
    path.write_bytes(good[:blank] + b"\n" + good[blank + 1 :])
    refused(lambda: read_tensors(path), "not as fxprune writes it")


def test_flipped_data_names_the_digest(saved):
    bad = bytearray(saved.read_bytes())
    bad[-1] ^= 1
    saved.write_bytes(bad)
    refused(lambda: read_tensors(saved), "SHA-256 does not match", "get it again")


def test_every_truncation_is_noticed(saved):
    rng = random.Random(1)
    good = saved.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(good) - 1, *(rng.randrange(len(good)) for _ in range(100))}
    for length in lengths:
        saved.write_bytes(good[:length])
        refused(lambda: read_tensors(saved), "cannot read")
    saved.write_bytes(good[:-3])
    refused(lambda: read_tensors(saved), f"has {len(good) - 3} bytes and should have {len(good)}")
    saved.write_bytes(good + b"\0")
    refused(lambda: read_tensors(saved), "truncated or has grown")
    saved.write_bytes(b"")
    refused(lambda: read_tensors(saved), "it is empty")


def test_two_files_spliced_are_noticed(tmp_path):
    """The header of one and the tensors of another: each is fine by itself."""
    a, b = tmp_path / "a", tmp_path / "b"
    write_tensors(a, {"t": torch.ones(8)}, {"v": 1})
    write_tensors(b, {"t": torch.zeros(8)}, {"v": 2})
    a.write_bytes(a.read_bytes()[:-32] + b.read_bytes()[-32:])
    refused(lambda: read_tensors(a), "SHA-256")


def test_pickles_are_recognised_and_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "net.pth"
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
        kind = "zip archive" if zipped else "a pickle"
        refused(lambda: read_tensors(path), kind, "never unpickles", "weights_only=True")
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        refused(lambda: read_tensors(path), "a pickle")
    path.write_bytes(pickle.dumps(None, protocol=4))  # shorter than a safetensors file can be
    refused(lambda: read_tensors(path), "a pickle")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}], ids=str)
def test_foreign_safetensors(tmp_path, metadata):
    path = tmp_path / "f.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata)
    refused(
        lambda: read_tensors(path),
        "this is a safetensors file but not one of fxprune's",
        "plain weights are loaded with model.load_state_dict",
    )


def test_second_metadata_key(saved):
    read = read_tensors(saved)[1]
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(read, saved, {**metadata, "format": "pt"})
    refused(lambda: read_tensors(saved), "more than one metadata key", "'format'")


@pytest.mark.parametrize(
    "content",
    [b"hello, this is text and nothing else", b"{}", b"\x00" * 8, b"\x00" * 100, b"\xff" * 100],
    ids=repr,
)
def test_not_a_safetensors_file(tmp_path, content):
    path = tmp_path / "f"
    path.write_bytes(content)
    refused(lambda: read_tensors(path), "cannot read `f`", "fix:")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
INNER = '{"sha256":"' + "0" * 64 + '"}'


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ([1], "not a safetensors file"),
        ({"a": 1}, "not a safetensors file"),
        (b"{", "not a JSON document"),
        (b"\xff\xff", "not a JSON document"),
        (b"[" * 100000, "nested too deeply"),
        (b'{"__metadata__":{"fxprune":"{}"},"__metadata__":{"fxprune":"{}"}}', "appears twice"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested too deeply"),
        (b'{"a":NaN}', "NaN"),
        ({"__metadata__": {"fxprune": 1}}, "not a string"),
        ({"__metadata__": {"fxprune": "{"}}, "not a JSON document"),
        ({"__metadata__": {"fxprune": '{"a":1,"a":2}'}}, "'a' appears twice"),
        ({"__metadata__": {"fxprune": '{"a":Infinity}'}}, "Infinity"),
        ({"__metadata__": {"fxprune": "[" * 100000}}, "nested too deeply"),
        ({"__metadata__": {"fxprune": '{"a":' * 80 + "1" + "}" * 80}}, "nested too deeply"),
        ({"__metadata__": {"fxprune": "[]"}}, "not an object with `sha256`"),
        ({"__metadata__": {"fxprune": "{}"}}, "not an object with `sha256`"),
        ({"__metadata__": {"fxprune": '{"sha256":1}'}}, "not an object with `sha256`"),
        ({"__metadata__": {"fxprune": INNER}, "t": 1}, "entry of tensor 't' is malformed"),
        ({"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "dtype": "X9"}}, "dtype 'X9'"),
        ({"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "dtype": [1]}}, "malformed"),
        ({"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "shape": [-1]}}, "malformed"),
        ({"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "shape": [True]}}, "malformed"),
        ({"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "shape": [1 << 63]}}, "malformed"),
        ({"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "shape": [1] * 65}}, "malformed"),
        (
            {"__metadata__": {"fxprune": INNER}, "t": {**ENTRY, "data_offsets": [0, 8]}},
            "as fxprune",
        ),
        ({"__metadata__": {"fxprune": INNER}, "t": ENTRY, "u": ENTRY}, "as fxprune writes"),
        ({"__metadata__": {"fxprune": INNER, "x": "y"}}, "more than one metadata key"),
        (b'{"__metadata__":{"fxprune":"{}"},"\\ud800":{}}', "cannot read"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_malformed_first_part(tmp_path, header, word):
    path = raw_file(tmp_path / "f", header, b"\0\0\0\0")
    refused(lambda: read_tensors(path), word)


def test_sizes_that_no_memory_holds_are_refused_before_they_are_asked_for(tmp_path):
    """The header is just as fxprune would write it; only the file's size gives it away."""
    for shape in ((1 << 50,), (0, 1 << 62, 1 << 62)):
        prefix, _ = checkpoint._prefix({"t": ("F32", shape)}, INNER)
        (tmp_path / "f").write_bytes(prefix)
        refused(lambda: read_tensors(tmp_path / "f"), "cannot read")


# ---- any file -----------------------------------------------------------------------------------


def temps(folder):
    return [p for p in folder.iterdir() if p.name.startswith(".fxprune-tmp-")]


def test_atomic_write_bytes_and_pieces(tmp_path):
    path = tmp_path / "report.html"
    atomic_write(path, b"one")
    assert path.read_bytes() == b"one"
    atomic_write(str(path), (piece for piece in (b"tw", memoryview(b"o"))))
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_has_the_suffix_and_the_directory(tmp_path):
    path = tmp_path / "net.onnx"
    with atomic_path(path) as temp:
        assert temp.suffix == ".onnx"
        assert temp.parent == tmp_path
        assert temp.exists()
        temp.unlink()  # a writer may make its own file there
        temp.write_text("x")
        assert not path.exists()
    assert path.read_text() == "x"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), CheckpointError("c")])
def test_a_failing_writer_leaves_all_as_it_was(tmp_path, error):
    path = tmp_path / "f"
    path.write_text("old")

    def pieces():
        yield b"new"
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(path, pieces())
    assert caught.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_targets(tmp_path):
    text = refused(lambda: atomic_write(tmp_path / "no" / "f", b""), "no` does not exist")
    assert "cannot write `f`; what was there is unchanged" in text
    assert "create that directory first" in text
    refused(lambda: atomic_write(tmp_path, b""), "it is a directory", "a file inside it")
    refused(lambda: atomic_write(f"{tmp_path}/new/", b""), "it is a directory")
    (tmp_path / "file").write_text("old")
    refused(lambda: atomic_write(tmp_path / "file" / "f", b""), "not a directory")
    refused(lambda: atomic_write(tmp_path / ("x" * 300), b""), "too long")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: atomic_write(tmp_path / "loop", b""), "symbolic links")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: atomic_write(tmp_path / "pipe", b""), "device, a pipe or a socket")
    refused(lambda: atomic_write("/dev/null", b""), "device")
    assert not temps(tmp_path)


def test_permission_denied_on_writing(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_text("old")

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        refused(lambda: atomic_write(path, b"new"), "Permission denied", "where you may write")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        refused(lambda: atomic_write(path, b"new"), "read-only")
    assert path.read_text() == "old"


def test_names_of_any_length_and_kind(tmp_path):
    for name in ("x" * 255, "ключ." + "y" * 200, ".hidden", "a b\n.safetensors", "пр" * 60):
        atomic_write(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    assert not temps(tmp_path)


def test_links_are_followed_and_modes_kept(tmp_path):
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "f", tmp_path / "latest"
    link.symlink_to(path)
    atomic_write(link, b"1")  # dangling so far
    os.chmod(path, 0o640)
    atomic_write(link, b"2")
    assert link.is_symlink()
    assert path.read_bytes() == b"2"
    assert path.stat().st_mode & 0o777 == 0o640


def test_new_files_have_the_mode_that_open_gives(tmp_path):
    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "f", b"")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_file_is_synced_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace

    def fsync(fd):
        done.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        sync(fd)

    def renamed(a, b):
        done.append("replace")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    atomic_write(tmp_path / "f", b"1")
    assert done == ["file", "replace", "directory"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_full_disk_simulated(saved, monkeypatch, call):
    """Whatever call reports it, the message has both numbers and the old file stays."""
    before = saved.read_bytes()
    big = {"t": torch.zeros(1000)}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: Usage(0, 0, 1234))
        text = refused(lambda: write_tensors(saved, big, {}), "No space left on device")
    assert "1234 are free" in text
    write_tensors(saved.with_name("other"), big, {})
    assert f"{saved.with_name('other').stat().st_size} bytes are needed" in text
    assert "make room" in text
    assert saved.read_bytes() == before
    assert not temps(saved.parent)


Usage = namedtuple("Usage", "total used free")


def test_full_disk_inside_a_foreign_writer(tmp_path):
    def write():
        with atomic_path(tmp_path / "f") as temp:
            temp.write_bytes(b"x" * 10)
            raise OSError(errno.ENOSPC, "No space left on device")

    refused(write, "10 bytes are needed", "are free")
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_synced(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(fd, code=errno.EINVAL):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(code, os.strerror(code))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "f", b"1")  # a file system that has no such call: nothing to say
    monkeypatch.setattr(os, "fsync", lambda fd: fsync(fd, errno.EIO))
    refused(lambda: atomic_write(tmp_path / "f", b"2"), "is written, but may be lost")
    assert (tmp_path / "f").read_bytes() == b"2"


def script(source, *args, **kwargs):
    code = "import sys, torch\ntorch.set_num_threads(1)\n" + textwrap.dedent(source)
    command = [*kwargs.pop("before", ()), sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def test_full_disk_for_real(tmp_path):
    """A 1 MB file system in a mount namespace of its own, which ends with the process."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount += ['mount -t tmpfs -o size=1m none "$0" || exit 77; exec "$@"', str(tmp_path)]
    try:
        can = subprocess.run([*mount, "true"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no `unshare` here: a small file system cannot be mounted")
    if can.returncode:
        pytest.skip(f"a small file system cannot be mounted: {can.stderr.strip()}")
    done = script(
        """
        import os
        from fxprune.checkpoint import read_tensors, write_tensors
        from fxprune.errors import CheckpointError
        path = sys.argv[1] + "/net.safetensors"
        write_tensors(path, {"t": torch.ones(100_000)}, {"v": 1})
        try:
            write_tensors(path, {"t": torch.zeros(200_000)}, {"v": 2})
        except CheckpointError as error:
            print(error)
        header, tensors = read_tensors(path)
        assert header == {"v": 1} and tensors["t"].eq(1).all()
        print(os.listdir(sys.argv[1]))
        """,
        tmp_path,
        before=mount,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device: 800" in done.stdout
    assert "are free" in done.stdout
    assert "['net.safetensors']" in done.stdout


def test_killed_at_any_moment(tmp_path):
    """SIGKILL, 200 times at random moments of a loop of saves: always a complete version."""
    done = script(
        """
        import json, os, random, signal, time
        from pathlib import Path
        from fxprune.checkpoint import read_tensors, write_tensors
        folder, rng = Path(sys.argv[1]), random.Random(0)
        path = folder / "net.safetensors"

        def save(version):
            write_tensors(path, {"a": torch.full((1 << 17,), version), "b": torch.tensor(version)},
                          {"version": version})

        save(0)
        versions, stale = [0], 0
        for _ in range(200):
            child = os.fork()
            if not child:
                version = versions[-1]
                while True:
                    version += 1
                    save(version)
            time.sleep(0.015 * rng.random())
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            stale += len(list(folder.glob(".fxprune-tmp-*")))
            header, tensors = read_tensors(path)
            assert tensors["a"].eq(header["version"]).all() and tensors["b"] == header["version"]
            versions.append(header["version"])
        save(versions[-1] + 1)
        print(json.dumps([versions, stale, os.listdir(folder)]))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    versions, stale, left = json.loads(done.stdout)
    assert versions == sorted(versions)
    assert versions[-1] > 0, "no save was ever complete: the test shows nothing"
    assert stale > 0, "no kill fell into a save: the test shows nothing"
    assert left == ["net.safetensors"]


def test_stale_files_go_and_held_or_foreign_ones_stay(tmp_path):
    path = tmp_path / "f.bin"
    stale = tmp_path / (checkpoint._temp_prefix(path) + "0123.bin")
    foreign = tmp_path / (checkpoint._temp_prefix(tmp_path / "other.bin") + "0123.bin")
    mine = tmp_path / "f.bin.tmp"
    for p in (stale, foreign, mine):
        p.write_text("half")
    with atomic_path(path) as outer:
        assert not stale.exists()
        outer.write_text("outer")
        atomic_write(path, b"inner")  # another writer to the same path meanwhile
        assert outer.exists()
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, foreign.name, mine.name}


def test_large_files_are_neither_copied_on_writing_nor_twice_on_reading(tmp_path):
    """Peak memory over what the tensors take themselves, for 128 MB."""
    done = script(
        """
        import resource
        from fxprune.checkpoint import read_tensors, write_tensors
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        path = sys.argv[1] + "/net.safetensors"
        write_tensors(path, {"t": torch.ones(3)}, {})
        read_tensors(path)
        tensors = {str(i): torch.ones(1 << 22) for i in range(8)}
        before = peak()
        write_tensors(path, tensors, {})
        written = peak()
        del tensors
        again = read_tensors(path)[1]
        print(written - before, peak() - written)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    writing, reading = map(int, done.stdout.split())
    assert writing < 32
    assert reading < 48
