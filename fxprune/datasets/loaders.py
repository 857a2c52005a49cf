"""Loaders over a data set: batches (input, target), the same on every machine for one seed.

Promise: the seed fixes the order and every augmentation, epoch by epoch; batch size and worker
         processes never change what an image becomes; iterating leaves the global random state
         alone. `train.generator` holds all that the next epoch depends on: with its state from the
         beginning of an epoch put back, that epoch comes again, batch for batch.
Refuses: a batch size below 1, a negative number of workers, a seed that torch cannot take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, get_worker_info

from fxprune.datasets.augment import DRAWS, crop_flip, normalize
from fxprune.errors import DataError, OptionError, OptionTypeError

T = TypeVar("T")
Batch = list[Tensor]  # [input, target]
Pick = int | tuple[int, int]  # an index; or (index, draw): the image as augmented by that number


@dataclass(frozen=True)
class Loaders:
    """A data set, ready for use; `train, test = loaders` unpacks it, `loaders[0]` is `train`.

    train, test, plain: yield [input float32 [N, C, H, W], target int64 [N]]. `train` shuffles
        anew, and augments if asked to, every epoch; `test` keeps its order; `plain` holds the
        training images without augmentation in one shuffled order, the same at every pass: for
        rankings by data. (Batch norms are measured anew on `train`: on what they have learnt from.)
    classes: targets are 0 ... classes - 1. shape: (C, H, W) of an input.
    mean, std: per channel, of pixels scaled to 0..1; inputs are (pixel - mean) / std.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: DataLoader[Batch] = field(repr=False)
    test: DataLoader[Batch] = field(repr=False)
    plain: DataLoader[Batch] = field(repr=False)

    def __iter__(self) -> Iterator[DataLoader[Batch]]:
        return iter((self.train, self.test))

    def __getitem__(self, index: int) -> DataLoader[Batch]:
        return (self.train, self.test)[index]

    def __len__(self) -> int:
        return 2


class Options(NamedTuple):
    """How a data set is to be served; see `fxprune.data.load`."""

    batch_size: int = 128
    seed: int = 0
    augment: bool = True
    workers: int = 0

    def check(self) -> None:
        """OptionTypeError or OptionError for a value that makes no sense."""
        for name, least in (("batch_size", 1), ("workers", 0), ("seed", None)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise OptionTypeError(f"`{name}` must be an integer, not {value!r}", where=name)
            if least is not None and value < least:
                raise OptionError(f"`{name}` must be at least {least}, not {value}", where=name)
        if not -(2**63) <= self.seed < 2**63:
            raise OptionError(f"`seed` must fit into 64 bits, not {self.seed}", where="seed")
        if not isinstance(self.augment, bool):
            raise OptionTypeError(
                f"`augment` must be True or False, not {self.augment!r}", where="augment"
            )


class Samples(Dataset[Batch], ABC):
    """Images and their labels, by batches: `__getitems__` is what a DataLoader calls.

    A picked index gives the image as it is; (index, draw) gives it augmented by that number. All
    picks of a batch are of one kind.
    """

    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, pick: Pick) -> Batch:
        images, labels = self.__getitems__([pick])
        return [images[0], labels[0]]

    def __getitems__(self, picks: Sequence[Pick]) -> Batch:
        pairs = [pick for pick in picks if isinstance(pick, tuple)]
        indices = [index for index, _ in pairs] or [int(pick) for pick in picks]  # type: ignore[arg-type]
        try:
            images = self.images_of(indices, [draw for _, draw in pairs] or None)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error  # type: ignore[return-value]  # `_Loader` raises it, in the main process
        return [images, self.labels[indices]]

    @abstractmethod
    def images_of(self, indices: Sequence[int], draws: Sequence[int] | None) -> Tensor:
        """The inputs float32 [n, C, H, W] of n images, augmented by n draws unless None."""


class InMemory(Samples):
    """All the images in one tensor.

    images: uint8 [N, C, H, W], normalised by mean and std when picked; or float32, ready for use.
    padding: how far a drawn crop may shift.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 4,
    ) -> None:
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.padding = padding

    def images_of(self, indices: Sequence[int], draws: Sequence[int] | None) -> Tensor:
        """The inputs float32 [n, C, H, W] of n images, augmented by n draws unless None."""
        images = self.images.index_select(0, torch.tensor(indices))
        if draws is not None:
            images = crop_flip(images, torch.tensor(draws), self.padding)
        return normalize(images, self.mean, self.std) if images.dtype == torch.uint8 else images


class _Draws(Sampler[tuple[int, int]]):
    """A new order every epoch, and a number with every index: (index, draw) pairs."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.size, generator=self.generator)
        draws = torch.randint(DRAWS, (self.size,), generator=self.generator)
        return zip(order.tolist(), draws.tolist(), strict=True)


class _Loader(DataLoader[Batch]):
    """A DataLoader of `Samples`: errors of worker processes arrive as they were raised.

    What torch does to them buries their text under a traceback.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def serve(
    name: str,
    classes: int,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    train: Samples,
    test: Samples,
    options: Options,
) -> Loaders:
    """The loaders of two parts of a data set; options that were checked."""

    def loader(samples: Samples, sampler: Sampler[Pick] | list[int] | None, seed: int) -> DataLoader[Batch]:  # fmt: skip
        generator = getattr(sampler, "generator", None) or torch.Generator().manual_seed(seed)
        return _Loader(
            samples,
            batch_size=options.batch_size,
            sampler=sampler,  # type: ignore[arg-type]  # a list will do
            num_workers=options.workers,
            collate_fn=_as_is,
            generator=generator,  # without one, every pass would draw from the global state
            pin_memory=torch.cuda.is_available(),
        )

    seed = options.seed
    generator = torch.Generator().manual_seed(seed)
    order: Sampler[Pick]
    if options.augment:
        order = _Draws(len(train), generator)  # type: ignore[assignment]
    else:
        order = RandomSampler(train, generator=generator)
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return Loaders(
        name,
        classes,
        shape,
        mean,
        std,
        train=loader(train, order, seed),
        test=loader(test, None, seed),
        plain=loader(train, shuffled, seed),
    )


def _as_is(batch: T) -> T:
    """Samples come as whole batches: nothing is left to collate."""
    return batch
