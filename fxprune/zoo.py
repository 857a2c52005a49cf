"""Networks of the pruning literature as their papers count them, and a lookup by name.

| name | paper | inputs | MACs | parameters |
|---|---|---|---:|---:|
| resnet20 | He et al. 2016 (arXiv:1512.03385, section 4.2) | 3x32x32, 10 classes | 40,551,040 | 269,722 |
| resnet32 | " | " | 68,862,592 | 464,154 |
| resnet44 | " | " | 97,174,144 | 658,586 |
| resnet56 | " | " | 125,485,696 | 853,018 |
| resnet110 | " | " | 252,887,680 | 1,727,962 |
| mobilenet_v1 | Howard et al. 2017 (arXiv:1704.04861) | 3x224x224, 1000 classes | 568,740,352 | 4,231,976 |
| vgg16_bn | Simonyan & Zisserman 2015 (arXiv:1409.1556) | 3x32x32, 10 classes | 313,463,808 | 14,991,946 |
| vgg19_bn | " | " | 398,398,464 | 20,304,202 |

Promise: MACs are those of convolutions and linears. Every network traces with `torch.fx`, takes any
         batch and other sizes than its own (each says which), and starts with He's normal weights.
Refuses: a name that is not in `names()`, with the nearest; options that it does not take, or that
         make no sense.
Adding a network: write its factory below and add one line to `_ZOO`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import OptionError, OptionTypeError

Shortcut = Literal["pad-both", "pad-after"]
_SHORTCUTS = ("pad-both", "pad-after")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, inputs, H, W] -> [N, outputs, H/stride, W/stride].

    The shortcut is option A: every `stride`-th pixel, zero channels for those that are missing,
    no parameters. The zeros stand before and after the channels there are ("pad-both"), or all
    after them ("pad-after"). Sizes round up.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, shortcut: Shortcut = "pad-both"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        # A quarter of the new width on each side, as in the code of which trained weights
        # circulate; the paper says only that zeros are padded.
        self.before = (outputs - inputs) // 2 if shortcut == "pad-both" else 0
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

    [N, in_channels, H, W] float -> logits [N, num_classes], of any size from 1x1 up. The keys of
    its state dict are those under which trained weights circulate: `conv1, bn1,
    layer{1,2,3}.{i}.conv{1,2}, .bn{1,2}, linear`. Build it with `cifar_resnet`, which checks its
    arguments.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        shortcut: Shortcut = "pad-both",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialise(self)

    @property
    def example_input_array(self) -> Tensor:
        """What `fxprune.compile` takes for an example input where none is given: [1, C, 32, 32]."""
        return _example(self, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


class CifarVGG(nn.Module):
    """A VGG for small images: 3x3 convolutions with batch norms, five poolings, two linears.

    [N, in_channels, H, W] float -> logits [N, num_classes]. `features.N` numbers convolution,
    norm, ReLU and pooling as torchvision's `vgg16_bn().features` does, whose weights fit with the
    default options. `classifier` is linear, norm, ReLU, linear, as Li et al. 2017
    (arXiv:1608.08710) count it. Build it with `vgg16_bn` or `vgg19_bn`, which check their arguments.
    Departs: poolings round up, so that every size from 1x1 on is taken (28x28, 8x8); where the
    sizes are even, as from 32x32 on down, that is the same. What is left above 1x1 is averaged.
    """

    def __init__(
        self,
        convolutions: tuple[int, int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for count, multiple in zip(convolutions, (1, 2, 4, 8, 8), strict=True):
            for _ in range(count):
                outputs = multiple * width
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(inputs, inputs),
            nn.BatchNorm1d(inputs),
            nn.ReLU(inplace=True),
            nn.Linear(inputs, num_classes),
        )
        _initialise(self)

    @property
    def example_input_array(self) -> Tensor:
        """What `fxprune.compile` takes for an example input where none is given: [1, C, 32, 32]."""
        return _example(self, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


class DepthwiseSeparable(nn.Module):
    """A 3x3 filter per channel, then a 1x1 convolution; each with its batch norm and ReLU.

    [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]. Sizes round up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn(pointwise(relu(bn(depthwise(x))))))."""
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class MobileNetV1(nn.Module):
    """A stem, 13 depthwise separable blocks (the paper's table 1), mean pooling, a linear.

    [N, in_channels, H, W] float -> logits [N, num_classes], of any size from 1x1 up.
    Build it with `mobilenet_v1`, which checks its arguments.
    Departs: the table prints stride 2 for the last depthwise layer; its sizes, and its 569 million
    MACs, are those of stride 1.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = []
        inputs = width
        for multiple, stride in _MOBILENET:
            blocks.append(DepthwiseSeparable(inputs, multiple * width, stride))
            inputs = multiple * width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, num_classes)
        _initialise(self)

    @property
    def example_input_array(self) -> Tensor:
        """What `fxprune.compile` takes for an example input where none is given: [1, C, 224, 224]."""
        return _example(self, 224)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


