"""Movement is not described but run: the operation itself, on ids, shows where channels go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.flow import Flow, Value, opaque, rule, uncut_like
from fxprune.graph import arguments, constant, op_name, value_of
from fxprune.labels import Label, Part, compact, uncut
from fxprune.rules.contraction import channel_ids


def run_on_ids(flow: Flow, node: Node, ids_of: Callable[[Label], Tensor] | None = None) -> Any:
    """Run the node's own operation with ids in place of tensors and numbers in place of sizes.

    ids_of: what stands for a labelled tensor, int64 of its true shape; its ids where omitted.
    """

    def stand_in(n: Node) -> Any:
        label = flow.of(n)
        if label is None:
            return value_of(n)
        return ids_of(label) if ids_of else label.expanded()

    args, kwargs = map_arg(node.args, stand_in), map_arg(node.kwargs, stand_in)
    if node.op == "call_module":
        return flow.traced.module(node)(*args, **kwargs)
    if node.op == "call_method":
        target = "reshape" if node.target == "view" else str(node.target)
        return getattr(args[0], target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def run_on(node: Node, value: Any) -> Any:
    """Run a node's own function or method on another first argument, with numbers for sizes."""
    rest, kwargs = constant(node.args[1:]), constant(node.kwargs)
    if node.op == "call_method":
        target = "reshape" if node.target == "view" else str(node.target)
        return getattr(value, target)(*rest, **kwargs)
    return node.target(value, *rest, **kwargs)  # type: ignore[operator]


def _move_parts(flow: Flow, node: Node) -> Value:
    """A tensor made of parameters: each dimension's index is moved as ids are."""
    label = flow.first(node)

    def indices(part: Part) -> list[Tensor]:
        moved = run_on_ids(
            flow, node, lambda x: part.index.expand(x.shape) if x is label else x.expanded()
        )
        return [m for m in pytree.tree_leaves(moved) if isinstance(m, Tensor)]

    moved = [(part, indices(part)) for part in label.parts]
    count = iter(range(len(moved[0][1])))

    def labelled(value: Any) -> Value:
        if not isinstance(value, Tensor):
            return None
        i = next(count)
        parts = [Part(p.tensor, p.dim, compact(m[i])) for p, m in moved]
        kept = tuple(p for p in parts if p.index.numel() > 1)
        return Label(tuple(value.shape), uncut(value.shape).ids, kept)

    return pytree.tree_map(labelled, value_of(node))


@rule("flatten", "ravel", "permute", "transpose", "movedim", "t", "unsqueeze", "squeeze")
@rule("numpy_T", "adjoint", "rot90", "atleast_1d", "atleast_2d", "atleast_3d", "unsafe_view")
@rule(nn.Flatten, nn.Unflatten)
def move(flow: Flow, node: Node) -> Value:
    """Operations that only rearrange elements: run them on the ids and read the result."""
    if all(label.uncut for label in flow.inputs(node)):
        return _move_parts(flow, node) if flow.first(node).parts else uncut_like(value_of(node))
    return pytree.tree_map(
        lambda ids: Label(tuple(ids.shape), compact(ids)) if isinstance(ids, Tensor) else None,
        run_on_ids(flow, node),
    )


@rule("view_as", "reshape_as")
def move_like(flow: Flow, node: Node) -> Value:
    """x.view_as(y) also ties x's channels to y's, whose sizes it takes."""
    moved, other = move(flow, node), flow.of(node.args[1])
    assert isinstance(moved, Label)
    assert other is not None
    flow.ledger.couple(moved.ids, other.ids, node)
    return moved


@rule("chunk", "split", "tensor_split", "narrow", "split_with_sizes")
def pieces(flow: Flow, node: Node) -> Value:
    """Parts of an axis: sizes are rewritten when it is cut, and no part may vanish."""
    x = flow.first(node)
    name = op_name(node)
    order = ("dim",) if name == "narrow" else ("parts", "dim")
    args = arguments(node, "input", *order)
    axis = constant(args.get("dim", 0)) % len(x.shape)
    out = value_of(node)
    whole = name == "narrow" or sum(part.shape[axis] for part in out) == x.shape[axis]
    if not whole or (name != "narrow" and any(part.shape[axis] == 0 for part in out)):
        flow.ledger.complete(x, [axis], node, f"parts of this `{name}` are empty or overlap")
    elif merged(x, axis):
        flow.ledger.complete(x, [axis], node, "a part of an axis that holds positions too")
    return all_stay(flow, move(flow, node))


def merged(x: Label, axis: int) -> bool:
    """Whether an axis holds positions (or a batch) beside channels: its length is then not fixed."""
    if x.ids.shape[axis] == 1:
        return False
    rows = x.ids.movedim(axis, 0).reshape(x.ids.shape[axis], -1)
    return (axis == 0 and len(x.shape) > 2) or len(torch.unique(rows, dim=0)) < len(rows)


def all_stay(flow: Flow, value: Value) -> Value:
    """Of every part, at least one channel must stay."""
    labels = [v for v in pytree.tree_leaves(value) if isinstance(v, Label)]
    for label in labels:  # guard: no empty part -> tests/test_groups.py -k piece
        if not label.uncut:
            flow.ledger.pieces.append(label.ids.flatten())
    return value


