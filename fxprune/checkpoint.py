"""Crash-safe files: the bytes of a checkpoint, and nothing of what they mean.

Promises: after any failure (an error, a full disk, SIGKILL, a power cut) a path holds a complete
          file, the old or the new one. Equal content gives equal bytes. What is read is what was
          written: no byte of a file lies outside the checks.
Refuses:  pickles, foreign and damaged files, tensors without plain bytes (meta, sparse, ...);
          always with CheckpointError. No path from a file is opened, and nothing is unpickled.
Source:   the safetensors format (github.com/huggingface/safetensors, "Format"), which is

    8 bytes: N, little-endian | N bytes of JSON, padded with spaces | the tensors' raw bytes

The format is written and read here, not by the library (which reads these files, and is what the
tests compare with): its order of tensors may change from version to version, it accepts flipped
bits, and here a tensor's bytes go to and from the file without a second copy in memory.

The JSON holds name -> dtype, shape and offsets, and under `__metadata__` the one key `fxprune`: the
caller's header with `sha256` added, as canonical JSON. That digest covers the header and, sorted by
name, each tensor's name, dtype, shape and bytes. The JSON around it is compared with the only one
that `write_tensors` could have written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import CheckpointError, PlanError
from fxprune.plan import parse_json, plain_json

try:
    import fcntl
except ImportError:  # Windows: no locks, so temporary files of killed processes stay
    fcntl = None  # type: ignore[assignment]

METADATA = "__metadata__"  # safetensors' own name for it
KEY = "fxprune"
MAX_HEADER_BYTES = 100_000_000  # as safetensors' readers
MAX_DIMS = 64
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}

StrPath = str | os.PathLike[str]
Spec = tuple[str, tuple[int, ...]]  # safetensors' name of the dtype, shape


# ---- any file -----------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: StrPath, *, size: int | None = None) -> Iterator[Path]:
    """A temporary path to write to; leaving the block puts that file at `path`, whole or not at all.

    The temporary file exists (empty), lies in the directory of `path` and has its suffix. Any
    exception in the block removes it and leaves `path` as it was; an OSError becomes
    CheckpointError. `size`, the bytes to come, is for the message when the disk is full. A symbolic
    link is followed; an existing file's mode is kept. What killed processes left of earlier writes
    to this path is removed; a temporary file that another writer still holds is not.
    """
    target, mode = _target(path)
    try:
        _remove_stale(target)
        temp, lock = _create_temp(target)
    except OSError as error:
        raise _write_error(target, error, size) from error
    try:
        yield temp
        if mode is not None:
            os.chmod(temp, mode)
        _sync(temp, os.O_RDWR)
        os.replace(temp, target)
    except OSError as error:
        if size is None:
            with contextlib.suppress(OSError):
                size = temp.stat().st_size
        _unlink(temp)  # before the free space is measured
        raise _write_error(target, error, size) from error
    except BaseException:
        _unlink(temp)
        raise
    finally:
        if lock is not None:
            lock.close()
    _sync_directory(target)


def atomic_write(
    path: StrPath, data: bytes | Iterable[bytes | memoryview], *, size: int | None = None
) -> None:
    """Write `data`, or its pieces one after the other, to `path`, whole or not at all."""
    if isinstance(data, bytes):
        size = len(data)
    with atomic_path(path, size=size) as temp, open(temp, "wb") as out:
        for piece in (data,) if isinstance(data, bytes) else data:
            out.write(piece)


def _target(path: StrPath) -> tuple[Path, int | None]:
    """Where the bytes go, links followed, and the mode of the file that is there."""
    text = _text(path)
    try:
        target = Path(os.path.realpath(text))
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        raise _write_error(text, error, None) from error
    if mode is None and not text.endswith(os.sep):
        return target, None
    if mode is None or stat.S_ISDIR(mode):
        raise _write_error(text, IsADirectoryError(errno.EISDIR, "it is a directory"), None)
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"cannot write `{Path(text).name}`",
            where=str(target),
            why="it is a device, a pipe or a socket, and would be replaced by a file",
            fix="give the path of a file",
        )
    if not os.access(target, os.W_OK):
        raise _write_error(target, PermissionError(errno.EACCES, "the file is read-only"), None)
    return target, stat.S_IMODE(mode)


def _text(path: StrPath) -> str:
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise CheckpointError(
            "this is not a path",
            where=repr(path)[:80],
            why=f"a path is a str or a pathlib.Path, not {type(path).__name__}",
            fix="pass the name of a file",
        ) from error
    if not text or "\0" in text:
        raise CheckpointError(
            "this is not a path",
            where=repr(text)[:80],
            why="it is empty or holds a zero byte",
            fix="pass the name of a file",
        )
    return text


def _temp_prefix(target: Path) -> str:
    """What the names of all our temporary files for this target begin with (short, whatever its
    name)."""
    return f".fxprune-tmp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _create_temp(target: Path) -> tuple[Path, FileIO | None]:
    """A new empty file beside the target, and itself, open: that holds its lock.

    The lock says that its writer lives; the system drops it with the process, however that ends,
    and Python with the file, should Ctrl-C come before anybody could close it.
    """
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= 32 else ""
    while True:
        temp = target.with_name(_temp_prefix(target) + secrets.token_hex(8) + suffix)
        lock = FileIO(temp, "x+")
        if fcntl is None:
            lock.close()
            return temp, None
        with contextlib.suppress(OSError):  # a file system without locks: nothing counts as stale
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:
            return temp, lock
        lock.close()  # another writer took it for a stale one before it was locked: once more


def _remove_stale(target: Path) -> None:
    """Remove temporary files for this target that no living process holds."""
    if fcntl is None:
        return
    prefix = _temp_prefix(target)
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(target.parent)):
            if not entry.name.startswith(prefix):
                continue
            with contextlib.suppress(OSError):  # gone, held, or not ours to open
                found = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(found)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(target: Path) -> None:
    """Make the new name durable, where directories can be synced at all."""
    try:
        _sync(target.parent, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"`{target.name}` is written, but may be lost if the power fails now",
                where=str(target),
                why=f"its directory could not be synced: {error.strerror}",
                fix="check the disk, then save again",
            ) from error


def _write_error(
    target: str | Path, error: OSError | ValueError, size: int | None
) -> CheckpointError:
    """The four facts about a write that failed."""
    target = Path(target)
    code = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    named = error.filename if isinstance(error, OSError) else None
    why = f"{reason} ({named})" if named else reason
    fix = "check the path and the disk, then save again"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        need = "more space is" if size is None else f"{size} bytes are"
        why = f"{reason}: {need} needed"
        with contextlib.suppress(OSError):
            why += f", {shutil.disk_usage(target.parent).free} are free"
        fix = "make room, or give a path on another disk"
        if code == errno.EFBIG:
            fix = "raise the limit on the size of files (ulimit -f), or use another file system"
    elif code == errno.ENOENT and not target.parent.is_dir():
        why, fix = f"the directory `{target.parent}` does not exist", "create that directory first"
    elif code == errno.ENOTDIR and not target.parent.is_dir():
        why, fix = f"`{target.parent}` is not a directory", "give a path inside a directory"
    elif code == errno.EISDIR:
        why, fix = "it is a directory", "give the path of a file inside it"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        why = f"{reason}: a new file is made in `{target.parent}`, then put in place of the old one"
        fix = "give a path in a directory where you may write"
    return CheckpointError(
        f"cannot write `{target.name}`; what was there is unchanged",
        where=str(target),
        why=why,
        fix=fix,
    )


# ---- files of tensors ---------------------------------------------------------------------------


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], header: Mapping[str, object]
) -> None:
    """Write tensors and a JSON header to one safetensors file, whole or not at all.

    The tensors may be on any device and have any strides: the file holds contiguous copies. The
    header is a JSON object (tuples become lists) without the key `sha256`. The same content gives
    the same bytes, in whatever order the mappings are. CheckpointError says what cannot be written.
    """
    if "sha256" in header:
        raise CheckpointError(
            "cannot save: the header has a key `sha256`",
            where="header",
            why="the file's digest goes there",
            fix="use another key",
        )
    for name in tensors:
        _check_name(name)
    host = {name: _host(name, tensors[name]) for name in sorted(tensors)}
    digest = _digest(host, _canonical(header))
    specs = {name: (_TAGS[t.dtype], tuple(t.shape)) for name, t in host.items()}
    prefix, total = _prefix(specs, _canonical({**header, "sha256": digest}))
    if len(prefix) - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"cannot save: names, shapes and header take {len(prefix)} bytes",
            where="header",
            why=f"the safetensors format allows {MAX_HEADER_BYTES}",
            fix="keep bulk data in tensors, not in the header",
        )

    def pieces() -> Iterator[bytes | memoryview]:
        yield prefix
        for name in _file_order(specs):
            yield _raw(host[name])

    atomic_write(path, pieces(), size=len(prefix) + total)


def read_tensors(path: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header (without `sha256`) and the tensors, on the CPU, of a file of `write_tensors`.

    CheckpointError says what is wrong with the file: missing, truncated, changed, foreign, a pickle.
    """
    text = _text(path)
    try:
        if not stat.S_ISREG(mode := os.stat(text).st_mode):  # opening a pipe would wait
            what = "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
            raise _read_error(text, what, "give the path of a file that fxprune.save wrote")
        with open(text, "rb", buffering=0) as file:
            return _read(file, text)
    except FileNotFoundError as error:
        raise _read_error(text, "there is no such file", "check the path") from error
    except OSError as error:
        raise _read_error(
            text, error.strerror or str(error), "check the path and its permissions"
        ) from error


