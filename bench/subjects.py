"""Networks of torchvision and timm to measure, and what a cut of them is compared with.

`build` gives a network in eval mode with random weights, an input that it takes, and the part that
is pruned: all of it, or the backbone of a detector. `perturb` gives every parameter and statistic
elements that differ, at a scale at which signals neither die nor explode: layer scales of 1e-6,
zeroed last norms and fresh batch norms would hide an error. `KeptNorms` is the law's reading of a
normalisation over channels of which some are gone: statistics over those that are kept.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from table import ROOT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import fxprune

NAMES = Path(__file__).with_name("timm_names.txt")
LIBRARIES = ("torchvision", "timm")


@dataclass
class Subject:
    """A network in eval mode, the part of it that is pruned ("" for all), and that part's input."""

    model: nn.Module
    part: str
    inputs: tuple[Tensor, ...]

    @property
    def pruned_part(self) -> nn.Module:
        """The module that is compiled."""
        return self.model.get_submodule(self.part)

    @property
    def shape(self) -> str:
        """Of the inputs, such as "1x3x224x224"."""
        return ", ".join("x".join(map(str, x.shape)) for x in self.inputs)


def names(library: str) -> list[str]:
    """Every name that torchvision lists, or the measured ones of timm."""
    return (
        torchvision.models.list_models() if library == "torchvision" else NAMES.read_text().split()
    )


def build(library: str, name: str) -> Subject:
    """A network with random weights and distinct elements; nothing is downloaded."""
    torch.manual_seed(0)
    subject = _timm(name) if library == "timm" else _torchvision(name)
    perturb(subject)
    return subject


def _timm(name: str) -> Subject:
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    return Subject(model, "", (torch.randn(1, *model.default_cfg["input_size"]),))


def _torchvision(name: str) -> Subject:
    kind = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    family = kind.partition(".")[0]
    options: dict[str, Any] = {"weights": None}
    if family in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # its own takes a minute
    if family == "quantization":
        options["quantize"] = False
    model = torchvision.models.get_model(name, **options).eval()
    shapes = {"video": (3, 8, 112, 112), "segmentation": (3, 128, 128), "detection": (3, 128, 128)}
    shape = shapes.get(family, (3, 224, 224))
    if name.startswith("mvit") or name == "s3d":
        shape = (3, 16, 224, 224)
    elif name.startswith("ssd"):
        shape = (3, 320, 320) if name.startswith("ssdlite") else (3, 300, 300)
    elif "inception_v3" in name:
        shape = (3, 299, 299)
    elif name.startswith("swin_v2"):
        shape = (3, 256, 256)
    elif family == "optical_flow":
        shape = (3, 128, 128)
    inputs = tuple(torch.randn(1, *shape) for _ in range(2 if family == "optical_flow" else 1))
    if family == "detection" and not name.startswith("ssd"):
        model.transform.min_size, model.transform.max_size = (128,), 160
    return Subject(model, "backbone" if family == "detection" else "", inputs)


@torch.no_grad()
def perturb(subject: Subject) -> None:
    """Give every element of every parameter and statistic a value of its own."""
    random = torch.Generator().manual_seed(1)
    for module in subject.model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                _perturb(p, "bias" in name, torch.randn(p.shape, generator=random).to(p.dtype))
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            for name, p in module._buffers.items():
                p.copy_((name in ("weight", "running_var")) + 0.2 * torch.randn(p.shape, generator=random).clamp(-2, 2))  # fmt: skip
    _calibrate(subject, random)


def _perturb(p: Tensor, bias: bool, noise: Tensor) -> None:
    constant = bool((p == p.flatten()[:1]).all()) if p.numel() else True
    wide = sum(size > 1 for size in p.shape) > 1
    if bias and p.dim() == 1:
        p.copy_(0.3 * noise)
    elif p.dim() <= 1:
        p.copy_(1 + 0.3 * noise.clamp(-3, 3))
    elif constant and wide:  # a matrix that starts at zero
        p.copy_(noise / max(p[0].numel(), 1) ** 0.5)
    elif constant or float(p.abs().max()) < 1e-3:  # a layer scale, a token
        p.copy_(0.5 + 0.15 * noise)
    else:
        p.add_(0.1 * float(p.abs().mean()) * noise)


