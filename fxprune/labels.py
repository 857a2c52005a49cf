"""Labels: which channel every element of an activation belongs to; and the ledger of what couples.

A label gives each element of a tensor an id. Elements with one id live or die together. The ids
are kept compact: size 1 along every axis on which they do not change, so their memory does not
grow with pixels or batches. Id 0 (`UNCUT`) marks what can never be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph import Tensors

UNCUT = 0


@dataclass(frozen=True)
class Part:
    """One dimension of a parameter (or buffer) inside a tensor that is made of it.

    index: int64, compact: which index of the dimension an element comes from, -1 for another source.
    """

    tensor: str
    dim: int
    index: Tensor

    @property
    def key(self) -> tuple[str, int]:
        """The slot it belongs to."""
        return self.tensor, self.dim


@dataclass(frozen=True)
class Label:
    """Ids of a tensor's elements.

    shape: the tensor's true shape on the example input. ids: int64, as many dims, each of size 1
    (constant along it) or the true size. parts: dimensions of parameters that it is made of; they
    get ids only where they meet channels of an activation (`Flow.bind`).
    """

    shape: tuple[int, ...]
    ids: Tensor
    parts: tuple[Part, ...] = ()

    @property
    def varying(self) -> list[int]:
        """The axes along which the ids change."""
        return [d for d, n in enumerate(self.ids.shape) if n > 1]

    @property
    def uncut(self) -> bool:
        """Whether no element can ever be cut."""
        return self.ids.numel() == 1 and int(self.ids.flatten()[0]) == UNCUT

    def expanded(self) -> Tensor:
        """The ids at the true shape, without memory of their own."""
        return self.ids.expand(self.shape)


def uncut(shape: Sequence[int]) -> Label:
    """The label of a tensor that no pruning touches."""
    return Label(tuple(shape), torch.zeros([1] * len(shape), dtype=torch.int64))


def compact(ids: Tensor) -> Tensor:
    """Drop the axes along which ids are constant (they keep size 1)."""
    for d in range(ids.dim()):
        if ids.shape[d] > 1 and ids.stride(d) == 0:
            ids = ids.narrow(d, 0, 1)
    for d in range(ids.dim()):
        if ids.shape[d] > 1 and bool((ids == ids.narrow(d, 0, 1)).all()):
            ids = ids.narrow(d, 0, 1)
    return ids


@dataclass
class Slot:
    """One dimension of one tensor, and the id of each index along it.

    size: channels along it; in `blocks` > 1 blocks of size / blocks each, where the dimension of a
    grouped convolution's weight is shared by all groups (the tensor's own length is one block).
    """

    tensor: str
    dim: int
    role: str
    ids: Tensor  # [size]
    blocks: int = 1
    producer: bool = False  # its rows make channels, so they can be scored
    makes: bool = True  # channels, or transforms them; False: reads them

    @property
    def size(self) -> int:
        """Channels along the dimension, over all blocks."""
        return len(self.ids)


@dataclass(frozen=True)
class Pick:
    """One axis of a tensor taken at constant places: out[i] = x[places[i]] along `axis` of x.

    places: int64 [n].
    """

    axis: int
    places: Tensor


@dataclass(frozen=True)
class Freeze:
    """Ids that may not be cut, because of a node."""

    ids: Tensor
    node: Node
    why: str


@dataclass(frozen=True)
class MacTerm:
    """`factor` x kept(out) x kept(in) multiply-adds per sample, of one call of one layer.

    dims: arrays of ids whose kept counts multiply, any shape.
    """

    node: str
    factor: float
    dims: tuple[Tensor, ...]


@dataclass
class Ledger:
    """What the rules learn while they walk the graph."""

    tensors: Tensors
    next_id: int = 1
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[Freeze] = field(default_factory=list)
    arrays: list[Tensor] = field(default_factory=list)  # ids that vary along several axes
    pieces: list[Tensor] = field(default_factory=list)  # of each, at least one id must stay
    residual: list[Tensor] = field(default_factory=list)  # ids that meet in an addition
    heads: list[Tensor] = field(default_factory=list)  # ids that live along an axis of heads
    head_dims: list[Tensor] = field(default_factory=list)  # and those of dimensions of all heads
    experts: list[Tensor] = field(default_factory=list)  # heads of a stacked weight
    by_head_dims: bool = False  # attention loses dimensions of all heads, not heads
    macs: list[MacTerm] = field(default_factory=list)
    whole_groups: dict[str, bool] = field(default_factory=dict)  # grouped weight -> how it is cut
    claimed: set[tuple[str, int, Node]] = field(default_factory=set)  # dimensions a node understood
    whole: dict[str, tuple[Node, str]] = field(default_factory=dict)  # tensors read in other ways
    pinned: dict[tuple[str, int], tuple[Node, str]] = field(default_factory=dict)  # and dimensions

    made: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (node, dim) -> ids of what
    # has a size but no identity per channel: constants, copies; they are cut as what they meet
    bound: set[tuple[str, int]] = field(default_factory=set)  # those that met channels
    picks: dict[Node, tuple[Pick, ...]] = field(
        default_factory=dict
    )  # axes taken at constant places
    shuffles: dict[Node, tuple[Node, ...]] = field(
        default_factory=dict
    )  # last node -> those before
    loose: set[Node] = field(default_factory=set)  # nodes that need be no rectangle: of a shuffle
    saved: frozenset[str] | None = None  # tensors that a plan can name; None: all

    def fresh(self, count: int) -> Tensor:
        """New ids, int64 [count]."""
        self.next_id += count
        return torch.arange(self.next_id - count, self.next_id)

    def freeze_whole(self) -> None:
        """What something reads whole stays: all dimensions of a tensor, or one of them."""
        for slot in self.slots.values():
            if slot.tensor in self.whole:
                self.freeze(slot.ids, *self.whole[slot.tensor])
            elif (slot.tensor, slot.dim) in self.pinned:
                self.freeze(slot.ids, *self.pinned[slot.tensor, slot.dim])
        for key, ids in self.made.items():
            whole = key in self.pinned and key in self.bound
            if whole:  # guard: made whole -> tests/test_movement.py -k made
                self.freeze(ids, *self.pinned[key])

    def freeze(self, ids: Tensor, node: Node, why: str) -> None:
        """These ids stay, whatever the plan says."""
        if ids.numel() == 1 and int(ids.flatten()[0]) == UNCUT:
            return
        self.frozen.append(Freeze(ids.flatten(), node, why))

    def couple(self, a: Tensor, b: Tensor, node: Node, why: str = "") -> None:
        """Ids at equal positions live or die together; whatever meets UNCUT stays."""
        if a is b:
            return
        a, b = torch.broadcast_tensors(a, b)
        a, b = a.flatten(), b.flatten()
        fixed = (a == UNCUT) | (b == UNCUT)
        if bool(fixed.any()):  # guard: meets what stays -> tests/test_groups.py -k meeting
            reason = why or "it meets channels that cannot be cut"
            self.freeze(torch.maximum(a, b)[fixed], node, reason)
            a, b = a[~fixed], b[~fixed]
        if a.numel():
            self.edges.append((a, b))

    def couple_along(self, ids: Tensor, axes: Sequence[int], node: Node, why: str) -> Tensor:
        """Ids along `axes` become one; returns the ids with these axes narrowed to size 1."""
        first = ids
        for d in axes:
            first = first.narrow(d, 0, 1)
        if first.numel() != ids.numel():
            self.couple(ids, first, node, why)
        return first

    def complete(self, label: Label, axes: Sequence[int], node: Node, why: str) -> Label:
        """No part of `axes` may be cut: couple along them, or freeze where nothing else varies."""
        named, axes = list(axes), [d for d in axes if d in label.varying]
        if not axes:
            kept = tuple(p for p in label.parts if all(p.index.shape[d] == 1 for d in named))
            whole = len(kept) < len(label.parts)  # dimensions of parameters, which have no ids yet
            if whole:  # guard: whole parameters -> tests/test_reader_core.py -k parameter
                return Label(label.shape, label.ids, kept)
            return label
        if axes == label.varying:  # guard: whole axes -> tests/test_law.py -k mixes
            self.freeze(label.ids, node, why)
            return uncut(label.shape)
        return Label(label.shape, self.couple_along(label.ids, axes, node, why))

    def slot(
        self,
        name: str | None,
        dim: int,
        role: str,
        ids: Tensor,
        node: Node,
        *,
        blocks: int = 1,
        producer: bool = False,
    ) -> Tensor:
        """The tensor's dimension holds these ids; a tensor met twice couples its two uses."""
        assert name is not None
        known = self.slots.get((name, dim))
        if known is not None:
            makes = role == "out"
            fits = (len(known.ids), known.blocks, known.makes) == (len(ids), blocks, makes)
            if not fits:  # guard: two roles -> tests/bad_input/test_kept.py -k "same_channels"
                why = f"`{name}` is used in two ways that do not fit together"
                self.freeze(known.ids, node, why)
                self.freeze(ids, node, why)
                return known.ids
            why = f"`{name}` is shared with a use that cannot be cut"
            self.couple(known.ids, ids, node, why)  # guard: shared -> tests/test_law.py -k shared
            return known.ids
        self.slots[name, dim] = Slot(name, dim, role, ids, blocks, producer, role == "out")
        unsaved = role == "in" and self.saved is not None and name not in self.saved
        if unsaved:  # guard: unsaved -> tests/test_reader_core.py -k saved
            self.freeze(ids, node, f"`{name}` is not in the state_dict: no plan can say it is cut")
        shared = name in self.tensors.overlapping
        if shared:  # guard: overlap -> tests/bad_input/test_kept.py -k memory
            other = self.tensors.overlapping[name]
            self.freeze(ids, node, f"`{name}` shares memory with a part of `{other}`")
        return ids
