"""`tools/guards.py`: what it takes out, and that it tells a held guard from one nobody tests."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "guards.py"
spec = importlib.util.spec_from_file_location("guards", TOOL)
guards = importlib.util.module_from_spec(spec)
sys.modules["guards"] = guards  # its dataclasses look themselves up there
spec.loader.exec_module(guards)


def without(source: str) -> str:
    """The source after removing the one marked line in it."""
    source = textwrap.dedent(source)
    (line,) = [i for i, row in enumerate(source.splitlines(), 1) if "# guard:" in row]
    return guards.remove(source, line)


def run(source: str, **names):
    exec(compile(source, "toy", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("source", "names", "before", "after"),
    [
        # an `if` alone
        ("y = 0\nif x < 0:  # guard: g\n    y = 1\n", {"x": -1}, 1, 0),
        # the head of a chain: the rest of the chain stays
        ("if x < 0:  # guard: g\n    y = 1\nelif x < 5:\n    y = 2\nelse:\n    y = 3\n", {"x": -1}, 1, 2),
        # the middle of a chain
        ("if x < 0:\n    y = 1\nelif x < 5:  # guard: g\n    y = 2\nelse:\n    y = 3\n", {"x": 1}, 2, 3),
        # a condition in brackets, over several lines, with letters of several bytes before it
        ("y = 'é'; y = 0\nif (\n    x\n    or x is None\n):  # guard: g\n    # why\n    y = 1\n", {"x": 1}, 1, 0),
        # two statements on a line: the last one goes
        ("y = 0; y += x  # guard: g\n", {"x": 3}, 3, 0),
        ("y = 0\nif x: y = 1  # guard: g\n", {"x": 3}, 1, 0),
        # a statement over several lines, marked at its start, and at its end
        ("y = 0\ny += max(  # guard: g\n    x,\n    2,\n)\n", {"x": 3}, 3, 0),
        ("y = 0\ny += max(\n    x,\n    2,\n)  # guard: g\n", {"x": 3}, 3, 0),
        ("y = 0\nfor i in (x, x):  # guard: g\n    y += i\n", {"x": 3}, 6, 0),
        ("y = 0\nwhile y < x:  # guard: g\n    y += 1\nelse:\n    y += 10\n", {"x": 3}, 13, 10),
        ("try:\n    y = 1\n    y = 1 / x\nexcept ZeroDivisionError:  # guard: g\n    y = 2\nexcept ArithmeticError:\n    y = 3\n", {"x": 0}, 2, 3),
        ("import contextlib\nwith contextlib.suppress(KeyError) as y, contextlib.suppress(OSError):  # guard: g\n    z = 1\ny = repr(y)[:1]\n", {}, "N", "N"),
    ],
)  # fmt: skip
def test_what_is_taken_out(source, names, before, after):
    assert run(source, **names)["y"] == before
    assert run(without(source), **names)["y"] == after


def test_a_removed_with_no_longer_manages_its_body():
    source = """
    import contextlib
    with contextlib.suppress(KeyError):  # guard: g
        {}[0]
    """
    run(textwrap.dedent(source))
    with pytest.raises(KeyError):
        run(without(source))


def test_a_removed_raise_leaves_the_rest_of_its_branch():
    source = "def f(x):\n    if x:\n        raise KeyError  # guard: g\n    return 1\n"
    assert run(without(source))["f"](True) == 1


@pytest.mark.parametrize(
    "source",
    [
        "x = (\n    1,  # guard: in the middle of a statement\n    2,\n)\n",
        "# guard: nothing but a comment\nx = 1\n",
        "def f():  # guard: g\n    return 1\n",
        "import os  # guard: g\n",
        "try:  # guard: g\n    x = 1\nfinally:\n    x = 2\n",
        "if 1:\n    x = 1\nelse:  # guard: g\n    x = 2\n",
        "pass  # guard: g\n",
    ],
)
def test_a_mark_that_cannot_be_followed_is_refused(source):
    with pytest.raises(guards.GuardError):
        without(source)


def test_what_stands_behind_the_arrow():
    assert guards.chosen_tests("") == list(guards.DEFAULT_TESTS)
    assert guards.chosen_tests("tests/test_a.py -k 'x or y'") == ["tests/test_a.py", "-k", "x or y"]  # fmt: skip
    assert guards.chosen_tests("a and not b") == ["tests", "-k", "a and not b"]


# --- a toy tree ------------------------------------------------------------------------------------

TOY = {
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\nmarkers = ["long"]\n',
    "fxprune/__init__.py": '''
        """Here `# guard: in a string` is no mark."""
        def root(x):
            if x != x:  # guard: nan -> tests/test_root.py -k nan
                raise ValueError("nan")
            elif x < 0:  # guard: negative  # noqa: E501
                raise ValueError("negative")
            return x ** 0.5
        ''',
    "passes/__init__.py": """
        def clip(x, most):
            assert most >= 0
            x = min(x, most)  # guard: clip -> clip or nothing
            return x
        """,
    "kernels/__init__.py": "",
    "tests/test_root.py": """
        import pytest
        from fxprune import root
        from hypothesis import given, strategies
        def test_nan():
            with pytest.raises(ValueError):
                root(float("nan"))
        @given(strategies.integers(-5, -1))
        def test_negative(x):
            with pytest.raises(ValueError):
                root(x)
        """,
    "tests/test_clip.py": """
        from fxprune.passes import clip
        def test_clip():
            assert clip(1, 2) == 1
        """,
}
HELD = "def test_clip_high():\n    from fxprune.passes import clip\n    assert clip(3, 2) == 2\n"


@pytest.fixture
def toy(tmp_path):
    for name, text in TOY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    for folder in ("passes", "kernels"):
        (tmp_path / "fxprune" / folder).symlink_to(Path("..") / folder)
    return tmp_path


def tool(toy, *arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, TOOL, "--root", toy, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=toy, env=kept)


def outcomes(output: str) -> dict[str, str]:
    """Guard -> outcome, from the printed table."""
    table = output.partition("outcome\n")[2].partition("\n\n")[0]
    rows = [row.split(maxsplit=3) for row in table.splitlines()]
    return {name: outcome for name, _, _, outcome in rows}


def test_the_toy_tree_end_to_end(toy):
    before = {name: (toy / name).read_text() for name in TOY}
    found = tool(toy)
    assert found.returncode == 1, found.stdout + found.stderr
    table = outcomes(found.stdout)
    assert list(table) == ["nan", "negative", "clip"]  # once each, though the links show them twice
    assert table["nan"] == "caught: tests/test_root.py::test_nan"
    assert table["negative"] == "caught: tests/test_root.py::test_negative"
    assert table["clip"].startswith("SURVIVED: 1 passed")
    assert "2 of 3 removals failed a test" in found.stdout
    assert {name: (toy / name).read_text() for name in TOY} == before
    assert sorted(path.name for path in toy.iterdir()) == sorted({n.split("/")[0] for n in TOY})

    with (toy / "tests/test_clip.py").open("a") as stream:
        stream.write(HELD)
    held = tool(toy, "--only", "cl*", "--jobs", "2")
    assert held.returncode == 0, held.stdout + held.stderr
    assert outcomes(held.stdout) == {"clip": "caught: tests/test_clip.py::test_clip_high"}


def test_a_removal_that_breaks_every_import_proves_nothing(toy):
    (toy / "fxprune/limits.py").write_text("LIMIT = 1  # guard: limit -> tests/test_limits.py\n")
    test = "from fxprune.limits import LIMIT\ndef test_limit():\n    assert LIMIT\n"
    (toy / "tests/test_limits.py").write_text(test)
    found = tool(toy, "--only", "limit")
    assert found.returncode == 1, found.stdout + found.stderr
    assert outcomes(found.stdout)["limit"] == "BROKEN: tests/test_limits.py cannot be collected"


def test_nothing_is_concluded_from_tests_that_fail_anyway(toy):
    (toy / "tests/test_clip.py").write_text("def test_clip():\n    assert False\n")
    found = tool(toy, "--only", "clip")
    assert found.returncode == 2
    assert "with every guard in place" in found.stderr


def test_the_sub_packages_must_come_from_the_copy_too(toy, tmp_path_factory):
    """A copy without its links would test the installed passes instead, guards and all."""
    (toy / "fxprune/passes").unlink()
    elsewhere = tmp_path_factory.mktemp("installed")
    (elsewhere / "passes.py").write_text(textwrap.dedent(TOY["passes/__init__.py"]))
    with (toy / "fxprune/__init__.py").open("a") as stream:
        stream.write(f"__path__.append({str(elsewhere)!r})\n")
    found = tool(toy, "--only", "clip")
    assert found.returncode == 2
    assert "not from the copy" in found.stderr


def test_a_name_that_no_guard_has(toy):
    found = tool(toy, "--only", "clop")
    assert found.returncode == 2
    assert "no guard named clop" in found.stderr


def test_the_marks_of_this_tree_can_be_followed():
    guards.find_guards(TOOL.parents[1])
