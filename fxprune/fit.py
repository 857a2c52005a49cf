"""The reference trainer: SGD with Nesterov momentum, a schedule, cross-entropy, and nothing clever.

Promise: the same model, loader, recipe and thread count give the same weights, bit for bit on a
CPU, also when the training was interrupted and resumed; the global random states, every module's
training flag and every tensor's memory format are as before afterwards; after an error the weights
and buffers are as before too.
Refuses: an empty loader, batches that are not (input, target), a loss that is not finite, a
checkpoint of another training.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.checkpoint import StrPath
from fxprune.errors import FxPruneError, OptionError, OptionTypeError
from fxprune.graph import modes_kept
from fxprune.interrupts import Interrupts
from fxprune.training import randomness
from fxprune.training import state as training_state
from fxprune.training.batches import Loader, check_loader, empty, logits_of, pair
from fxprune.training.meter import PROGRESS, Meter, meter
from fxprune.training.recipe import AMP, Recipe
from fxprune.training.state import Parts, Position, tensors_of

__all__ = ["History", "Recipe", "accuracies", "accuracy", "train"]

Evaluate = Loader | Callable[[nn.Module], float]
Progress = bool | Literal["log"]

_CHECK_EVERY = 16  # steps between two looks at the loss; each look waits for the GPU


class History(list[float]):
    """The mean loss of every epoch. `scores`: what `evaluate` gave after each, or nothing."""

    def __init__(self, losses: Iterable[float] = (), scores: Iterable[float] = ()) -> None:
        super().__init__(losses)
        self.scores = list(scores)


# ---- train --------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    loader: Loader,
    recipe: Recipe,
    *,
    progress: Progress = True,
    on_epoch: Callable[[int, float], None] | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: StrPath | None = None,
    resume: bool = True,
) -> History:
    """Train `model` in place; the mean cross-entropy of every epoch, `recipe.epochs` numbers.

    loader:   yields (input, target): float [N, ...] and int64 [N], moved to the model's device;
              iterated once per epoch. A batch of one sample that follows larger ones is left out
              where the network has batch norms: one sample has no variance.
    progress: True shows epoch, loss, images per second and the time left: a bar where stderr is a
              terminal, else a line at most every 30 seconds; "log" is a line per epoch.
    on_epoch: called as on_epoch(epochs done, mean loss) after every epoch.
    evaluate: measured after every epoch, in eval mode and full precision: a loader (top-1 accuracy)
              or a function (model) -> float. In `scores` of what is returned, and in the progress.
    checkpoint: a file, written at the start, after every epoch, and when Ctrl-C or SIGTERM ends the
              training, which then finishes its step first. Where it exists, training goes on from
              it, in the middle of an epoch too (whose first batches are then drawn once more, and
              not trained on), and is the same bit for bit on a CPU as one without interruption. It
              replaces the model's weights; one that is complete trains nothing. The generators of
              `loader` and `loader.sampler` belong to it; loaders must be deterministic otherwise
              (torch's are, but for `persistent_workers=True` with random augmentation).
    resume:   False ignores and overwrites an earlier file.

    OptionError when the loader is empty or yields something else, or for "fp16" without CUDA,
    FxPruneError when the loss is not finite, CheckpointError for a file that belongs to another
    training or cannot be written; the model is then as before. What a loader's worker process
    raises arrives here with its traceback. Ctrl-C keeps what was trained so far.
    """
    _check_arguments(model, loader, recipe, progress, evaluate)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(
            "this model has nothing to train",
            where="model",
            why="no parameter requires a gradient",
            fix="call model.requires_grad_()",
        )
    device = parameters[0].device
    _check_amp(recipe, device)
    before = {key: value.detach().clone() for key, value in tensors_of(model).items()}
    optimizer = recipe.optimizer(parameters)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    parts = Parts(model, optimizer, scaler, loader, asdict(recipe), device)
    try:
        with (
            Interrupts(checkpoint is not None) as interrupts,
            _channels_last(model) if recipe.channels_last else nullcontext(),
            modes_kept(model),
            randomness.seeded(recipe.seed, device),
            meter(progress, "training", recipe.epochs) as shown,
        ):
            run = _Run(parts, recipe, evaluate, shown, interrupts, checkpoint)
            run.begin(resume)
            try:
                run.epochs(on_epoch)
            except KeyboardInterrupt:
                if interrupts.whole:
                    run.save()
                raise
    except Exception:
        with torch.no_grad():
            for key, value in tensors_of(model).items():
                value.copy_(before[key])  # guard: the old weights -> tests/test_fit.py -k leaves
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
    return History(run.position.losses, run.position.scores)


class _Run:
    """A training under way. What changes between two steps changes inside `interrupts.held()`."""

    def __init__(
        self,
        parts: Parts,
        recipe: Recipe,
        evaluate: Evaluate | None,
        shown: Meter,
        interrupts: Interrupts,
        checkpoint: StrPath | None,
    ) -> None:
        self.parts, self.model, self.device = parts, parts.model, parts.device
        self.recipe, self.shown, self.interrupts = recipe, shown, interrupts
        self.evaluate, self.checkpoint = evaluate, checkpoint
        self.position = Position()
        self.start = randomness.capture(self.device, parts.loader)  # as this epoch began
        self.now = self.start  # as it was after the last step
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.total = torch.zeros((), dtype=exact, device=self.device)  # loss over samples

    def begin(self, resume: bool) -> None:
        """Go on from the file; or write the first one: a path that cannot be written shows now."""
        if self.checkpoint is None:
            return
        if not (resume and os.path.exists(self.checkpoint)):
            self.save()
            return
        self.position, self.start, self.now = training_state.load(self.checkpoint, self.parts)
        randomness.restore(self.start, self.device, self.parts.loader)
        self.total.fill_(self.position.total)
        self.shown.resume(self.position.epoch)

    def save(self) -> None:
        """Write the file, where there is to be one."""
        if self.checkpoint is None:
            return
        self.position.total = self.total.item()
        with self.interrupts.held():
            training_state.save(self.checkpoint, self.parts, self.position, self.start, self.now)

    def epochs(self, on_epoch: Callable[[int, float], None] | None) -> None:
        """All that are left."""
        while (p := self.position).epoch < self.recipe.epochs:
            self.model.train()
            loss = self.epoch()
            scores = [] if self.evaluate is None else [_score(self.model, self.evaluate)]
            with self.interrupts.held():
                self.position = Position(
                    p.epoch + 1, losses=[*p.losses, loss], scores=[*p.scores, *scores]
                )
                self.total.zero_()
                self.now = self.start = randomness.capture(self.device, self.parts.loader)
            self.shown.finish_round(p.epoch + 1, self.facts(loss))
            self.save()
            if on_epoch is not None:
                on_epoch(p.epoch + 1, loss)

    def epoch(self) -> float:
        """The rest of the present epoch; the mean loss per sample of all of it."""
        p, loader = self.position, self.parts.loader
        steps = len(loader) if isinstance(loader, Sized) else 0
        self.shown.begin_round()
        for x, y in self.batches():
            # The middle of the step: at its beginning, a warm-up's first step would have rate 0.
            share = min((p.step + 0.5) / steps, 1.0) if steps else 0.5
            rest = len(y) == 1 and p.seen > p.step and _normalises(self.model)
            with self.interrupts.held():  # guard: whole steps -> tests/training/test_state.py
                if not rest:
                    self.learn(x, y, self.recipe.learning_rate(p.epoch + share))
                    p.seen += len(y)
                p.step += 1
                if self.checkpoint is not None:
                    self.now = randomness.capture(self.device)
            looked = p.step % _CHECK_EVERY == 1
            facts = self.facts(self.mean()) if looked else None
            self.shown.step(p.epoch + (min(p.step / steps, 1.0) if steps else 0.0), len(y), facts)
        if not p.step:
            raise empty(p.epoch)
        return self.mean()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of this epoch's batches; those before are drawn once more, and dropped."""
        batches = iter(self.parts.loader)
        for _ in itertools.islice(batches, self.position.step):
            continue
        if self.position.step:  # guard: the step's states -> tests/training/test_state.py
            randomness.restore(self.now, self.device)
        for batch in batches:
            yield pair(batch)

    def learn(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One step of SGD."""
        recipe, optimizer, scaler = self.recipe, self.parts.optimizer, self.parts.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = x.to(self.device, non_blocking=True)
        if recipe.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with _autocast(recipe, self.device):
            logits = logits_of(self.model, x, y)
        if logits.dtype in AMP.values():
            logits = logits.float()
        y = y.to(self.device, non_blocking=True)
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(
                (p for g in optimizer.param_groups for p in g["params"]), recipe.clip_norm
            )
        scaler.step(optimizer)
        scaler.update()
        self.total += loss.detach().to(self.total.dtype) * len(y)

    def mean(self) -> float:
        """The mean loss of this epoch so far; FxPruneError when it is not finite."""
        p = self.position
        loss = self.total.item() / max(p.seen, 1)
        if math.isfinite(loss):
            return loss
        raise FxPruneError(
            f"the loss became {loss}",
            where=f"epoch {p.epoch + 1}, at or before step {p.step}",
            why="training diverged, or an input or a weight is not finite",
            fix=f"use a smaller learning rate (now {self.recipe.lr:g}) or warmup=1 or "
            "clip_norm=1.0; check that inputs and weights are finite. The model is as it was "
            "before training",
        )

    def facts(self, loss: float) -> str:
        """A loss, and the score of the last whole epoch, in words."""
        form = ", score {:.4g}" if callable(self.evaluate) else ", accuracy {:.1%}"
        return f"loss {loss:.3f}" + "".join(form.format(s) for s in self.position.scores[-1:])


# ---- accuracy -----------------------------------------------------------------------------------


def accuracy(
    model: nn.Module, loader: Loader, *, topk: int = 1, progress: Progress = False
) -> float:
    """The share of inputs whose target is among the `topk` largest logits, 0 to 1.

    loader yields (input, target): float [N, ...] and int64 [N]; the model gives [N, classes].
    Measured in eval mode; every module's mode is as before afterwards. OptionError when the
    loader is empty or yields something else, or there are fewer than `topk` classes.
    progress: a bar on a terminal, where no other bar is shown; see `train`.
    """
    return accuracies(model, loader, (topk,), progress=progress)[0]


def accuracies(
    model: nn.Module, loader: Loader, topk: Sequence[int] = (1, 5), *, progress: Progress = False
) -> tuple[float, ...]:
    """`accuracy` for several `topk` in one pass, in their order: by default top-1 and top-5."""
    check_loader(loader, "loader")
    _check_progress(progress)
    if not topk or not all(isinstance(k, int) and k >= 1 for k in topk):
        raise OptionError(f"topk is {topk!r}", where="topk", why="it must be integers of at least 1")  # fmt: skip
    device = _device(model)
    right = torch.zeros(len(topk), dtype=torch.int64, device=device)
    steps, seen = len(loader) if isinstance(loader, Sized) else 0, 0
    with modes_kept(model), torch.no_grad(), meter(progress, "measuring", 1, unit="") as shown:
        model.eval()
        for step, batch in enumerate(loader, 1):
            x, y = pair(batch)
            logits = logits_of(model, x.to(device, non_blocking=True), y)
            if (classes := logits.shape[1]) < max(topk):
                raise OptionError(
                    f"there is no top-{max(topk)} of {classes} classes",
                    where="topk",
                    fix=f"use {classes} at most",
                )
            y = y.to(device, non_blocking=True)
            for i, k in enumerate(topk):
                best = logits.argmax(1, keepdim=True) if k == 1 else logits.topk(k).indices
                right[i] += (best == y[:, None]).sum()
            seen += len(y)
            shown.step(min(step / steps, 1.0) if steps else 0.0, len(y))
    if not seen:
        raise empty()
    return tuple(n / seen for n in right.tolist())


def _score(model: nn.Module, evaluate: Evaluate) -> float:
    """What `evaluate` says of the model, in eval mode."""
    if not callable(evaluate):
        return accuracy(model, evaluate)
    with modes_kept(model):
        return float(evaluate(model.eval()))


# ---- arguments ----------------------------------------------------------------------------------


def _check_arguments(
    model: object, loader: object, recipe: object, progress: object, evaluate: object
) -> None:
    for name, value, kind in (("model", model, nn.Module), ("recipe", recipe, Recipe)):
        if not isinstance(value, kind):
            raise OptionTypeError(
                f"{name} is a {type(value).__name__}",
                where=name,
                why=f"it must be a {kind.__name__}",
            )
    check_loader(loader, "loader")
    _check_progress(progress)
    if evaluate is None or callable(evaluate):
        return
    check_loader(evaluate, "evaluate")
    if isinstance(evaluate, Iterator):
        raise OptionTypeError(
            "evaluate can be iterated only once",
            where="evaluate",
            why="it is measured after every epoch",
            fix="pass a DataLoader, a list of batches, or a function of the model",
        )


def _check_progress(progress: object) -> None:
    if progress not in PROGRESS:
        raise OptionError(f"progress is {progress!r}", where="progress", why='it must be True, False or "log"')  # fmt: skip


def _check_amp(recipe: Recipe, device: torch.device) -> None:
    if recipe.amp == "fp16" and device.type != "cuda":
        raise OptionError(
            f'amp="fp16" does not train on {device.type}',
            where="amp",
            why="its small gradients vanish without scaling, which needs CUDA",
            fix='use amp="bf16" or amp=None, or move the model to a GPU',
        )


# ---- the model while it trains ------------------------------------------------------------------


def _autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    if recipe.amp is None:
        return nullcontext()
    return torch.autocast(device.type, AMP[recipe.amp])


def _device(model: nn.Module) -> torch.device:
    """Where the model lives: the device of its first parameter or buffer."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _normalises(model: nn.Module) -> bool:
    """Whether some batch norm takes its statistics from the batch."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(m.training for m in norms)


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Four-dimensional parameters and buffers in channels_last; at the end, in their old storage."""
    old = {t: t.data for t in tensors_of(model).values() if t.dim() == 4}
    try:
        for t in old:
            t.data = t.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for t, data in old.items():
            t.data = data.copy_(t.data)
