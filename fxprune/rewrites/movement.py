"""Parts of an axis: bounds, piece lengths and paddings follow the cut."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.graph import arguments, constant, first_argument
from fxprune.labels import Label
from fxprune.rewrites.base import Cut, rewrite
from fxprune.rules.movement import pad_amounts


@rewrite("chunk", "split", "split_with_sizes", "tensor_split")
def split(cut: Cut, node: Node) -> Any:
    """chunk / split / tensor_split: pieces keep what is left of them."""
    source = cut.label(first_argument(node))
    if source is None:
        return None
    dim = constant(arguments(node, "input", "sections", "dim").get("dim", 0))
    axis = dim % len(source.shape)
    if not cut.is_cut(source, axis):
        return None
    parts = [v for v in pytree.tree_leaves(cut.analysis.flow.labels[node]) if isinstance(v, Label)]
    sizes = [cut.sizes(part)[axis] for part in parts]
    return cut.call(torch.split, cut.new(first_argument(node)), sizes, dim)


@rewrite("narrow")
def narrow(cut: Cut, node: Node) -> Any:
    """A part of an axis by start and length."""
    source = cut.label(first_argument(node))
    args = arguments(node, "input", "dim", "start", "length")
    if source is None:
        return None
    axis = constant(args["dim"]) % len(source.shape)
    if not cut.is_cut(source, axis):
        return None
    kept = cut.kept(source, axis)
    start, length = constant(args["start"]), constant(args["length"])
    start += len(kept) if start < 0 else 0
    first = int(kept[:start].sum())
    return cut.call(
        torch.narrow,
        cut.new(first_argument(node)),
        constant(args["dim"]),
        first,
        int(kept[start : start + length].sum()),
    )


@rewrite("pad")
def pad(cut: Cut, node: Node) -> Any:
    """Channels padded onto channels: as many as are kept of them."""
    args = arguments(node, "input", "pad", "mode", "value")
    label, source = cut.label(node), cut.label(args["input"])
    if label is None or source is None or not (cut.is_cut(label) or cut.is_cut(source)):
        return None
    written = list(args["pad"])
    amounts = pad_amounts(constant(written), len(label.shape))
    changed = [cut.new(w) for w in written]
    for axis, (before, after) in enumerate(amounts):
        if (before, after) == (0, 0) or axis not in source.varying:
            continue
        kept, inner = cut.kept(label, axis), cut.kept(source, axis)
        at = 2 * (len(label.shape) - 1 - axis)
        changed[at] = int(kept[:before].sum()) if before >= 0 else -int(inner[:-before].sum())
        changed[at + 1] = (
            int(kept[len(kept) - after :].sum()) if after >= 0 else -int(inner[after:].sum())
        )
    return cut.call(
        torch.nn.functional.pad,
        cut.new(args["input"]),
        changed,
        args.get("mode", "constant"),
        cut.new(args["value"]),
    )


@rewrite("squeeze")
def squeeze(cut: Cut, node: Node) -> Any:
    """A channel axis that was longer than 1 is not squeezed away when one channel is left."""
    label = cut.label(first_argument(node))
    if label is None or not cut.is_cut(label):
        return None
    given = arguments(node, "input", "dim")["dim"]
    rank = len(label.shape)
    dims = range(rank) if given is None else [given] if isinstance(given, int) else given
    safe = tuple(d % rank for d in dims if not cut.is_cut(label, d % rank))
    return cut.call(torch.squeeze, cut.new(first_argument(node)), safe)
