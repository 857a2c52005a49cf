"""Products of two activations: attention, einsum, bmm. Heads are cut whole.

Axes of a product are named by letters, as in einsum: batch letters are in both operands and in the
result, contracted ones in both operands only, free ones in one operand and in the result.

* Along batch letters (heads) both operands live or die together, whole: what an operand has along
  its other axes becomes one. Nothing else is needed: what a lost head computes is read by nobody.
* Contracted ids are coupled. A cut term of the sum must be zero in the masked network: one factor's
  producers are zeroed there (their slices get the role "in"), which needs that whatever lies
  between producer and product maps zero to zero.
* Free ids pass into the result. Ids of one kind only: where a result would have two, the fewer stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.graph import arguments, constant, op_name
from fxprune.labels import Label, MacTerm, Slot, uncut
from fxprune.rules.elementwise import join
from fxprune.rules.zeros import zeroed_at


@dataclass(frozen=True)
class Operand:
    """One factor: the node that computes it (if one does), its label, one letter per axis."""

    node: Any
    label: Label
    letters: str

    def axes(self, letters: str) -> list[int]:
        """The axes that carry these letters."""
        return [d for d, c in enumerate(self.letters) if c in letters]

    def varies(self, letters: str) -> bool:
        """Whether it has different ids along any of these letters."""
        return any(d in self.label.varying for d in self.axes(letters))

    def ids(self, letters: str) -> Tensor:
        """Ids along `letters`, in that order, of size 1 where it has none; it varies along no other."""
        ids = self.label.ids
        order = [self.letters.index(c) for c in letters if c in self.letters]
        others = [d for d in range(ids.dim()) if d not in order]
        for d in others:
            ids = ids.narrow(d, 0, 1)
        ids = ids.permute(*order, *others).flatten(len(order)).squeeze(-1) if others else ids.permute(order)  # fmt: skip
        for d, c in enumerate(letters):
            if c not in self.letters:
                ids = ids.unsqueeze(d)
        return ids

    def with_ids(self, ids: Tensor) -> Operand:
        """The same factor with other ids."""
        return replace(self, label=Label(self.label.shape, ids))


def product(flow: Flow, node: Node, a: Operand, b: Operand, result: str) -> Label:
    """The label of a product of two tensors whose axes are named; see the module."""
    both = "".join(c for c in a.letters if c in b.letters)
    batch = "".join(c for c in both if c in result)
    contracted = "".join(c for c in both if c not in result)
    sizes = _sizes(a, b)
    if node not in flow.computed:
        return _of_constants(flow, node, a, b, result, sizes)
    a, b = (_sum_alone(flow, node, x, both + result) for x in (a, b))
    found: list[Tensor] = []  # ids that multiply the cost and may pass into the result
    makes: Tensor | None = None  # new channels, of a factor made of parameters
    for x, other in ((a, b), (b, a)):
        if x.label.parts:
            bound, makes = _weight(flow, node, x, other, batch, contracted, result)
            a, b = (bound, b) if x is a else (a, bound)
    whole = _whole_heads(flow, node, a, b, batch), _whole_heads(flow, node, b, a, batch)
    a, b = whole
    heads = _meet(flow, node, a, b, batch, sizes)
    summed = _contract(flow, node, a, b, contracted)
    free = [x.ids(result) for x in (a, b) if x.varies("".join(c for c in result if c not in batch))]
    free += [makes] if makes is not None else []
    if heads is not None:
        free.append(_placed(heads, batch, result))
    ids = _one_kind(flow, node, free, result)
    found = [t for t in (summed, ids) if t is not None and t.numel() > 1]
    share = math.prod(sizes.values()) / flow.traced.batch / math.prod(t.numel() for t in found)
    flow.ledger.macs.append(MacTerm(node.name, share, tuple(found)))
    return Label(tuple(sizes[c] for c in result), ids)


def _sizes(*operands: Operand) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for x in operands:
        for c, n in zip(x.letters, x.label.shape, strict=True):
            sizes[c] = max(sizes.get(c, 1), n)
    return sizes


def _of_constants(
    flow: Flow, node: Node, a: Operand, b: Operand, result: str, sizes: dict[str, int]
) -> Label:
    """A product of parameters and constants: dimensions pass that no sum runs over."""
    total = math.prod(sizes.values()) / flow.traced.batch
    flow.ledger.macs.append(MacTerm(node.name, total, ()))
    parts = []
    for x, other in ((a, b), (b, a)):
        for part in x.label.parts:
            index = x.with_ids(part.index)
            varied = [c for c, n in zip(x.letters, part.index.shape, strict=True) if n > 1]
            if all(c in result and c not in other.letters for c in varied):
                parts.append(replace(part, index=index.ids(result)))
    shape = tuple(sizes[c] for c in result)
    return Label(shape, uncut(shape).ids, tuple(parts))


def _placed(ids: Tensor, letters: str, result: str) -> Tensor:
    """Ids along some letters, arranged for the axes of the result."""
    ids = ids.permute([letters.index(c) for c in result if c in letters])
    for d, c in enumerate(result):
        if c not in letters:
            ids = ids.unsqueeze(d)
    return ids


def _sum_alone(flow: Flow, node: Node, x: Operand, known: str) -> Operand:
    """Letters of one operand alone that are summed away need their axes whole."""
    axes = [d for d, c in enumerate(x.letters) if c not in known and d in x.label.varying]
    if not axes:
        return x
    return replace(x, label=flow.ledger.complete(x.label, axes, node, "a sum over the channels"))


def _weight(
    flow: Flow, node: Node, x: Operand, other: Operand, batch: str, contracted: str, result: str
) -> tuple[Operand, Tensor | None]:
    """A factor made of parameters: ids where it meets channels, and those that it makes itself.

    Along batch letters it is one parameter per head; else it is a linear map, whose contracted
    dimension is read and whose own free dimension makes channels.
    """
    if other.varies(batch):
        axes = x.axes("".join(c for c in batch if other.varies(c)))
        bound = flow.bind(node, x.label, axes)
        flow.ledger.experts.append(bound.ids.flatten())
        return replace(x, label=bound), None
    makes = None
    own = [d for d in x.axes(result) if x.letters[d] not in other.letters and x.label.shape[d] > 1]
    elsewhere = "".join(c for c in other.letters if c in result)
    if own and contracted and not other.varies(elsewhere):
        made = flow.bind(node, x.label, own[-1:], producer=True)
        makes = replace(x, label=made).ids(result) if not made.uncut else None
    axes = x.axes("".join(c for c in contracted if other.varies(c)))
    bound = flow.bind(node, x.label, axes, role="in") if axes else Label(x.label.shape, uncut(x.label.shape).ids)  # fmt: skip
    return replace(x, label=bound), makes


def _whole_heads(flow: Flow, node: Node, x: Operand, other: Operand, batch: str) -> Operand:
    """What varies along batch letters is cut by whole entries of these.

    But by equal parts of all heads, where the other operand has heads that cannot be cut.
    """
    heads = [d for d in x.axes(batch) if d in x.label.varying]
    if not heads:
        return x
    beside = [d for d in x.label.varying if d not in heads]
    stay = flow.ledger.by_head_dims or all(_whole(other, x.letters[d]) for d in heads)
    if beside and stay:
        ids = flow.ledger.couple_along(x.label.ids, heads, node, "the heads that it meets stay")
        flow.ledger.head_dims.append(ids.flatten())
        return x.with_ids(ids)
    ids = flow.ledger.couple_along(x.label.ids, beside, node, "of one head")
    flow.ledger.heads.append(ids.flatten())
    return x.with_ids(ids)


def _whole(x: Operand, letter: str) -> bool:
    """Whether an operand has several entries of an axis, all of which must stay."""
    d = x.letters.index(letter)
    return x.label.shape[d] > 1 and d not in x.label.varying


def _meet(
    flow: Flow, node: Node, a: Operand, b: Operand, batch: str, sizes: dict[str, int]
) -> Tensor | None:
    """Couple both operands along batch letters; None where nothing varies there."""
    if not (a.varies(batch) or b.varies(batch)):
        return None
    labels = [
        Label(
            tuple(x.label.shape[x.letters.index(c)] for c in batch),
            x.ids(batch) if x.varies(batch) else uncut([1] * len(batch)).ids,
        )
        for x in (a, b)
    ]
    ids = join(flow, node, labels, tuple(sizes[c] for c in batch)).ids
    return ids if ids.numel() > 1 else None


def _contract(flow: Flow, node: Node, a: Operand, b: Operand, letters: str) -> Tensor | None:
    """Couple what both operands have along the letters that are summed, and zero one of them."""
    ids = []
    for x in (a, b):
        if x.varies(letters):
            beside = [d for d in x.label.varying if x.letters[d] not in letters]
            x = x.with_ids(flow.ledger.couple_along(x.label.ids, beside, node, "of one sum"))
            ids.append(x.ids(letters))
    if not ids:
        return None
    if len(ids) == 1:
        flow.ledger.freeze(ids[0], node, "it is summed with a tensor that cannot be cut")
        return None
    why = "it is summed with channels that cannot be cut"
    flow.ledger.couple(ids[0], ids[1], node, why)
    slots = _zeroed(flow, node, a)
    slots = _zeroed(flow, node, b) if slots is None else slots
    if slots is None:  # guard: zero stays zero -> tests/test_products.py -k zero
        why = "its cut terms would not be zero in the masked network"
        flow.ledger.freeze(torch.cat([i.flatten() for i in ids]), node, why)
        return None
    for slot in slots:
        slot.role = "in"
    return ids[0] if ids[0].numel() >= ids[1].numel() else ids[1]


def _zeroed(flow: Flow, node: Node, x: Operand) -> list[Slot] | None:
    """What to zero besides, for cut entries of a factor to be zero: nothing of a weight."""
    slots = zeroed_at(flow, x.node, node)
    saved = flow.ledger.saved
    unsaved = saved is not None and any(slot.tensor not in saved for slot in slots or ())
    if unsaved:  # guard: unsaved zero -> tests/test_reader_core.py -k name
        return None
    label = flow.of(x.node)
    return [] if slots is not None and label is not None and label.parts else slots


def _one_kind(flow: Flow, node: Node, kinds: Sequence[Tensor], result: str) -> Tensor:
    """The ids that pass into the result: the kind with most of them; the others stay."""
    if not kinds:
        return uncut([1] * len(result)).ids
    first = max(kinds, key=lambda t: t.numel())
    for other in kinds:
        if other is not first:
            flow.ledger.freeze(other, node, "a product keeps the channels of one factor only")
    return first


# Operations


def _letters(count: int, start: int = 0) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[start : start + count]


@rule("matmul", "bmm", "mm", "mv", "dot", "baddbmm", "addmm", "addbmm")
def matmul(flow: Flow, node: Node) -> Value:
    """a @ b with broadcast batch axes; what is added to the product meets its channels."""
    plus = op_name(node) in ("baddbmm", "addmm")
    if op_name(node) in ("addbmm", "mv", "dot"):
        return opaque(flow, node, f"fxprune has no rule for `{op_name(node)}`")
    args = arguments(node, *(("input", "a", "b") if plus else ("a", "b")))
    left = args["a"] if args["a"] is not None else args["input"]
    right = args["b"] if args["b"] is not None else args["other"] or args["mat2"]
    a, b = flow.of(left), flow.of(right)
    if a is None or b is None or min(len(a.shape), len(b.shape)) < 2:
        return opaque(flow, node, "a product of vectors")
    rank = max(len(a.shape), len(b.shape)) - 2
    batch = _letters(rank, 3)
    made = product(
        flow,
        node,
        Operand(left, a, batch[rank - len(a.shape) + 2 :] + "ac"),
        Operand(right, b, batch[rank - len(b.shape) + 2 :] + "cb"),
        batch + "ab",
    )
    if plus:
        added = flow.of(args["input"])
        assert added is not None
        return join(flow, node, [made, added], made.shape)
    return made


@rule("einsum")
def einsum(flow: Flow, node: Node) -> Value:
    """torch.einsum of one or two operands."""
    equation, *given = node.args
    operands = list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given
    labels = [flow.of(n) for n in operands]
    if not isinstance(equation, str) or any(label is None for label in labels):
        return opaque(flow, node, "an einsum whose equation is computed")
    terms, result = _equation(equation, [len(label.shape) for label in labels if label])
    plain = all(len(set(t)) == len(t) for t in [*terms, result])
    if len(operands) != 2 or not plain:
        return opaque(flow, node, f"an einsum `{equation}` of other than two plain operands")
    x, y = (
        Operand(n, label, t) for n, label, t in zip(operands, labels, terms, strict=True) if label
    )
    return product(flow, node, x, y, result)


def _equation(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of every operand and of the result; `...` gets capitals of its own."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    extra = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)]
    dots = [chr(0x3B1 + i) for i in range(max(extra, default=0))]  # no letter of an equation
    if not arrow:
        plain = sorted(c for c in set(left) - set(",.") if left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(plain)
    filled = [
        t.replace("...", "".join(dots[len(dots) - n :])) for t, n in zip(terms, extra, strict=True)
    ]
    return filled, right.replace("...", "".join(dots))


@rule("scaled_dot_product_attention")
def attention(flow: Flow, node: Node) -> Value:
    """softmax(q k^T * scale + mask) v, over the last two axes; heads are an axis before them."""
    args = arguments(
        node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )
    q, k, v = (flow.of(args[name]) for name in ("query", "key", "value"))
    assert q is not None
    assert k is not None
    assert v is not None
    if constant(args["enable_gqa"]):
        k, v = (_shared_heads(x, q.shape[-3]) for x in (k, v))
    batch = _letters(len(q.shape) - 2, 4)
    if len({len(x.shape) for x in (q, k, v)}) > 1:
        return opaque(flow, node, "an attention whose operands differ in rank")
    scores = product(
        flow,
        node,
        Operand(args["query"], q, batch + "ac"),
        Operand(args["key"], k, batch + "bc"),
        batch + "ab",
    )
    masked = flow.of(args["attn_mask"])
    if masked is not None:
        scores = join(flow, node, [scores, masked], scores.shape)
    last = len(scores.shape) - 1
    scores = flow.ledger.complete(scores, [last], node, "softmax runs over the channels")
    return product(
        flow,
        node,
        Operand(None, scores, batch + "ab"),
        Operand(args["value"], v, batch + "bd"),
        batch + "ad",
    )


def _shared_heads(x: Label, heads: int) -> Label:
    """Keys and values of grouped queries: each head serves several neighbouring queries."""
    times = heads // x.shape[-3]
    axis = len(x.shape) - 3
    ids = x.ids.repeat_interleave(times, axis) if x.ids.shape[axis] > 1 else x.ids
    return Label((*x.shape[:-3], heads, *x.shape[-2:]), ids)
