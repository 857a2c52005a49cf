"""The modules random networks are made of: small, traceable by torch.fx, and readable.

The repr of a block is the call that builds it, so a printed network can be pasted back:
`from blocks import *`. `Layer` and `Op` reach most of torch by name; a class of its own is kept
for what needs parameters, sizes or a shape of code that users write.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Block(nn.Module):
    """A module whose repr is the call that builds it."""

    call: str

    def __new__(cls, *args: Any, **kwargs: Any) -> "Block":
        self = super().__new__(cls)
        parts = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
        self.__dict__["call"] = f"{cls.__name__}({', '.join(parts)})"
        return self

    def __repr__(self) -> str:
        return self.call


class Layer(Block):
    """A layer of torch.nn, by name."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, name)(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Op(Block):
    """A function of torch or torch.nn.functional, by name: `Op("roll", 1, 1)` is torch.roll(x, 1, 1)."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.name, self.args, self.kwargs = name, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        function = getattr(torch, self.name, None) or getattr(F, self.name)
        return function(x, *self.args, **self.kwargs)


class Method(Block):
    """A method of the tensor, by name: `Method("permute", 0, 2, 3, 1)` is x.permute(0, 2, 3, 1)."""

    def __init__(self, name: str, *args: Any) -> None:
        super().__init__()
        self.name, self.args = name, args

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x, self.name)(*self.args)


class Chain(Block):
    """Blocks one after another."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda width: nn.ReLU(),
    "relu_inplace": lambda width: nn.ReLU(inplace=True),
    "relu6": lambda width: nn.ReLU6(),
    "leaky_relu": lambda width: nn.LeakyReLU(0.1),
    "silu": lambda width: nn.SiLU(),
    "hardswish": lambda width: nn.Hardswish(),
    "sigmoid": lambda width: nn.Sigmoid(),
    "tanh": lambda width: nn.Tanh(),
    "gelu": lambda width: nn.GELU(),
    "prelu": lambda width: nn.PReLU(),
    "prelu_channels": lambda width: nn.PReLU(width),
}


