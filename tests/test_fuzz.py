"""Readers of files and texts: whatever they get, a result that round-trips, or an error of ours.

Nothing else comes out: no other exception, no example that takes long, none that takes much memory,
no trace on the model. Each property is drawn a few hundred times; the long profile repeats all of
them with fresh seeds for FXPRUNE_FUZZ_SECONDS (600), and prints how many examples that were.
"""

import contextlib
import copy
import functools
import json
import math
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import plan_document
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from refusals import X, facts, net

import fxprune
from fxprune import CheckpointError, FxPruneError, Plan, PlanError, Sensitivity, checkpoint
from fxprune.checkpoint import read_tensors, write_tensors
from fxprune.plan import parse_json, plain_json
from fxprune.report import GroupRow, Report, TimingRow
from fxprune.sensitivity import Curve, Point

SECONDS = float(os.environ.get("FXPRUNE_FUZZ_SECONDS", "600"))
MOST_SECONDS = 2.0  # of processor time, for one example
MOST_BYTES = 1 << 30  # of address space beyond what is there, for one example

PROPERTIES: list[tuple[Callable[..., None], dict[str, Any]]] = []
quick = settings(
    deadline=None,  # `bounded` counts the time of the readers alone
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def fuzzed(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`given`, for the ordinary profile and, with fresh seeds, for the long one."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        PROPERTIES.append((check, strategies))
        return quick(given(**strategies)(check))

    return decorate


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail when the block takes long (or hangs), or asks for much memory."""

    def hangs(*arguments):
        raise AssertionError("this example hangs")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, limits[1]))
    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 60)
    begin = time.process_time()
    try:
        yield
    finally:
        took = time.process_time() - begin
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert took < MOST_SECONDS, f"this example takes {took:.1f} s"


def refused(error: FxPruneError) -> bool:
    """False; the text of a refusal can be printed and is not endless."""
    text = str(error)
    assert len(text) < 20_000
    assert all(line.isprintable() for line in text.splitlines())
    return False


# What is read, while it is right


@functools.cache
def home() -> Path:
    """A folder that goes with the process; in memory, where the system has such a place."""
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    home.folder = folder  # type: ignore[attr-defined]
    return Path(folder.name)


@functools.cache
def saved() -> tuple[bytes, dict[str, Any], dict[str, torch.Tensor]]:
    """A saved network: its bytes, its header and its tensors."""
    torch.manual_seed(0)
    path = home() / "net.safetensors"
    fxprune.save(fxprune.compile(net().eval(), X, progress=False), path)
    return path.read_bytes(), *read_tensors(path)


@functools.cache
def report_document() -> dict[str, Any]:
    """A report with something in every field."""
    report = fxprune.compile(net().eval(), X, progress=False).report
    report.asked, report.notes = {"macs": 0.5}, ["note"]
    report.groups.append(GroupRow("x", 8, 4, ("x.weight",)))
    report.timings.append(TimingRow("pruned", 8, 1.5, 1.25, 2.0))
    report.stages.update(before=0.9, after=math.nan)
    return json.loads(report.to_json())


@functools.cache
def scan_document() -> dict[str, Any]:
    points = (Point(0.1, 7, 0.9), Point(0.5, 4, math.nan))
    scan = Sensitivity("Net", 0.93, (Curve("conv1", 8, "l1 smallest", points),))
    return json.loads(scan.to_json())


# What is done to it


WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
ODD = st.sampled_from(
    [
        None, True, False, 0, 1, 2, -1, 5, 1.0, 0.5, 1e308, 1 << 31, 1 << 63, 1 << 64, 10**400, "", "a",
        "0.weight", "3.weight", "1.running_mean", "conv", "cut", "changed", "all", "in", "\ud800", "\0", "..",
        "/etc/passwd", "[bold]", "x" * 1000, [], {}, [0], [0, 1], [[0]], [[]], [None], {"a": 1},
        {"name": "x"}, {"macs": 1}, float("nan"), float("inf"), -float("inf"),
    ]
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "insert", "copy", "rename"]), st.integers(0, 9) | ODD | VALUES),
    max_size=3,
)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 20),
        st.integers(0, 4) | st.integers(0, 5000),
        st.binary(max_size=9) | st.sampled_from(list(b'[]{}",:0123456789eE-.tfn\\')).map(lambda b: bytes([b])),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def mutated(document: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A copy with each change made at one of its places; a change that cannot be is left out."""
    document = copy.deepcopy(document)
    for n, change, value in changes:
        found = [p for p in places(document) if p]
        if not found:
            break
        *parents, last = found[n % len(found)]
        parent, value = at(document, tuple(parents)), copy.deepcopy(value)
        if change == "delete":
            del parent[last]
        elif change == "copy":
            parent[last] = copy.deepcopy(at(document, found[(n * 31 + 7) % len(found)]))
        elif change == "insert" and isinstance(parent, list):
            parent.insert(last, value)
        elif change == "rename" and isinstance(parent, dict) and isinstance(value, str):
            parent[value] = parent.pop(last)
        else:
            parent[last] = value
    return document


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Some bytes taken out at some places, others put in."""
    for begin, drop, put in edits:
        begin %= len(data) or 1
        data = data[:begin] + put + data[begin + drop :]
    return data


# Plans


def reads_or_refuses(read: Callable[[Any], Plan], given_: Any) -> bool:
    """A plan whose text reads back as the same plan, or PlanError; nothing else."""
    with bounded():
        try:
            plan = read(given_)
        except PlanError as error:
            return refused(error)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    return True


@fuzzed(changes=CHANGES)
def test_plans_with_changes(changes):
    data = mutated(plan_document(), changes)
    read = reads_or_refuses(Plan.from_dict, data)
    assert read or changes
    reads_or_refuses(Plan.from_json, json.dumps(data))


@fuzzed(edits=EDITS)
def test_plans_with_other_bytes(edits):
    text = edited(Plan.from_dict(plan_document()).to_json().encode(), edits)
    reads_or_refuses(Plan.from_json, text)
    reads_or_refuses(Plan.from_json, text.decode("latin-1"))


@fuzzed(value=VALUES | st.text() | st.binary())
def test_plans_of_anything(value):
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    assert not reads_or_refuses(Plan.from_json, text)
    assert not reads_or_refuses(Plan.from_dict, value)
    try:
        assert plain_json(value, "here") == parse_json(json.dumps(value))
    except (FxPruneError, TypeError):
        assert isinstance(value, str | bytes)


@fuzzed(changes=CHANGES)
def test_plans_applied_to_a_network(changes):
    """What the reader takes, `apply` and `mask` refuse, or obey."""
    _, header, _ = saved()
    try:
        plan = Plan.from_dict(mutated(header["plan"], changes))
    except PlanError:
        return
    model = network()
    with bounded(), contextlib.suppress(FxPruneError):
        pruned = fxprune.apply(model, plan, X)
        assert {(s.tensor, s.dim): s for s in pruned.plan.slices} == {
            (s.tensor, s.dim): s for s in plan.slices
        }
        assert fxprune.apply(model, pruned.plan, X).plan == pruned.plan
    with bounded(), contextlib.suppress(FxPruneError):
        fxprune.mask(model, plan)
    assert facts(model) == untouched_facts()


# Files


@functools.cache
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return net().eval()


@functools.cache
def untouched_facts() -> Any:
    return facts(network())


def loads_or_refuses(data: bytes | None) -> bool:
    """A network that saves to a file which loads as the same network; or an error of ours."""
    path, again = home() / "fuzzed.safetensors", home() / "again.safetensors"
    if data is not None:
        path.write_bytes(data)
    model = network()
    untouched_facts()
    with bounded():
        try:
            loaded = fxprune.load(path, model)
        except FxPruneError as error:
            return refused(error)
        finally:
            assert facts(model) == untouched_facts()
    fxprune.save(loaded, again)
    twice = fxprune.load(again, model)
    assert twice.plan == fxprune.pruned.plan_now(loaded)
    ours, theirs = loaded.state_dict(), twice.state_dict()
    assert list(ours) == list(theirs)
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype
        same = (t == theirs[name]) | (t.isnan() if t.is_floating_point() else torch.tensor(False))
        assert bool(same.all()), name
    return True


@fuzzed(edits=EDITS)
def test_files_with_other_bytes(edits):
    """No byte lies outside the checks: only the very same file is read."""
    good, _, _ = saved()
    bad = edited(good, edits)
    assert loads_or_refuses(bad) == (bad == good)


@fuzzed(length=st.integers(0, 1 << 20), more=st.binary(max_size=9))
def test_files_that_end_elsewhere(length, more):
    good, _, _ = saved()
    bad = good[: length % (len(good) + 1)] + more
    assert loads_or_refuses(bad) == (bad == good)


@fuzzed(changes=CHANGES, raw=st.booleans())
def test_files_with_another_first_part(changes, raw):
    """The JSON that lists the tensors, changed; its length fits, its digest may not."""
    good, _, _ = saved()
    end = 8 + int.from_bytes(good[:8], "little")
    document = mutated(json.loads(good[8:end]), changes)
    text = json.dumps(document, ensure_ascii=raw, separators=(",", ":")).encode(
        errors="surrogatepass"
    )
    text += b" " * (-len(text) % 8)
    bad = len(text).to_bytes(8, "little") + text + good[end:]
    assert loads_or_refuses(bad) == (bad == good)


TENSORS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from(
            ["drop", "rename", "dtype", "shape", "nan", "copy", "scalar", "empty", "wide"]
        ),
        st.sampled_from(list(checkpoint.DTYPES.values())),
        WORDS | ODD.filter(lambda v: isinstance(v, str)),
    ),
    max_size=2,
)


def other_tensors(tensors: dict[str, torch.Tensor], changes: Any) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    for n, change, dtype, word in changes:
        if not tensors:
            break
        name = sorted(tensors)[n % len(tensors)]
        t = tensors.pop(name)
        if change == "rename":
            tensors[word] = t
        elif change == "dtype":
            tensors[name] = t.to(dtype)
        elif change == "shape":
            tensors[name] = t.reshape(-1)
        elif change == "nan":
            tensors[name] = (
                torch.full_like(t, math.nan) if t.is_floating_point() else torch.zeros_like(t)
            )
        elif change == "copy":
            tensors[name] = tensors[word] = t
        elif change == "scalar":
            tensors[name] = t.reshape(-1)[:1].squeeze()
        elif change == "empty":
            tensors[name] = t.reshape(-1)[:0]
        elif change == "wide":
            tensors[name] = torch.cat([t[None], t[None]])
    return tensors


@fuzzed(changes=CHANGES, others=TENSORS)
def test_files_with_another_content_and_the_right_checksum(changes, others):
    """What somebody can write who has the format right: header and tensors are somebody else's."""
    _, header, tensors = saved()
    new = mutated(header, changes)
    try:
        write_tensors(home() / "fuzzed.safetensors", other_tensors(tensors, others), new)
    except CheckpointError:
        return  # no writer of ours can make such a file
    read = loads_or_refuses(None)
    assert read or changes or others


# Reports and scans


def shows_or_refuses(kind: Any, text: str | bytes, page: bool) -> bool:
    with bounded():
        try:
            read = kind.from_json(text)
        except FxPruneError as error:
            return refused(error)
        str(read)
        again = kind.from_json(read.to_json())
        assert again.to_json() == read.to_json()
    if page:
        read.to_html(home() / "page.html")
    return True


@fuzzed(changes=CHANGES, page=st.integers(0, 40).map(lambda n: n == 40))
@pytest.mark.filterwarnings("ignore")  # of matplotlib, about strange names and numbers
def test_reports_with_changes(changes, page):
    read = shows_or_refuses(Report, json.dumps(mutated(report_document(), changes)), page)
    assert read or changes


@fuzzed(changes=CHANGES, page=st.integers(0, 40).map(lambda n: n == 40))
@pytest.mark.filterwarnings("ignore")
def test_scans_with_changes(changes, page):
    read = shows_or_refuses(Sensitivity, json.dumps(mutated(scan_document(), changes)), page)
    assert read or changes


@fuzzed(edits=EDITS, value=VALUES | st.text() | st.binary())
def test_reports_and_scans_of_anything(edits, value):
    for kind, document in ((Report, report_document()), (Sensitivity, scan_document())):
        text = edited(json.dumps(document).encode(), edits)
        shows_or_refuses(kind, text, False)
        shows_or_refuses(kind, text.decode("latin-1"), False)
        text = value if isinstance(value, str | bytes) else json.dumps(value)
        assert not shows_or_refuses(kind, text, False)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_for_as_long_as_there_is_time(capsys):
    """Fresh seeds each time; the one that failed is in hypothesis's own report."""
    long = settings(
        quick, max_examples=100, derandomize=False, database=None, print_blob=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )  # fmt: skip
    begin, rounds = time.monotonic(), 0
    first = time.time_ns()
    while time.monotonic() - begin < SECONDS:
        for check, strategies in PROPERTIES:
            seed(first + rounds)(long(given(**strategies)(check)))()
            rounds += 1
            if time.monotonic() - begin > SECONDS:
                break
    with capsys.disabled():
        print(
            f"\n{100 * rounds:,} examples in {time.monotonic() - begin:.0f} s, seeds from {first}"
        )
    assert rounds
