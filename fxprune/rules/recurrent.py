"""Recurrent layers: a hidden unit is a row of every gate, and a column of what reads the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.graph import value_of
from fxprune.labels import Label, MacTerm
from fxprune.rules.contraction import channel_ids

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


@rule(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(flow: Flow, node: Node) -> Value:
    """All layers and directions lose the same units, since a layer has one hidden size.

    A unit that goes is read by nobody: the columns of the state's weight that read it are zero in
    the masked network.
    """
    module = flow.traced.module(node)
    assert isinstance(module, nn.RNNBase)
    if len(node.all_input_nodes) > 1 or module.proj_size:
        return opaque(flow, node, "a recurrent layer with a state given or a projection")
    ledger, name = flow.ledger, flow.ledger.tensors.name
    x, size = flow.first(node), module.hidden_size
    known = ledger.slots.get((name(module.weight_hh_l0) or "", 1))  # type: ignore[arg-type]
    hidden = known.ids if known else ledger.fresh(size)
    rows = hidden.repeat(GATES[type(module)])
    columns = channel_ids(flow, node, x, len(x.shape) - 1)
    steps = x.ids.new_tensor(x.shape[:-1]).prod().item() / flow.traced.batch
    directions = ("", "_reverse")[: 2 if module.bidirectional else 1]
    for layer in range(module.num_layers):
        for direction in directions:
            own = {kind: _own(module, f"{kind}_l{layer}{direction}") for kind in _KINDS}
            for kind, read in (("weight_ih", columns), ("weight_hh", hidden)):
                weight = name(own[kind])
                ledger.slot(weight, 0, "out", rows, node, producer=True)
                ledger.slot(weight, 1, "in", read, node)
                ledger.macs.append(MacTerm(node.name, steps, (rows, read)))
            for kind in ("bias_ih", "bias_hh"):
                if own[kind] is not None:
                    ledger.slot(name(own[kind]), 0, "out", rows, node)
        columns = hidden.repeat(len(directions))
    return _labelled(value_of(node), columns, hidden)


_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _own(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name)


def _labelled(
    value: tuple[Tensor, Tensor | tuple[Tensor, ...]], out: Tensor, state: Tensor
) -> Value:
    """The outputs of all steps, and the last state (or two of them): channels on the last axis."""

    def label(t: Tensor, ids: Tensor) -> Label:
        return Label(tuple(t.shape), ids.view([1] * (t.dim() - 1) + [-1]))

    made, last = value
    states = label(last, state) if isinstance(last, torch.Tensor) else tuple(label(t, state) for t in last)  # fmt: skip
    return label(made, out), states