class ConvBnAct(Block):
    """Convolution, batch norm, activation, in an nn.Sequential; act=None leaves the last one out."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        bias: bool = False,
        act: str | None = "relu",
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        tail = [ACTIVATIONS[act](c_out)] if act else []
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(c_out), *tail)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def merged(how: str, parts: Sequence[Tensor]) -> Tensor:
    """The parts in one tensor: side by side, interleaved, or by an elementwise operator."""
    match how:
        case "cat":
            return torch.cat(parts, 1)
        case "reversed cat":
            return torch.cat(parts[::-1], dim=1)
        case "stack":
            return torch.stack(parts, 2).flatten(1, 2)
        case "add_":
            return functools.reduce(lambda a, b: b.add_(a), parts)
        case "add":
            return functools.reduce(lambda a, b: a + b, parts)
        case "sub":
            return functools.reduce(lambda a, b: a - b, parts)
        case "mul":
            return functools.reduce(lambda a, b: a * b, parts)
        case "gate":
            return functools.reduce(lambda a, b: a * b.sigmoid(), parts)
        case "swish":
            return functools.reduce(lambda a, b: a * F.silu(b), parts)
        case _:
            return functools.reduce(getattr(torch, how), parts)


def run(body: nn.Module | None, x: Tensor) -> Tensor:
    """body(x); None is the identity without a node of its own."""
    return x if body is None else body(x)


def modules(bodies: Iterable[nn.Module | None]) -> nn.ModuleList:
    """The bodies that hold something, registered."""
    return nn.ModuleList(body for body in bodies if body is not None)


class Merge(Block):
    """Branches that read one tensor, merged: residuals, gates, concatenations."""

    def __init__(self, bodies: Sequence[nn.Module | None], how: str) -> None:
        super().__init__()
        self.branches, self.how = modules(bodies), how
        self.holds = [body is not None for body in bodies]

    def forward(self, x: Tensor) -> Tensor:
        branches = iter(self.branches)
        return merged(self.how, [next(branches)(x) if holds else x for holds in self.holds])


class Pieces(Block):
    """The channels cut into pieces, each through its own body, merged; `cut` and `at` say where.

    chunk n | split sizes | slice k (x[:, :k], x[:, k:]) | unbind n (equal blocks of an unflatten).
    """

    def __init__(
        self,
        cut: Literal["chunk", "split", "slice", "unbind"],
        at: int | tuple[int, ...],
        bodies: Sequence[nn.Module | None],
        how: str,
    ) -> None:
        super().__init__()
        self.cut, self.at, self.how = cut, at, how
        self.bodies = modules(bodies)
        self.holds = [body is not None for body in bodies]

    def pieces(self, x: Tensor) -> list[Tensor]:
        match self.cut:
            case "chunk":
                cut = x.chunk(self.at, 1)
            case "split":
                cut = torch.split(x, self.at, dim=1)
            case "unbind":
                cut = x.unflatten(1, (self.at, -1)).unbind(1)
            case "slice":
                cut = (x[:, : self.at], x[:, self.at :])
        return [cut[i] for i in range(len(self.holds))]

    def forward(self, x: Tensor) -> Tensor:
        bodies = iter(self.bodies)
        pieces = zip(self.holds, self.pieces(x), strict=True)
        return merged(
            self.how, [next(bodies)(piece) if holds else piece for holds, piece in pieces]
        )


class Dense(Block):
    """DenseNet: every layer reads the concatenation of all tensors before it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class PadShortcut(Block):
    """Option A: the shortcut is strided by slicing and padded with zero channels on both sides."""

    def __init__(self, body: nn.Module, before: int, after: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body, self.pad, self.stride = body, (0, 0, 0, 0, before, after), stride

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class ZeroShortcut(Block):
    """Option A by concatenation: the shortcut is cat((x, 0 * x))."""

    def __init__(self, body: nn.Module, *, stride: int = 1) -> None:
        super().__init__()
        self.body, self.stride = body, stride

    def forward(self, x: Tensor) -> Tensor:
        skip = x[..., :: self.stride, :: self.stride]
        return self.body(x) + torch.cat((skip, 0 * skip), 1)


class LinearGate(Block):
    """Squeeze and excitation with linears; the sizes of its views come from x.size()."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        s = F.relu(self.squeeze(self.pool(x).view(b, c)))
        return x * torch.sigmoid(self.excite(s)).view(x.shape[0], x.shape[1], 1, 1)


class Shuffle(Block):
    """Channel shuffle by view, transpose, view; with `width` the sizes of the view are constants."""

    def __init__(self, groups: int, width: int | None = None) -> None:
        super().__init__()
        self.groups, self.width = groups, width

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        if self.width is None:
            x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2)
            return x.reshape(b, c, h, w)
        x = x.reshape(-1, self.groups, self.width // self.groups, h, w)
        return x.transpose(1, 2).contiguous().view(-1, self.width, h, w)


class Twice(Block):
    """One module called twice in a row."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.body(x)))


class Siamese(Block):
    """One module called on two branches, which then have to keep the same channels."""

    def __init__(self, first: nn.Module, second: nn.Module, shared: nn.Module, how: str) -> None:
        super().__init__()
        self.first, self.second, self.shared, self.how = first, second, shared, how

    def forward(self, x: Tensor) -> Tensor:
        return merged(self.how, [self.shared(self.first(x)), self.shared(self.second(x))])


class SharedNorm(Block):
    """Two convolutions, one batch norm."""

    def __init__(self, c_in: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(F.relu(self.norm(self.first(x)))))


class Tied(Block):
    """Two convolutions with one weight and a bias each, in a row or side by side."""

    def __init__(self, c_in: int, c_out: int, *, parallel: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.second = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.second.weight = self.first.weight
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return torch.cat([self.first(x), self.second(x)], 1)
        return self.second(F.relu(self.first(x)))


class PerChannel(Block):
    """x * p or x + p for a tensor p with one element per channel, reshaped on use where it is 1-D."""

    def __init__(
        self, shape: tuple[int, ...], how: Literal["mul", "add"] = "mul", *, buffer: bool = False
    ) -> None:
        super().__init__()
        self.how, self.flat = how, len(shape) == 1
        if buffer:
            self.register_buffer("scale", torch.ones(shape))
        else:
            self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.view(1, -1, 1, 1) if self.flat else self.scale
        return x * scale if self.how == "mul" else x + scale


class FunctionalConv(Block):
    """F.conv2d with parameters of the block."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.ones(c_out))
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class FunctionalLinear(Block):
    """F.linear over the channels, moved last and back."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c_out, c_in))
        self.bias = nn.Parameter(torch.ones(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1).contiguous()


class FunctionalNorm(Block):
    """F.batch_norm with parameters and buffers of the block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(
            x, *statistics, self.weight, self.bias, training=self.training, eps=self.eps
        )


class FunctionalDropout(Block):
    """F.dropout that follows the mode of the block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, training=self.training)


class ResizedSkip(Block):
    """Feature pyramid: a smaller map, resized to the size of x, is added to x."""

    def __init__(self, down: nn.Module, mode: str = "nearest") -> None:
        super().__init__()
        self.down, self.mode = down, mode

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.down(x), size=x.shape[-2:], mode=self.mode)


class Slice(Block):
    """Channels start:stop, every stride-th row and column."""

    def __init__(
        self, start: int | None = None, stop: int | None = None, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.start, self.stop, self.stride = start, stop, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return x if self.start is self.stop is None else x[:, self.start : self.stop]


class Gather(Block):
    """Channels picked by a constant list, which may repeat, reorder and drop."""

    def __init__(self, indices: Sequence[int], *, select: bool = False) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(indices))
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, 1, self.index) if self.select else x[:, self.index]


