"""The README's own code runs as it stands, in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_for_a_model_of_ones_own_runs(tmp_path):
    pytest.importorskip("onnxruntime", reason="the README exports to ONNX: the export extra")
    (code,) = [block for block in blocks("python") if "fxprune.load" in block]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "prunable groups" in done.stdout
    assert "ResNet pruned by l1" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"resnet18.safetensors", "resnet18.onnx"}


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"make ([a-z-]+)", "\n".join(blocks("sh")))
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in MAKEFILE
