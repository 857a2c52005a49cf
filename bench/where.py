"""Where and when something is measured: the columns of a row that name the machine and the code."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def here(device: torch.device, threads: int) -> dict[str, str]:
    """The columns `threads`, `device`, `torch`, `commit` and `date`; a GPU's rows have threads 0."""
    on_gpu = device.type == "cuda"
    return {
        "threads": "0" if on_gpu else str(threads),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((row.partition(":")[2].strip() for row in lines if row.startswith("model name")), "unknown CPU")  # fmt: skip


def commit() -> str:
    """The short hash, with a mark where the package differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "fxprune", "passes", "kernels")
    return (git("rev-parse", "--short", "--verify", "HEAD") or "none") + ("+" if changed else "")