class RootWidth(Block):
    """x / sqrt(C), with C read from the shape: a number that pruning must not change."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1] ** 0.5


class Sorted(Block):
    """Values sorted over the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x, dim=1)[0]


class Mix(Block):
    """Channels mixed by an einsum with a parameter."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.weight).contiguous()


@torch.fx.wrap
def opaque(x: Tensor) -> Tensor:
    """Neighbouring channels averaged, in a function that tracing does not look into."""
    return (x + x.roll(1, 1)) / 2


class Opaque(Block):
    """A call of a function nobody can know."""

    def forward(self, x: Tensor) -> Tensor:
        return opaque(x)


class DerivedConv(Block):
    """A convolution or a linear map whose weight is computed from parameters."""

    def __init__(self, c_in: int, c_out: int, how: str) -> None:
        super().__init__()
        self.how = how
        shape = (c_in, c_out) if how == "transposed" else (c_out, c_in)
        kernel = () if how in ("matmul", "linear") else (3, 3)
        self.weight = nn.Parameter(torch.ones(*shape, *kernel))
        if how == "gain":
            self.gain = nn.Parameter(torch.ones(c_out, 1, 1, 1))
        if how == "branches":
            self.small = nn.Parameter(torch.ones(c_out, c_in, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "gain":
                return F.conv2d(x, self.gain * self.weight, padding=1)
            case "branches":
                return F.conv2d(x, self.weight + F.pad(self.small, (1, 1, 1, 1)), padding=1)
            case "flipped":
                return F.conv2d(x, self.weight.flip(2, 3), padding=1)
            case "centre":
                return F.conv2d(x, self.weight[:, :, 1:2, 1:2])
            case "transposed":
                return F.conv2d(x, self.weight.transpose(0, 1), padding=1)
            case "functional transpose":
                return F.conv_transpose2d(x, self.weight.transpose(0, 1), padding=1)
            case "matmul":
                return (x.movedim(1, -1) @ self.weight.t()).movedim(-1, 1).contiguous()
            case _:
                weight = 0.5 * self.weight
                return F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2).contiguous()


class StandardisedConv(Block):
    """A convolution whose filters have mean 0 and deviation 1 over what they read."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c_out, c_in, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-3), padding=1)


class Einsum(Block):
    """An einsum of maps and a parameter; `last` moves the channels last around it."""

    def __init__(self, equation: str, shape: tuple[int, ...], *, last: bool = False) -> None:
        super().__init__()
        self.equation, self.last = equation, last
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.last:
            return torch.einsum(self.equation, x, self.weight).contiguous()
        y = torch.einsum(self.equation, x.permute(0, 2, 3, 1), self.weight)
        return y.permute(0, 3, 1, 2).contiguous()


class GroupEinsum(Block):
    """A map of its own for each block of channels: stacked weights [groups, in, out]."""

    def __init__(self, groups: int, c_in: int, c_out: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(groups, c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.groups, -1))
        return torch.einsum("bgihw,gio->bgohw", x, self.weight).flatten(1, 2).contiguous()


