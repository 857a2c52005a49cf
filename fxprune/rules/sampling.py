"""Sampling, unpooling and sliding windows: channels stay; where to look may not depend on a cut."""

from __future__ import annotations

from types import FunctionType

from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.graph import arguments, constant, first_argument, op_name, value_of
from fxprune.labels import Label, compact
from fxprune.rules.contraction import Weight, channel_ids, contract, whole_parameter
from fxprune.rules.elementwise import join


def _name(flow: Flow, node: Node) -> str:
    return op_name(node) or type(flow.traced.module(node)).__name__


@rule("max_unpool1d", "max_unpool2d", "max_unpool3d")
@rule(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
def unpool(flow: Flow, node: Node) -> Value:
    """Values go where indices say, channel by channel: both have the same channels."""
    name = _name(flow, node)
    x, indices = flow.of(node.args[0]), flow.of(arguments(node, "input", "indices")["indices"])
    if x is None or indices is None:
        return opaque(flow, node, f"`{name}` of computed indices")
    rank = int(name[-2])
    both = [_still(flow, node, label, rank) for label in (x, indices)]
    return Label(tuple(value_of(node).shape), join(flow, node, both, x.shape).ids)


def _still(flow: Flow, node: Node, label: Label, rank: int) -> Label:
    """The last `rank` axes hold positions only."""
    axes = range(len(label.shape) - rank, len(label.shape))
    why = f"`{_name(flow, node)}` mixes positions of channels"
    return flow.ledger.complete(label, axes, node, why)


@rule("grid_sample", "grid_sampler", "roi_align", "roi_pool")
@rule("torchvision.ops.roi_align.RoIAlign", "torchvision.ops.roi_pool.RoIPool")
def sample(flow: Flow, node: Node) -> Value:
    """x looked up at places of a grid or in boxes: axis 1 of x stays, the places may not be cut."""
    x = flow.of(first_argument(node))
    out = value_of(node)
    if x is None or not isinstance(out, Tensor):
        return opaque(flow, node, f"`{_name(flow, node)}` of several tensors")
    for label in flow.inputs(node):
        if label is not x:
            flow.ledger.freeze(label.ids, node, f"places for `{_name(flow, node)}`")
    others = [d for d in range(len(x.shape)) if d != 1]
    why = f"`{_name(flow, node)}` mixes positions of channels"
    return Label(tuple(out.shape), flow.ledger.complete(x, others, node, why).ids)


@rule("deform_conv2d")
def deformable(flow: Flow, node: Node) -> Value:
    """A convolution that looks where `offset` says: offsets and masks may not be cut.

    torch's counter of operations does not know it, so it costs nothing here either.
    """
    order = ["input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask"]
    if not isinstance(node.target, FunctionType):  # the operator in which the function ends
        order = ["input", "weight", "offset", "mask", "bias"]
    args = arguments(node, *order)
    x, weight, offset = (flow.of(args[key]) for key in ("input", "weight", "offset"))
    name, bias = (whole_parameter(flow, args[key]) for key in ("weight", "bias"))
    if x is None or weight is None or offset is None or name is None:
        return opaque(flow, node, "the weight of this `deform_conv2d` is no parameter")
    for label in (offset, flow.of(args["mask"])):
        if label is not None:
            flow.ledger.freeze(label.ids, node, "places for `deform_conv2d`")
    several = offset.shape[1] > 2 * weight.shape[2] * weight.shape[3]
    if several or x.shape[1] > weight.shape[1]:
        return opaque(flow, node, "a `deform_conv2d` of several groups")
    before = len(flow.ledger.macs)
    x = flow.ledger.complete(x, [0, 2, 3], node, "`deform_conv2d` mixes positions of channels")
    made = contract(flow, node, x, Weight(name, weight.shape, bias), 1)
    del flow.ledger.macs[before:]
    added = flow.of(args["bias"])
    if bias is None and added is not None:  # zeros of a size
        flow.ledger.couple(flow.bind(node, added, [0]).ids, made.ids.flatten(), node)
    return made


@rule("unfold", nn.Unfold)
def unfold(flow: Flow, node: Node) -> Value:
    """Sliding windows: of an axis (`Tensor.unfold`), or kernel entries beside each channel."""
    x, out = flow.first(node), value_of(node)
    if node.op == "call_method" or (node.op == "call_function" and node.target is not F.unfold):
        axis = constant(arguments(node, "input", "dimension")["dimension"]) % len(x.shape)
        kept = flow.ledger.complete(x, [axis], node, "windows over the channels")
        return Label(tuple(out.shape), kept.ids.unsqueeze(-1))
    axis = len(x.shape) - 3
    ids = channel_ids(flow, node, _still(flow, node, x, 2), axis)
    ids = ids.repeat_interleave(out.shape[axis] // len(ids))
    return Label(tuple(out.shape), compact(ids.view([-1, 1] if axis == 0 else [1, -1, 1])))


@rule("fold", nn.Fold)
def fold(flow: Flow, node: Node) -> Value:
    """Windows added up: the kernel entries of a channel live or die together."""
    x, out = flow.first(node), value_of(node)
    axis = len(x.shape) - 2
    ids = channel_ids(flow, node, _still(flow, node, x, 1), axis).view(out.shape[axis], -1)
    ids = flow.ledger.couple_along(ids, [1], node, "of a fold").flatten()
    shape = [-1 if d == axis else 1 for d in range(len(out.shape))]
    return Label(tuple(out.shape), compact(ids.view(shape)))


@rule("glu", nn.GLU)
def gated_linear_unit(flow: Flow, node: Node) -> Value:
    """The first half times the sigmoid of the second: both halves keep the same channels."""
    x, out = flow.first(node), value_of(node)
    if node.op == "call_module":
        dim = flow.traced.module(node).dim
    else:
        dim = arguments(node, "input", "dim").get("dim", -1)
    axis = constant(dim) % len(x.shape)
    if x.ids.shape[axis] == 1:
        return Label(tuple(out.shape), x.ids)
    value, gate = x.ids.chunk(2, axis)
    flow.ledger.couple(value, gate, node)
    return Label(tuple(out.shape), compact(value))
