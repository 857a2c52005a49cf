"""The ResNets for small images of He et al. 2016 (arXiv:1512.03385, section 4.2), and a lookup.

Promise: `cifar_resnet(depth)` has depth = 6n + 2 weighted layers, shortcuts of option A (no
parameters), and state-dict keys `conv1, bn1, layer{1,2,3}.{i}.conv{1,2}, .bn{1,2}, linear`, the
keys under which trained weights circulate. Every network traces with `torch.fx` and takes any
batch and any square or oblong size from 4x4 up (32x32 in the paper).
Refuses: a depth that is not 6n + 2; a name that is not in `names()`, with the nearest one.
Adding a network: write its factory below and add one line to `_ZOO`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import OptionError, OptionTypeError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, inputs, H, W] -> [N, outputs, H/stride, W/stride].

    The shortcut is option A: every `stride`-th pixel, zero channels before and after, no
    parameters. Sizes round up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.before = (outputs - inputs) // 2  # the paper: a quarter of the new width
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.before or self.after:
            x = F.pad(x, (0, 0, 0, 0, self.before, self.after))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """A stem, three stages of `blocks` BasicBlocks of widths w, 2w, 4w, mean pooling, a linear.

    [N, in_channels, H, W] float -> logits [N, num_classes]. Convolutions and the linear start
    with He's normal weights. Build it with `cifar_resnet`, which checks its arguments.
    """

    def __init__(
        self, blocks: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, stride=1)
        self.layer2 = _stage(blocks, width, 2 * width, stride=2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
) -> CifarResNet:
    """The ResNet with `depth` = 6n + 2 weighted layers, freshly initialised, in training mode.

    `width` is the number of channels of the first stage (the paper: 16). Parameters with the
    defaults: 269,722 (20), 464,154 (32), 658,586 (44), 853,018 (56), 1,727,962 (110).
    OptionError for a depth that is not 6n + 2 or a count below 1, OptionTypeError for one that
    is no integer.
    """
    for name, value in (
        ("depth", depth),
        ("num_classes", num_classes),
        ("in_channels", in_channels),
        ("width", width),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise OptionTypeError(f"`{name}` must be an integer, not {value!r}", where=name)
        if value < 1:
            raise OptionError(f"`{name}` must be at least 1, not {value}", where=name)
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        below = max(8, depth - rest)
        raise OptionError(
            f"there is no CIFAR ResNet of depth {depth}",
            where="depth",
            why="three stages of n blocks of two convolutions, a stem and a linear make 6n + 2",
            fix=f"pass depth={below} or depth={below + 6}",
        )
    return CifarResNet(blocks, num_classes, in_channels, width)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet(20, ...)`: 269,722 parameters and 40.6 million MACs on 3x32x32 images."""
    return cifar_resnet(20, num_classes, in_channels, width)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet(32, ...)`: 464,154 parameters."""
    return cifar_resnet(32, num_classes, in_channels, width)


def resnet44(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet(44, ...)`: 658,586 parameters."""
    return cifar_resnet(44, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet(56, ...)`: 853,018 parameters and 125.5 million MACs on 3x32x32 images."""
    return cifar_resnet(56, num_classes, in_channels, width)


def resnet110(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet(110, ...)`: 1,727,962 parameters."""
    return cifar_resnet(110, num_classes, in_channels, width)


_ZOO: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}


def names() -> tuple[str, ...]:
    """The names that `build` knows, smallest network first."""
    return tuple(_ZOO)


def build(name: str, **options: int) -> nn.Module:
    """A fresh network by its name, e.g. `build("resnet56", in_channels=1)`.

    `options` go to the factory. OptionError for an unknown name (with the nearest known one) or
    an option that the factory does not take.
    """
    if name not in _ZOO:
        near = difflib.get_close_matches(name.lower(), _ZOO, n=1, cutoff=0.5)
        raise OptionError(
            f"the zoo has no network {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where="name",
            fix=f"use one of {', '.join(_ZOO)}",
        )
    known = inspect.signature(_ZOO[name]).parameters
    for option in options:
        if option not in known:
            raise OptionError(
                f"{name} takes no option {option!r}",
                where=option,
                fix=f"it takes {', '.join(known)}",
            )
    return _ZOO[name](**options)


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """`blocks` BasicBlocks; the first one strides and widens."""
    later = (BasicBlock(outputs, outputs) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *later)