def _read(file: FileIO, path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = os.fstat(file.fileno()).st_size
    head = bytearray(min(8, size))
    _fill(file, memoryview(head), path)
    length = int.from_bytes(head, "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _not_safetensors(bytes(head), size, path)
    head += bytearray(length)
    _fill(file, memoryview(head)[8:], path)
    document = _parse(bytes(head[8:]), "its first part", path)
    if not isinstance(document, dict):
        raise _not_safetensors(bytes(head[:8]), size, path)
    text = _our_metadata(document.pop(METADATA, None), document, path)
    header = _parse(text, f"its `{KEY}` metadata", path)
    if not isinstance(header, dict) or not isinstance(digest := header.pop("sha256", None), str):
        raise _read_error(path, f"its `{KEY}` metadata is not an object with `sha256`", _DAMAGED)
    specs = {name: _spec(name, entry, path) for name, entry in document.items()}
    prefix, total = _prefix(specs, _canonical({**header, "sha256": digest}))
    if prefix != head:
        raise _read_error(path, "its first part is not as fxprune writes it", _DAMAGED)
    if size != len(prefix) + total:
        why = f"it has {size} bytes and should have {len(prefix) + total}"
        raise _read_error(path, f"it is truncated or has grown: {why}", _DAMAGED)
    tensors = {}
    for name in _file_order(specs):
        tag, shape = specs[name]
        try:
            tensors[name] = torch.empty(shape, dtype=DTYPES[tag])
        except RuntimeError as error:  # out of memory, or a shape that torch cannot have
            why = f"tensor {name!r} of shape {list(shape)}: {error}"
            raise _read_error(path, why, "free some memory, or get the file again") from error
        _fill(file, _raw(tensors[name]), path)
    if _digest(tensors, _canonical(header)) != digest:
        raise _read_error(path, "its SHA-256 does not match: some bytes have changed", _DAMAGED)
    return header, {name: tensors[name] for name in sorted(tensors)}


_DAMAGED = "the file is damaged: get it again, or save it again"


def _read_error(path: str, why: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read `{Path(path).name}`", where=os.path.abspath(path), why=why, fix=fix
    )


def _not_safetensors(head: bytes, size: int, path: str) -> CheckpointError:
    """Say what the file may be instead, from its first bytes."""
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5"):
        kind = "a zip archive, as torch.save writes" if head[:1] == b"P" else "a pickle"
        return _read_error(
            path,
            f"it is {kind}, not a safetensors file; fxprune never unpickles",
            "load plain weights into the original model with model.load_state_dict("
            "torch.load(path, weights_only=True)); keep pruned models with fxprune.save",
        )
    if size == 0:
        return _read_error(path, "it is empty", _DAMAGED)
    return _read_error(
        path,
        "it is not a safetensors file, or a truncated one",
        "give the path of a file that fxprune.save wrote",
    )


def _our_metadata(metadata: object, entries: Mapping[str, object], path: str) -> str:
    """The text under the one key `fxprune`."""
    if not isinstance(metadata, dict) or KEY not in metadata:
        if all(isinstance(e, dict) and "data_offsets" in e for e in entries.values()):
            raise _read_error(
                path,
                "this is a safetensors file but not one of fxprune's",
                "plain weights are loaded with model.load_state_dict(safetensors.torch."
                "load_file(path)); fxprune.load reads what fxprune.save wrote",
            )
        raise _not_safetensors(b"", -1, path)
    if len(metadata) > 1:
        other = min(k for k in metadata if k != KEY)
        raise _read_error(
            path,
            f"it has more than one metadata key: besides `{KEY}` also {other!r}",
            "another program has rewritten it: get the file that fxprune.save wrote",
        )
    if not isinstance(metadata[KEY], str):
        raise _read_error(path, f"its `{KEY}` metadata is not a string", _DAMAGED)
    return str(metadata[KEY])


def _parse(text: str | bytes, what: str, path: str) -> object:
    try:
        return parse_json(text)
    except PlanError as error:
        detail = f"{error.what} ({error.why})" if error.why else error.what
        raise _read_error(path, f"{what} cannot be read: {detail}", _DAMAGED) from error


def _spec(name: str, entry: object, path: str) -> Spec:
    """Dtype and shape; the offsets follow from all of them and are compared as a whole."""
    if isinstance(entry, dict):
        tag, shape = entry.get("dtype"), entry.get("shape")
        if isinstance(tag, str) and tag not in DTYPES:
            raise _read_error(
                path, f"tensor {name!r} has the unknown dtype {tag[:40]!r}", "upgrade fxprune"
            )
        if isinstance(tag, str) and isinstance(shape, list) and len(shape) <= MAX_DIMS:
            dims = tuple(d for d in shape if type(d) is int and 0 <= d < 1 << 63)
            if len(dims) == len(shape):
                return tag, dims
    raise _read_error(path, f"the entry of tensor {name[:200]!r} is malformed", _DAMAGED)


def _fill(file: FileIO, view: memoryview, path: str) -> None:
    """Read exactly as many bytes as fit; one system call reads at most 2 GB."""
    while len(view):
        count = file.readinto(view)
        if not count:
            raise _read_error(path, "it became shorter while it was read", _DAMAGED)
        view = view[count:]


def _file_order(specs: Mapping[str, Spec]) -> list[str]:
    """Wide dtypes first, so that each tensor is aligned; then by name."""
    return sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))


