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
    AtSize,
    Attention,
    Chain,
    ChannelNorm,
    ClassToken,
    Context,
    ConvBnAct,
    CrossAttention,
    Csp,
    Deformable,
    Dense,
    DerivedConv,
    Einsum,
    ExpandedGate,
    FlatHeads,
    FunctionalConv,
    FunctionalDropout,
    FunctionalGroupNorm,
    FunctionalLinear,
    FunctionalNorm,
    FunctionalPRelu,
    FunctionalSequence,
    Gather,
    GroupedQueries,
    GroupEinsum,
    HandNorm,
    Involution,
    Layer,
    LearnedQueries,
    LinearGate,
    LinearHead,
    Merge,
    Method,
    Mix,
    Mlp,
    OneHead,
    Op,
    Opaque,
    Outputs,
    PadShortcut,
    PerChannel,
    Pieces,
    Product,
    ReducedKeys,
    ResizedSkip,
    RootWidth,
    Sequences,
    SharedNorm,
    Shuffle,
    Siamese,
    Slice,
    Sorted,
    SpatialGate,
    StandardisedConv,
    Sublayer,
    Tied,
    TokenHead,
    Tokens,
    TorchAttention,
    Transposed,
    Twice,
    TwoPools,
    Unfold,
    Volumes,
    Windows,
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


@feature("functional_norm", "instance_norm", "instance_norm_plain")
def norm(d: Draw, at: At, name: str) -> Built:
    if name == "functional_norm":
        return FunctionalNorm(at.width), at
    relu = Layer("ReLU")  # the mean of a normalised map is constant, and heads take means
    options = {"affine": True} if name == "instance_norm" else {}
    return chain([Layer("InstanceNorm2d", at.width, **options), relu]), at


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


# Tokens


def heads(d: Draw) -> tuple[int, int]:
    """A number of heads, and dimensions of each."""
    return d.choice((2, 3, 1, 4)), d.choice((2, 1, 3))


def sublayer(d: Draw, width: int, body: nn.Module) -> nn.Module:
    """The body as blocks of transformers hold it."""
    options = {"post": True} if d.integer(0, 3) == 3 else {}
    options |= {"scale": True} if d.flag() else {}
    return Sublayer(
        width, body, d.choice(("layer", "rms", "layer without bias", "none")), **options
    )


def stacked(d: Draw, width: int, body: nn.Module) -> nn.Module:
    """The body in a residual, behind positions of its own, before an MLP; or bare."""
    kind = d.integer(0, 3)
    if kind == 0:
        return body
    blocks = [sublayer(d, width, body)]
    if kind == 2:
        blocks.append(sublayer(d, width, Mlp(width, d.width(), d.choice(MLPS))))
    return chain(blocks)


def tokens(d: Draw, body: nn.Module) -> nn.Module:
    return Tokens(body, d.choice(("unflatten", "reshape", "view")))


def at_size(d: Draw, at: At, size: int, body: nn.Module) -> tuple[nn.Module, At]:
    """A body that needs maps of one size; maps that must keep theirs are given it back."""
    back = at.fixed or d.flag()
    return AtSize(size, body, **{"back": True} if back else {}), at if back else at._replace(
        size=size
    )


MLPS = ("gelu", "swiglu", "geglu", "glu")


