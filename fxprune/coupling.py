"""The groups of an analysis as a graph: which layer reads the channels of one and makes another's.

Promise: every group is a node, and so is every layer whose outputs all stay, with the reason; the
nodes and the layers of each come in the order of computation; the same network, the same graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import numpy as np

from fxprune.cost import Cost
from fxprune.graph import place
from fxprune.groups import Analysis, Group
from fxprune.labels import UNCUT, Slot
from fxprune.report import AnalysisRow


def coupling(analysis: Analysis) -> nx.DiGraph:
    """The graph of the groups.

    Nodes: kind (of `groups.KINDS`, or "frozen"), width, units (sets of channels that go together), free (channels of the widest
    producer that may go), residual, members (tensors), producers (layers), steps (the place of each
    producer in the order of computation), frozen (None, or why nothing of it may go).
    Edges: layers, those that read channels of the first node and make channels of the second.
    """
    graph = nx.DiGraph()
    slots = analysis.slots
    owner = {int(c): g.name for g in analysis.groups for c in g.classes}
    step = {slot.tensor: i for i, slot in enumerate(s for s in slots if s.producer)}
    for group in analysis.groups:
        layers = _layers(group.producers, step)
        graph.add_node(group.name, **_facts(analysis, group), **layers, frozen=None)
    reasons = _reasons(analysis)
    for slot in slots:
        if slot.producer and not _owners(analysis, slot, owner):
            _add_frozen(graph, slot, step, _reason(analysis, slot, reasons))
    made = _made(analysis, graph, owner)
    for slot in slots:
        if slot.role == "in" and not slot.producer:
            layer = layer_of(slot.tensor)
            for source in _owners(analysis, slot, owner):
                for target in made.get(slot.tensor, ()):
                    _add_edge(graph, source, target, layer)
    return graph


def layer_of(tensor: str) -> str:
    """The module that holds a tensor; the tensor where the model itself holds it."""
    return tensor.rpartition(".")[0] or tensor


def shares_of_macs(analysis: Analysis) -> dict[str, float]:
    """By group, the share of the multiply-adds that go with all of its channels, 0 to 1."""
    cost, whole = Cost.of(analysis), analysis.everything()
    total = cost.macs(whole)
    shares = {}
    for group in analysis.groups:
        keep = whole.copy()
        keep[group.classes] = False
        shares[group.name] = 1 - cost.macs(keep) / total if total else 0.0
    return shares


def rows_of(analysis: Analysis) -> list[AnalysisRow]:
    """A row per group, for tables."""
    shares = shares_of_macs(analysis)
    return [
        AnalysisRow(
            name=g.name,
            channels=g.width,
            cuttable=len(g),
            residual=g.residual,
            members=g.members,
            kind=g.kind,
            macs=shares[g.name],
        )
        for g in analysis.groups
    ]


def _facts(analysis: Analysis, group: Group) -> dict[str, Any]:
    free = ~analysis.stays[analysis.classes(group.widest.ids)]
    return {
        "kind": group.kind,
        "width": group.width,
        "units": len(group),
        "free": int(free.sum()),
        "residual": group.residual,
        "members": group.members,
    }


def _layers(producers: Iterable[Slot], step: Mapping[str, int]) -> dict[str, tuple[Any, ...]]:
    """The layers of some producers and their places in the order, a layer once."""
    first: dict[str, int] = {}
    for slot in producers:
        first.setdefault(layer_of(slot.tensor), step[slot.tensor])
    return {"producers": tuple(first), "steps": tuple(first.values())}


def _owners(analysis: Analysis, slot: Slot, owner: Mapping[int, str]) -> list[str]:
    """The groups that a dimension holds channels of, in the order in which they come."""
    classes = analysis.classes(slot.ids).tolist()
    return list(dict.fromkeys(owner[c] for c in classes if c in owner))


def _add_frozen(graph: nx.DiGraph, slot: Slot, step: Mapping[str, int], why: str) -> None:
    """A layer of which nothing may go; several tensors of one layer make one node."""
    name = _frozen_name(graph, slot)
    if name in graph:
        return
    graph.add_node(
        name,
        kind="frozen",
        width=slot.size,
        units=0,
        free=0,
        residual=False,
        members=(slot.tensor,),
        **_layers([slot], step),
        frozen=why,
    )


def _frozen_name(graph: nx.DiGraph, slot: Slot) -> str:
    """The layer's name, or the tensor's where a group has that already."""
    layer = layer_of(slot.tensor)
    taken = layer in graph and graph.nodes[layer]["frozen"] is None
    return slot.tensor if taken else layer


def _reasons(analysis: Analysis) -> dict[int, str]:
    """By class, why it stays, with the place in the user's code."""
    reasons: dict[int, str] = {}
    fixed = int(analysis.class_of[UNCUT])
    for freeze in analysis.flow.ledger.frozen:
        where = "" if freeze.node.op == "output" else place(freeze.node)
        why = f"{freeze.why} ({where})" if where else freeze.why
        for c in np.unique(analysis.class_of[freeze.ids.numpy()]).tolist():
            if c != fixed:
                reasons.setdefault(c, why)
    return reasons


def _reason(analysis: Analysis, slot: Slot, reasons: Mapping[int, str]) -> str:
    """Why nothing of a dimension may go."""
    own = (reasons[c] for c in analysis.classes(slot.ids).tolist() if c in reasons)
    return next(own, "its channels meet others that cannot be cut")


def _made(analysis: Analysis, graph: nx.DiGraph, owner: Mapping[int, str]) -> dict[str, list[str]]:
    """By tensor, the nodes whose channels its rows make."""
    return {
        slot.tensor: _owners(analysis, slot, owner) or [_frozen_name(graph, slot)]
        for slot in analysis.slots
        if slot.producer
    }


def _add_edge(graph: nx.DiGraph, source: str, target: str, layer: str) -> None:
    known = graph.edges[source, target]["layers"] if graph.has_edge(source, target) else ()
    if layer not in known:
        graph.add_edge(source, target, layers=(*known, layer))