def _prefix(specs: Mapping[str, Spec], metadata: str) -> tuple[bytes, int]:
    """All that stands before the tensors, and how many bytes these have."""
    header: dict[str, object] = {METADATA: {KEY: metadata}}
    end = 0
    for name in _file_order(specs):
        tag, shape = specs[name]
        begin, end = end, end + math.prod(shape) * DTYPES[tag].itemsize
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
    compact = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    text = compact.encode(errors="surrogatepass")  # names of a damaged file; we write none
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    """SHA-256 of tensors and header.

    Each tensor is a line of JSON, from which follows how many raw bytes come after it; that line
    begins with `[`, the header with `{`. So no two contents give one stream of bytes.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(_dumps([name, _TAGS[t.dtype], list(t.shape)]).encode() + b"\n")
        sha.update(_raw(t))
    sha.update(header.encode())
    return sha.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor: a view, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _dumps(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(header: Mapping[str, object]) -> str:
    """The one text of a header; CheckpointError if it could not be read back."""
    try:
        return _dumps(plain_json(dict(header), "header"))
    except PlanError as error:
        raise CheckpointError(
            "cannot save: the header is not JSON",
            where=error.where,
            why=f"{error.what.removeprefix('bad plan: ')}: {error.why}",
            fix="use only dicts with string keys, lists, strings, finite numbers, booleans, None",
        ) from error


def _check_name(name: object) -> None:
    why = None
    if not isinstance(name, str):
        why = f"a name is a string, not {type(name).__name__}"
    elif name == METADATA:
        why = "safetensors keeps that name for itself"
    else:
        try:
            name.encode()
        except UnicodeEncodeError:
            why = "UTF-8 cannot hold it"
    if why:
        raise CheckpointError(
            f"cannot save a tensor named {name!r}", where="tensors", why=why, fix="rename it"
        )


def _host(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, or CheckpointError."""
    fix = "convert it first"
    if not isinstance(tensor, Tensor):
        why, fix = f"it is a {type(tensor).__name__}, not a tensor", "save it in the header"
    elif tensor.is_meta:
        why, fix = "it is on the meta device and has no data", "load the weights first"
    elif tensor.is_quantized:
        why, fix = "it is quantized", "dequantize it first"
    elif tensor.layout != torch.strided:
        why, fix = f"it is sparse ({tensor.layout})", "make it dense first: tensor.to_dense()"
    elif hasattr(tensor, "full_tensor"):
        why, fix = "it is sharded (DTensor)", "gather it first: tensor.full_tensor()"
    elif tensor.dtype not in _TAGS:
        why = f"the file format has no {str(tensor.dtype).removeprefix('torch.')}"
    elif tensor.dim() > MAX_DIMS:
        why = f"it has {tensor.dim()} dimensions; at most {MAX_DIMS} are supported"
    else:
        try:
            host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            _raw(host)
            return host
        except (RuntimeError, TypeError, NotImplementedError) as error:  # subclasses, dead devices
            why = f"its bytes cannot be had: {error}"
    raise CheckpointError(f"cannot save tensor `{name}`", where=name, why=why, fix=fix)
