"""Binary formats: what is read, and every kind of damage by its words."""

from __future__ import annotations

import gzip
import hashlib
import os

import pytest
import torch
from fake_data import cifar_records, idx

from fxprune.datasets.formats import md5, read_cifar, read_idx, read_idx_labels
from fxprune.errors import DataError

SOURCE = "http://where.example/it.tar.gz"


def refused(call):
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("limits", [(10,), (20, 100)])
@pytest.mark.parametrize("summed", [True, False])
def test_a_cifar_file_comes_back(tmp_path, limits, summed):
    data, images, labels = cifar_records(5, limits)
    path = tmp_path / "batch.bin"
    path.write_bytes(data)
    published = hashlib.md5(data).hexdigest() if summed else None
    got = read_cifar(path, 5, limits, published, SOURCE)
    assert (got[0].dtype, got[1].dtype) == (torch.uint8, torch.int64)
    assert torch.equal(got[0], images)
    assert torch.equal(got[1], labels[-1])


def test_a_wrong_sum_is_told_with_both(tmp_path):
    path = tmp_path / "batch.bin"
    data = cifar_records(5, (10,))[0]
    path.write_bytes(data[:-1] + b"\x00")
    text = refused(lambda: read_cifar(path, 5, (10,), hashlib.md5(data).hexdigest(), SOURCE))
    assert text == (
        "`batch.bin` is damaged\n"
        f"  where: {path}\n"
        f"  why:   its MD5 is {md5(path)}, the published one {hashlib.md5(data).hexdigest()}\n"
        f"  fix:   delete it, and it comes anew from {SOURCE}"
    )


def test_a_truncated_file_is_told_with_both_sizes(tmp_path):
    path = tmp_path / "batch.bin"
    path.write_bytes(cifar_records(5, (10,))[0][:-1])
    text = refused(lambda: read_cifar(path, 5, (10,), None, SOURCE))
    assert "it holds 15,364 bytes instead of 15,365" in text
    text = refused(lambda: read_cifar(path, 5, (10,), "0" * 32, SOURCE))
    assert "instead of 15,365; its MD5 is " in text
    path.write_bytes(b"")
    assert "it holds 0 bytes" in refused(lambda: read_cifar(path, 5, (10,), None, SOURCE))


@pytest.mark.parametrize(
    ("limits", "column", "label", "words"),
    [
        ((10,), 0, 10, "record 2 has the label 10; labels are 0 ... 9"),
        ((20, 100), 0, 20, "record 2 has the label 20; labels are 0 ... 19"),
        ((20, 100), 1, 255, "record 2 has the label 255; labels are 0 ... 99"),
    ],
)
def test_a_label_out_of_range(tmp_path, limits, column, label, words):
    data = bytearray(cifar_records(5, limits)[0])
    data[2 * (3072 + len(limits)) + column] = label
    path = tmp_path / "batch.bin"
    path.write_bytes(data)
    text = refused(lambda: read_cifar(path, 5, limits, None, SOURCE))
    assert "`batch.bin` is damaged" in text
    assert words in text


@pytest.mark.parametrize("packed", [True, False])
def test_an_idx_file_comes_back(tmp_path, packed):
    images = torch.randint(256, (6, 4, 5), dtype=torch.uint8)
    data = idx(images)
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(data) if packed else data)
    sums = (None, hashlib.md5(data).hexdigest())  # of what it holds, however it was packed
    assert all(torch.equal(read_idx(path, (6, 4, 5), s, SOURCE), images) for s in sums)


def test_labels_of_an_idx_file_and_their_range(tmp_path):
    labels = torch.tensor([3, 0, 9], dtype=torch.uint8)
    path, data = tmp_path / "labels", idx(labels)
    path.write_bytes(data)
    published = hashlib.md5(data).hexdigest()
    got = read_idx_labels(path, 3, 10, published, SOURCE)
    assert got.dtype == torch.int64
    assert got.tolist() == [3, 0, 9]
    text = refused(lambda: read_idx_labels(path, 3, 9, published, SOURCE))
    assert "record 2 has the label 9; labels are 0 ... 8" in text


def test_an_idx_file_with_another_header(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx(torch.zeros(6, 5, 4, dtype=torch.uint8)))
    text = refused(lambda: read_idx(path, (6, 4, 5), None, SOURCE))
    assert "its header is not that of bytes [6, 4, 5]" in text


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not gzip", lambda b: b[:12] + b"\xff" * 20 + b[32:]])  # fmt: skip
def test_an_archive_that_cannot_be_unpacked(tmp_path, damage):
    path = tmp_path / "images.gz"
    images = torch.randint(256, (6, 4, 5), dtype=torch.uint8)
    path.write_bytes(damage(gzip.compress(idx(images))))
    text = refused(lambda: read_idx(path, (6, 4, 5), None, SOURCE))
    assert "`images.gz` is damaged" in text
    assert "it cannot be unpacked: " in text


def test_a_truncated_idx_file(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx(torch.zeros(6, 4, 5, dtype=torch.uint8))[:-7])
    text = refused(lambda: read_idx(path, (6, 4, 5), None, SOURCE))
    assert "it holds 129 bytes instead of 136" in text


def test_a_file_that_cannot_be_read(tmp_path):
    text = refused(lambda: read_cifar(tmp_path / "none.bin", 1, (10,), None, SOURCE))
    assert "`none.bin` cannot be read" in text
    assert os.strerror(2) in text
    (tmp_path / "folder.bin").mkdir()
    text = refused(lambda: read_cifar(tmp_path / "folder.bin", 1, (10,), None, SOURCE))
    assert f"why:   {os.strerror(21)}" in text
    assert f"fix:   make it readable, or get it from {SOURCE}" in text
