"""Archives of public data sets: fetched where there is a network, checked, unpacked.

Promise: a file under its own name is whole: it is fetched under another, checked against its
         published MD5, and then renamed; members of an archive likewise. After an error or Ctrl-C
         nothing half there is left. What is there is never overwritten.
Refuses: another sum, an answer that breaks off, an archive with members outside of its folder.
         Without a network the error says what to fetch, with its MD5, and where to put it.
"""

from __future__ import annotations

import http.client
import os
import secrets
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fxprune.datasets.formats import md5
from fxprune.errors import DataError

_TIMEOUT = 30.0  # seconds without an answer, or without another byte
_CHUNK = 1 << 20  # bytes
_NO_ANSWER = (
    OSError,
    http.client.HTTPException,
)  # what a connection raises; URLError is an OSError


@dataclass(frozen=True)
class Remote:
    """A file on a server: its address, and the MD5 that is published for it."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


def fetch(remote: Remote, folder: Path, title: str, also: str = "") -> Path:
    """`folder / remote.name`, downloaded and checked; one that is already there is not touched.

    title: the data set, and also: what else to say of how to get it, for messages. A bar on stderr shows how far it is, on a terminal.
    DataError when it cannot be had, cannot be written, or has another MD5.
    """
    target = folder / remote.name
    if os.path.exists(target):  # unlike Path.exists, False where one may not look
        return target
    try:
        # The folder is made when the server has answered: no network, no empty folders.
        answer = urllib.request.urlopen(remote.url, timeout=_TIMEOUT)
    except _NO_ANSWER as error:  # guard: offline -> tests/datasets -k "network or 404"
        raise _unreachable(remote, folder, title, also, error) from error
    with answer, _temporary(folder, remote.name) as (file, path):
        length = answer.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else 0
        with _bar(remote.name, size) as advance:
            while True:
                try:
                    chunk = answer.read(_CHUNK)
                except _NO_ANSWER as error:
                    raise _unreachable(remote, folder, title, also, error) from error
                if not chunk:
                    break
                file.write(chunk)
                advance(len(chunk))
        done = file.tell()
        file.close()
        if done < size:  # guard: broken off -> tests/datasets/test_downloads.py -k breaks
            short = OSError(f"the answer broke off after {done:,} of {size:,} bytes")
            raise _unreachable(remote, folder, title, also, short)
        found = md5(path)
        if (
            found != remote.md5
        ):  # guard: fetched sum -> tests/datasets/test_downloads.py -k wrong_sum
            raise DataError(
                f"what came as `{remote.name}` is not the published file",
                where=remote.url,
                why=f"its MD5 is {found}, the published one {remote.md5}; nothing was kept",
                fix="try again; if it stays so, something between here and the server changes it",
            )
        os.replace(path, target)
    return target


def unpack(remote: Remote, root: Path, top: str, wanted: Sequence[str], title: str) -> None:
    """Put the `wanted` members, or all, of the archive's folder `top` below `root / top`.

    The archive is `root / remote.name`; it is fetched when it is not there, and then removed
    after unpacking. Members that are there already stay as they are.
    DataError as for `fetch`, and for an archive that is damaged or lacks a wanted member.
    """
    own = os.path.exists(root / remote.name)
    archive = fetch(remote, root, title, ", where it is unpacked by itself")
    found = md5(archive) if own else remote.md5
    if found != remote.md5:  # guard: own archive -> tests/datasets/test_downloads.py -k damaged
        raise DataError(
            f"`{archive.name}` is damaged",
            where=str(archive),
            why=f"its MD5 is {found}, the published one {remote.md5}",
            fix=f"delete it, and it comes anew from {remote.url}",
        )
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{top}-") as aside:
            try:
                _extract(archive, Path(aside))
            except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
                raise DataError(
                    f"`{archive.name}` cannot be unpacked",
                    where=str(archive),
                    why=str(error),
                    fix=f"delete it, and it comes anew from {remote.url}",
                ) from error
            _move(Path(aside) / top, root / top, wanted, archive)
    except OSError as error:
        raise _unwritable(root, error) from error
    if not own:
        archive.unlink(missing_ok=True)


def _extract(archive: Path, folder: Path) -> None:
    """Everything in a tar or zip archive, nothing of it outside of the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as members:
            members.extractall(folder)  # it takes `..` and leading slashes off names by itself
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def _move(source: Path, target: Path, wanted: Sequence[str], archive: Path) -> None:
    """A folder, or what is missing of it, to its place; each file at once or not at all."""
    lacking = [name for name in wanted if not (source / name).exists()]
    if lacking or not source.is_dir():
        raise DataError(
            f"`{archive.name}` does not hold `{'/'.join([source.name, *lacking[:1]])}`",
            where=str(archive),
            why="it is another archive than its name says",
        )
    if not target.exists():
        os.replace(source, target)
        return
    for name in wanted:
        if not (target / name).exists():
            os.replace(source / name, target / name)


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[tuple[IO[bytes], Path]]:
    """A file in the folder under a name that nobody looks for; it is gone afterwards."""
    path = folder / f".{name}-{secrets.token_hex(4)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:  # unlike tempfile's, it is for whom the umask lets read it
            yield file, path
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        with suppress(OSError):
            path.unlink()


def _unreachable(
    remote: Remote, folder: Path, title: str, also: str, error: Exception
) -> DataError:
    reason: object = error
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        reason = error.reason
    return DataError(
        f"{title} is not here, and could not be downloaded",
        where=str(folder),
        why=f"{remote.url}: {reason}",
        fix=f"get {remote.url} (MD5 {remote.md5}) wherever there is a network, and put it into "
        f"{folder}{also}; or say where the data is: root=..., or the variable FXPRUNE_DATA",
    )


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        "the data cannot be written",
        where=str(folder),
        why=error.strerror or str(error),
        fix="pass another root=..., or set the variable FXPRUNE_DATA; or make room there",
    )


@contextmanager
def _bar(name: str, size: int) -> Iterator[Any]:
    """What is told of every chunk that came: a bar on a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(f"fetching {name}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(name, total=size or None)
        yield lambda count: bar.advance(task, count)
