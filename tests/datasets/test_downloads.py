"""Downloads: whole files under their own names or nothing at all, and words for what went wrong."""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import os
import stat
import tarfile
import threading

import pytest
from fake_data import nobody_there, served, tar_of, tree, write, zip_of

from fxprune.datasets import downloads
from fxprune.datasets.downloads import Remote, fetch, unpack
from fxprune.errors import DataError

DATA = bytes(range(256)) * 20


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def md5(data):
    return hashlib.md5(data).hexdigest()


def refused(call):
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def test_a_file_is_fetched_once(tmp_path):
    with served({"set/a.gz": DATA}) as (home, asked):
        remote = Remote(f"{home}set/a.gz", md5(DATA))
        for _ in range(2):
            assert fetch(remote, tmp_path / "new" / "folder", "A") == tmp_path / "new/folder/a.gz"
        assert asked == ["/set/a.gz"]
    assert tree(tmp_path) == ["new/folder/a.gz"]
    assert (tmp_path / "new/folder/a.gz").read_bytes() == DATA


def test_others_may_read_what_was_fetched(tmp_path):
    with served({"a.gz": DATA}) as (home, _):
        path = fetch(Remote(f"{home}a.gz", md5(DATA)), tmp_path, "A")
    (tmp_path / "mine").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "mine").stat().st_mode)


def test_what_is_there_is_not_touched(tmp_path):
    write(tmp_path, {"a.gz": "mine"})
    assert fetch(Remote("http://nowhere.invalid/a.gz", "0"), tmp_path, "A").read_text() == "mine"


def test_a_wrong_sum_keeps_nothing(tmp_path):
    with served({"a.gz": DATA}) as (home, _):
        text = refused(lambda: fetch(Remote(f"{home}a.gz", "0" * 32), tmp_path, "A"))
    assert "what came as `a.gz` is not the published file" in text
    assert f"its MD5 is {md5(DATA)}, the published one {'0' * 32}; nothing was kept" in text
    assert f"where: {home}a.gz" in text
    assert tree(tmp_path) == []


def test_an_answer_that_breaks_off_keeps_nothing(tmp_path):
    with served({"a.gz": DATA}, short=20) as (home, _):
        text = refused(lambda: fetch(Remote(f"{home}a.gz", md5(DATA)), tmp_path, "A"))
    assert "A is not here, and could not be downloaded" in text
    assert f"{home}a.gz: the answer broke off after 5,100 of 5,120 bytes" in text
    assert tree(tmp_path) == []


def test_an_answer_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.2)
    event = threading.Event()
    with served({"a.gz": DATA}, wait=event) as (home, _):
        text = refused(lambda: fetch(Remote(f"{home}a.gz", md5(DATA)), tmp_path, "A"))
        event.set()
    assert f"{home}a.gz: timed out" in text
    assert tree(tmp_path) == []


def test_no_network_says_what_to_put_where(tmp_path):
    folder, home = tmp_path / "data", nobody_there()
    text = refused(lambda: fetch(Remote(f"{home}a.gz", "1234"), folder, "Fashion"))
    assert text == (
        "Fashion is not here, and could not be downloaded\n"
        f"  where: {folder}\n"
        f"  why:   {home}a.gz: [Errno {errno.ECONNREFUSED}] Connection refused\n"
        f"  fix:   get {home}a.gz (MD5 1234) wherever there is a network, and put it into {folder}; "
        "or say where the data is: root=..., or the variable FXPRUNE_DATA"
    )
    assert not folder.exists()


