"""Contractions: convolutions and linears end one set of ids and start another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.graph import arguments, constant, op_name, value_of
from fxprune.labels import Label, Ledger, MacTerm


def channel_ids(flow: Flow, node: Node, x: Label, axis: int) -> Tensor:
    """One id per index of `axis`, int64 [x.shape[axis]]; ids along other axes are coupled to it."""
    axis %= len(x.shape)
    x = flow.bind(node, x, [axis])
    ids = flow.ledger.couple_along(
        x.ids, [d for d in x.varying if d != axis], node, "part of its channels cannot be cut"
    )
    return ids.flatten().expand(x.shape[axis])


@dataclass(frozen=True)
class Weight:
    """A convolution or linear: its weight's name and shape, bias, groups, and the axes it uses."""

    name: str
    shape: tuple[int, ...]
    bias: str | None
    groups: int = 1
    transposed: bool = False


def contract(flow: Flow, node: Node, x: Label, w: Weight, axis: int) -> Label:
    """y = W x along `axis`: the ids of x end in W's input dimension, new ids leave its output.

    A grouped convolution is cut either by whole groups (input and output channels of a group live
    or die together) or by the same positions in every group; whichever leaves more choice.
    """
    out = value_of(node)
    ledger = flow.ledger
    axis %= len(x.shape)
    if x.varying and axis not in x.varying:
        return _along_another_axis(flow, node, x, w, axis)
    columns = channel_ids(flow, node, x, axis)
    n_in, n_out = len(columns), out.shape[axis]
    dim_out, dim_in = (1, 0) if w.transposed else (0, 1)
    blocks_in, blocks_out = (1, w.groups) if w.transposed else (w.groups, 1)
    if w.groups > 1 and _by_whole_groups(ledger, w, columns, n_in, n_out):
        rows = _whole_groups(flow, node, w, columns, n_out)
    else:
        known = ledger.slots.get((w.name, dim_out))
        rows = known.ids if known else ledger.fresh(n_out)
        rows = ledger.slot(w.name, dim_out, "out", rows, node, blocks=blocks_out, producer=True)
        columns = ledger.slot(w.name, dim_in, "in", columns, node, blocks=blocks_in)
        if w.groups > 1:
            for ids in (columns, rows):  # guard: same positions -> tests/test_law.py -k grouped
                ledger.couple_along(ids.view(w.groups, -1), [0], node, "of a grouped convolution")
    if w.bias is not None:
        ledger.slot(w.bias, 0, "out", rows, node)
    ledger.claimed.update((t, d, node) for t in (w.name, w.bias) for d in (0, 1) if t)
    _count(flow, node, x, w, n_in, n_out)
    shape = [1] * len(out.shape)
    shape[axis] = n_out
    return Label(tuple(out.shape), rows.view(shape))


def _along_another_axis(flow: Flow, node: Node, x: Label, w: Weight, axis: int) -> Label:
    """A map over positions: channels on other axes pass, the map itself stays whole.

    Positions that a convolution mixes beside `axis` must not carry channels.
    """
    out = value_of(node)
    why = "its input has channels along another axis"
    mixed = [d for d in range(axis + 1, len(x.shape)) if w.shape[2:]]
    kept = flow.ledger.complete(x, mixed, node, why)
    for name in (w.name, w.bias):
        if name is not None:
            flow.ledger.whole.setdefault(name, (node, why))
    if kept.varying and w.groups == 1:
        share = out.numel() * w.shape[1] * math.prod(w.shape[2:]) / kept.ids.numel()
        if w.transposed:
            share = math.prod(x.shape) * w.shape[1] * math.prod(w.shape[2:]) / kept.ids.numel()
        flow.ledger.macs.append(MacTerm(node.name, share / flow.traced.batch, (kept.ids,)))
    return Label(tuple(out.shape), kept.ids)