# Of each block: outputs as a multiple of the stem's, and the stride of its depthwise layer.
_MOBILENET = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2)) + 5 * ((16, 1),) + ((32, 2), (32, 1))


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut = "pad-both",
) -> CifarResNet:
    """The ResNet with `depth` = 6n + 2 weighted layers, freshly initialised, in training mode.

    `width` is the number of channels of the first stage (the paper: 16); `shortcut` is where the
    zero channels stand at the beginning of the second and third, "pad-both" or "pad-after".
    OptionError for a depth that is not 6n + 2, a count below 1 or an unknown shortcut,
    OptionTypeError for a count that is no integer.
    """
    _check_counts(depth=depth, num_classes=num_classes, in_channels=in_channels, width=width)
    if shortcut not in _SHORTCUTS:
        raise OptionError(
            f"there is no shortcut {shortcut!r}",
            where="shortcut",
            fix=f"use one of {', '.join(map(repr, _SHORTCUTS))}",
        )
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        below = max(8, depth - rest)
        raise OptionError(
            f"there is no CIFAR ResNet of depth {depth}",
            where="depth",
            why="three stages of n blocks of two convolutions, a stem and a linear make 6n + 2",
            fix=f"pass depth={below} or depth={below + 6}",
        )
    return CifarResNet(blocks, num_classes, in_channels, width, shortcut)


def resnet20(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut = "pad-both",
) -> CifarResNet:
    """`cifar_resnet(20, ...)`: 269,722 parameters, 40.6 million MACs on 3x32x32 images."""
    return cifar_resnet(20, num_classes, in_channels, width, shortcut)


def resnet32(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut = "pad-both",
) -> CifarResNet:
    """`cifar_resnet(32, ...)`: 464,154 parameters, 68.9 million MACs on 3x32x32 images."""
    return cifar_resnet(32, num_classes, in_channels, width, shortcut)


def resnet44(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut = "pad-both",
) -> CifarResNet:
    """`cifar_resnet(44, ...)`: 658,586 parameters, 97.2 million MACs on 3x32x32 images."""
    return cifar_resnet(44, num_classes, in_channels, width, shortcut)


def resnet56(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut = "pad-both",
) -> CifarResNet:
    """`cifar_resnet(56, ...)`: 853,018 parameters, 125.5 million MACs on 3x32x32 images."""
    return cifar_resnet(56, num_classes, in_channels, width, shortcut)


def resnet110(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut = "pad-both",
) -> CifarResNet:
    """`cifar_resnet(110, ...)`: 1,727,962 parameters, 252.9 million MACs on 3x32x32 images."""
    return cifar_resnet(110, num_classes, in_channels, width, shortcut)


