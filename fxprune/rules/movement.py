"""Movement is not described but run: the operation itself, on ids, shows where channels go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.flow import Flow, Value, opaque, rule, uncut_like
from fxprune.graph import arguments, constant, op_name, value_of
from fxprune.labels import Label, compact, uncut
from fxprune.rules.contraction import channel_ids


def run_on_ids(flow: Flow, node: Node) -> Any:
    """Run the node's own operation with ids in place of tensors and numbers in place of sizes."""

    def stand_in(n: Node) -> Any:
        label = flow.of(n)
        return value_of(n) if label is None else label.expanded()

    args, kwargs = map_arg(node.args, stand_in), map_arg(node.kwargs, stand_in)
    if node.op == "call_module":
        return flow.traced.module(node)(*args, **kwargs)
    if node.op == "call_method":
        target = "reshape" if node.target == "view" else str(node.target)
        return getattr(args[0], target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


@rule("view", "reshape", "flatten", "unflatten", "ravel", "permute", "transpose", "movedim", "t")
@rule("unsqueeze", "squeeze", "expand", "repeat", "tile", "broadcast_to", "numpy_T", "adjoint")
@rule(nn.Flatten, nn.Unflatten)
def move(flow: Flow, node: Node) -> Value:
    """Operations that only rearrange elements: run them on the ids and read the result."""
    if all(label.uncut for label in flow.inputs(node)):
        return uncut_like(value_of(node))
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
    order = ("dim", "start", "length") if name == "narrow" else ("parts", "dim")
    args = arguments(node, "input", *order)
    axis = constant(args.get("dim", 0)) % len(x.shape)
    parts = args["parts"] or args["sections"] or args["indices_or_sections"]
    if name == "tensor_split" and not isinstance(constant(parts), int):
        flow.ledger.complete(x, [axis], node, "`tensor_split` at given indices")
    elif merged(x, axis):
        flow.ledger.complete(x, [axis], node, "a part of an axis that holds positions too")
    return _all_stay(flow, move(flow, node))


def merged(x: Label, axis: int) -> bool:
    """Whether an axis holds positions (or a batch) beside channels: its length is then not fixed."""
    if x.ids.shape[axis] == 1:
        return False
    rows = x.ids.movedim(axis, 0).reshape(x.ids.shape[axis], -1)
    return (axis == 0 and len(x.shape) > 2) or len(torch.unique(rows, dim=0)) < len(rows)


def _all_stay(flow: Flow, value: Value) -> Value:
    """Of every part, at least one channel must stay."""
    labels = [v for v in pytree.tree_leaves(value) if isinstance(v, Label)]
    for label in labels:  # guard: no empty part -> tests/test_groups.py -k piece
        if not label.uncut:
            flow.ledger.pieces.append(label.ids.flatten())
    return value


@rule("unbind", "select")
def single(flow: Flow, node: Node) -> Value:
    """Taking single entries of an axis needs the axis whole."""
    x = flow.first(node)
    axis = constant(arguments(node, "input", "dim").get("dim", 0)) % len(x.shape)
    if flow.ledger.complete(x, [axis], node, f"`{op_name(node)}` picks single channels").uncut:
        return uncut_like(value_of(node))
    return move(flow, node)


@rule("getitem")
def getitem(flow: Flow, node: Node) -> Value:
    """x[...]: slices of step 1 are rewritten, single indices need their axis whole."""
    source, index = node.args
    value = flow.labels.get(source)  # type: ignore[arg-type]
    if isinstance(value, tuple | list):
        return value[index] if isinstance(index, int | slice) else None
    x = flow.of(source)
    if x is None:
        return None
    steps = index_steps(constant(index), len(x.shape))
    if steps is None:
        return opaque(flow, node, "an index that is itself a tensor or list")
    broken = [
        d
        for d, step in steps.items()
        if isinstance(step, int) or step.step not in (None, 1) or (_shortens(step) and merged(x, d))
    ]
    if flow.ledger.complete(x, broken, node, "single channels are picked by index").uncut:
        return uncut_like(value_of(node))
    result = move(flow, node)
    return _all_stay(flow, result) if any(_shortens(s) for s in steps.values()) else result


def _shortens(step: Any) -> bool:
    return isinstance(step, slice) and (step.start, step.stop) != (None, None)


def index_steps(index: Any, rank: int) -> dict[int, Any] | None:
    """What an index does to each axis: {axis: int or slice}; None for tensors, lists and masks."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(i, int | slice | type(None) | type(Ellipsis)) for i in items) or any(
        isinstance(i, bool) for i in items
    ):
        return None
    real = sum(i is not None and i is not Ellipsis for i in items)
    steps, axis = {}, 0
    for item in items:
        if item is Ellipsis:
            axis += rank - real
        elif item is not None:
            steps[axis] = item
            axis += 1
    return steps


@rule("cat", "stack")
def concatenate(flow: Flow, node: Node) -> Value:
    """Labels side by side; the compact ids are joined, never the full ones."""
    given = arguments(node, "tensors", "dim")
    labels = [flow.of(n) for n in given["tensors"]] if isinstance(given["tensors"], list | tuple) else None  # fmt: skip
    out = value_of(node)
    if labels is None or any(label is None for label in labels):
        return opaque(flow, node, "a concatenation of a computed list")
    parts = [label for label in labels if label is not None]
    dim = given.get("dim", given.get("axis", 0)) % len(out.shape)
    ids = [label.ids for label in parts]
    if op_name(node) == "cat":
        ids = [i.narrow(dim, 0, 1).expand(_with(i, dim, p.shape[dim])) if i.shape[dim] == 1 else i
               for i, p in zip(ids, parts, strict=True)]  # fmt: skip
    sizes = [max(i.shape[d] for i in ids) for d in range(ids[0].dim())]
    wide = [i.expand([i.shape[d] if op_name(node) == "cat" and d == dim else n
                      for d, n in enumerate(sizes)]) for i in ids]  # fmt: skip
    joined = torch.cat(wide, dim) if op_name(node) == "cat" else torch.stack(wide, dim)
    return Label(tuple(out.shape), compact(joined))


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
    return _all_stay(flow, label) if min(before, after) < 0 else label


def _ones(x: Label) -> list[int]:
    return [d for d, n in enumerate(x.shape) if n == 1 and d > 0]


def pad_amounts(amounts: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """F.pad's list, last axis first, as (before, after) per axis."""
    pairs = [(0, 0)] * rank
    for i in range(len(amounts) // 2):
        pairs[rank - 1 - i] = (int(amounts[2 * i]), int(amounts[2 * i + 1]))
    return pairs


@rule("channel_shuffle", nn.ChannelShuffle)
def channel_shuffle(flow: Flow, node: Node) -> Value:
    """The same positions of every group are cut, so that the shuffle still fits."""
    x = flow.first(node)
    if node.op == "call_module":
        module = flow.traced.module(node)
        assert isinstance(module, nn.ChannelShuffle)
        groups = module.groups
    else:
        groups = arguments(node, "input", "groups")["groups"]
    ids = channel_ids(flow, node, x, 1)
    if groups > 1:  # guard: shuffles stay rectangles -> tests/test_law.py -k shuffle_module
        flow.ledger.couple_along(ids.view(groups, -1), [0], node, "of a channel shuffle")
    return move(flow, node)


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