@feature(
    *("attention_matmul", "attention_einsum", "attention_sdpa", "attention_causal"),
    *("attention_cosine", "attention_channels", "attention_linear"),
)
def attention(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    form = d.choice(("reshape", "unbind", "chunk", "split", "three"))
    body = Attention(width, *heads(d), name.removeprefix("attention_"), form, **d.bias())
    return chain([*prefix, tokens(d, stacked(d, width, body))]), at._replace(width=width)


@feature(
    *("one_head", "flat_heads", "grouped_queries", "class_token", "learned_queries"),
    *("torch_attention", "torch_cross_attention", "torch_encoder"),
)
def other_attention(d: Draw, at: At, name: str) -> Built:
    torchs, (count, dim) = name.startswith("torch"), heads(d)
    prefix, width = d.fit(at, count if torchs else 1, max(2, count))
    match name:
        case "one_head":
            body: nn.Module = OneHead(width, d.width(), **{"bmm": True} if d.flag() else {})
        case "flat_heads":
            body = FlatHeads(width, count, dim)
        case "grouped_queries":
            shared = d.choice((2, 1))
            body = GroupedQueries(width, 2 * shared, shared, dim, d.choice(("gqa", "repeat")))
        case "class_token":
            inner = stacked(d, width, Attention(width, count, dim, d.choice(("matmul", "sdpa"))))
            body = ClassToken(width, inner, d.choice(("add", "gate")))
        case "learned_queries":
            gather, read = (CrossAttention(width, width, *heads(d)) for _ in range(2))
            body = LearnedQueries(width, gather, read, d.integer(2, 4))
        case "torch_encoder":
            options = {"batch_first": True} | ({"norm_first": True} if d.flag() else {})
            body = Layer("TransformerEncoderLayer", width, count, d.width(), **options)
        case _:
            options = {"cross": True} if name == "torch_cross_attention" else {}
            body = TorchAttention(width, count, **options | ({"first": False} if d.flag() else {}))
    body = body if name == "torch_encoder" else stacked(d, width, body)
    return chain([*prefix, tokens(d, body)]), at._replace(width=width)


@feature("reduced_keys")
def reduced_keys(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    other, how = d.width(low=2), d.choice(("matmul", "einsum", "sdpa", "cosine"))
    block = ReducedKeys(width, other, CrossAttention(width, other, *heads(d), how))
    return chain([*prefix, block]), at._replace(width=width)


@feature("windows", "windows_shifted")
def windows(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    side = d.choice((3, 2))
    options = {"table": side} if d.flag() else {}
    body = Attention(width, *heads(d), d.choice(("matmul", "sdpa", "einsum")), **options)
    shift = {"shift": 1} if name == "windows_shifted" else {}
    block = Windows(stacked(d, width, body), side, **shift)
    return chain([*prefix, block]), at._replace(width=width)


@feature("relative_bias", "position_embedding", "token_mixing", "layer_norm_maps")
def of_one_size(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    side = d.choice((3, 4))
    inner = Attention(width, *heads(d), d.choice(("matmul", "sdpa", "einsum")), "unbind")
    match name:
        case "relative_bias":
            how = d.choice(("matmul", "sdpa", "einsum"))
            body = tokens(d, stacked(d, width, Attention(width, *heads(d), how, table=side)))
        case "position_embedding":
            if d.flag():
                body = chain([PerChannel((1, width, side, side), "add"), d.conv(width, width)])
            else:
                positions = PerChannel((1, side * side, width), "add")
                body = tokens(d, chain([positions, stacked(d, width, inner)]))
        case "token_mixing":
            mixing = Transposed(Mlp(side * side, d.width(), d.choice(("gelu", "swiglu"))))
            body = tokens(d, stacked(d, width, mixing))
        case _:
            body = chain([Layer("LayerNorm", [width, side, side]), Layer("ReLU")])
    block, after = at_size(d, at, side, body)
    return chain([*prefix, block]), after._replace(width=width)


@feature("siamese_attention")
def siamese_attention(d: Draw, at: At, name: str) -> Built:
    width, how = d.width(low=2, high=6), d.choice(("cat", "add", "mul"))
    first, second = (d.body(at, width)[0] for _ in range(2))
    body = stacked(d, width, Attention(width, *heads(d), d.choice(("matmul", "sdpa"))))
    out = 2 * width if how == "cat" else width
    return Siamese(first, second, tokens(d, body), how), at._replace(width=out)


@feature("mlp")
def mlp(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    body = Mlp(width, d.width(), d.choice(MLPS))
    return chain([*prefix, tokens(d, stacked(d, width, body))]), at._replace(width=width)


# Products and computed weights


@feature("nonlocal", "similarity", "gram", "inner_product", "gate_einsum")
def product(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    how = {"nonlocal": "attention", "inner_product": "inner", "gate_einsum": "gate"}.get(name, name)
    inner = d.width(low=2)
    block = Product(width, inner, how)
    return chain([*prefix, block]), at._replace(width=inner if how == "gate" else width)


@feature("einsum_forms", "einsum_groups", "einsum_scale")
def einsums(d: Draw, at: At, name: str) -> Built:
    if name == "einsum_scale":
        prefix, width = d.fit(at, low=2)
        block = Einsum("bchw,c->bchw", (width,))
        return chain([*prefix, block]), at._replace(width=width)
    if name == "einsum_groups":
        groups = d.choice((2, 3))
        prefix, width = d.fit(at, groups, 2 * groups)
        out = d.integer(1, 4)
        block = GroupEinsum(groups, width // groups, out)
        return chain([*prefix, block]), at._replace(width=groups * out)
    width = d.width(low=2)
    equation, flipped, last = d.choice(
        (
            ("bchw,dc->bdhw", True, False),
            ("bhwc,cd->bhwd", False, True),
            ("...c,dc->...d", True, True),
            ("b c h w, c d -> b d h w", False, False),
        )
    )
    shape = (width, at.width) if flipped else (at.width, width)
    return Einsum(equation, shape, **{"last": True} if last else {}), at._replace(width=width)


@feature("derived_weight", "derived_transpose", "standardised_conv")
def derived_weight(d: Draw, at: At, name: str) -> Built:
    prefix, c_in = d.fit(at, low=2)
    width = d.width(low=2)
    if name == "standardised_conv":
        return chain([*prefix, StandardisedConv(c_in, width)]), at._replace(width=width)
    how = d.choice(
        ("gain", "branches", "flipped", "centre", "linear")
        if name == "derived_weight"
        else ("matmul", "transposed", "functional transpose")
    )
    return chain([*prefix, DerivedConv(c_in, width, how)]), at._replace(width=width)


@feature("unfold", "involution", "deformable")
def patches(d: Draw, at: At, name: str) -> Built:
    if name == "involution":
        groups = d.choice((1, 2, 3))
        prefix, width = d.fit(at, groups, max(2, groups))
        return chain([*prefix, Involution(width, groups)]), at._replace(width=width)
    width = d.width(low=2)
    if name == "unfold":
        return Unfold(at.width, width, d.choice(("conv", "linear"))), at._replace(width=width)
    block = Deformable(at.width, width, **{"mask": True} if d.flag() else {})
    return block, at._replace(width=width)


# Sequences and volumes


@feature("conv1d", "conv1d_rows", "conv1d_transposed", "conv1d_functional", "norm1d")
def sequences(d: Draw, at: At, name: str) -> Built:
    prefix, c_in = d.fit(at, low=2)
    width = d.width(low=2)
    match name:
        case "conv1d_transposed":
            body: nn.Module = Layer("ConvTranspose1d", c_in, width, 3, padding=1, **d.bias())
        case "conv1d_functional":
            options = {"transposed": True} if d.flag() else {}
            body = FunctionalSequence(c_in, width, **options)
        case "norm1d":
            norms = (("BatchNorm1d", width), ("InstanceNorm1d", width), ("GroupNorm", 1, width))
            first = Layer("Conv1d", c_in, width, 1, **d.bias())
            body = chain([first, Layer(*d.choice(norms)), Layer("ReLU")])
        case _:
            body = Layer("Conv1d", c_in, width, 3, padding=1, **d.bias())
    if d.flag():
        body = chain([body, Layer("PReLU", width), Layer("Conv1d", width, width, 1)])
    rows = {"rows": True} if name == "conv1d_rows" else {}
    return chain([*prefix, Sequences(body, **rows)]), at._replace(width=width)


@feature("conv3d", "conv3d_transposed", "conv3d_blocks")
def volumes(d: Draw, at: At, name: str) -> Built:
    depth = d.choice((2, 3)) if name == "conv3d_blocks" else 1
    prefix, c_in = d.fit(at, depth, 2 * depth)
    width = d.width(low=2, high=6)
    kind = "ConvTranspose3d" if name == "conv3d_transposed" else "Conv3d"
    body: nn.Module = Layer(kind, c_in // depth, width, 3, padding=1, **d.bias())
    if d.flag():
        norm = d.choice(("BatchNorm3d", "InstanceNorm3d"))
        body = chain([body, Layer(norm, width), Layer("ReLU")])
    options = {"depth": depth} if depth > 1 else {}
    return chain([*prefix, Volumes(body, **options)]), at._replace(width=width * depth)


# Gated units, and ways to spread one gate


@feature("glu", "glu_swish", "simple_gate")
def gated_unit(d: Draw, at: At, name: str) -> Built:
    width = d.width()
    wide = d.conv(at.width, 2 * width)
    match name:
        case "glu":
            gate: nn.Module = Layer("GLU", 1) if d.flag() else Op("glu", d.choice((1, -3)))
        case "glu_swish":
            gate = Pieces("chunk", 2, [None, None], "swish")
        case _:
            gate = Pieces("chunk", 2, [None, None], "mul")
    return chain([wide, gate]), at._replace(width=width)


@feature("gate_conv", "two_pools", "context", "squeeze_mean", "expanded_gate")
def gate(d: Draw, at: At, name: str) -> Built:
    hidden = d.width()
    match name:
        case "gate_conv":
            conv = Layer("Conv2d", at.width, at.width, 3, padding=1)
            block: nn.Module = Merge([None, conv], d.choice(("gate", "swish")))
        case "two_pools":
            block = TwoPools(at.width, hidden)
        case "context":
            block = Context(at.width, hidden)
        case "squeeze_mean":
            squeeze = Op(d.choice(("mean", "amax")), (2, 3), keepdim=True)
            convs = [Layer("Conv2d", at.width, hidden, 1), Layer("SiLU")]
            convs += [Layer("Conv2d", hidden, at.width, 1), Op("hardsigmoid")]
            block = Merge([None, chain([squeeze, *convs])], "mul")
        case _:
            how = d.choice(("number", "size", "shape", "repeat", "as"))
            block = ExpandedGate(at.width, how)
    return block, at


@feature("csp")
def csp(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, 2)
    layers = [d.conv(width // 2, width // 2) for _ in range(d.integer(1, 2))]
    return chain([*prefix, Csp(layers)]), at._replace(width=width + len(layers) * (width // 2))


# Norms over channels


@feature("layer_norm", "rms_norm", "layer_norm_functional", "rms_norm_functional")
def channel_norm(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, low=2)
    kind, functional = name.split("_")[0], name.endswith("functional")
    block = ChannelNorm(width, f"functional {kind}" if functional else kind)
    return chain([*prefix, block, Layer("ReLU")]), at._replace(width=width)


@feature("group_norm", "group_norm_functional", "group_norm_each", "group_norm_plain")
def group_norm(d: Draw, at: At, name: str) -> Built:
    groups = d.choice((1, 2, 3))
    prefix, width = d.fit(at, groups, 2 * groups)
    groups = width if name == "group_norm_each" else groups
    if name == "group_norm_functional":
        block: nn.Module = FunctionalGroupNorm(groups, width)
    else:
        options = {"affine": False} if name == "group_norm_plain" else {}
        block = Layer("GroupNorm", groups, width, **options)
    return chain([*prefix, block, Layer("ReLU")]), at._replace(width=width)


@feature("prelu_functional")
def prelu_functional(d: Draw, at: At, name: str) -> Built:
    return FunctionalPRelu(at.width), at


# Positions


@feature(
    "roll_positions", "flip_positions", "softmax_positions", "cumsum_positions", "max_positions"
)
def positions(d: Draw, at: At, name: str) -> Built:
    op = {
        "roll_positions": Op("roll", (1, -1), (2, 3)),
        "flip_positions": Op("flip", (3,)),
        "softmax_positions": Op("softmax", 3),
        "cumsum_positions": Op("cumsum", 2),
        "max_positions": Op("amax", 2, keepdim=True),
    }[name]
    return Merge([None, op], d.choice(("add", "mul", "sub"))), at


@feature("pad_reflect", "pad_replicate", "pad_circular", "pad_constant", "pad_shift")
def pads(d: Draw, at: At, name: str) -> Built:
    if name == "pad_shift":
        return Op("pad", (1, -1, -2, 2)), at
    width, mode = d.width(), name.removeprefix("pad_")
    if mode == "constant":
        pad: nn.Module = Op("pad", (0, 2, 1, 1), value=0.5) if d.flag() else Layer("ZeroPad2d", 1)
    elif d.flag():
        pad = Op("pad", (1, 1, 1, 1), mode=mode)
    else:
        kind = {"reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}[mode]
        pad = Layer(f"{kind}Pad2d", 1)
    return chain([pad, Layer("Conv2d", at.width, width, 3)]), at._replace(width=width)


@feature("pixel_unshuffle")
def pixel_unshuffle(d: Draw, at: At, name: str) -> Built:
    """To twice the size and back, since sizes must be even."""
    prefix, width = d.fit(at, high=4)
    block = Op("pixel_unshuffle", 2) if d.flag() else Layer("PixelUnshuffle", 2)
    larger = Layer("Upsample", scale_factor=2, mode="bilinear")
    return chain([*prefix, larger, block]), at._replace(width=4 * width)


@feature("stacked_shuffles", "permuted", "repeat_interleave")
def permutations(d: Draw, at: At, name: str) -> Built:
    prefix, width = d.fit(at, 6, 6) if name == "stacked_shuffles" else d.fit(at, low=2, high=8)
    match name:
        case "stacked_shuffles":
            between = [Layer("ReLU")] if d.flag() else []
            block: nn.Module = chain([Shuffle(2), *between, Shuffle(3)])
        case "permuted":
            left = list(range(width))
            order = [left.pop(d.integer(0, len(left) - 1)) for _ in range(width)]
            block = Gather(order, **{"select": True} if d.flag() else {})
        case _:
            block = Op("repeat_interleave", 2, dim=1)
    out = 2 * width if name == "repeat_interleave" else width
    return chain([*prefix, block]), at._replace(width=out)


# Channels that depend on each other: most of these have to stay complete


@feature(
    "local_response_norm",
    "channel_softmax",
    "channel_mean",
    "channel_max",
    "cumsum",
    "sort",
    "opaque",
    "normalize",
    "hand_norm",
    "channel_pools",
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
        "normalize": lambda: Op("normalize", dim=1),
        "hand_norm": lambda: HandNorm(width, d.choice(("layer", "response"))),
        "channel_pools": lambda: Merge([None, SpatialGate()], "mul"),
    }[name]
    return chain([*prefix, block()]), at._replace(width=width)


FREEZING = frozenset(
    {"local_response_norm", "channel_softmax", "channel_mean", "channel_max"}
    | {"cumsum", "sort", "opaque", "normalize", "hand_norm", "channel_pools"}
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


@head("head_tokens", "head_query")
def token_head(d: Draw, at: At, name: str) -> nn.Module:
    prefix, width = d.fit(at, low=2)  # one channel, normalised, is a constant
    attention = CrossAttention(width, width, *heads(d)) if name == "head_query" else None
    return chain([*prefix, TokenHead(width, d.integer(2, 4), attention)])


@head("head_conv", "head_raw")
def map_head(d: Draw, at: At, name: str) -> nn.Module | None:
    return Layer("Conv2d", at.width, d.integer(1, 3), 1) if name == "head_conv" else None


@head("head_tuple", "head_dict")
def several(d: Draw, at: At, name: str) -> nn.Module:
    inner = [n for n in ("head_pool", "head_flatten", "head_conv") if n in d.pool] or ["head_pool"]
    first = d.head(at, inner)
    second = d.head(at, inner) if d.flag() else None  # None: the feature map itself
    return Outputs([first, second], ("first", "second") if name == "head_dict" else None)
