"""Does zero stay zero? Which tensors to zero so that cut entries of an activation are zero.

Cut terms of a sum over two activations (a query times a key) must vanish in the masked network.
They do if the layers that make one factor are zeroed in their cut rows, and all that lies between
maps zero to zero.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.flow import Flow, leaves, writers
from fxprune.graph import arguments, constant, first_argument, op_name
from fxprune.labels import Slot
from fxprune.rules.norms import zeroable

KEEPS_ZERO = {
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish",
    "tanh", "hardtanh", "softsign", "tanhshrink", "hardshrink", "softshrink", "prelu", "abs", "neg",
    "sin", "sinh", "asinh", "atan", "sqrt", "square", "sign", "round", "floor", "ceil", "dropout",
    "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type_as", "type",
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "t", "squeeze",
    "unsqueeze", "expand", "repeat", "tile", "broadcast_to", "getitem", "chunk", "split", "unbind",
    "select", "narrow", "split_with_sizes", "tensor_split", "roll", "flip", "pixel_shuffle",
    "pixel_unshuffle", "index_select", "repeat_interleave", "unfold", "mean", "sum", "normalize",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate", "div", "pad",
}  # fmt: skip
KEEP_ZERO = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Tanh,
    nn.Hardswish, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d,
)  # fmt: skip


_INFINITE = {"rsqrt", "reciprocal", "log", "log2", "log10"}  # at zero


def zeroed_at(flow: Flow, node: Any, reader: Node | None = None) -> list[Slot] | None:
    """The slots whose cut entries, set to zero, make those of a node zero; None where none do.

    reader: the node that reads it; what is written into it in place before that counts, too.
    """
    if not isinstance(node, Node):
        return None
    changed = any(not _keeps_zero(flow, writer) for writer in writers(flow, node, reader))
    if changed:  # guard: written -> tests/test_reader_core.py -k written
        return None
    if node.op == "get_attr":
        name = flow.ledger.tensors.name(flow.traced.attribute(node))
        return [s for s in flow.ledger.slots.values() if s.tensor == name]
    if node.op == "call_module":
        return _of_module(flow, node)
    name = op_name(node)
    if name == "mul":
        return _of_product(flow, node)
    if name in ("add", "sub", "cat", "stack"):
        return _all_of(flow, node)
    if name == "linear" or name.startswith("conv"):
        args = arguments(node, "input", "weight", "bias")
        return _made_by(flow, args["weight"], args["bias"], "transpose" in name)
    if name in ("layer_norm", "group_norm", "rms_norm", "batch_norm"):
        return _normalised(flow, node)
    return zeroed_at(flow, first_argument(node), node) if _keeps_zero(flow, node) else None


def _keeps_zero(flow: Flow, node: Node) -> bool:
    """Whether an operation on one tensor gives zero where that is zero."""
    name = op_name(node)
    if node.op == "call_module":
        return isinstance(flow.traced.module(node), KEEP_ZERO)
    if name == "mul":
        return True
    if name == "pad":
        return not constant(arguments(node, "input", "pad", "mode", "value")["value"])
    if name == "hardtanh":
        args = arguments(node, "input", "min_val", "max_val")
        return bool(args.get("min_val", -1) <= 0 <= args.get("max_val", 1))
    if name == "div":
        divisor = flow.of(arguments(node, "input", "other")["other"])
        return divisor is None or divisor.uncut
    return name in KEEPS_ZERO


def _has_channels(flow: Flow, node: Node) -> bool:
    return any(not label.uncut or label.parts for label in leaves(flow.labels.get(node)))


def _of_product(flow: Flow, node: Node) -> list[Slot] | None:
    """A product is zero where a factor is, if all others are finite there."""
    factors = [n for n in node.all_input_nodes if _has_channels(flow, n)]
    for n in factors:
        slots = _scale(flow, node, n) if _made_of_parameters(flow, n) else zeroed_at(flow, n, node)
        finite = not any(_infinite(flow, other) for other in factors if other is not n)
        if slots is not None and finite:  # guard: finite -> tests/test_reader_core.py -k finite
            return slots
    return None


def _made_of_parameters(flow: Flow, node: Node) -> bool:
    label = flow.of(node)
    return label is not None and bool(label.parts)


def _scale(flow: Flow, node: Node, factor: Node) -> list[Slot] | None:
    """A factor made of parameters: the dimensions that have the channels of this product."""
    label, ledger = flow.of(factor), flow.ledger
    if label is None or zeroed_at(flow, factor, node) is None:
        return None
    keys = sorted({p.key for p in label.parts if (*p.key, node) in ledger.claimed})
    usable = keys and all(key in ledger.slots for key in keys)
    if not usable:  # guard: scales -> tests/test_reader_core.py -k scale
        return None
    return [ledger.slots[key] for key in keys]


def _infinite(flow: Flow, node: Any) -> bool:
    """Whether a factor may be infinite where what it is computed of is zero."""
    while isinstance(node, Node) and node.op.startswith("call_") and _has_channels(flow, node):
        name, args = op_name(node), arguments(node, "input", "other")
        divisor = flow.of(args["other"]) if name == "div" else None
        exponent = args.values.get("exponent", args["other"]) if name == "pow" else 1
        unknown = not isinstance(exponent, int | float) or exponent < 0
        if name in _INFINITE or unknown or not (divisor is None or divisor.uncut):
            return True
        if name in ("matmul", "linear", "add") or node.op == "call_module":
            return False
        node = first_argument(node)
    return False


def _all_of(flow: Flow, node: Node) -> list[Slot] | None:
    """A sum or concatenation is zero where all of its tensors are; numbers added are not."""
    sums = op_name(node) in ("add", "sub")
    args = arguments(node, "input", "other") if sums else arguments(node, "tensors")
    given = [args["input"], args["other"]] if sums else pytree.tree_leaves(args["tensors"])
    if any(not isinstance(v, Node) for v in given):
        return None
    slots: list[Slot] = []
    for n in given:
        if sums or _has_channels(flow, n):
            own = zeroed_at(flow, n, node)
            if own is None:
                return None
            slots += own
    return slots


def _of_module(flow: Flow, node: Node) -> list[Slot] | None:
    module = flow.traced.module(node)
    slots = flow.ledger.slots
    name = flow.ledger.tensors.name
    weight, bias = (name(module._parameters.get(own)) for own in ("weight", "bias"))
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        dim = 1 if getattr(module, "transposed", False) else 0
        return _slots_at(slots, [(weight, dim), (bias, 0)])
    if zeroable(module):
        return _slots_at(slots, [(weight, 0), (bias, 0)])
    return zeroed_at(flow, first_argument(node), node) if _keeps_zero(flow, node) else None


def _slots_at(
    slots: dict[tuple[str, int], Slot], keys: list[tuple[str | None, int]]
) -> list[Slot] | None:
    """The weight's slot, which must be there, and the bias' if it has one."""
    (weight, dim), bias = keys[0], keys[1][0]
    if weight is None or (weight, dim) not in slots:
        return None
    if bias is not None and (bias, 0) not in slots:
        return None
    return [slots[weight, dim], *([slots[bias, 0]] if bias else [])]


def _made_by(flow: Flow, weight: Any, bias: Any, transposed: bool = False) -> list[Slot] | None:
    """A functional layer whose weight (and bias) are parameters."""
    names: list[str | None] = []
    for n in (weight, bias):
        if n is not None and not (isinstance(n, Node) and n.op == "get_attr"):
            return None
        names.append(None if n is None else flow.ledger.tensors.name(flow.traced.attribute(n)))
    return _slots_at(flow.ledger.slots, [(names[0], int(transposed)), (names[1], 0)])


def _normalised(flow: Flow, node: Node) -> list[Slot] | None:
    """A functional norm with a weight and bias of its own."""
    order = {
        "layer_norm": ("input", "normalized_shape", "weight", "bias"),
        "rms_norm": ("input", "normalized_shape", "weight"),
        "group_norm": ("input", "num_groups", "weight", "bias"),
        "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    }[op_name(node)]
    args = arguments(node, *order)
    return None if args["weight"] is None else _made_by(flow, args["weight"], args["bias"])