def _by_whole_groups(ledger: Ledger, w: Weight, columns: Tensor, n_in: int, n_out: int) -> bool:
    if w.name not in ledger.whole_groups:
        per_group = max(n_in, n_out) // w.groups
        cuttable = bool((columns != 0).all())
        ledger.whole_groups[w.name] = cuttable and w.groups >= per_group
    return ledger.whole_groups[w.name]


def _whole_groups(flow: Flow, node: Node, w: Weight, columns: Tensor, n_out: int) -> Tensor:
    """Only dim 0 is cut: it holds the outputs of a convolution, the inputs of a transposed one."""
    ledger = flow.ledger
    n_in = len(columns)
    depthwise = n_in == w.groups
    size = n_in if w.transposed else n_out
    known = ledger.slots.get((w.name, 0))
    rows = known.ids if known else ledger.fresh(size)
    role = "in" if w.transposed and not depthwise else "out"
    rows = ledger.slot(w.name, 0, role, rows, node, producer=not depthwise)
    blocks = rows.view(w.groups, -1)
    ledger.couple_along(blocks, [1], node, "of a grouped convolution")
    inputs = columns.view(w.groups, -1)
    why = "part of a group's inputs cannot be cut"
    for column in inputs.unbind(1):  # guard: whole groups -> tests/test_law.py -k depthwise
        ledger.couple(column, blocks[:, 0], node, why)
    return rows if not w.transposed else blocks[:, :1].expand(-1, n_out // w.groups).flatten()


def _count(flow: Flow, node: Node, x: Label, w: Weight, n_in: int, n_out: int) -> None:
    """Multiply-adds of this call, per sample, as a product of kept counts."""
    out = value_of(node)
    if not n_in or not n_out:
        return
    batch = flow.traced.batch
    kernel = math.prod(w.shape[2:])
    places = (math.prod(x.shape) // n_in) if w.transposed else (out.numel() // n_out)
    factor = places * kernel / batch
    if flow.ledger.whole_groups.get(w.name, False):
        dims: tuple[Tensor, ...] = (flow.ledger.slots[w.name, 0].ids,)
        factor *= (n_out if w.transposed else n_in) // w.groups
    else:
        dims = (flow.ledger.slots[w.name, 0].ids, flow.ledger.slots[w.name, 1].ids)
        factor /= w.groups
    flow.ledger.macs.append(MacTerm(node.name, factor, dims))


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_module(flow: Flow, node: Node) -> Value:
    """A convolution layer."""
    module = flow.traced.module(node)
    assert isinstance(module, nn.modules.conv._ConvNd)
    x = flow.first(node)
    name = flow.ledger.tensors.name
    w = Weight(
        name(module.weight) or "",
        tuple(module.weight.shape),
        name(module.bias),
        module.groups,
        module.transposed,
    )
    return contract(flow, node, x, w, len(x.shape) - len(module.kernel_size) - 1)


@rule(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
def linear_module(flow: Flow, node: Node) -> Value:
    """A linear layer reads and writes the last axis."""
    module = flow.traced.module(node)
    assert isinstance(module, nn.Linear)
    x = flow.first(node)
    name = flow.ledger.tensors.name
    w = Weight(name(module.weight) or "", tuple(module.weight.shape), name(module.bias))
    return contract(flow, node, x, w, len(x.shape) - 1)


def contract_by(
    flow: Flow, node: Node, x: Label, weight: Label, bias: Label | None, axis: int
) -> Label:
    """As `contract`, by a weight [out, in, ...] that forward computes from parameters.

    Position by position along its first two axes; what else it does to them stays uncut.
    """
    out = value_of(node)
    axis %= len(x.shape)
    columns = channel_ids(flow, node, x, axis)
    inner = flow.bind(node, weight, [1], role="in")
    outer = flow.bind(node, weight, [0], producer=True)
    why = "the weight that reads it is not made of parameters along this axis"
    flow.ledger.couple(columns, inner.ids.flatten(), node, why)
    rows = outer.ids.flatten()
    if bias is not None:
        bound = flow.bind(node, bias, [0])
        flow.ledger.couple(rows, bound.ids.flatten(), node, "its bias cannot be cut")
    count = out.numel() // out.shape[axis] * math.prod(weight.shape[2:]) / flow.traced.batch
    sizes = (columns.expand(weight.shape[1]), rows.expand(weight.shape[0]))
    flow.ledger.macs.append(MacTerm(node.name, count, sizes))
    shape = [1] * len(out.shape)
    shape[axis] = len(rows)
    return Label(tuple(out.shape), rows.view(shape))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
@rule("linear")
def functional_contraction(flow: Flow, node: Node) -> Value:
    """F.conv2d and friends with a weight (and bias) that are parameters, or made of them."""
    name = op_name(node)
    transposed = "transpose" in name
    order = ["input", "weight", "bias", "stride", "padding"]
    order += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    args = arguments(node, *order)
    x, weight, bias = (flow.of(args[key]) for key in ("input", "weight", "bias"))
    if x is None or weight is None:
        return opaque(flow, node, f"a `{name}` of something that is no tensor")
    last = 0 if name == "linear" else int(name[-2])
    axis = len(x.shape) - last - 1
    groups = int(constant(args.get("groups", 1)))
    direct = [whole_parameter(flow, args[key]) for key in ("weight", "bias")]
    if direct[0] and (bias is None or direct[1]):
        w = Weight(direct[0], weight.shape, direct[1], groups, transposed)
        return contract(flow, node, x, w, axis)
    computed = not weight.parts and not weight.uncut
    if name == "linear" and computed:
        return opaque(flow, node, "a `linear` whose weight is an activation")
    if groups > 1 or transposed or not weight.parts or (x.varying and axis not in x.varying):
        return opaque(flow, node, f"the weight of this `{name}` is computed, not a parameter")
    return contract_by(flow, node, x, weight, bias, axis)


def whole_parameter(flow: Flow, node: object) -> str | None:
    """The name of the parameter that a node reads as it is."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    return flow.ledger.tensors.name(flow.traced.attribute(node))


@rule(
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
)
def standardised_convolution(flow: Flow, node: Node) -> Value:
    """A convolution whose weight is standardised over its inputs: these stay, its outputs may go."""
    module = flow.traced.module(node)
    x, out = flow.first(node), value_of(node)
    name, ledger = flow.ledger.tensors.name, flow.ledger
    why = f"the weight of `{node.target}` is standardised over its inputs"
    ledger.freeze(x.ids, node, why)
    known = ledger.slots.get((name(module.weight) or "", 0))  # type: ignore[arg-type]
    rows = known.ids if known else ledger.fresh(out.shape[1])
    rows = ledger.slot(name(module.weight), 0, "out", rows, node, producer=True)  # type: ignore[arg-type]
    for own in ("bias", "gain"):
        t = module._parameters.get(own)
        if t is not None:
            ledger.slot(name(t), 0, "out", rows, node)
    groups = int(module.groups)  # type: ignore[arg-type]
    if groups > 1:
        ledger.couple_along(rows.view(groups, -1), [0], node, "of a grouped convolution")
    weight = module._parameters["weight"]
    assert weight is not None
    per_row = weight[0].numel() * out.numel() / out.shape[1] / flow.traced.batch
    ledger.macs.append(MacTerm(node.name, per_row, (rows,)))
    shape = [-1 if d == 1 else 1 for d in range(len(out.shape))]
    return Label(tuple(out.shape), rows.view(shape))


@rule(nn.Embedding)
def embedding(flow: Flow, node: Node) -> Value:
    """A table of rows: its width is made here, which entry is looked up does not matter."""
    module, out = flow.traced.module(node), value_of(node)
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        return opaque(flow, node, f"`{node.target}` scales its rows by their norm")
    name = flow.ledger.tensors.name(module.weight)
    known = flow.ledger.slots.get((name or "", 1))
    width = known.ids if known else flow.ledger.fresh(out.shape[-1])
    width = flow.ledger.slot(name, 1, "out", width, node, producer=True)
    return Label(tuple(out.shape), width.view([1] * (len(out.shape) - 1) + [-1]))