class Product(Block):
    """A product of two branches over channels or positions, added to the maps or gating them."""

    def __init__(self, c_in: int, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(c_in, width, 1), nn.Conv2d(c_in, width, 1)
        if how in ("attention", "similarity"):
            self.value, self.back = nn.Conv2d(c_in, width, 1), nn.Conv2d(width, c_in, 1)
        if how == "gram":
            self.value = nn.Conv2d(c_in, width, 1)
            self.back = nn.Conv2d(width, c_in, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        match self.how:
            case "attention":
                pairs = torch.softmax(a.flatten(2).transpose(1, 2) @ b.flatten(2), dim=-1)
                y = pairs @ self.value(x).flatten(2).transpose(1, 2)
                return x + self.back(y.transpose(1, 2).reshape(a.shape))
            case "similarity":
                pairs = torch.bmm(a.flatten(2).transpose(1, 2), b.flatten(2)) / (
                    b.shape[2] * b.shape[3]
                )
                y = torch.einsum("bij,bcj->bci", pairs, self.value(x).flatten(2))
                return x + self.back(y.unflatten(2, x.shape[2:]))
            case "gram":
                pairs = torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)).softmax(-1)
                y = pairs @ self.value(x).flatten(2)
                return x + self.back(y.unflatten(2, x.shape[2:]))
            case "inner":
                return x * torch.einsum("bchw,bchw->bhw", a, b).unsqueeze(1).sigmoid()
            case _:
                return torch.einsum("bchw,bc->bchw", a, b.mean((2, 3)))


class Context(Block):
    """Global context: a weighted mean over positions, transformed and added."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.where = nn.Conv2d(width, 1, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.where(x).flatten(2).softmax(2)
        context = torch.matmul(x.flatten(2), weights.transpose(1, 2))
        return x + self.layers(context.unsqueeze(-1))


class TwoPools(Block):
    """Channels gated by what one small network makes of their mean and of their maximum."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, most = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.layers(mean) + self.layers(most))


class SpatialGate(Block):
    """A gate per position, from the mean and the maximum of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pools = [x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]]
        return self.conv(torch.cat(pools, dim=1)).sigmoid()


class ExpandedGate(Block):
    """One gate per position, expanded to the channels in one of the ways users write."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.width, self.how = width, how
        self.gate = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        match self.how:
            case "number":
                return x * gate.expand(-1, self.width, -1, -1)
            case "size":
                return x * gate.expand(-1, x.shape[1], -1, -1)
            case "shape":
                return x * gate.expand(x.shape)
            case "repeat":
                return x * gate.repeat(1, x.size(1), 1, 1)
        return x * gate.expand_as(x)


class Csp(Block):
    """Half of the channels passes, the other half goes through layers whose outputs are all kept."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        seen = [one, two]
        for layer in self.layers:
            seen.append(layer(seen[-1]))
        return torch.cat(seen, 1)


class Sequences(Block):
    """The positions of maps as one sequence, or each row as one, through a body, and back."""

    def __init__(self, body: nn.Module, *, rows: bool = False) -> None:
        super().__init__()
        self.body, self.rows = body, rows

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if self.rows:
            y = self.body(x.permute(0, 2, 1, 3).flatten(0, 1))
            return y.unflatten(0, (b, h)).permute(0, 2, 1, 3).contiguous()
        return self.body(x.flatten(2)).unflatten(2, (h, w))


class Volumes(Block):
    """Maps as volumes, of depth 1 or by blocks of channels, through a body, and back."""

    def __init__(self, body: nn.Module, *, depth: int = 1) -> None:
        super().__init__()
        self.body, self.depth = body, depth

    def forward(self, x: Tensor) -> Tensor:
        if self.depth == 1:
            return self.body(x.unsqueeze(2)).squeeze(2)
        return self.body(x.unflatten(1, (-1, self.depth))).flatten(1, 2)


class FunctionalSequence(Block):
    """F.conv1d or F.conv_transpose1d over sequences, with parameters of the block."""

    def __init__(self, c_in: int, c_out: int, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        shape = (c_in, c_out) if transposed else (c_out, c_in)
        self.weight, self.bias = (
            nn.Parameter(torch.ones(*shape, 3)),
            nn.Parameter(torch.ones(c_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = F.conv_transpose1d if self.transposed else F.conv1d
        return conv(x, self.weight, self.bias, padding=1)


class FunctionalPRelu(Block):
    """F.prelu with a slope per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope)


