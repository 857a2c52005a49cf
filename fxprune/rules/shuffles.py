"""Shuffles: a view, a transpose and a view back are a permutation of one axis, and need no rectangle.

What such a chain computes in between has no other reader, so it may stop being a rectangle: the
rewrite then takes the kept channels at their new places instead (`fxprune.rewrites.indexing`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.graph import arguments, first_argument, op_name, value_of
from fxprune.labels import Label, Pick, compact
from fxprune.rules.contraction import channel_ids
from fxprune.rules.movement import move, run_on

_LINKS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "transpose",
    "permute",
    "movedim",
    "contiguous",
}
_LONGEST = 6


@rule("view", "reshape", "unflatten")
def reshape(flow: Flow, node: Node) -> Value:
    """Views; the first of a chain that permutes one axis frees the chain from being rectangles."""
    x = flow.first(node)
    if any(isinstance(arg, torch.dtype) for arg in node.args):
        return opaque(flow, node, "the bits of a tensor read as another type")
    if len(x.varying) == 1 and node not in flow.ledger.loose and len(value_of(node).shape) > len(x.shape):  # fmt: skip
        _note_shuffle(flow, node, x, x.varying[0])
    return move(flow, node)


def _note_shuffle(flow: Flow, node: Node, x: Label, axis: int) -> None:
    chain = _chain(node, x.shape)
    if not chain:
        return
    count = x.shape[axis]
    places = torch.arange(count).view([-1 if d == axis else 1 for d in range(len(x.shape))])
    moved: Tensor = places.expand(x.shape)
    for link in chain:
        moved = run_on(link, moved)
    moved = compact(moved)
    one = [d for d, n in enumerate(moved.shape) if n > 1] == [axis]
    if not one:  # guard: one axis -> tests/test_movement.py -k "mixed"
        return
    flow.ledger.loose.update(chain[:-1])
    flow.ledger.shuffles[chain[-1]] = chain[:-1]
    flow.ledger.picks[chain[-1]] = (Pick(axis, moved.flatten()),)


def _chain(node: Node, shape: tuple[int, ...]) -> tuple[Node, ...]:
    """The nodes from a view until the shape is `shape` again, if nothing else reads them."""
    chain = [node]
    while len(chain) < _LONGEST and len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        link = _links(user) and len(user.args) > 0 and user.args[0] is chain[-1]
        if not link or chain[-1] in (*_nodes(user.args[1:]), *user.kwargs.values()):
            return ()
        chain.append(user)
        if tuple(value_of(user).shape) == shape:
            return tuple(chain)
    return ()


def _links(node: Node) -> bool:
    return op_name(node) in _LINKS or (op_name(node) == "getattr" and node.args[1] in ("mT", "T"))


def _nodes(args: tuple[object, ...]) -> list[object]:
    return [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]


@rule("channel_shuffle", "native_channel_shuffle", nn.ChannelShuffle)
def channel_shuffle(flow: Flow, node: Node) -> Value:
    """A permutation of axis 1."""
    x = flow.of(first_argument(node))
    assert x is not None
    if node.op == "call_module":
        module = flow.traced.module(node)
        assert isinstance(module, nn.ChannelShuffle)
        groups = module.groups
    else:
        groups = arguments(node, "input", "groups")["groups"]
    ids = channel_ids(flow, node, x, 1)
    places = torch.arange(len(ids)).view(groups, -1).t().flatten()
    flow.ledger.picks[node] = (Pick(1, places),)
    shape = [-1 if d == 1 else 1 for d in range(len(x.shape))]
    return Label(x.shape, compact(ids[places].view(shape)))
