"""Layers with a parameter or statistic of each channel alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.labels import Label
from fxprune.rules.contraction import channel_ids
from fxprune.rules.elementwise import tensor_args
from fxprune.rules.norms import PER_CHANNEL_NORMS, unknown_part


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
@rule(*PER_CHANNEL_NORMS)
def normalise_each(flow: Flow, node: Node) -> Value:
    """Batch and instance norm: a parameter and statistics per channel, axis 1."""
    x = flow.first(node)
    module = flow.traced.module(node)
    if why := unknown_part(module):
        return opaque(flow, node, why)
    own = [*module._parameters.values(), *module._buffers.values()]
    return _per_channel(flow, node, x, own, channel_axis(module, len(x.shape)))


def channel_axis(module: nn.Module, rank: int) -> int:
    """1, but for instance norms of unbatched inputs."""
    spatial = re.fullmatch(r"InstanceNorm(\d)d", type(module).__name__)
    return rank - 1 - int(spatial[1]) if spatial else 1


@rule(nn.PReLU)
def prelu(flow: Flow, node: Node) -> Value:
    """One slope for all, or one per channel."""
    x = flow.first(node)
    weight = flow.traced.module(node)._parameters["weight"]
    return x if weight is None or weight.numel() == 1 else _per_channel(flow, node, x, [weight])


def _per_channel(
    flow: Flow, node: Node, x: Label, own: Sequence[Tensor | None], axis: int = 1
) -> Label:
    ids = channel_ids(flow, node, x, axis)
    for t in own:
        if t is not None and t.dim() == 1:
            flow.ledger.slot(flow.ledger.tensors.name(t), 0, "out", ids, node)
    return x


@rule("batch_norm", "instance_norm", "prelu")
def functional_per_channel(flow: Flow, node: Node) -> Value:
    """F.batch_norm and friends: vectors of the graph act on axis 1."""
    x, *own = [flow.of(n) for n in tensor_args(node)]
    assert x is not None
    ids = channel_ids(flow, node, x, 1)
    for label in own:
        if label is None or math.prod(label.shape) == 1:
            continue
        own_ids = flow.bind(node, label, range(len(label.shape))).ids
        if own_ids.numel() > 1:
            flow.ledger.couple(ids, own_ids.flatten(), node)
        else:
            flow.ledger.freeze(ids, node, "it is scaled by a tensor that cannot be cut")
    return x