@rule("cat", "stack")
def concatenate(flow: Flow, node: Node) -> Value:
    """Labels side by side; the compact ids are joined, never the full ones."""
    given = arguments(node, "tensors", "dim")
    labels = [flow.of(n) for n in given["tensors"]] if isinstance(given["tensors"], list | tuple) else None  # fmt: skip
    out = value_of(node)
    if labels is None or any(label is None for label in labels):
        return opaque(flow, node, "a concatenation of a computed list")
    parts = _bound(flow, node, [label for label in labels if label is not None])
    dim = given.get("dim", given.get("axis", 0)) % len(out.shape)
    name = op_name(node)
    if len(parts) > 1 and (name == "stack" or not any(dim in label.varying for label in parts)):
        coupled = flow.couple_all(node, parts)  # beside each other, not behind: all or none
        coupled = coupled.unsqueeze(dim) if name == "stack" else coupled
        return Label(tuple(out.shape), coupled, _joined_parts(node, parts, dim))
    ids = [label.ids for label in parts]
    if op_name(node) == "cat":
        ids = [i.narrow(dim, 0, 1).expand(_with(i, dim, p.shape[dim])) if i.shape[dim] == 1 else i
               for i, p in zip(ids, parts, strict=True)]  # fmt: skip
    sizes = [max(i.shape[d] for i in ids) for d in range(ids[0].dim())]
    wide = [i.expand([i.shape[d] if op_name(node) == "cat" and d == dim else n
                      for d, n in enumerate(sizes)]) for i in ids]  # fmt: skip
    joined = torch.cat(wide, dim) if op_name(node) == "cat" else torch.stack(wide, dim)
    return Label(tuple(out.shape), compact(joined), _joined_parts(node, parts, dim))


def _bound(flow: Flow, node: Node, labels: Sequence[Label]) -> list[Label]:
    """Tensors made of parameters take ids on the axes where those beside them have ids."""
    axes = sorted({d for label in labels for d in label.varying})
    return [flow.bind(node, label, axes) if axes else label for label in labels]


def _joined_parts(node: Node, labels: Sequence[Label], dim: int) -> tuple[Part, ...]:
    """The dimensions of parameters laid side by side; -1 where another one lies."""
    if op_name(node) != "cat":
        return ()
    found = []
    for i, label in enumerate(labels):
        for part in label.parts:
            rows = [
                part.index.expand(_with(part.index, dim, other.shape[dim]))
                if i == j
                else torch.full(_with(part.index, dim, other.shape[dim]), -1)
                for j, other in enumerate(labels)
            ]
            found.append(Part(part.tensor, part.dim, compact(torch.cat(rows, dim))))
    return tuple(found)


def _with(ids: Tensor, dim: int, n: int) -> list[int]:
    return [n if d == dim else s for d, s in enumerate(ids.shape)]


@rule("pad")
def pad(flow: Flow, node: Node) -> Value:
    """Padding other axes changes nothing; constants padded onto channels are channels of their own."""
    args = arguments(node, "input", "pad", "mode", "value")
    x, out = flow.of(args["input"]), value_of(node)
    assert x is not None
    amounts = pad_amounts(constant(args["pad"]), len(x.shape))
    onto = [d for d in x.varying if amounts[d] != (0, 0)]
    if not onto:
        if x.ids.numel() == 1 and not x.uncut and any(amounts[d] != (0, 0) for d in _ones(x)):
            flow.ledger.freeze(x.ids, node, "its one channel is padded")
            return uncut(out.shape)
        return Label(tuple(out.shape), x.ids)
    if len(x.varying) > 1 or merged(x, onto[0]) or args.get("mode", "constant") != "constant":
        x = flow.ledger.complete(x, onto, node, "channels are padded by copies of channels")
        return Label(tuple(out.shape), x.ids)
    (axis,) = onto
    before, after = amounts[axis]
    ids = F.pad(x.ids.flatten(), (before, after), value=-1)
    ids = torch.where(ids < 0, flow.ledger.fresh(len(ids)), ids)
    shape = [1] * len(out.shape)
    shape[axis] = len(ids)
    label = Label(tuple(out.shape), ids.view(shape))
    return all_stay(flow, label) if min(before, after) < 0 else label


def _ones(x: Label) -> list[int]:
    return [d for d, n in enumerate(x.shape) if n == 1 and d > 0]


def pad_amounts(amounts: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """F.pad's list, last axis first, as (before, after) per axis."""
    pairs = [(0, 0)] * rank
    for i in range(len(amounts) // 2):
        pairs[rank - 1 - i] = (int(amounts[2 * i]), int(amounts[2 * i + 1]))
    return pairs


@rule("pixel_shuffle", "pixel_unshuffle", nn.PixelShuffle, nn.PixelUnshuffle)
def pixel_shuffle(flow: Flow, node: Node) -> Value:
    """r*r neighbouring channels and one channel of r*r positions are the same thing."""
    x, out = flow.first(node), value_of(node)
    axis = len(x.shape) - 3
    ids = channel_ids(flow, node, x, axis)
    if len(ids) > out.shape[axis]:
        ids = ids.view(out.shape[axis], -1)
        ids = flow.ledger.couple_along(ids, [1], node, "of a pixel shuffle").flatten()
    else:
        ids = ids.repeat_interleave(out.shape[axis] // len(ids))
    shape = [1] * len(out.shape)
    shape[axis] = len(ids)
    return Label(tuple(out.shape), compact(ids.view(shape)))