class Unfold(Block):
    """Convolution by F.unfold and a product with a weight."""

    def __init__(self, c_in: int, c_out: int, how: Literal["conv", "linear"] = "conv") -> None:
        super().__init__()
        self.how = how
        self.mix = nn.Conv1d(9 * c_in, c_out, 1) if how == "conv" else nn.Linear(9 * c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1)
        if self.how == "conv":
            y = self.mix(patches)
        else:
            y = self.mix(patches.transpose(1, 2)).transpose(1, 2)
        return y.unflatten(2, x.shape[2:]).contiguous()


class Involution(Block):
    """A kernel made at every position, the same for all channels of a group."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.kernel = nn.Conv2d(width, 9 * groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = self.kernel(x).view(b, self.groups, 1, 9, h, w)
        patches = F.unfold(x, 3, padding=1).view(b, self.groups, c // self.groups, 9, h, w)
        return (kernel * patches).sum(3).view(b, c, h, w)


deform_conv2d = torchvision.ops.deform_conv2d
torch.fx.wrap("deform_conv2d")  # it branches on sizes


class Deformable(Block):
    """Deformable convolution with offsets, and perhaps a mask, from convolutions."""

    def __init__(self, c_in: int, c_out: int, *, mask: bool = False) -> None:
        super().__init__()
        self.offset = nn.Conv2d(c_in, 18, 3, padding=1)
        self.mask = nn.Conv2d(c_in, 9, 1) if mask else None
        self.weight = nn.Parameter(torch.ones(c_out, c_in, 3, 3))
        self.bias = nn.Parameter(torch.ones(c_out))

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return deform_conv2d(
            x, self.offset(x), self.weight, self.bias, padding=(1, 1), mask=mask
        ).contiguous()


# Norms of maps


class ChannelNorm(Block):
    """Statistics over the channels of maps, in the forms in which users write them."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how, self.eps = how, 1e-5
        if how in ("layer", "rms"):
            self.norm = nn.LayerNorm(width) if how == "layer" else nn.RMSNorm(width)
        else:
            self.weight, self.bias = (
                nn.Parameter(torch.ones(width)),
                nn.Parameter(torch.ones(width)),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "group":
            return F.group_norm(x, 1, self.weight, self.bias, self.eps)
        x = x.permute(0, 2, 3, 1)
        match self.how:
            case "functional layer":
                x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
            case "functional rms":
                x = F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
                x = x + self.bias
            case _:
                x = self.norm(x)
        return x.permute(0, 3, 1, 2).contiguous()


class HandNorm(Block):
    """Norms over channels written by hand: what is divided by says nothing about a cut."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how, self.eps = how, 1e-5
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        if self.how == "layer":
            centred = x - x.mean(1, keepdim=True)
            return (
                centred / (centred.pow(2).mean(1, keepdim=True) + self.eps).sqrt() * weight + bias
            )
        size = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return x + weight * (x * (size / (size.mean(dim=1, keepdim=True) + self.eps))) + bias


class FunctionalGroupNorm(Block):
    """F.group_norm with parameters of the block."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.groups, self.eps = groups, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, eps=self.eps)


# Tokens


class Tokens(Block):
    """Maps as tokens [B, H * W, C] through a body, and back to maps."""

    def __init__(
        self, body: nn.Module, back: Literal["unflatten", "reshape", "view"] = "unflatten"
    ) -> None:
        super().__init__()
        self.body, self.back = body, back

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        if self.back == "view":
            return y.contiguous().view(b, y.shape[1], h, w)
        y = y.unflatten(2, (h, w)) if self.back == "unflatten" else y.reshape(b, -1, h, w)
        return y.contiguous()


class AtSize(Block):
    """A body that needs maps of one size: pooled to it, and where `back`, resized after it."""

    def __init__(self, size: int, body: nn.Module, *, back: bool = False) -> None:
        super().__init__()
        self.pool, self.body, self.back = nn.AdaptiveAvgPool2d(size), body, back

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.pool(x))
        return F.interpolate(y, size=x.shape[-2:]) if self.back else y


def relative_index(size: int) -> Tensor:
    """For each pair of positions of a square, the row of their difference in a table."""
    at = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    apart = at[:, None] - at[None] + size - 1
    return apart[..., 0] * (2 * size - 1) + apart[..., 1]