def vgg16_bn(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, bias: bool = True
) -> CifarVGG:
    """VGG-16 with batch norm: 14,991,946 parameters, 313.5 million MACs on 3x32x32 images.

    `width` is the number of channels of the first convolution (the paper: 64); `bias` is whether
    convolutions have one (torchvision's do; the batch norms make it superfluous).
    OptionError for a count below 1, OptionTypeError for another type.
    """
    return _vgg((2, 2, 3, 3, 3), num_classes, in_channels, width, bias)


def vgg19_bn(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, bias: bool = True
) -> CifarVGG:
    """VGG-19 with batch norm: 20,304,202 parameters, 398.4 million MACs on 3x32x32 images.

    Options and errors as for `vgg16_bn`.
    """
    return _vgg((2, 2, 4, 4, 4), num_classes, in_channels, width, bias)


def mobilenet_v1(num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> MobileNetV1:
    """MobileNet: 4,231,976 parameters, 568.7 million MACs on 3x224x224 images.

    `width` is the number of channels of the stem, 32 times the paper's width multiplier: 24, 16
    and 8 are its 0.75, 0.5 and 0.25.
    OptionError for a count below 1, OptionTypeError for one that is no integer.
    """
    _check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
    return MobileNetV1(num_classes, in_channels, width)


_ZOO: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "mobilenet_v1": mobilenet_v1,
    "vgg16_bn": vgg16_bn,
    "vgg19_bn": vgg19_bn,
}
_LARGE = ("mobilenet_v1",)  # made for images of 224x224; the others for 32x32


def names() -> tuple[str, ...]:
    """The names that `build` knows, fewest parameters first."""
    return tuple(_ZOO)


def input_shape(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network was made for, and its MACs are given for.

    OptionError for an unknown name.
    """
    _factory(name)
    side = 224 if name in _LARGE else 32
    return 3, side, side


def build(name: str, **options: Any) -> nn.Module:
    """A fresh network by its name, e.g. `build("resnet56", in_channels=1)`, in training mode.

    `options` go to the factory, which checks them. OptionError for an unknown name (with the
    nearest known one) or an option that the factory does not take.
    """
    factory = _factory(name)
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise OptionError(
                f"{name} takes no option {option!r}",
                where=option,
                fix=f"it takes {', '.join(known)}",
            )
    return factory(**options)


def _factory(name: str) -> Callable[..., nn.Module]:
    if not isinstance(name, str):
        raise OptionTypeError(f"the name of a network is a string, not {name!r}", where="name")
    if name not in _ZOO:
        near = difflib.get_close_matches(name.lower(), _ZOO, n=1, cutoff=0.5)
        raise OptionError(
            f"the zoo has no network {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where="name",
            fix=f"use one of {', '.join(_ZOO)}",
        )
    return _ZOO[name]


def _vgg(
    convolutions: tuple[int, int, int, int, int],
    num_classes: int,
    in_channels: int,
    width: int,
    bias: bool,
) -> CifarVGG:
    _check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
    if not isinstance(bias, bool):
        raise OptionTypeError(f"`bias` must be True or False, not {bias!r}", where="bias")
    return CifarVGG(convolutions, num_classes, in_channels, width, bias)


def _check_counts(**counts: object) -> None:
    """OptionTypeError for what is no integer, OptionError for one below 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise OptionTypeError(f"`{name}` must be an integer, not {value!r}", where=name)
        if value < 1:
            raise OptionError(f"`{name}` must be at least 1, not {value}", where=name)


def _initialise(network: nn.Module) -> None:
    """He's normal weights for convolutions and linears."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def _example(network: nn.Module, side: int) -> Tensor:
    """Zeros [1, C, side, side] like the weights of the first convolution."""
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    return conv.weight.new_zeros(1, conv.in_channels, side, side)


def _stage(
    blocks: int, inputs: int, outputs: int, stride: int, shortcut: Shortcut
) -> nn.Sequential:
    """`blocks` BasicBlocks; the first one strides and widens."""
    later = (BasicBlock(outputs, outputs) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), *later)
