"""Small real data sets as pairs of loaders: (input, target) batches, the same on every machine.

Promise: every function here returns `(train_loader, test_loader)`; the split never changes, so
scores compare; `seed` only orders the training batches, and the same seed gives the same order,
epoch by epoch. No worker processes.
Adding a set: one function of the same shape, ending in `_loaders(...)`, and one line in `_SETS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import OptionError, OptionTypeError

Batch = list[Tensor]  # [input, target]
Loaders = tuple[DataLoader[Batch], DataLoader[Batch]]


def digits(batch_size: int = 64, seed: int = 0) -> Loaders:
    """Hand-written digits of scikit-learn: 1,437 images to train with, 360 to test with.

    Batches are images [N, 1, 8, 8] float32, with mean 0 and standard deviation 1 over all pixels
    of the training images, and labels [N] int64 in 0..9. Each class has its share in both parts.
    Training batches are shuffled anew every epoch; test batches keep their order.
    OptionError for a batch size below 1. Source: `sklearn.datasets.load_digits` (Alpaydin &
    Kaynak 1998), which ships with scikit-learn: nothing is downloaded.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels.reshape(-1, 1, 8, 8), labels, test_size=360, random_state=0, stratify=labels
    )
    mean, std = train_x.mean(), train_x.std()
    return _loaders(
        torch.as_tensor((train_x - mean) / std, dtype=torch.float32),
        torch.as_tensor(train_y, dtype=torch.int64),
        torch.as_tensor((test_x - mean) / std, dtype=torch.float32),
        torch.as_tensor(test_y, dtype=torch.int64),
        batch_size,
        seed,
    )


_SETS: dict[str, Callable[[int, int], Loaders]] = {"digits": digits}


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return tuple(_SETS)


def load(name: str, batch_size: int = 64, seed: int = 0) -> Loaders:
    """The loaders of a data set by its name; OptionError for an unknown one, with the nearest."""
    if name not in _SETS:
        near = difflib.get_close_matches(name.lower(), _SETS, n=1)
        raise OptionError(
            f"there is no data set {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where="name",
            fix=f"use one of {', '.join(_SETS)}",
        )
    return _SETS[name](batch_size, seed)


def _loaders(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, batch_size: int, seed: int
) -> Loaders:
    """Loaders over tensors held in memory; the shuffling has its own generator."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise OptionTypeError(f"`batch_size` must be an integer, not {batch_size!r}")
    if batch_size < 1:
        raise OptionError(f"`batch_size` must be at least 1, not {batch_size}", where="batch_size")
    train: DataLoader[Batch] = DataLoader(
        TensorDataset(train_x, train_y),  # type: ignore[arg-type]  # it yields tuples, collated to lists
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    test: DataLoader[Batch] = DataLoader(
        TensorDataset(test_x, test_y),  # type: ignore[arg-type]
        batch_size=batch_size,
    )
    return train, test