def attend(how: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Values weighted by products of queries and keys, all [B, heads, N, D]."""
    if how == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if how == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if how == "channels":  # between channels of a head
        pairs = F.normalize(q.transpose(-2, -1), dim=-1) @ F.normalize(k, dim=-2)
        return ((2.0 * pairs).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)
    if how == "linear":
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)
    if how == "einsum":
        pairs = torch.einsum("bhid,bhjd->bhij", q, k) / k.shape[-1] ** 0.5
    elif how == "cosine":
        pairs = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 3.0
    else:
        pairs = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    pairs = pairs if bias is None else pairs + bias
    if how == "einsum":
        return torch.einsum("bhij,bhjd->bhid", torch.softmax(pairs, -1), v)
    return pairs.softmax(dim=-1) @ v


class Attention(Block):
    """Self-attention of tokens [B, N, C]: queries, keys, values from one linear or three.

    table: the side of a square of positions that have a bias per head and difference.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dim: int,
        how: str = "matmul",
        form: Literal["reshape", "unbind", "chunk", "split", "three"] = "reshape",
        *,
        bias: bool = True,
        table: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.inner, self.how, self.form = heads, heads * dim, how, form
        if form == "three":
            self.query, self.key = nn.Linear(width, self.inner), nn.Linear(width, self.inner)
            self.value = nn.Linear(width, self.inner)
        else:
            self.qkv = nn.Linear(width, 3 * self.inner, bias=bias)
        self.proj = nn.Linear(self.inner, width)
        self.has_table = table is not None
        if table is not None:
            self.table = nn.Parameter(torch.ones((2 * table - 1) ** 2, heads))
            self.register_buffer("index", relative_index(table))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        if self.form in ("reshape", "unbind"):
            qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.inner // self.heads)
            qkv = qkv.permute(2, 0, 3, 1, 4)
            if self.form == "unbind":
                q, k, v = qkv.unbind(0)
                return q, k, v
            return qkv[0], qkv[1], qkv[2]
        if self.form == "three":
            q, k, v = self.query(x), self.key(x), self.value(x)
        elif self.form == "chunk":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = torch.split(self.qkv(x), self.inner, dim=2)
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        bias = None
        if self.has_table:
            bias = (
                self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1)[None]
            )
        return self.proj(attend(self.how, q, k, v, bias).transpose(1, 2).flatten(2))


class OneHead(Block):
    """Attention without an axis of heads."""

    def __init__(self, width: int, dim: int, *, bmm: bool = False) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, dim), nn.Linear(width, dim)
        self.value, self.bmm = nn.Linear(width, width), bmm

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.bmm:
            return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=2), v)
        return (q @ k.transpose(1, 2) * 0.4).softmax(-1) @ v


