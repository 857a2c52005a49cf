"""Random networks of feature maps and tokens, drawn by hypothesis or from a seed by the same code.

    net = build(7)                                              # a plain seed
    @given(net=nets())                                          # anything
    @given(net=nets(require={"chunk2"}, exclude=FREEZING))      # with chunk(2), nothing that freezes

A network is valid by construction: float64, eval mode, traceable by torch.fx, alive (its outputs
depend on its input), and open to any batch size and to both spatial sizes of `net.inputs()`.
`net.features` names what was drawn. The glue between blocks may appear whatever was asked for.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import TypeVar

from blocks import Net
from features import ACTIVATIONS, BLOCKS, FREEZING, HEADS, At, Chooser, Draw
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

T = TypeVar("T")

__all__ = ["ACTIVATIONS", "ALL_FEATURES", "FREEZING", "GLUE", "build", "nets"]

ALL_FEATURES: tuple[str, ...] = (*BLOCKS, *HEADS)
GLUE = frozenset({"conv", "relu", "adaptive_pool", "head_pool"})


class Seeded:
    """Decisions from a seed."""

    def __init__(self, seed: int) -> None:
        self.integer = random.Random(seed).randint

    def together(self, decide: Callable[[], T]) -> T:
        return decide()


class Drawn:
    """Decisions from hypothesis."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def together(self, decide: Callable[[], T]) -> T:
        return self.draw(st.builds(decide))


def network(
    chooser: Chooser,
    *,
    features: Iterable[str] | None = None,
    require: Iterable[str] = (),
    exclude: Iterable[str] = (),
    max_blocks: int = 8,
) -> Net:
    """One network; `features` is what may be drawn (default: all), `require` what has to be.

    Raises ValueError for a name that is not in ALL_FEATURES, one both required and excluded, two
    required heads, or more required blocks than `max_blocks`.
    """
    require, exclude = sorted(set(require)), set(exclude)
    pool = (set(ALL_FEATURES) if features is None else set(features)) - exclude
    if unknown := {*pool, *require, *exclude} - set(ALL_FEATURES):
        raise ValueError(f"no such features: {sorted(unknown)}")
    if both := exclude.intersection(require):
        raise ValueError(f"required and excluded: {sorted(both)}")
    todo = [name for name in require if name in BLOCKS]
    heads = [name for name in require if name in HEADS]
    if len(heads) > 1 or len(todo) > max_blocks:
        raise ValueError(f"cannot require {require} in {max_blocks} blocks and one head")

    draw = Draw(chooser, pool, max_blocks)
    channels, size = draw.choice((3, 1, 2)), draw.integer(6, 10)
    at = At(draw.width(), size)
    blocks = [draw.conv(channels, at.width)]

    def step() -> tuple[nn.Module, At] | None:
        if not todo and (draw.budget <= 0 or not draw.integer(0, 6)):
            return None
        name = None
        if not todo or (draw.budget > len(todo) and draw.flag()):
            name = draw.name(at)
        if name is None and todo:
            name = todo.pop(0)
        return None if name is None else draw.block(at, name)

    while built := chooser.together(step):
        block, at = built
        blocks.append(block)
    head = draw.head(at, heads or [name for name in HEADS if name in pool] or ["head_pool"])
    seed = draw.integer(0, 999)
    return Net(blocks, head, channels=channels, size=size, seed=seed, features=draw.seen)


def build(
    seed: int,
    *,
    features: Iterable[str] | None = None,
    require: Iterable[str] = (),
    exclude: Iterable[str] = (),
    max_blocks: int = 8,
) -> Net:
    """The network of a seed; the same seed and arguments give the same network, values included."""
    chooser = Seeded(seed)
    drawn = (
        network(chooser, features=features, require=require, exclude=exclude, max_blocks=max_blocks)
        for _ in itertools.count()
    )
    return next(net for net in drawn if net.alive())


@st.composite
def nets(
    draw: st.DrawFn,
    *,
    features: Iterable[str] | None = None,
    require: Iterable[str] = (),
    exclude: Iterable[str] = (),
    max_blocks: int = 8,
) -> Net:
    """A strategy of networks; arguments as in `network`. A failing example shrinks to few blocks."""
    net = network(
        Drawn(draw),
        features=features,
        require=require,
        exclude=exclude,
        max_blocks=max_blocks,
    )
    assume(net.alive())
    return net
