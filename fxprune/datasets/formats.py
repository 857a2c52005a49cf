"""The binary formats of small public data sets, read into uint8 tensors.

Promise: a file is read once, and what is returned has been checked: its size, its MD5 where one is
         published, the range of its labels.
Refuses: a file of another size or sum, or with a label out of range, with DataError that gives both
         the found and the wanted.
Source:  the CIFAR page's "binary version" (Krizhevsky 2009); the idx format of the MNIST page
         (LeCun et al. 1998), which Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) shares.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxprune.errors import DataError

_SIDE = 32  # of a CIFAR image


def md5(path: Path) -> str:
    """The MD5 of a file, in hexadecimal: of damage it tells, of malice it does not."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def read_cifar(
    path: Path, records: int, limits: Sequence[int], published: str | None, source: str
) -> tuple[Tensor, Tensor]:
    """Images uint8 [records, 3, 32, 32] and labels int64 [records] of a CIFAR `.bin` file.

    A record is one byte per label, the last of them the one that is returned, and 3 x 32 x 32
    bytes, red before green before blue. Labels lie below their `limits`. `published` is the MD5
    of the file, None where there is none; `source` says where a good one comes from.
    DataError for a file that is not so.
    """
    length = len(limits) + 3 * _SIDE * _SIDE
    data = _checked(path, _bytes_of(path, source), records * length, published, source)
    table = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(records, length)
    labels = table[:, : len(limits)].long()
    for column, limit in zip(labels.T, limits, strict=True):
        _check_range(path, column, limit, source)
    images = table[:, len(limits) :].reshape(records, 3, _SIDE, _SIDE)
    return images, labels[:, -1].contiguous()


def read_idx(path: Path, shape: tuple[int, ...], published: str | None, source: str) -> Tensor:
    """The bytes of an idx file, uint8 of that shape; a name that ends in `.gz` is unpacked first.

    `published` is the MD5 of what it holds unpacked: archives of the same bytes differ in their
    headers. DataError for another size, sum or shape, or for an archive that cannot be unpacked.
    """
    data = _bytes_of(path, source)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, f"it cannot be unpacked: {error}", source) from error
    header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
    total = len(header) + int(torch.Size(shape).numel())
    data = _checked(path, data, total, published, source)
    if not data.startswith(header):  # guard: idx header -> tests/datasets/test_formats.py -k header
        raise _damaged(path, f"its header is not that of bytes {list(shape)}", source)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=len(header)).view(shape)


def read_idx_labels(path: Path, count: int, limit: int, published: str, source: str) -> Tensor:
    """The labels int64 [count] of an idx file, each below `limit`; DataError as for `read_idx`."""
    labels = read_idx(path, (count,), published, source).long()
    _check_range(path, labels, limit, source)
    return labels


def _bytes_of(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"`{path.name}` cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            fix=f"make it readable, or get it from {source}",
        ) from error


def _checked(path: Path, data: bytes, size: int, published: str | None, source: str) -> bytes:
    """The data, if it has that size and sum."""
    wrong = []
    if (
        len(data) != size
    ):  # guard: size of a data file -> tests/datasets/test_formats.py -k truncated
        wrong.append(f"it holds {len(data):,} bytes instead of {size:,}")
    found = _md5(data).hexdigest() if published else None
    if found != published:  # guard: sum of a data file -> tests/datasets/test_formats.py -k sum
        wrong.append(f"its MD5 is {found}, the published one {published}")
    if wrong:
        raise _damaged(path, "; ".join(wrong), source)
    return data


def _check_range(path: Path, labels: Tensor, limit: int, source: str) -> None:
    bad = (labels >= limit).nonzero().flatten().tolist()
    if bad:  # guard: label in range -> tests/datasets/test_formats.py -k range
        why = f"record {bad[0]} has the label {labels[bad[0]]}; labels are 0 ... {limit - 1}"
        raise _damaged(path, why, source)


def _damaged(path: Path, why: str, source: str) -> DataError:
    return DataError(
        f"`{path.name}` is damaged",
        where=str(path),
        why=why,
        fix=f"delete it, and it comes anew from {source}",
    )


def _md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)