class FlatHeads(Block):
    """Attention whose heads lie in the batch: [B * heads, N, D] through bmm."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.query, self.key = nn.Linear(width, heads * dim), nn.Linear(width, heads * dim)
        self.value, self.proj = nn.Linear(width, heads * dim), nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, self.dim).transpose(1, 2).reshape(-1, n, self.dim)
            for layer in (self.query, self.key, self.value)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        y = y.view(b, self.heads, n, self.dim).transpose(1, 2)
        return self.proj(y.reshape(b, n, self.heads * self.dim))


class GroupedQueries(Block):
    """Several heads of queries for each head of keys and values."""

    def __init__(self, width: int, heads: int, shared: int, dim: int, how: str = "gqa") -> None:
        super().__init__()
        self.heads, self.shared, self.how = heads, shared, how
        self.query = nn.Linear(width, heads * dim)
        self.kv = nn.Linear(width, 2 * shared * dim)
        self.proj = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.shared, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            times = self.heads // self.shared
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, dim=1)
            y = attend("matmul", q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class CrossAttention(Block):
    """Tokens x look at tokens y; of two arguments, not a block of a chain."""

    def __init__(self, width: int, other: int, heads: int, dim: int, how: str = "matmul") -> None:
        super().__init__()
        self.heads, self.how = heads, how
        self.query, self.kv = nn.Linear(width, heads * dim), nn.Linear(other, 2 * heads * dim)
        self.proj = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k, v = self.kv(y).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), k, v))
        return self.proj(attend(self.how, q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(Block):
    """nn.MultiheadAttention of one sequence, or of two."""

    def __init__(self, width: int, heads: int, *, cross: bool = False, first: bool = True) -> None:
        super().__init__()
        self.cross, self.first = cross, first
        self.attention = nn.MultiheadAttention(width, heads, batch_first=first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        other = torch.tanh(x) if self.cross else x
        y, _ = self.attention(x, other, other, need_weights=False)
        return y if self.first else y.transpose(0, 1)


class ReducedKeys(Block):
    """Maps look at a strided convolution of themselves."""

    def __init__(self, width: int, other: int, attention: CrossAttention) -> None:
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(width, other, 3, 2, padding=1), nn.LayerNorm(other)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        other = self.norm(self.reduce(x).flatten(2).transpose(1, 2))
        y = self.attention(x.flatten(2).transpose(1, 2), other)
        return x + y.transpose(1, 2).reshape(x.shape)


class Windows(Block):
    """Attention inside windows of maps, padded where they do not divide them, perhaps shifted."""

    def __init__(self, body: nn.Module, window: int, *, shift: int = 0) -> None:
        super().__init__()
        self.body, self.window, self.shift = body, window, shift

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.window
        y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, (s - w % s) % s, 0, (s - h % s) % s))
        rows, columns = y.shape[1] // s, y.shape[2] // s
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = y.reshape(b, rows, s, columns, s, c).permute(0, 1, 3, 2, 4, 5)
        y = self.body(y.reshape(b * rows * columns, s * s, c))
        y = y.view(b, rows, columns, s, s, -1).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(b, rows * s, columns * s, -1)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        return y[:, :h, :w, :].permute(0, 3, 1, 2).contiguous()


class ClassToken(Block):
    """A learned token beside the others, read at the end by all of them."""

    def __init__(self, width: int, body: nn.Module, how: Literal["add", "gate"] = "add") -> None:
        super().__init__()
        self.token, self.body, self.how = nn.Parameter(torch.ones(1, 1, width)), body, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1))
        if self.how == "add":
            return y[:, 1:] + y[:, :1]
        return x * y[:, 0].unsqueeze(1).sigmoid()


class LearnedQueries(Block):
    """Learned queries gather from the tokens, and the tokens read from them."""

    def __init__(
        self, width: int, gather: CrossAttention, read: CrossAttention, count: int
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.ones(1, count, width))
        self.gather, self.read = gather, read

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        return x + self.read(x, queries + self.gather(queries, x))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer without bias": lambda width: nn.LayerNorm(width, bias=False),
    "rms": nn.RMSNorm,
    "none": lambda width: nn.Identity(),
}


class Sublayer(Block):
    """x + scale * body(norm(x)), or norm(x + body(x)) where `post`."""

    def __init__(
        self,
        width: int,
        body: nn.Module,
        norm: str = "layer",
        *,
        post: bool = False,
        scale: bool = False,
    ) -> None:
        super().__init__()
        self.norm, self.body, self.post, self.scaled = NORMS[norm](width), body, post, scale
        if scale:
            self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x if self.post else self.norm(x))
        y = self.scale * y if self.scaled else y
        return self.norm(x + y) if self.post else x + y


class Mlp(Block):
    """Two linears over the last axis, the first perhaps gated."""

    def __init__(self, width: int, hidden: int, how: str = "gelu") -> None:
        super().__init__()
        self.how = how
        self.up = nn.Linear(width, 2 * hidden if how in ("geglu", "glu") else hidden)
        if how == "swiglu":
            self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "swiglu":
                return self.down(F.silu(self.gate(x)) * self.up(x))
            case "geglu":
                y, gate = self.up(x).chunk(2, dim=-1)
                return self.down(y * F.gelu(gate))
            case "glu":
                return self.down(F.glu(self.up(x), dim=-1))
        return self.down(F.gelu(self.up(x)))


class Transposed(Block):
    """A body over the tokens of a fixed count, for each channel."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2)).transpose(1, 2)


class TokenHead(Block):
    """Tokens to logits: by their mean, a learned query, or a class token."""

    def __init__(self, width: int, classes: int, attention: CrossAttention | None = None) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)
        self.attention = attention
        if attention is not None:
            self.query = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(2).transpose(1, 2))
        if self.attention is None:
            return self.fc(x.mean(dim=1))
        return self.fc(self.attention(self.query.expand(x.shape[0], -1, -1), x)[:, 0])


