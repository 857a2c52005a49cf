"""Elementwise operations couple ids position by position, after broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.flow import RULES, Flow, Value, axis_ids, opaque, rule, rule_where
from fxprune.graph import function_name, op_name, value_of
from fxprune.labels import Label, uncut
from fxprune.modes import ModeCall

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
    if len(labels) == 1 and labels[0].shape == tuple(out.shape) and not labels[0].param:
        return labels[0]
    result = join(flow, node, labels, tuple(out.shape))
    if op_name(node) in ("add", "sub") and sum(not label.uncut for label in labels) > 1:
        flow.ledger.residual.append(result.ids.flatten())
    return result


def tensor_args(node: Node) -> list[Node]:
    """The nodes whose channels meet in an elementwise operation."""
    if op_name(node) in ("type_as", "to"):
        return list(node.all_input_nodes[:1])
    return [n for n in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(n, Node)]


def join(flow: Flow, node: Node, labels: Sequence[Label], shape: tuple[int, ...]) -> Label:
    """Couple the labels of operands that broadcast to `shape`."""
    aligned = [_align(label, len(shape)) for label in labels]
    varying = sorted({d for label in aligned for d in label.varying})
    aligned = [_on_axes(flow, node, label, varying, shape) for label in aligned]
    full: list[Label] = []
    for label in aligned:
        if label.ids.numel() == 1 and any(label.shape[d] == 1 < shape[d] for d in varying):
            flow.ledger.freeze(label.ids, node, "its one channel is broadcast over many")
        else:
            full.append(label)
    if not full or not varying:
        single = [a for a in aligned if not a.uncut]
        for other in single[1:]:
            flow.ledger.couple(single[0].ids, other.ids, node)
        return Label(shape, single[0].ids) if single else uncut(shape)
    leader = max(full, key=lambda label: label.ids.numel())
    for other in full:
        if other is not leader:  # guard: elementwise -> tests/test_groups.py -k residual
            flow.ledger.couple(
                leader.ids, other.ids, node, "it meets a tensor whose channels cannot be cut"
            )
    sizes = torch.broadcast_shapes(*(label.ids.shape for label in full))
    return Label(shape, leader.ids.expand(sizes))


def _align(label: Label, rank: int) -> Label:
    """Leading axes of size 1, as broadcasting adds them."""
    lead = rank - len(label.shape)
    if lead <= 0:
        return label
    return Label((1,) * lead + label.shape, label.ids[(None,) * lead], label.param)


def _on_axes(
    flow: Flow, node: Node, label: Label, varying: Sequence[int], shape: tuple[int, ...]
) -> Label:
    """A parameter of several axes takes ids along the one axis on which the activation has them."""
    axes = [d for d in varying if label.shape[d] > 1]
    if label.param is None or len(axes) != 1:
        return label
    t = flow.ledger.tensors.tensor[label.param]
    flow.ledger.claimed.add((label.param, node))
    own = axes[0] - (len(shape) - t.dim())
    ids = axis_ids(flow, label.param, t, own, node)
    return _align(Label(tuple(t.shape), ids), len(shape))


for _kind in (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink,
    nn.LogSigmoid, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.RReLU, nn.Identity, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
):  # fmt: skip
    RULES[_kind] = elementwise


@rule(ModeCall)
def mode_call(flow: Flow, node: Node) -> Value:
    """A function that an earlier trace made into a module, since its arguments follow the mode."""
    module = flow.traced.module(node)
    assert isinstance(module, ModeCall)
    name = function_name(module.function)
    if name in ("batch_norm", "instance_norm"):
        return RULES[name](flow, node)
    if is_pointwise(name):
        return elementwise(flow, node)
    return opaque(flow, node, f"`{name}` differs between the modes")


rule("torchvision.ops.stochastic_depth.StochasticDepth")(elementwise)
