"""Loaders that are empty, die, or yield something else: said in plain words, with the loader's own
traceback where it has one, and the model as it was."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from refusals import X, bits, net, refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxprune
from fxprune import OptionError, OptionTypeError, fit


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    """Torch asks for its workers every fifth of a second instead of every five."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        yield
        gc.collect()  # loaders that tracebacks held wait for their workers now


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Values, flags and modes; the loader itself may draw random numbers."""

    def look() -> Any:
        state = [(k, t.requires_grad, bits(t)) for k, t in model.state_dict(keep_vars=True).items()]
        return state, [m.training for m in model.modules()]

    before = look()
    yield
    assert look() == before


def classifier() -> nn.Sequential:
    return nn.Sequential(*net(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Samples(Dataset[Any]):
    """Eight samples, of which the sixth may do something else."""

    def __init__(self, sample: Callable[[], Any], sixth: Callable[[], Any] | None = None):
        self.sample, self.sixth = sample, sixth

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return self.sixth() if i == 5 and self.sixth else self.sample()


def pair() -> tuple[Tensor, int]:
    return torch.randn(3, 8, 6), 1


def corrupt() -> Any:
    raise ValueError("image 5.jpg is corrupt")


def dies() -> Any:
    os._exit(3)


def repair(model: nn.Module, loader: Any) -> object:
    return fxprune.compile(model, X, repair="bn", data=loader, progress=False)


def evaluate(model: nn.Module, loader: Any) -> object:
    return fxprune.compile(model, X, evaluate=loader, progress=False)


def train(model: nn.Module, loader: Any) -> object:
    return fit.train(model, loader, fit.Recipe(epochs=1, lr=0.01), progress=False)


USES = [repair, evaluate, train]
every_use = pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)


@every_use
def test_a_loader_that_works(use):
    use(classifier(), DataLoader(Samples(pair), 4))


@every_use
@pytest.mark.parametrize("batches", [[], DataLoader(Samples(pair), 16, drop_last=True)])
def test_a_loader_without_a_batch(use, batches):
    model = classifier()
    with as_it_was(model):
        refused(OptionError, lambda: use(model, batches), "loader", "batch")


@every_use
@pytest.mark.parametrize("batch", [{"x": X, "y": 1}, 3, "image", None, (), ("x", 1)])
def test_batches_of_another_kind(use, batch):
    model = classifier()
    with as_it_was(model):
        refused(OptionTypeError, lambda: use(model, [batch, batch]), "batch", "(input, target)")


@every_use
@pytest.mark.parametrize("loader", [3, 0.5])
def test_what_is_no_loader(use, loader):
    model = classifier()
    with as_it_was(model):
        refused(OptionTypeError, lambda: use(model, loader), "must be")


@every_use
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_raises_says_it_itself(use, workers):
    """With the traceback of its worker, which tells more than a sentence of ours."""
    model = classifier()
    loader = DataLoader(Samples(pair, corrupt), 2, num_workers=workers)
    with as_it_was(model), pytest.raises(ValueError, match=r"image 5\.jpg is corrupt") as e:
        use(model, loader)
    assert "in corrupt" in str(e.value) or any(t.name == "corrupt" for t in e.traceback)


def test_a_worker_that_dies_is_reported_and_the_model_is_as_it_was():
    model = classifier()
    loader = DataLoader(Samples(pair, dies), 2, num_workers=1)
    # Torch notices either the dead worker or the torn connection first.
    words = r"exited unexpectedly|[Cc]onnection reset|EOF|[Bb]roken pipe|refused"
    with as_it_was(model), pytest.raises((RuntimeError, OSError, EOFError), match=words):
        train(model, loader)
    train(model, DataLoader(Samples(pair), 4))


def test_targets_that_the_model_does_not_have():
    model = classifier()
    with as_it_was(model):
        for use in (evaluate, train):
            refused(OptionError, lambda: use(model, [(X, torch.tensor([0, 9]))]), "targets run from", "classes 0 to 3")  # noqa: B023 # fmt: skip
            refused(OptionTypeError, lambda: use(model, [(X, torch.rand(2))]), "int64")  # noqa: B023


def test_one_sample_cannot_train_a_batch_norm_of_one_value():
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    batches: Iterable[Any] = [(X[:1], torch.tensor([1]))]
    with as_it_was(model):
        refused(OptionError, lambda: train(model, batches), "one sample", "larger batch size")
