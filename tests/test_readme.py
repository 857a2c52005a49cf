"""The README's own commands and code run as they stand, in a folder with nothing else in it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def code(word: str) -> str:
    (found,) = [block for block in blocks("python") if word in block]
    return found


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_is_run_by_something():
    """`make demo` and `make test` by .ci/run, which installs as well; the others by this file."""
    heads = {shlex.split(line)[0] for line in commands()}
    assert heads == {"make", "pip", "fxprune"}
    for line in commands():
        if line.startswith("make"):
            assert f"\n{line}" in CI, line
            assert f"\n{line.split()[1]}:" in MAKEFILE
    installed = [line for line in commands() if line.startswith("pip")]
    assert installed == ['pip install -e ".[export]"']
    assert '-e ".[test,export]"' in MAKEFILE  # what every make target begins with


def test_the_commands_of_fxprune(tmp_path):
    pytest.importorskip("onnxruntime", reason="the README exports to ONNX: the export extra")
    (tmp_path / "net.py").write_text(code("def make"))
    said = {}
    for line in commands():
        if line.startswith("fxprune"):
            said[line] = run(
                [sys.executable, "-m", "fxprune.cli", *shlex.split(line)[1:]], tmp_path
            )
    assert len(said) >= 4
    assert {p.name for p in tmp_path.iterdir() if p.name != "__pycache__"} == {
        "net.py",
        "net",
        "run",
    }
    for folder in ("net", "run"):
        files = {p.name for p in (tmp_path / folder).iterdir()}
        assert files >= {"net.safetensors", "plan.json", "report.html", "report.json", "run.json"}
    assert (tmp_path / "net" / "net.onnx").is_file()
    (analyzed,) = [text for line, text in said.items() if line.startswith("fxprune analyze")]
    assert "prunable groups" in analyzed


def test_the_code_for_a_model_of_ones_own(tmp_path):
    pytest.importorskip("onnxruntime", reason="the README exports to ONNX: the export extra")
    said = run([sys.executable, "-c", code("fxprune.load")], tmp_path)
    assert "prunable groups" in said
    assert "ResNet pruned by L1" in said
    assert {p.name for p in tmp_path.iterdir()} == {"resnet18.safetensors", "resnet18.onnx"}


def test_the_calls_in_the_text_exist():
    """What stands between backticks and looks like a call of fxprune names something that is there."""
    import fxprune
    from fxprune.cli.app import app

    for name in re.findall(r"`(?:\w+ = )?fxprune\.(\w+)", README):
        assert hasattr(fxprune, name), name
    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    for name in re.findall(r"`fxprune (\w+)", README):
        assert name in known | {"COMMAND"}, name


def test_the_files_it_points_to_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
