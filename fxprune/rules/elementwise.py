"""Elementwise operations couple ids position by position, after broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.flow import RULES, Flow, Value, opaque, rule, rule_where
from fxprune.graph import op_name, value_of
from fxprune.labels import Label, Part, uncut

_POINTWISE = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "stochastic_depth", "relu6", "selu", "celu", "silu", "mish",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "tanhshrink", "logsigmoid",
    "contiguous", "to", "float", "double", "half", "bfloat16", "type", "type_as", "clone", "detach",
    "cpu", "cuda", "requires_grad", "identity", "expand_as", "masked_fill", "where", "pos", "copy",
    "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "empty_like", "bernoulli",
}  # fmt: skip


@lru_cache(maxsize=4096)
def is_pointwise(name: str) -> bool:
    """Whether torch itself tags the operation as pointwise, or it is built of such."""
    if name in _POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None) if name else None
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


@rule_where(is_pointwise)
def elementwise(flow: Flow, node: Node) -> Value:
    """Full operands couple position by position; an operand of size 1 on an axis does not."""
    out = value_of(node)
    if not isinstance(out, Tensor):
        return opaque(flow, node, "an elementwise operation with several results")
    labels = [label for n in tensor_args(node) if (label := flow.of(n)) is not None]
    if len(labels) == 1 and labels[0].shape == tuple(out.shape):
        return labels[0]
    result = join(flow, node, labels, tuple(out.shape))
    met = sum(not label.uncut for label in labels)
    if op_name(node) in ("add", "sub") and met > 1:
        flow.ledger.residual.append(result.ids.flatten())
    return result


def tensor_args(node: Node) -> list[Node]:
    """The nodes whose channels meet in an elementwise operation."""
    if op_name(node) in ("type_as", "to"):
        return list(node.all_input_nodes[:1])
    return [n for n in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(n, Node)]


def join(flow: Flow, node: Node, labels: Sequence[Label], shape: tuple[int, ...]) -> Label:
    """Couple the labels of operands that broadcast to `shape`.

    The result has the ids of the operand with most of them. What another operand has along other
    axes becomes one (or stays); where it is full and cannot be cut, neither can the result.
    """
    aligned = [_align(label, len(shape)) for label in labels]
    varying = sorted({d for label in aligned for d in label.varying})
    if not varying:
        return _constant(flow, node, aligned, shape)
    joint = max((label.varying for label in aligned), key=len)
    aligned = [_bound(flow, node, label, varying, joint) for label in aligned]
    first = max(range(len(aligned)), key=lambda i: aligned[i].ids.numel())
    leader = aligned[first]
    ids = leader.ids
    for i, other in enumerate(aligned):
        if i != first:  # guard: elementwise -> tests/test_groups.py -k residual
            ids = _meet(flow, node, ids, leader, other)
    return Label(shape, ids)


def _bound(
    flow: Flow, node: Node, label: Label, varying: Sequence[int], joint: Sequence[int]
) -> Label:
    """A parameter's ids where it meets channels.

    joint: the axes (heads, dimensions) along which channels vary together. What serves all heads
    alike is left whole, so that they can be cut whole; or is cut, where they lose dimensions.
    """
    axes = [d for d in varying if label.shape[d] > 1]
    if label.parts and len(joint) > 1:
        if flow.ledger.by_head_dims:
            axes = [d for d in axes if d != joint[0]]
        elif joint[0] not in axes:
            axes = []
    return flow.bind(node, label, axes)


def _meet(flow: Flow, node: Node, ids: Tensor, leader: Label, other: Label) -> Tensor:
    """Couple what one operand has with the ids of the leading one; returns what these become."""
    why = "it meets a tensor whose channels cannot be cut"
    extra = [d for d in other.varying if leader.ids.shape[d] == 1]
    if extra:
        other = flow.ledger.complete(other, extra, node, "it meets channels along another axis")
    common = other.varying
    full = [d for d in leader.varying if other.shape[d] > 1 and d not in common]
    if common:
        flow.ledger.couple(ids, other.ids, node, why)
        return ids
    if not full:
        if not other.uncut and any(leader.shape[d] > 1 for d in leader.varying):
            flow.ledger.freeze(other.ids, node, "its one channel is broadcast over many")
        return ids
    if full == leader.varying:
        flow.ledger.couple(ids, other.ids, node, why)
        return ids
    flow.ledger.couple_along(ids, full, node, why)
    return ids


def _constant(flow: Flow, node: Node, labels: Sequence[Label], shape: tuple[int, ...]) -> Label:
    """Nothing varies: one channel each, or tensors made of parameters, which keep what they are."""
    single = [a for a in labels if not a.uncut]
    for other in single[1:]:
        flow.ledger.couple(single[0].ids, other.ids, node)
    if single:
        return Label(shape, single[0].ids)
    return Label(shape, uncut(shape).ids, merged_parts(labels, shape))


def merged_parts(labels: Sequence[Label], shape: Sequence[int]) -> tuple[Part, ...]:
    """Dimensions of parameters that survive in a tensor computed of them, position by position.

    Along an axis where another operand is full and no parameter, nothing can be cut.
    """
    kept: list[Part] = []
    for label in labels:
        for part in label.parts:
            axes = [d for d, n in enumerate(part.index.shape) if n > 1]
            others = [o for o in labels if o is not label and any(o.shape[d] > 1 for d in axes)]
            if all(any(p.index.shape[d] > 1 for p in o.parts for d in axes) for o in others):
                kept.append(part)
    return tuple(kept)


def _align(label: Label, rank: int) -> Label:
    """Leading axes of size 1, as broadcasting adds them."""
    lead = rank - len(label.shape)
    if lead <= 0:
        return label
    new = (None,) * lead
    parts = tuple(Part(p.tensor, p.dim, p.index[new]) for p in label.parts)
    return Label((1,) * lead + label.shape, label.ids[new], parts)


for _kind in (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink,
    nn.LogSigmoid, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.RReLU, nn.Identity, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
):  # fmt: skip
    RULES[_kind] = elementwise


rule(
    "torchvision.ops.stochastic_depth.StochasticDepth",
    "timm.layers.drop.DropPath",
    "timm.layers.drop.DropBlock2d",
)(elementwise)