class LinearHead(Block):
    """Maps to logits: pool to pool x pool, flatten in one of the ways users write, linear layers."""

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        pool: int = 1,
        how: Literal["flatten", "view", "constant", "mean"] = "flatten",
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.how, self.flat = how, width * pool * pool
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.hidden = hidden
        if hidden is not None:
            self.fc1, self.norm = nn.Linear(self.flat, hidden), nn.BatchNorm1d(hidden)
            self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(hidden or self.flat, classes)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "mean":
                x = x.mean([2, 3])
            case "flatten":
                x = torch.flatten(self.pool(x), 1)
            case "view":
                x = self.pool(x)
                x = x.view(x.size(0), -1)
            case "constant":
                x = self.pool(x).view(-1, self.flat)
        if self.hidden is not None:
            x = self.drop(F.relu(self.norm(self.fc1(x))))
        return self.fc(x)


class Outputs(Block):
    """Several outputs, as a tuple or under names; None stands for the tensor itself."""

    def __init__(
        self, heads: Sequence[nn.Module | None], names: tuple[str, ...] | None = None
    ) -> None:
        super().__init__()
        self.heads, self.names = modules(heads), names
        self.holds = [head is not None for head in heads]

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | dict[str, Tensor]:
        heads = iter(self.heads)
        values = tuple(next(heads)(x) if holds else x for holds in self.holds)
        return values if self.names is None else dict(zip(self.names, values, strict=True))


class Net(Block):
    """A random network in float64 and eval mode: blocks, then a head (None: the last feature map).

    `features` names what was drawn. The values come from the first seed at or after `seed` for which
    the outputs are finite, of moderate size and depend on the input (`alive`), if one of 20 does.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        head: nn.Module | None,
        *,
        channels: int,
        size: int,
        seed: int = 0,
        features: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head
        self.channels, self.size, self.features = channels, size, frozenset(features)
        lines = "".join(f"    {block!r},\n" for block in blocks)
        options = f"{channels=}, {size=}, {seed=},\n  features={sorted(self.features)}"
        self.call = f"Net(\n  [\n{lines}  ],\n  {head!r},\n  {options},\n)"
        self.double().eval()
        for s in range(seed, seed + 20):
            randomise(self, s)
            if self.alive():
                break

    def forward(self, x: Tensor) -> Any:  # a tensor, a tuple or a dict of them
        for block in self.blocks:
            x = block(x)
        return run(self.head, x)

    def example_input(self) -> Tensor:
        """[1, C, H, W] float64, the same at every call."""
        return self.inputs()[0]

    def inputs(self) -> list[Tensor]:
        """Two inputs of different batch and spatial size, [1, C, H, W] and [3, C, H + 2, W + 1]."""
        g = torch.Generator().manual_seed(self.size)
        shapes = [(1, self.size, self.size), (3, self.size + 2, self.size + 1)]
        return [
            torch.randn(n, self.channels, h, w, generator=g, dtype=torch.float64)
            for n, h, w in shapes
        ]

    @torch.no_grad()
    def alive(self) -> bool:
        """Each output is finite, below 1e4, and differs between the images of a batch."""
        leaves = [leaf for x in self.inputs() for leaf in tree_leaves(self(x))]
        return all(
            bool(leaf.isfinite().all())
            and leaf.abs().max().item() < 1e4
            and leaf.std().item() > 1e-4
            and (len(leaf) == 1 or (leaf - leaf[:1]).abs().max().item() > 1e-4)
            for leaf in leaves
        )


@torch.no_grad()
def randomise(net: nn.Module, seed: int) -> None:
    """Give every float of the network a value of its own: mixed signs, activations of order one."""
    g = torch.Generator().manual_seed(seed)
    seen: set[int] = set()  # tied tensors are filled once
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps = 10 ** -(2 + 3 * torch.rand((), generator=g).item())
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensor.copy_(_values(name, tensor, g))


def _values(name: str, old: Tensor, g: torch.Generator) -> Tensor:
    """Values for a tensor: statistics, biases, kernels by fan-in, scales of either sign."""
    if not old.is_floating_point():  # counters get a value, index lists mean something as they are
        return torch.randint(1, 1000, (), generator=g) if old.dim() == 0 else old
    normal = torch.randn(old.shape, generator=g, dtype=torch.float64)
    uniform = torch.rand(old.shape, generator=g, dtype=torch.float64)
    if name == "running_var":
        return 0.05 + 3.95 * uniform
    if name.endswith("bias") or name == "running_mean":
        return 0.5 * normal
    if name.endswith("weight") and old.dim() >= 2:
        return normal * 1.4 / (old.numel() / len(old)) ** 0.5
    return (0.3 + 1.4 * uniform) * torch.where(normal < -0.5, -1.0, 1.0)
