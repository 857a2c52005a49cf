"""Remove each guard in turn, and see that a test notices.

A guard is a statement whose trailing comment reads `# guard: NAME`. Behind an arrow may stand the
tests that hold it: a file, a node id and any options of pytest, or else an expression for `-k`:

    if ratio != ratio:  # guard: nan-ratio -> tests/test_budget.py -k nan
    seen.add(key)  # guard: each-storage-once -> shared and not long

For each guard the tree is copied, the guard alone is taken out of the copy, and the tests run
there with fixed seeds until the first failure. A guard survives when everything still passes:
then nothing proves that it is needed. First of all, the same tests must pass with every guard in.

What "taken out" means: the condition of `if`, `elif` and `while` becomes False, a `for` runs over
nothing, a `with` manages nothing, an `except` catches nothing, any other statement becomes `pass`.

Exit status: 0 every removal failed a test, 1 some did not, 2 nothing could be concluded.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FOLDERS = ("fxprune", "passes", "kernels")
# For guards that name no tests. Those that do are checked much faster.
DEFAULT_TESTS = ("tests", "-m", "not long", "--ignore-glob=*test_guards_tool.py")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "venv", "build", "dist", "demo-out", "__pycache__", "*.egg-info", ".*_cache",
    ".hypothesis",
)  # fmt: skip
MARK = re.compile(
    r"(?:^|\s\s)#\s*guard:\s*(?P<name>[^#]*?)\s*(?:->\s*(?P<tests>[^#]*?)\s*)?(?:#|$)"
)
# Statements that others cannot do without, or that have no condition to switch off.
WHOLE = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Try,
    ast.TryStar, ast.Match, ast.AsyncFor, ast.AsyncWith,
)  # fmt: skip
TREE, OUT = "FXPRUNE_GUARDS_TREE", "FXPRUNE_GUARDS_OUT"


class GuardError(Exception):
    """A mark that cannot be followed; the message says where and why."""


@dataclass(frozen=True)
class Guard:
    """One mark: its name, its place, and the tests written behind the arrow."""

    name: str
    file: str  # relative to the root, with /
    line: int
    tests: str = ""

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Outcome:
    """What the tests said about one removal."""

    kind: str  # "caught", "SURVIVED", "BROKEN" (nothing could be imported), "HUNG", "NO TESTS"
    detail: str
    seconds: float


# --- finding and removing -------------------------------------------------------------------------


def find_guards(root: Path) -> list[Guard]:
    """Every marked line of the package, in order of file and line. Links are not followed."""
    guards = []
    for folder in FOLDERS:
        for parent, _, names in sorted(os.walk(root / folder)):
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(parent) / name
                    guards += _marks(path, path.relative_to(root).as_posix())
    return guards


def _marks(path: Path, file: str) -> Iterator[Guard]:
    with tokenize.open(path) as stream:
        source = stream.read()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        found = MARK.search(token.string) if token.type == tokenize.COMMENT else None
        if found is None:
            continue
        guard = Guard(found["name"], file, token.start[0], found["tests"] or "")
        if not guard.name:
            raise GuardError(f"{guard.where}: a guard needs a name, as in `# guard: nan-ratio`")
        try:
            remove(source, guard.line)
        except GuardError as error:
            raise GuardError(f"{guard.where}: guard `{guard.name}`: {error}") from None
        yield guard


def remove(source: str, line: int) -> str:
    """The source without the guard marked on `line` (1-based).

    The innermost statement that starts there; else the one whose header or whole text ends there,
    which is where a formatter moves the comment of a statement that spans lines.
    """
    node = _marked(ast.parse(source), line)
    if isinstance(node, ast.If | ast.While):
        cuts: list[tuple[ast.AST, str]] = [(node.test, "False")]
    elif isinstance(node, ast.For):
        cuts = [(node.iter, "()")]
    elif isinstance(node, ast.With):
        nothing = "__import__('contextlib').nullcontext()"
        cuts = [(item.context_expr, nothing) for item in node.items]
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        cuts = [(node.type, "()")]
    elif isinstance(node, ast.stmt) and not isinstance(node, WHOLE):
        cuts = [(node, "pass")]
    else:
        raise GuardError(f"a {type(node).__name__} cannot be taken out by itself")

    text = source.encode()
    starts = [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    for old, new in reversed(cuts):  # from the back, so that offsets stay true
        begin = starts[old.lineno - 1] + old.col_offset
        end = starts[old.end_lineno - 1] + old.end_col_offset
        text = text[:begin] + new.encode() + text[end:]
    if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)):
        raise GuardError("taking it out changes nothing")
    return text.decode()


def _marked(tree: ast.Module, line: int) -> ast.AST:
    starting, ending = [], []
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.ExceptHandler):
            continue
        if node.lineno == line:
            starting.append(node)
        elif node.lineno < line and line in _last_lines(node):
            ending.append(node)
    if not (starting or ending):
        raise GuardError("no statement starts on this line, nor ends its header there")
    return max(starting or ending, key=lambda node: (node.lineno, node.col_offset))


def _last_lines(node: ast.AST) -> range:
    """The lines on which the header of a compound statement, or a simple statement, may end."""
    if not hasattr(node, "body"):
        return range(node.end_lineno, node.end_lineno + 1)
    if isinstance(node, ast.If | ast.While):
        header = node.test
    elif isinstance(node, ast.For):
        header = node.iter
    elif isinstance(node, ast.With):
        header = node.items[-1].optional_vars or node.items[-1].context_expr
    else:
        return range(0)
    first = node.body[0]
    decorators = [d.lineno for d in getattr(first, "decorator_list", ())]
    return range(header.end_lineno, min([first.lineno, *decorators]))


# --- running --------------------------------------------------------------------------------------


def chosen_tests(tests: str) -> list[str]:
    """Arguments of pytest for what stands behind the arrow."""
    if not tests:
        return list(DEFAULT_TESTS)
    words = shlex.split(tests)
    return words if words[0].startswith("tests/") else ["tests", "-k", tests]


def run_tests(tree: Path, arguments: Sequence[str], timeout: float) -> tuple[Outcome, str]:
    """Run pytest in a copy of the tree, importing the copy; what it said, and its output."""
    out = tree.with_suffix(".json")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_", "FXPRUNE_"))
    }
    environment = kept | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(HERE)]),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        TREE: str(tree),
        OUT: str(out),
    }
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "-x", "-q", *arguments],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Outcome("HUNG", f"no answer in {timeout:.0f} s", time.monotonic() - begin), ""
    seconds = time.monotonic() - begin
    said = json.loads(out.read_text()) if out.exists() else {}
    closing = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode == 0:
        outcome = Outcome("SURVIVED", closing, seconds)
    elif done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        outcome = Outcome("NO TESTS", shlex.join(arguments), seconds)
    elif "test" in said:
        outcome = Outcome("caught", said["test"], seconds)
    else:  # a broken import fails every test of the file, which proves nothing about the guard
        outcome = Outcome("BROKEN", said.get("collection", closing), seconds)
    return outcome, done.stdout


def copy_tree(root: Path, target: Path) -> Path:
    """A copy with its links kept as links, without environments, caches and results."""
    shutil.copytree(root, target, symlinks=True, ignore=NOT_COPIED)
    return target


def try_tests(
    whole: Path, tests: str, timeout: float, without: Guard | None = None
) -> tuple[Outcome, str]:
    """Run some tests in a fresh copy, one guard taken out of it or none; what they said, and how."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
        tree = copy_tree(whole, Path(folder) / "tree")
        if without is not None:
            path = tree / without.file
            with tokenize.open(path) as stream:
                source, encoding = stream.read(), stream.encoding
            path.write_text(remove(source, without.line), encoding=encoding)
        return run_tests(tree, chosen_tests(tests), timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Find, remove, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="names or patterns"
    )
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at the same time")
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="seconds for one run of pytest"
    )
    parser.add_argument("--list", action="store_true", help="print the guards and stop")
    parser.add_argument("--root", type=Path, default=HERE.parent, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        # One snapshot for the whole run, so that work may go on in the tree meanwhile.
        whole = copy_tree(options.root.resolve(), Path(folder).resolve() / "whole")
        try:
            guards = find_guards(whole)
        except GuardError as error:
            print(error, file=sys.stderr)
            return 2
        if options.only:
            guards = [g for g in guards if any(fnmatch.fnmatch(g.name, o) for o in options.only)]
        if not guards:
            wanted = f" named {', '.join(options.only)}" if options.only else ""
            print(f"no guard{wanted} in {', '.join(FOLDERS)}", file=sys.stderr)
            return 2
        if options.list:
            for guard in guards:
                print(f"{guard.name}  {guard.where}  {shlex.join(chosen_tests(guard.tests))}")
            return 0
        with ThreadPoolExecutor(max_workers=max(options.jobs, 1)) as pool:
            if not all_pass(whole, guards, options.timeout, pool):
                return 2
            return all_fail(whole, guards, options.timeout, pool)


def all_pass(whole: Path, guards: Sequence[Guard], timeout: float, pool: Executor) -> bool:
    """Whether the tests pass with every guard in place; what fails then would prove nothing."""
    selections = list(dict.fromkeys(guard.tests for guard in guards))
    answers = pool.map(lambda tests: try_tests(whole, tests, timeout), selections)
    passed = True
    for tests, (outcome, output) in zip(selections, answers, strict=True):
        shown = shlex.join(chosen_tests(tests))
        if outcome.kind == "SURVIVED":
            print(f"every guard in place: {shown}: {outcome.detail}", flush=True)
        else:
            passed = False
            print(f"with every guard in place, `pytest {shown}` does not pass:", file=sys.stderr)
            print(output[-4000:] or outcome.detail, file=sys.stderr, flush=True)
    return passed


def all_fail(whole: Path, guards: Sequence[Guard], timeout: float, pool: Executor) -> int:
    """Take the guards out in turn and print the table; the exit status."""
    name = max(5, *(len(guard.name) for guard in guards))
    place = max(10, *(len(guard.where) for guard in guards))
    print(f"\n{'guard':<{name}}  {'removed at':<{place}}  {'s':>5}  outcome")
    answers = pool.map(lambda guard: try_tests(whole, guard.tests, timeout, guard), guards)
    caught = 0
    for guard, (outcome, _) in zip(guards, answers, strict=True):
        caught += outcome.kind == "caught"
        print(
            f"{guard.name:<{name}}  {guard.where:<{place}}  {outcome.seconds:5.0f}  "
            f"{outcome.kind}: {outcome.detail}",
            flush=True,
        )
    print(f"\n{caught} of {len(guards)} removals failed a test")
    return 0 if caught == len(guards) else 1


# --- inside the pytest that runs in a copy (`-p guards`) --------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """See that the copy is what gets imported, and fix hypothesis's seed; after every conftest."""
    tree = os.environ.get(TREE)
    if tree is None:
        return
    origin = importlib.util.find_spec("fxprune").origin
    if not Path(origin).resolve().is_relative_to(tree):
        pytest.exit(f"fxprune comes from {origin}, not from the copy in {tree}", returncode=99)
    from hypothesis import Phase, settings

    # No shrinking: that a test fails is all that is asked, not by which smallest example.
    settings.register_profile(
        "guards",
        parent=settings(),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
    )
    settings.load_profile("guards")


def pytest_sessionfinish() -> None:
    """See that nothing of the package came from elsewhere, the sub-packages behind links included."""
    tree = os.environ.get(TREE)
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if tree is None or name.partition(".")[0] != "fxprune" or file is None:
            continue
        if not Path(file).resolve().is_relative_to(tree):
            pytest.exit(f"{name} came from {file}, not from the copy in {tree}", returncode=99)


def _note(kind: str, what: str) -> None:
    out = os.environ.get(OUT)
    if out is not None and not Path(out).exists():
        Path(out).write_text(json.dumps({kind: what}))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the first test that fails."""
    if report.failed:
        _note("test", report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note the first file that cannot be collected."""
    if report.failed:
        _note("collection", f"{report.nodeid} cannot be collected")


if __name__ == "__main__":
    sys.exit(main())
