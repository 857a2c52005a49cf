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
    if name in ("bias", "running_mean"):
        return 0.5 * normal
    if name == "weight" and old.dim() >= 2:
        return normal * 1.4 / (old.numel() / len(old)) ** 0.5
    return (0.3 + 1.4 * uniform) * torch.where(normal < -0.5, -1.0, 1.0)