def test_404(tmp_path):
    with served({}) as (home, _):
        text = refused(lambda: fetch(Remote(f"{home}a.gz", "1234"), tmp_path / "data", "A"))
    assert f"{home}a.gz: HTTP Error 404: Not Found" in text
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_keeps_nothing(tmp_path, monkeypatch, error):
    def read(self, amount):
        if self.length < len(DATA):
            raise error
        return original(self, 7)

    original = http.client.HTTPResponse.read
    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    with served({"a.gz": DATA}) as (home, _), pytest.raises(error):
        fetch(Remote(f"{home}a.gz", md5(DATA)), tmp_path, "A")
    assert tree(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with served({"a.gz": DATA}) as (home, _):
        text = refused(lambda: fetch(Remote(f"{home}a.gz", md5(DATA)), tmp_path / "file/x", "A"))
    assert "the data cannot be written" in text
    assert f"why:   {os.strerror(20)}" in text


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(downloads.os, "replace", full)
    with served({"a.gz": DATA}) as (home, _):
        text = refused(lambda: fetch(Remote(f"{home}a.gz", md5(DATA)), tmp_path, "A"))
    assert f"why:   {os.strerror(28)}" in text
    assert "make room there" in text
    assert tree(tmp_path) == []


@pytest.mark.parametrize(("pack", "name"), [(tar_of, "set.tar.gz"), (zip_of, "set.zip")])
def test_a_fetched_archive_is_unpacked_and_removed(tmp_path, pack, name):
    archive = pack({"top/a.bin": b"a", "top/b.bin": b"b", "other/c": b"c"})
    with served({name: archive}) as (home, _):
        unpack(Remote(f"{home}{name}", md5(archive)), tmp_path, "top", ("a.bin",), "A")
    assert tree(tmp_path) == ["top/a.bin", "top/b.bin"]
    assert list(tmp_path.iterdir()) == [tmp_path / "top"]


@pytest.mark.parametrize(("pack", "name"), [(tar_of, "set.tar.gz"), (zip_of, "set.zip")])
def test_ones_own_archive_is_unpacked_and_kept(tmp_path, pack, name):
    archive = pack({"top/a.bin": b"a"})
    write(tmp_path, {name: archive})
    unpack(Remote(f"http://nowhere.invalid/{name}", md5(archive)), tmp_path, "top", ("a.bin",), "A")
    assert tree(tmp_path) == [name, "top/a.bin"]


def test_what_lies_there_unpacked_stays(tmp_path):
    archive = tar_of({"top/a.bin": b"a", "top/b.bin": b"b", "top/c.bin": b"c"})
    write(tmp_path, {"set.tgz": archive, "top/a.bin": "mine"})
    remote = Remote("http://nowhere.invalid/set.tgz", md5(archive))
    unpack(remote, tmp_path, "top", ("a.bin", "b.bin"), "A")
    assert tree(tmp_path) == ["set.tgz", "top/a.bin", "top/b.bin"]
    assert (tmp_path / "top/a.bin").read_text() == "mine"


def test_ones_own_archive_that_is_damaged(tmp_path):
    archive = tar_of({"top/a.bin": b"a"})
    write(tmp_path, {"set.tgz": archive[:-1]})
    remote = Remote("http://where.example/set.tgz", md5(archive))
    text = refused(lambda: unpack(remote, tmp_path, "top", ("a.bin",), "A"))
    assert "`set.tgz` is damaged" in text
    assert f"its MD5 is {md5(archive[:-1])}, the published one {md5(archive)}" in text
    assert "delete it, and it comes anew from http://where.example/set.tgz" in text
    assert tree(tmp_path) == ["set.tgz"]


@pytest.mark.parametrize("data", [b"no archive", tar_of({"top/a.bin": DATA})[:60]])
def test_an_archive_that_cannot_be_unpacked(tmp_path, data):
    write(tmp_path, {"set.tgz": data})
    remote = Remote("http://where.example/set.tgz", md5(data))
    text = refused(lambda: unpack(remote, tmp_path, "top", ("a.bin",), "A"))
    assert "`set.tgz` cannot be unpacked" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "set.tgz"]


def test_an_archive_without_what_is_wanted(tmp_path):
    for files, words in (
        ({"top/a.bin": b"a"}, "does not hold `top/b.bin`"),
        ({"else/b.bin": b"b"}, "does not hold `top/b.bin`"),
    ):
        archive = tar_of(files)
        write(tmp_path, {"set.tgz": archive})
        remote = Remote("http://where.example/set.tgz", md5(archive))
        text = refused(lambda remote=remote: unpack(remote, tmp_path, "top", ("b.bin",), "A"))
        assert words in text
        assert list(tmp_path.iterdir()) == [tmp_path / "set.tgz"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "top/../../evil"])
def test_an_archive_writes_nothing_outside(tmp_path, name):
    root = tmp_path / "root"
    for pack, file in ((tar_of, "set.tgz"), (zip_of, "set.zip")):
        archive = pack({"top/a.bin": b"a", name: b"evil"})
        write(root, {file: archive})
        remote = Remote(f"http://where.example/{file}", md5(archive))
        try:
            unpack(remote, root, "top", ("a.bin",), "A")
        except DataError as error:
            assert "cannot be unpacked" in str(error)  # noqa: PT017
        assert all(path.startswith("root/") for path in tree(tmp_path))
        assert not os.path.exists("/evil")


def test_a_link_out_of_an_archive_is_refused(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        link = tarfile.TarInfo("top/a.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../secret"
        tar.addfile(link)
    write(tmp_path, {"set.tgz": out.getvalue()})
    remote = Remote("http://where.example/set.tgz", md5(out.getvalue()))
    text = refused(lambda: unpack(remote, tmp_path, "top", ("a.bin",), "A"))
    assert "`set.tgz` cannot be unpacked" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "set.tgz"]
