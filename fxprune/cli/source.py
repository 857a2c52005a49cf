"""What a command works on: the model of a name with its weights, and the data set beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import data as data_sets
from fxprune import zoo
from fxprune.cli import specs, values
from fxprune.cli.weights import load_weights
from fxprune.errors import FxPruneError, OptionError
from fxprune.training.batches import as_floats


@dataclass(frozen=True, kw_only=True)
class Source:
    """The options that name a model and its data, checked as far as words can be."""

    model: str
    set_: Sequence[str] | None = None
    weights: Path | None = None
    input_size: str | None = None
    data: str | None = None
    data_dir: Path | None = None
    batch_size: int = 128
    workers: int = 0
    augment: bool = True
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        specs.slug(self.model)
        specs.options_of(self.set_ or ())
        if self.input_size is not None:
            values.size_of(self.input_size)
        for option, file in self.inputs.items():
            if file is not None and not file.is_file():
                raise OptionError(f"there is no file `{file}`", where=option)

    @property
    def inputs(self) -> dict[str, Path | None]:
        """The files that it reads, by the option that names them."""
        return {"MODEL": specs.source_file(self.model), "--weights": self.weights}

    def open(self) -> Opened:
        """Make the model and load the data; the seed fixes weights and the order of batches."""
        loaders = None
        if self.data is not None:
            loaders = data_sets.load(
                self.data,
                root=self.data_dir,
                batch_size=self.batch_size,
                seed=self.seed,
                augment=self.augment,
                workers=self.workers,
                size=self._image_size(),
            )
        torch.manual_seed(self.seed)
        model = specs.build(self.model, self._options(loaders))
        if self.weights is not None:
            load_weights(model, self.weights)
        model = model.to(_device(self.device))
        example = self._example(model, loaders)
        if loaders is not None:
            self._check_size(loaders)
            _check_fit(model, example, loaders)
        return Opened(model, example, loaders)

    def _image_size(self) -> int | None:
        """What images of a folder are scaled to: the height of --input-size."""
        if self.input_size is None or not (self.data or "").startswith("imagefolder"):
            return None
        return values.size_of(self.input_size)[-2]

    def _check_size(self, loaders: Any) -> None:
        """What is measured must be the data's images; OptionError when --input-size differs."""
        if self.input_size is None or values.size_of(self.input_size)[1:] == loaders.shape:
            return
        raise OptionError(  # guard: the data's size -> tests/cli/test_compile.py -k sizes_differ
            f"--input-size {self.input_size} is not the size of the images of {loaders.name}",
            where="--input-size",
            why=f"they are {'x'.join(map(str, loaders.shape))}",
            fix="leave it out; the data says it",
        )

    def _options(self, loaders: Any) -> Mapping[str, specs.Value]:
        """Those set; for a network of the zoo, its classes and channels are those of the data."""
        options = specs.options_of(self.set_ or ())
        library, _, name = self.model.partition(":")
        if loaders is None or library != "zoo" or name not in zoo.names():
            return options
        return {"num_classes": loaders.classes, "in_channels": loaders.shape[0], **options}

    def _example(self, model: nn.Module, loaders: Any) -> Tensor | None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self.input_size is not None:
            shape = values.size_of(self.input_size)
        elif loaders is not None:
            shape = (1, *loaders.shape)
        else:
            return None
        x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return as_floats(model, x.to(device))


@dataclass(frozen=True)
class Opened:
    """The model in eval mode; an example input [N, C, H, W], where one is known; the loaders."""

    model: nn.Module
    example: Tensor | None
    loaders: Any  # fxprune.data's, or None

    def has_data(self, option: str) -> Any:
        """The loaders; OptionError when there are none."""
        if self.loaders is None:
            raise OptionError(
                f"{option} needs data", where="--data", fix="name a set: --data cifar10"
            )
        return self.loaders


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"there is no device `{name}` here",
            where="--device",
            why=str(error).splitlines()[0],
            fix="--device cpu",
        ) from error
    return device


def _check_fit(model: nn.Module, example: Tensor | None, loaders: Any) -> None:
    """The model must take the data's images and tell its classes apart."""
    name, shape = type(model).__name__, "x".join(map(str, loaders.shape))
    try:
        with torch.no_grad():
            logits = model(example)
    except Exception as error:  # whatever a model raises for an input that it does not take
        raise FxPruneError(
            f"this {name} does not take the images of {loaders.name}",
            where="MODEL, --data",
            why=f"for one of {shape} it raises {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="choose another model, or set its options with --set, such as in_channels=1",
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < loaders.classes:
        gives = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise FxPruneError(
            f"this {name} does not classify the images of {loaders.name}",
            where="MODEL, --data",
            why=f"it gives {gives}; needed is [1, {loaders.classes}], a logit per class",
            fix=f"--set num_classes={loaders.classes}, where the model has that option",
        )