def _calibrate(subject: Subject, random: torch.Generator) -> None:
    """Statistics of batch norms near those of the activations, and then away from them."""
    part = subject.pruned_part
    norms = [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.running_mean is not None]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
        m.train()
    part(*(torch.randn(2, *x.shape[1:], generator=random) for x in subject.inputs))
    for m, momentum in zip(norms, momenta, strict=True):
        m.eval()
        m.momentum = momentum
        shift = torch.randn(m.running_mean.shape, generator=random)
        m.running_mean.add_(0.3 * shift * m.running_var.sqrt())
        m.running_var.mul_(0.5 + 1.5 * torch.rand(m.running_var.shape, generator=random)).add_(1e-3)


class KeptNorms(TorchFunctionMode):
    """While active, layer, RMS and group norms take their statistics over kept channels only.

    kept: {id of a norm's weight: int64 [kept], ascending}. Removed channels come out as zero.
    """

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.kept = kept
        self.fastpath = torch.backends.mha.get_fastpath_enabled()

    def __enter__(self) -> KeptNorms:
        torch.backends.mha.set_fastpath_enabled(False)  # it calls norms of its own
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.backends.mha.set_fastpath_enabled(self.fastpath)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take the kept channels out, normalise those, and put them back."""
        kwargs = dict(kwargs or {})
        if function not in (F.layer_norm, F.rms_norm, F.group_norm):
            return function(*args, **kwargs)
        order = ["input", "num_groups" if function is F.group_norm else "normalized_shape", "weight", "bias", "eps"]  # fmt: skip
        if function is F.rms_norm:
            order.remove("bias")
        given = dict(zip(order, args, strict=False)) | kwargs
        kept = self.kept.get(id(given.get("weight")))
        if kept is None:
            return function(**given)
        axis = 1 if function is F.group_norm else -1
        x = given["input"]
        given["input"] = x.index_select(axis, kept)
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                given[name] = given[name][kept]
        if "normalized_shape" in given:
            given["normalized_shape"] = (len(kept),)
        else:
            per = x.shape[1] // given["num_groups"]
            counts = torch.bincount(kept // per)
            if len(set(counts[counts > 0].tolist())) > 1:
                raise ValueError("the groups of a group norm keep different counts of channels")
            given["num_groups"] = int((counts > 0).sum())
        return torch.zeros_like(x).index_copy(axis, kept, function(**given))


def twice(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Other inputs of the same sizes, two samples each, float64."""
    random = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(2, *x.shape[1:], generator=random, dtype=torch.float64) for x in inputs
    )


def total(outputs: Any) -> Tensor:
    """One number that every floating output has a part in."""
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    return sum((t.square().mean() for t in leaves if t.is_floating_point()), torch.zeros(()))


def alone(
    words: Sequence[str], limit: float, gigabytes: float
) -> tuple[dict[str, str] | None, str]:
    """The JSON on the last line that a script prints in a process of its own, or why there is none.

    words: the script and its arguments. limit: seconds. gigabytes: of data that it may hold.
    """

    def restrict() -> None:
        size = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    try:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=limit,
            preexec_fn=restrict,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return None, f"not done after {limit:g} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = done.stderr.strip().rpartition("\n")[2]
        return None, f"exit code {done.returncode}: {last}"[:600]
    return json.loads(lines[-1]), ""


def forked(
    measure: Callable[[], dict[str, str]], limit: float, gigabytes: float
) -> tuple[dict[str, str] | None, str]:
    """As `alone`, for a function: in a copy of this process, which has imported everything."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
            signal.alarm(max(int(limit), 1))
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(measure()))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return None, f"not done after {limit:g} s"
    return (json.loads(text), "") if text else (None, f"exit code {status}")


def said(error: BaseException) -> str:
    """The class and the first lines of an error; where it arose, if nobody raised it on purpose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' | '.join(lines[:4])}"[:500]
    if not isinstance(error, fxprune.FxPruneError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text += f" | at {frame.filename}:{frame.lineno} in {frame.name}"
    return without_paths(text)


def without_paths(text: str) -> str:
    """Files named from the library or the repository on."""
    text = re.sub(r"[^\s()'\"`]*/(?:site-packages|python3[.]\d+)/", "", text)
    return text.replace(f"{ROOT}/", "")


def version(library: str) -> str:
    """Of torchvision or timm."""
    if library == "torchvision":
        return torchvision.__version__
    import timm

    return timm.__version__
