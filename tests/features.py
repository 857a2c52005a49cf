"""What random networks are drawn from: one builder per family of blocks, each under its names.

A builder gets the draw, the place `At` it stands on and the name it was drawn under, and returns a
block and the place after it. Adding one: `@feature("name")` here, a class in blocks.py if torch.nn
has none; test_strategies.py walks the registry.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from blocks import (
    ACTIVATIONS,
    Chain,
    ConvBnAct,
    Dense,
    FunctionalConv,
    FunctionalDropout,
    FunctionalLinear,
    FunctionalNorm,
    Gather,
    Layer,
    LinearGate,
    LinearHead,
    Merge,
    Method,
    Mix,
    Op,
    Opaque,
    Outputs,
    PadShortcut,
    PerChannel,
    Pieces,
    ResizedSkip,
    RootWidth,
    SharedNorm,
    Shuffle,
    Siamese,
    Slice,
    Sorted,
    Tied,
    Twice,
    ZeroShortcut,
)
from torch import nn

T = TypeVar("T")

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 1, 9, 11, 12)  # the first is what a failing example shrinks to
SMALLEST = 3  # spatial side below which nothing shrinks any more


class Chooser(Protocol):
    """Where decisions come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high inclusive; low is the simplest."""
        ...

    def together(self, decide: Callable[[], T]) -> T:
        """decide(), whose decisions a shrinker may drop as one."""
        ...


class At(NamedTuple):
    """A place in a network: channels, the smallest spatial side, whether the sides must stay."""

    width: int
    size: int
    fixed: bool = False


Built = tuple[nn.Module, At]


@dataclass(frozen=True)
class Feature:
    """How a block is drawn, and on which maps it can stand."""

    build: Callable[["Draw", At, str], Built]
    resizes: bool = False
    smallest: int = SMALLEST
    largest: int = 99


BLOCKS: dict[str, Feature] = {}
HEADS: dict[str, Callable[["Draw", At, str], nn.Module | None]] = {}


def feature(*names: str, **limits: Any) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
    """Register a builder of blocks under each of the names, which it receives."""

    def register(build: Callable[..., Built]) -> Callable[..., Built]:
        BLOCKS.update({name: Feature(build, **limits) for name in names})
        return build

    return register


def head(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a builder of heads under each of the names."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        HEADS.update(dict.fromkeys(names, build))
        return build

    return register


class Draw:
    """One network being drawn: the source of decisions, what may still come, what came."""

    def __init__(self, chooser: Chooser, pool: Iterable[str], budget: int) -> None:
        self.chooser, self.pool, self.budget = chooser, frozenset(pool), budget
        self.seen: set[str] = set()
        self.depth = 0

    def integer(self, low: int, high: int) -> int:
        return self.chooser.integer(low, high)

    def flag(self) -> bool:
        return bool(self.chooser.integer(0, 1))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.chooser.integer(0, len(options) - 1)]

    def width(self, multiple: int = 1, low: int = 1, high: int = 12) -> int:
        return self.choice([w for w in WIDTHS if w % multiple == 0 and low <= w <= high])

    def conv(self, c_in: int, c_out: int) -> nn.Module:
        """The glue: a convolution that keeps the spatial size, perhaps with batch norm and ReLU."""
        self.seen.add("conv")
        kind = self.choice(("pointwise", "3x3", "normed"))
        if kind == "normed":
            self.seen.add("relu")
            return ConvBnAct(c_in, c_out, *self.choice(((), (1,))))
        kernel, options = (1, {}) if kind == "pointwise" else (3, {"padding": 1})
        return Layer("Conv2d", c_in, c_out, kernel, **options | self.bias())

    def bias(self) -> dict[str, bool]:
        """The options of a layer with or, as often, without a bias."""
        return {"bias": False} if self.flag() else {}

    def stride(self, at: At) -> tuple[dict[str, int], int]:
        """The options of a layer with stride 2, where the place allows it, and the size after it."""
        if not at.fixed and at.size >= 5 and self.flag():
            return {"stride": 2}, halved(at.size)
        return {}, at.size

    def fit(
        self, at: At, multiple: int = 1, low: int = 1, high: int = 99
    ) -> tuple[list[nn.Module], int]:
        """Nothing if the width is right, else a convolution that makes it so."""
        if at.width % multiple == 0 and low <= at.width <= high:
            return [], at.width
        width = self.width(multiple, low, min(high, 12))
        return [self.conv(at.width, width)], width

    def block(self, at: At, name: str) -> Built:
        """The named block, on a map it can stand on."""
        spec, prefix = BLOCKS[name], []
        if not at.fixed and not spec.smallest <= at.size <= spec.largest:
            self.seen.add("adaptive_pool")
            prefix, at = [Layer("AdaptiveAvgPool2d", 6)], at._replace(size=6)
        if at.width > 16:  # concatenations grow; keep a printed network small
            width = self.width()
            prefix, at = [*prefix, self.conv(at.width, width)], at._replace(width=width)
        self.seen.add(name)
        self.budget -= 1
        block, after = spec.build(self, at, name)
        return chain([*prefix, block]), after._replace(fixed=at.fixed)

    def name(self, at: At) -> str | None:
        """A block that can follow, None when there is none."""
        names = [n for n in BLOCKS if n in self.pool and not (at.fixed and BLOCKS[n].resizes)]
        return self.choice(names) if names else None

    def body(self, at: At, out: int | None = None) -> tuple[nn.Module, int]:
        """A branch that keeps the spatial size, and its width: `out`, where that is given."""
        at, blocks = at._replace(fixed=True), []
        self.depth += 1
        if self.depth <= 2 and self.budget > 0 and self.flag() and (name := self.name(at)):
            block, at = self.block(at, name)
            blocks.append(block)
        self.depth -= 1
        if not blocks or out not in (None, at.width):
            width = out or self.width()
            blocks.append(self.conv(at.width, width))
            at = at._replace(width=width)
        return chain(blocks), at.width

    def branches(self, places: Iterable[At]) -> tuple[list[nn.Module | None], list[int]]:
        """A body or nothing (None) for each of the places, and their widths."""
        drawn = [self.body(at) if self.flag() else (None, at.width) for at in places]
        return [body for body, _ in drawn], [width for _, width in drawn]

    def head(self, at: At, names: Sequence[str]) -> nn.Module | None:
        name = self.choice(names)
        self.seen.add(name)
        return HEADS[name](self, at, name)


def chain(blocks: Sequence[nn.Module]) -> nn.Module:
    """The blocks as one module, flat."""
    flat = [b for block in blocks for b in (block.blocks if isinstance(block, Chain) else [block])]
    return flat[0] if len(flat) == 1 else Chain(flat)


def halved(size: int) -> int:
    return (size + 1) // 2


# Convolutions and activations


@feature("conv")
def conv(d: Draw, at: At, name: str) -> Built:
    width, kernel = d.width(), d.choice((3, 1, 5))
    options = ({"padding": kernel // 2} if kernel > 1 else {}) | d.bias()
    return Layer("Conv2d", at.width, width, kernel, **options), at._replace(width=width)


@feature("conv_oblong", "conv_dilated", "conv_reflect", "conv_same")
def conv_same_size(d: Draw, at: At, name: str) -> Built:
    width = d.width()
    kernel, options = {
        "conv_oblong": ((1, 3), {"padding": (0, 1)}),
        "conv_dilated": (3, {"padding": 2, "dilation": 2}),
        "conv_reflect": (3, {"padding": 1, "padding_mode": "reflect"}),
        "conv_same": (3, {"padding": "same"}),
    }[name]
    return Layer("Conv2d", at.width, width, kernel, **options | d.bias()), at._replace(width=width)


@feature("conv_strided", resizes=True, smallest=5)
def conv_strided(d: Draw, at: At, name: str) -> Built:
    width, kernel = d.width(), d.choice((3, 1, 5))
    block = Layer("Conv2d", at.width, width, kernel, stride=2, padding=kernel // 2)
    return block, at._replace(width=width, size=halved(at.size))


@feature("conv_valid", resizes=True, smallest=5)
def conv_valid(d: Draw, at: At, name: str) -> Built:
    width = d.width()
    return Layer("Conv2d", at.width, width, 3), at._replace(width=width, size=at.size - 2)


@feature(*ACTIVATIONS)
def conv_bn_act(d: Draw, at: At, name: str) -> Built:
    width, options = d.width(), {"bias": True} if d.flag() else {}
    block = ConvBnAct(at.width, width, d.choice((3, 1)), act=name, **options)
    return block, at._replace(width=width)


@feature("depthwise", "depthwise_multiplier")
def depthwise(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2, high=12)
    out = width * (1 if name == "depthwise" else d.integer(2, 3))
    block = Layer("Conv2d", width, out, 3, padding=1, groups=width, **d.bias())
    return chain([*prefix, block]), at._replace(width=out)


@feature("grouped")
def grouped(d: Draw, at: At, name: str) -> Built:
    groups = d.choice((2, 3, 4))
    prefix, width = d.fit(at, groups, groups + 1)
    out = groups * d.integer(1, 4)
    block = Layer("Conv2d", width, out, 3, padding=1, groups=groups, **d.bias())
    return chain([*prefix, block]), at._replace(width=out)


@feature("transposed", "transposed_grouped", "transposed_depthwise")
def transposed(d: Draw, at: At, name: str) -> Built:
    groups = d.choice((2, 3)) if name == "transposed_grouped" else 1
    prefix, width = d.fit(at, groups, 2 * groups, 12)
    out = d.width(groups, groups + 1)
    if name == "transposed_depthwise":
        groups = out = width
    options = {"padding": 1} | ({"groups": groups} if groups > 1 else {}) | d.bias()
    block = Layer("ConvTranspose2d", width, out, 3, **options)
    return chain([*prefix, block]), at._replace(width=out)


@feature("transposed_strided", resizes=True, largest=7)
def transposed_strided(d: Draw, at: At, name: str) -> Built:
    width = d.width()
    if d.flag():
        block = Layer("ConvTranspose2d", at.width, width, 3, 2, padding=1, output_padding=1)
    else:
        block = Layer("ConvTranspose2d", at.width, width, 2, 2, bias=False)
    return block, at._replace(width=width, size=2 * at.size)


# A map of one channel is contiguous in every memory format, so what comes channels-last from a
# permute stays so behind it, and a later view fails: these three give two channels or more.


@feature("functional_conv", "functional_linear", "einsum")
def functional(d: Draw, at: At, name: str) -> Built:
    width = d.width(low=2)
    block = {
        "functional_conv": FunctionalConv,
        "functional_linear": FunctionalLinear,
        "einsum": Mix,
    }
    return block[name](at.width, width), at._replace(width=width)


@feature("channels_last")
def channels_last(d: Draw, at: At, name: str) -> Built:
    width = d.width(low=2)
    middle = [Layer("Linear", at.width, width)]
    if d.flag():
        middle = [Layer("Linear", at.width, hidden := d.width()), Layer("GELU")]
        middle.append(Layer("Linear", hidden, width))
    there, back = Method("permute", 0, 2, 3, 1), Method("permute", 0, 3, 1, 2)
    block = [there, *middle, back, Method("contiguous")]  # for the views that may follow
    return chain(block), at._replace(width=width)


# Residuals, gates, branches


@feature("residual", "residual_inplace")
def residual(d: Draw, at: At, name: str) -> Built:
    body, width = d.body(at)
    last = ConvBnAct(width, at.width, act=None) if d.flag() else d.conv(width, at.width)
    if name == "residual_inplace":  # autograd forbids writing to an output that its layer saved
        last = ConvBnAct(width, at.width, act=None)
    block = Merge([None, chain([body, last])], "add_" if name == "residual_inplace" else "add")
    return chain([block, Layer("ReLU")] if d.flag() else [block]), at


@feature("residual_projection")
def residual_projection(d: Draw, at: At, name: str) -> Built:
    stride, size = d.stride(at)
    body, width = d.body(at)
    out = d.width()
    last = ConvBnAct(width, out, **stride, act=None)
    shortcut = ConvBnAct(at.width, out, 1, **stride, act=None)
    return Merge([shortcut, chain([body, last])], "add"), at._replace(width=out, size=size)


@feature("broadcast_map", "broadcast_gate")
def broadcast(d: Draw, at: At, name: str) -> Built:
    if name == "broadcast_map":  # [B, 1, H, W]
        gate = [Layer("Conv2d", at.width, 1, 3, padding=1), Layer("Sigmoid")]
        return Merge([None, chain(gate)], d.choice(("mul", "add"))), at
    gate = [Layer("AdaptiveAvgPool2d", 1), Layer("Conv2d", at.width, at.width, 1)]
    return Merge([None, chain(gate)], d.choice(("gate", "add"))), at


@feature("shortcut_pad", "shortcut_zeros")
def option_a(d: Draw, at: At, name: str) -> Built:
    stride, size = d.stride(at)
    body, width = d.body(at)
    before, after = d.integer(0, 3), d.integer(1, 3)
    out = at.width + before + after if name == "shortcut_pad" else 2 * at.width
    body = chain([body, ConvBnAct(width, out, **stride, act=None)])
    if name == "shortcut_pad":
        block: nn.Module = PadShortcut(body, before, after, **stride)
    else:
        block = ZeroShortcut(body, **stride)
    return block, at._replace(width=out, size=size)


@feature("se_conv", "se_linear")
def squeeze_excite(d: Draw, at: At, name: str) -> Built:
    hidden = d.width()
    if name == "se_linear":
        return LinearGate(at.width, hidden), at
    squeeze = [Layer("AdaptiveAvgPool2d", 1), Layer("Conv2d", at.width, hidden, 1), Layer("ReLU")]
    excite = [Layer("Conv2d", hidden, at.width, 1), Layer(d.choice(("Sigmoid", "Hardsigmoid")))]
    return Merge([None, chain([*squeeze, *excite])], "mul"), at


@feature("add", "subtract", "multiply", "maximum", "minimum", "stack")
def two_branches(d: Draw, at: At, name: str) -> Built:
    out = d.width()
    how = {"subtract": "sub", "multiply": "mul"}.get(name, name)
    branches = [d.body(at, out)[0] for _ in range(2)]
    return Merge(branches, how), at._replace(width=2 * out if name == "stack" else out)


@feature("concat", "concat_nested")
def concat(d: Draw, at: At, name: str) -> Built:
    widths = [d.width(high=6) for _ in range(d.integer(2, 3))]
    block, out = Merge([d.body(at, width)[0] for width in widths], "cat"), sum(widths)
    if name == "concat_nested":
        block, out = Merge([block, d.conv(at.width, 3), None], "cat"), out + 3 + at.width
    return block, at._replace(width=out)


@feature("dense")
def dense(d: Draw, at: At, name: str) -> Built:
    growth = d.width(high=4)
    layers = [d.conv(at.width + i * growth, growth) for i in range(d.integer(2, 3))]
    return Dense(layers), at._replace(width=at.width + len(layers) * growth)


@feature("chunk2", "chunk3", "split", "slice", "unbind")
def pieces(d: Draw, at: At, name: str) -> Built:
    """Every piece into a body and side by side, or pieces of one size into a product or a sum."""
    count, cut = (3 if name == "chunk3" else 2), name.rstrip("23")
    side_by_side = d.flag()
    uneven = side_by_side and name in ("chunk2", "split", "slice")
    prefix, width = d.fit(at, 1 if uneven else count, 2)
    sizes = [-(-width // count)] * (count - 1)
    if uneven and name != "chunk2":
        sizes = [d.integer(1, width - 1)]
    sizes.append(width - sum(sizes))
    arg = {"split": tuple(sizes), "slice": sizes[0]}.get(name, count)
    places = [at._replace(width=size) for size in sizes]
    if side_by_side:
        bodies, widths = d.branches(places)
        block, out = Pieces(cut, arg, bodies, d.choice(("cat", "reversed cat"))), sum(widths)
    else:
        bodies = [d.body(place, place.width)[0] if d.flag() else None for place in places]
        block, out = Pieces(cut, arg, bodies, d.choice(("gate", "add", "mul"))), sizes[0]
    return chain([*prefix, block]), at._replace(width=out)


@feature("split_of_concat")
def split_of_concat(d: Draw, at: At, name: str) -> Built:
    """The cut of the split lies elsewhere than the seam of the concatenation."""
    a, b = d.width(low=2, high=6), d.width(low=2, high=6)
    joined = Merge([d.body(at, a)[0], d.body(at, b)[0]], "cat")
    sizes = (a - 1, b + 1) if d.flag() else (a + 1, b - 1)
    bodies, widths = d.branches([at._replace(width=size) for size in sizes])
    return chain([joined, Pieces("split", sizes, bodies, "cat")]), at._replace(width=sum(widths))


@feature("slice_drop")
def slice_drop(d: Draw, at: At, name: str) -> Built:
    """Channels that are computed and not read."""
    prefix, width = d.fit(at, low=2)
    kept = d.integer(1, width - 1)
    bounds = d.choice(((0, kept), (None, kept), (width - kept, None), (-kept, None)))
    return chain([*prefix, Slice(*bounds)]), at._replace(width=kept)


# Channels moved about


@feature("shuffle_view", "shuffle_constant", "shuffle_module", "unflatten")
def shuffle(d: Draw, at: At, name: str) -> Built:
    groups = d.choice((2, 3))
    prefix, width = d.fit(at, groups, 2 * groups)
    match name:
        case "shuffle_view":
            block: nn.Module = Shuffle(groups)
        case "shuffle_constant":
            block = Shuffle(groups, width)
        case "shuffle_module":
            block = Layer("ChannelShuffle", groups)
        case _:
            middle = Op("transpose", 1, 2) if d.flag() else PerChannel((groups, 1, 1, 1))
            block = chain([Op("unflatten", 1, (groups, -1)), middle, Op("flatten", 1, 2)])
    return chain([*prefix, block]), at._replace(width=width)


@feature("group_sum")
def group_sum(d: Draw, at: At, name: str) -> Built:
    """Blocks of channels added up, as in split attention."""
    prefix, width = d.fit(at, 2, 4)
    block = [Op("unflatten", 1, (2, width // 2)), Op("sum", 1)]
    return chain([*prefix, *block]), at._replace(width=width // 2)


@feature("roll", "flip", "repeat")
def moved(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2, high=8)
    block = {
        "roll": Op("roll", 1, 1),
        "flip": Op("flip", (1,)),
        "repeat": Method("repeat", 1, 2, 1, 1),
    }[name]
    out = 2 * width if name == "repeat" else width
    return chain([*prefix, block]), at._replace(width=out)


@feature("gather")
def gather(d: Draw, at: At, name: str) -> Built:
    indices = [d.integer(0, at.width - 1) for _ in range(d.integer(2, 6))]
    options = {"select": True} if d.flag() else {}
    return Gather(indices, **options), at._replace(width=len(indices))


# Parameters and modules in several roles


@feature("shared_conv", "shared_norm", "shared_siamese", "tied_weights", "tied_parallel")
def shared(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    after = at._replace(width=width)
    match name:
        case "shared_conv":
            block: nn.Module = Twice(d.conv(width, width))
        case "shared_norm":
            block, after = SharedNorm(width, out := d.width(low=2)), at._replace(width=out)
        case "shared_siamese":
            middle, out, how = d.width(low=2), d.width(low=2, high=6), d.choice(("cat", "add"))
            first, second = (d.body(after, middle)[0] for _ in range(2))
            block = Siamese(first, second, d.conv(middle, out), how)
            after = at._replace(width=2 * out if how == "cat" else out)
        case "tied_weights":
            block = Tied(width, width)
        case _:
            block, after = (
                Tied(width, out := d.width(high=6), parallel=True),
                at._replace(width=2 * out),
            )
    return chain([*prefix, block]), after


@feature("layer_scale", "channel_bias", "channel_buffer", "channel_vector")
def per_channel(d: Draw, at: At, name: str) -> Built:
    shape = d.choice(((1, at.width, 1, 1), (at.width, 1, 1)))
    match name:
        case "layer_scale":
            block = PerChannel(shape)
        case "channel_bias":
            block = PerChannel(shape, "add")
        case "channel_buffer":
            block = PerChannel(shape, d.choice(("mul", "add")), buffer=True)
        case _:
            block = PerChannel((at.width,), d.choice(("mul", "add")))
    return block, at


@feature("root_width")
def root_width(d: Draw, at: At, name: str) -> Built:
    return RootWidth(), at


@feature("dropout", "dropout2d")
def dropout(d: Draw, at: At, name: str) -> Built:
    return FunctionalDropout() if name == "dropout" else Layer("Dropout2d", 0.2), at


@feature("functional_norm", "instance_norm")
def norm(d: Draw, at: At, name: str) -> Built:
    if name == "functional_norm":
        return FunctionalNorm(at.width), at
    relu = Layer("ReLU")  # the mean of a normalised map is constant, and heads take means
    return chain([Layer("InstanceNorm2d", at.width, affine=True), relu]), at


# Spatial sizes


@feature("max_pool", "avg_pool", resizes=True, smallest=6)
def pool(d: Draw, at: At, name: str) -> Built:
    if name == "avg_pool":
        return Layer("AvgPool2d", 2), at._replace(size=at.size // 2)
    if d.flag():
        return Layer("MaxPool2d", 3, 2, padding=1), at._replace(size=halved(at.size))
    return Op("max_pool2d", 2), at._replace(size=at.size // 2)


@feature("max_pool_same", "avg_pool_same")
def pool_same(d: Draw, at: At, name: str) -> Built:
    return Layer("MaxPool2d" if name == "max_pool_same" else "AvgPool2d", 3, 1, padding=1), at


@feature("adaptive_pool", resizes=True)
def adaptive_pool(d: Draw, at: At, name: str) -> Built:
    size = d.integer(SMALLEST, 6)
    kind = d.choice(("AdaptiveAvgPool2d", "AdaptiveMaxPool2d"))
    return Layer(kind, size), at._replace(size=size)


@feature("spatial_slice", resizes=True, smallest=5)
def spatial_slice(d: Draw, at: At, name: str) -> Built:
    return Slice(stride=2), at._replace(size=halved(at.size))


@feature("nearest", "bilinear", resizes=True, largest=7)
def upsample(d: Draw, at: At, name: str) -> Built:
    if d.flag():
        block: nn.Module = Layer("Upsample", scale_factor=2, mode=name)
    else:
        block = Op("interpolate", scale_factor=2, mode=name)
    return block, at._replace(size=2 * at.size)


@feature("resized_skip", smallest=5)
def resized_skip(d: Draw, at: At, name: str) -> Built:
    down = Layer("Conv2d", at.width, at.width, 3, stride=2, padding=1)
    return ResizedSkip(down, d.choice(("nearest", "bilinear"))), at


@feature("pixel_shuffle", resizes=True, largest=7)
def pixel_shuffle(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, 4)
    block = Op("pixel_shuffle", 2) if d.flag() else Layer("PixelShuffle", 2)
    return chain([*prefix, block]), at._replace(width=width // 4, size=2 * at.size)


# Channels that depend on each other: most of these have to stay complete


@feature("group_norm")
def group_norm(d: Draw, at: At, name: str) -> Built:
    groups = d.choice((1, 2, 3))
    prefix, width = d.fit(at, groups, 2 * groups)
    return chain([*prefix, Layer("GroupNorm", groups, width)]), at._replace(width=width)


@feature(
    "local_response_norm",
    "channel_softmax",
    "channel_mean",
    "channel_max",
    "cumsum",
    "sort",
    "opaque",
)
def across_channels(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    block = {
        "local_response_norm": lambda: Layer("LocalResponseNorm", 3, alpha=1.0),
        "channel_softmax": lambda: Op("softmax", 1),
        "channel_mean": lambda: Merge([None, Op("mean", 1, keepdim=True)], "sub"),
        "channel_max": lambda: Merge([None, Op("amax", 1, keepdim=True)], "mul"),
        "cumsum": lambda: Op("cumsum", 1),
        "sort": Sorted,
        "opaque": Opaque,
    }[name]
    return chain([*prefix, block()]), at._replace(width=width)


FREEZING = frozenset(
    {"local_response_norm", "channel_softmax", "channel_mean", "channel_max"}
    | {"cumsum", "sort", "opaque"}
)  # an einsum with a parameter is a contraction, which an analysis may also understand


# Heads


@head("head_pool", "head_mean", "head_flatten", "head_view", "head_constant", "head_mlp")
def linear_head(d: Draw, at: At, name: str) -> nn.Module:
    classes = d.integer(2, 4)
    match name:
        case "head_pool":
            return LinearHead(at.width, classes)
        case "head_mean":
            return LinearHead(at.width, classes, how="mean")
        case "head_mlp":
            return LinearHead(at.width, classes, pool=d.choice((1, 2)), hidden=d.width(low=2))
    return LinearHead(at.width, classes, pool=d.choice((2, 3)), how=name.removeprefix("head_"))


@head("head_conv", "head_raw")
def map_head(d: Draw, at: At, name: str) -> nn.Module | None:
    return Layer("Conv2d", at.width, d.integer(1, 3), 1) if name == "head_conv" else None


@head("head_tuple", "head_dict")
def several(d: Draw, at: At, name: str) -> nn.Module:
    inner = [n for n in ("head_pool", "head_flatten", "head_conv") if n in d.pool] or ["head_pool"]
    first = d.head(at, inner)
    second = d.head(at, inner) if d.flag() else None  # None: the feature map itself
    return Outputs([first, second], ("first", "second") if name == "head_dict" else None)
