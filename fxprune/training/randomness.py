"""Every random state that a training draws from: seeded, captured, restored.

Promise: outside `seeded`, the global states of Python, NumPy and torch (the CPU, and the CUDA
         device in use) are as before; what `capture` gives, `restore` puts back bit for bit.
Departs: states inside a data set or a worker process are out of reach. torch seeds each worker
         from the loader's generator at the start of every epoch, so that they follow from what is
         captured, except with `persistent_workers=True`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python, NumPy and torch inside; outside, their states are untouched."""
    before = capture(device)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        restore(before, device)


def capture(device: torch.device, loader: object = None) -> dict[str, Tensor]:
    """The global states and those of the loader's own generators, as tensors on the CPU.

    `torch`, `cuda` and one per generator: uint8 [n]; `python` and `numpy`: int64 [n] and, under
    `.gauss`, the normal numbers they hold back: float64 [0] or [1].
    """
    _, words, held = random.getstate()
    numpy: Any = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.from_numpy(np.array(words, np.int64)),
        "python.gauss": torch.tensor([] if held is None else [held], dtype=torch.float64),
        "numpy": torch.from_numpy(np.append(numpy[1].astype(np.int64), numpy[2:4])),
        "numpy.gauss": torch.tensor([numpy[4]], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states | {name: g.get_state() for name, g in _generators(loader).items()}


def restore(states: Mapping[str, Tensor], device: torch.device, loader: object = None) -> None:
    """Put back what `capture` gave; a state whose owner is not here any more is left out."""
    torch.set_rng_state(states["torch"])
    held = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), held[0] if held else None))
    *keys, place, has_gauss = states["numpy"].tolist()
    gauss = states["numpy.gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), place, has_gauss, gauss))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    for name, generator in _generators(loader).items():
        if name in states:
            generator.set_state(states[name])


def _generators(loader: object) -> dict[str, torch.Generator]:
    """The generators that a loader and its sampler hold; one that both hold has one name."""
    found: dict[str, torch.Generator] = {}
    for name, owner in (("loader", loader), ("sampler", getattr(loader, "sampler", None))):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and generator not in found.values():
            found[name] = generator
    return found
