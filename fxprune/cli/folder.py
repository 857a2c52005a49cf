"""The folder of a run: what it was started with, what is known so far, and what it gave.

Promise: `run.json` says what to type to get the same again. A run that was stopped, by whatever,
         goes on when the same command is given again: scores that are known are not measured anew.
         Only files of fxprune's own names are ever replaced or removed. With `--restart` they are
         kept until the new run has something to show.
Refuses: a folder with a finished run, with a run of other settings, or in which another run is at
         work; `--restart` replaces the first two.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fxprune.checkpoint import atomic_write
from fxprune.cli.console import say
from fxprune.errors import CheckpointError, FxPruneError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

RECORD = "run.json"
RESULTS = {
    "net.safetensors": "weights and plan; fxprune.load reads it",
    "net.onnx": "for ONNX Runtime",
    "net.pt2": "for torch.export.load",
    "plan.json": "which channels stay; fxprune.apply replays it",
    "report.json": "everything measured, for programs",
    "report.html": "open it in a browser",
    "sensitivity.json": "every score of the scan, for programs",
    "sensitivity.html": "open it in a browser",
    "ratios.json": "what the layers bear: compile --ratio @ratios.json",
    RECORD: "the command, versions and settings",
}
_ASIDE = ".replaced"  # the files of an earlier run, until the new one has some of its own
_WORKING = ("sensitivity.jsonl", *(f"checkpoint-{i}.safetensors" for i in range(1, 100)))
# Settings that change what is told, or where and how fast, but not what comes out.
_BESIDE = (
    "out",
    "as_json",
    "debug",
    "resume",
    "threads",
    "workers",
    "data_dir",
    "latency",
    "latency_batch",
    "export",
    "drop",
)
SCHEMA_VERSION = 1


@dataclass
class Run:
    """One command at work in its folder.

    record: what `run.json` holds. resumed: whether an earlier process began it.
    """

    folder: Path
    record: dict[str, Any]
    resumed: bool = False
    began: float = field(default_factory=time.perf_counter)

    @property
    def scores(self) -> dict[str, float]:
        """Score by stage, in the order measured."""
        return {k: math.nan if v is None else v for k, v in self.record["scores"].items()}

    def score(self, stage: str, measure: Callable[[], float]) -> tuple[float, bool]:
        """The score of a stage, measured unless it is known from before (then: True)."""
        if stage in self.record["scores"]:
            return self.scores[stage], True
        value = float(measure())
        self.record["scores"][stage] = value if math.isfinite(value) else None
        self.write()
        return value, False

    @property
    def finished(self) -> bool:
        """Whether all of it is done and written."""
        return bool(self.record["state"] == "finished")

    def checkpoint(self, number: int) -> Path:
        """Where the training after the cut of that number keeps its state."""
        return self.folder / f"checkpoint-{number}.safetensors"

    def put(self, name: str, text: str) -> Path:
        """Write one of the `RESULTS`, whole or not at all."""
        atomic_write(self.folder / name, text.encode())
        return self.folder / name

    def write(self) -> None:
        """Bring `run.json` up to date."""
        self.record["seconds"] = round(self._earlier + time.perf_counter() - self.began, 1)
        self.put(RECORD, json.dumps(self.record, indent=2, allow_nan=False) + "\n")

    def finish(self) -> None:
        """All is written: the state of the training is needed no more."""
        self.record["state"] = "finished"
        self.write()
        for path in self.folder.glob("checkpoint-*.safetensors"):
            if path.name in _WORKING:
                path.unlink()

    def files(self) -> dict[str, str]:
        """The names of what the folder holds, with what each file is for."""
        return {name: why for name, why in RESULTS.items() if (self.folder / name).is_file()}

    def __post_init__(self) -> None:
        self._earlier = float(self.record.get("seconds") or 0.0)


@contextlib.contextmanager
def opened(
    folder: Path,
    command: str,
    words: Sequence[str],
    settings: Mapping[str, Any],
    *,
    resume: bool | None,
    inputs: Mapping[str, Path | None],
) -> Iterator[Run]:
    """The run of a folder, begun or gone on with; a stop inside says how to go on.

    words: the command line. settings: all options by name. inputs: files that it reads, by option.
    resume: None goes on with an unfinished run and refuses a finished one; True gives a finished
    one as it is; False removes what an earlier run left, once the new one has written something.
    FxPruneError when the folder holds something that must not be replaced.
    """
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        fresh = _record(command, words, settings, inputs)
        _recover(folder)
        with _set_aside(folder) if resume is False else contextlib.nullcontext():
            run = _continued(folder, fresh, bool(resume))
            if run is None:
                run = Run(folder, fresh)
                run.write()
            try:
                yield run
            except KeyboardInterrupt:
                if resume is not False or _started(folder):
                    say(f"what was done is kept in {folder}: the same command goes on from there")
                raise
            except BaseException:  # a user's model may call sys.exit
                if not run.resumed and not _started(folder):
                    _forget(folder, new)
                raise


@contextlib.contextmanager
def _set_aside(folder: Path) -> Iterator[None]:
    """Inside, the folder holds nothing of an earlier run; it is back when the new one did nothing."""
    names = [n for n in (*_WORKING, *RESULTS) if (folder / n).exists()]  # `run.json` last
    if not names:
        yield
        return
    (folder / _ASIDE).mkdir(exist_ok=True)
    for name in names:
        os.replace(folder / name, folder / _ASIDE / name)
    try:
        yield
    finally:
        _recover(folder)


def _recover(folder: Path) -> None:
    """What was set aside comes back, or goes when the new run has something of its own."""
    aside = folder / _ASIDE
    if not aside.is_dir():
        return
    if not _started(folder):  # guard: the old run -> tests/cli/test_compile.py -k fails_restarted
        (folder / RECORD).unlink(missing_ok=True)
        for name in (*_WORKING, *RESULTS):
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
    shutil.rmtree(aside, ignore_errors=True)


def _started(folder: Path) -> bool:
    """Whether there is more than a record: something that took its time."""
    return any((folder / name).exists() for name in (*_WORKING, *RESULTS) if name != RECORD)


def _forget(folder: Path, new: Sequence[Path]) -> None:
    """A run that failed before it did anything must not stand in the way of the next."""
    (folder / RECORD).unlink(missing_ok=True)
    for made in new:
        with contextlib.suppress(OSError):  # somebody put something there
            made.rmdir()


def _continued(folder: Path, fresh: dict[str, Any], finished_too: bool) -> Run | None:
    """The run that the folder holds, if any; FxPruneError when it is not this one."""
    path = folder / RECORD
    if not path.exists():
        there = [name for name in RESULTS if (folder / name).exists()]
        if there:  # guard: unknown files stay -> tests/cli/test_compile.py -k unknown_origin
            raise _occupied(folder, f"it holds {', '.join(there)}")
        return None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        _check(old)  # guard: damaged records -> tests/cli/test_compile.py -k of_other_kinds
        state, settings = old["state"], old["settings"]
    except (OSError, ValueError, RecursionError) as error:
        raise _occupied(folder, f"its {RECORD} cannot be read: {error}") from error
    if state != "finished" and not old["scores"] and not _started(folder):
        return None  # killed before it did anything
    if (
        state == "finished" and not finished_too
    ):  # guard: finished runs stay -> tests/cli/test_compile.py -k finished
        raise _occupied(folder, f"it holds a finished run: {old.get('line')}")
    differing = _differences(settings, fresh["settings"])
    if old["command"] != fresh["command"]:
        differing.insert(0, f"command {old['command']}, now {fresh['command']}")
    if differing:  # guard: runs do not mix -> tests/cli/test_compile.py -k other_weights
        state = "a finished" if state == "finished" else "an unfinished"
        why = f"it holds {state} run with other settings: {'; '.join(differing[:4])}"
        raise _occupied(folder, why)
    return Run(folder, old, resumed=True)


def _check(record: Any) -> None:
    """ValueError unless that is what a run writes."""
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError("it is of another version")
    kinds = {"command": str, "state": str, "settings": dict, "scores": dict, "seconds": float}
    for key, kind in kinds.items():
        value = record.get(key)
        if not (_is_number(value) if kind is float else isinstance(value, kind)):
            raise ValueError(f"its `{key}` is {_shown(value)}")
    for stage, score in record["scores"].items():
        if score is not None and not _is_number(score):
            raise ValueError(f"its score `{stage}` is {_shown(score)}")


def _is_number(value: object) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)  # type: ignore[arg-type]


def _occupied(folder: Path, why: str) -> FxPruneError:
    return FxPruneError(
        f"the folder {folder} is not written over",
        why=why,
        fix="choose another with --out, or replace what is there with --restart",
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"--{key.replace('_', '-')} {_shown(old.get(key))}, now {_shown(new.get(key))}"
        for key in [*new, *(k for k in old if k not in new)]
        if key not in _BESIDE and old.get(key) != new.get(key)
    ]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _record(
    command: str,
    words: Sequence[str],
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | None],
) -> dict[str, Any]:
    plain = {key.strip("_"): _plain(value) for key, value in settings.items()}
    for option, file in inputs.items():
        if file is not None:
            plain[f"{option.strip('-').lower()}_sha256"] = _digest(file)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "line": shlex.join(["fxprune", *words]),
        "state": "unfinished",
        "seed": plain.get("seed"),
        "settings": plain,
        "versions": _versions(),
        "platform": platform.platform(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "scores": {},
    }


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened_file:
            return file_digest(opened_file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"the file cannot be read: {error.strerror}", where=str(file)
        ) from error


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fxprune", "torch", "torchvision", "timm", "numpy", "scikit-learn"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder for this process alone; the lock vanishes with the process, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # guard: one run a folder -> tests/cli/test_compile.py -k two_runs
            raise FxPruneError(
                f"another fxprune is at work in {folder}",
                fix="wait for it, or choose another folder with --out",
            ) from None
        except OSError as error:  # a file system without locks
            print(f"fxprune: {folder} cannot be locked: {error.strerror}", file=sys.stderr)
        yield
    finally:
        os.close(handle)
