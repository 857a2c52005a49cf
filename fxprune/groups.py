"""Dependency analysis: which channels must live or die together, and which must stay.

Ids that couple (union-find over the ledger's edges) form classes; classes that share the output
dimension of one producer form a group, within which a method chooses. Every activation must stay a
rectangle when channels go: where ids vary along two axes of one tensor, each class must depend on
one axis only, so classes are joined until that holds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import PlanError
from fxprune.graph import place
from fxprune.labels import UNCUT, Label, Slot
from fxprune.pause import collector_paused
from fxprune.plan import Note
from fxprune.rules import Flow, flow_through
from fxprune.trace import Traced, trace

Array = np.ndarray[Any, Any]
KINDS = {
    "heads": "whole heads of an attention",
    "head-dims": "the same dimensions of all heads of an attention",
    "experts": "entries of a stacked weight, each with its own map",
    "embedding": "a width that linear layers and additions share: tokens of a transformer",
    "stage": "channels that additions couple",
    "mlp": "the hidden width of linear layers",
    "channels": "channels between convolutions",
}


@dataclass(frozen=True)
class Group:
    """Channels among which a method chooses.

    name: the module of its first producer. classes: int64 [C], the coupled sets that may go, in the
    first producer's order. producers: the dimensions whose rows make these channels. residual:
    whether an addition couples it.
    """

    name: str
    classes: Array
    producers: tuple[Slot, ...]
    members: tuple[str, ...]
    residual: bool
    width: int  # rows of the widest producer, frozen ones included
    kind: str = "channels"  # of `KINDS`

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def widest(self) -> Slot:
        """The first of the producers with the most rows: all of the group where others pad."""
        return max(self.producers, key=lambda slot: slot.size)


def by_head_dims(scope: str | Sequence[str]) -> bool:
    """Whether a scope asks for attention to be cut by dimensions of all heads."""
    return "head-dims" in ([scope] if isinstance(scope, str) else scope)


@dataclass
class Analysis:
    """What `fxprune.analyze` returns: groups, frozen nodes, and how ids map to classes.

    groups: those of which something may go. frozen: node name -> why its channels stay.
    """

    traced: Traced
    flow: Flow
    class_of: Array  # int64 [ids]: the class of every id; 0 for UNCUT
    stays: Array  # bool [classes]: may never be cut
    groups: list[Group]
    frozen: dict[str, str]
    pieces: list[Array]  # classes of which at least one must stay
    _seen: dict[int, tuple[Tensor, Array]] = field(default_factory=dict, repr=False)

    @property
    def slots(self) -> list[Slot]:
        """Every (tensor, dimension) that carries channels, in graph order."""
        return list(self.flow.ledger.slots.values())

    def classes(self, ids: Tensor) -> Array:
        """Classes of an array of ids, same shape; read only."""
        known = self._seen.get(id(ids))
        if known is None:
            known = self._seen[id(ids)] = ids, self.class_of[ids.numpy()]
        return known[1]

    def everything(self) -> Array:
        """The mask that keeps all classes: bool [classes]."""
        return np.ones(len(self.stays), dtype=bool)

    def group(self, name: str) -> Group:
        """The group of that name, or the one that a tensor of that name belongs to."""
        for group in self.groups:
            if name == group.name or name in group.members:
                return group
        raise PlanError(
            f"no prunable group is called `{name}`",
            where=f"`{name}`",
            why="groups are named after the module that makes their channels"
            + (f"; the first ones are {', '.join(g.name for g in self.groups[:5])}" if self.groups else ""),
            fix="print(fxprune.analyze(model)) lists them, and why others are frozen",
        )  # fmt: skip

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the model's state_dict."""
        return state_of(self.traced.model)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the tensors' names and shapes, and of the graph."""
        return {
            "tensors": tensors_fingerprint(self.state),
            "graph": graph_fingerprint(self.traced),
        }

    @property
    def notes(self) -> tuple[Note, ...]:
        """The frozen nodes as the plan lists them."""
        return tuple(Note(node, why) for node, why in self.frozen.items())

    def plan(self, keep: Mapping[str, Sequence[int]]) -> Any:
        """A plan made by hand: {group, module or tensor: indices that stay}; couplings expanded.

        Raises PlanError where indices are out of range or the couplings forbid the choice.
        """
        from fxprune.planning import plan_by_hand

        return plan_by_hand(self, keep)

    def to_networkx(self) -> nx.DiGraph:
        """The data flow: nodes carry op, target, shape and the names of the groups they hold."""
        graph = nx.DiGraph()
        owner = {int(c): g.name for g in self.groups for c in g.classes}
        for node in self.traced.graph.nodes:
            label = self.flow.labels.get(node)
            held: list[str] = []
            if isinstance(label, Label):
                held = sorted({owner[c] for c in self.classes(label.ids).ravel().tolist() if c in owner})  # fmt: skip
            graph.add_node(
                node.name,
                op=node.op,
                target=str(node.target),
                shape=label.shape if isinstance(label, Label) else None,
                groups=held,
                frozen=self.frozen.get(node.name),
            )
            graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return graph

    def coupling(self) -> nx.DiGraph:
        """The groups: nodes are groups and frozen layers, edges the layers that join them.

        `fxprune.coupling.coupling` tells what nodes and edges carry.
        """
        from fxprune.coupling import coupling

        return coupling(self)

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Draw the groups, for a browser; OSError when the file cannot be written."""
        from fxprune.views.coupling import write_coupling

        write_coupling(self.coupling(), path, type(self.traced.model).__name__)

    def __str__(self) -> str:
        return analysis_table(self)

    __repr__ = __str__


def analysis_table(analysis: Analysis) -> str:
    """The groups and what is frozen, as text for a terminal."""
    from fxprune.coupling import rows_of
    from fxprune.views.tables import analysis_text

    return analysis_text(rows_of(analysis), analysis.frozen)


@dataclass(frozen=True)
class Lineage:
    """What a pruned network remembers of its first original, so that later cuts compose.

    keys: the original's state_dict keys. classes: per (tensor, dim), the original's class of each
    index that is left. whole_groups: how grouped convolutions are cut.
    """

    keys: frozenset[str]
    classes: Mapping[tuple[str, int], Array]
    whole_groups: Mapping[str, bool]
    by_head_dims: bool = False


def lineage_of(analysis: Analysis, keep: Array, older: Lineage | None) -> Lineage:
    """The lineage of what a mask of kept classes, bool [classes], leaves."""
    classes = {}
    for s in analysis.slots:
        own = analysis.classes(s.ids)
        classes[s.tensor, s.dim] = own[keep[own]]
    keys = older.keys if older else frozenset(analysis.state)
    ledger = analysis.flow.ledger
    return Lineage(keys, classes, dict(ledger.whole_groups), ledger.by_head_dims)


def analyze_traced(
    traced: Traced, lineage: Lineage | None = None, by_head_dims: bool = False
) -> Analysis:
    """Label the graph, join what couples, and form the groups.

    With a lineage, channels that were coupled in the first original stay coupled, and attention is
    cut as it was. by_head_dims: by dimensions of all its heads, not by whole heads.
    """
    if lineage is not None:
        late = by_head_dims and not lineage.by_head_dims
        if late:  # guard: one way -> tests/test_reader_core.py -k heads
            raise PlanError(
                "the network was cut by whole heads before, so it cannot be cut by head-dims now",
                where="scope",
                why="one plan cuts attention in one way",
                fix='start from the original with scope="head-dims", or use scope="heads"',
            )
        by_head_dims = lineage.by_head_dims
    flow = flow_through(traced, lineage.whole_groups if lineage else {}, by_head_dims)
    if lineage is not None:  # guard: cuts compose -> tests/test_groups.py -k later_cuts
        _couple_as_before(flow, lineage)
    class_of = _classes(flow)
    stays = np.zeros(class_of.max() + 1, dtype=bool)
    stays[class_of[UNCUT]] = True
    for freeze in flow.ledger.frozen:  # guard: frozen stay -> tests/test_groups.py
        stays[class_of[freeze.ids.numpy()]] = True
    return Analysis(
        traced,
        flow,
        class_of,
        stays,
        _groups(flow, class_of, stays),
        _reasons(flow),
        _pieces(flow, class_of, stays),
    )


@collector_paused
def analyze_model(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    lineage: Lineage | None = None,
    by_head_dims: bool = False,
) -> Analysis:
    """Trace and analyse; arguments as in `analyze_traced`."""
    return analyze_traced(trace(model, example_inputs), lineage, by_head_dims)


def _couple_as_before(flow: Flow, lineage: Lineage) -> None:
    first: dict[int, int] = {}
    for key, slot in flow.ledger.slots.items():
        before = lineage.classes.get(key)
        if before is not None and len(before) == slot.size:
            leaders = [first.setdefault(int(c), int(i)) for c, i in zip(before, slot.ids, strict=True)]  # fmt: skip
            ids, leaders_ = slot.ids, torch.tensor(leaders)
            cuttable = (ids != UNCUT) & (leaders_ != UNCUT)
            flow.ledger.edges.append((ids[cuttable], leaders_[cuttable]))


# Classes


def _classes(flow: Flow) -> Array:
    """Connected components of the couplings, joined further until every array is a rectangle."""
    ledger = flow.ledger
    pairs = [
        (a.numpy().ravel(), b.numpy().ravel())
        for a, b in (torch.broadcast_tensors(x, y) for x, y in ledger.edges)
    ]
    arrays = [ids.numpy() for ids in ledger.arrays]
    while True:
        class_of = _components(pairs, ledger.next_id)
        fixed = class_of[UNCUT]
        frozen = {int(c) for f in ledger.frozen for c in class_of[f.ids.numpy()]}
        new = [pair for ids in arrays for pair in _to_rectangle(ids, class_of, fixed, frozen)]
        if not new:
            return class_of
        pairs += new


def _components(pairs: list[tuple[Array, Array]], count: int) -> Array:
    if not pairs:
        return np.arange(count)
    rows = np.concatenate([a for a, _ in pairs])
    cols = np.concatenate([b for _, b in pairs])
    edges = coo_matrix((np.ones(len(rows), dtype=np.int32), (rows, cols)), shape=(count, count))
    labels: Array = connected_components(edges, directed=False)[1].astype(np.int64)
    return labels


def _to_rectangle(
    ids: Array, class_of: Array, fixed: int, frozen: set[int]
) -> list[tuple[Array, Array]]:
    """Couplings after which each class of a many-axis array depends on one axis only."""
    classes = class_of[ids]
    if frozen:
        classes = np.where(np.isin(classes, list(frozen)), fixed, classes)
    axes = [d for d in range(classes.ndim) if (classes != classes.take([0], axis=d)).any()]
    if len(axes) < 2:
        return []
    best = max(axes, key=lambda d: (_choices(classes, d), d))
    along = np.moveaxis(ids, best, 0).reshape(ids.shape[best], -1)
    return [(np.repeat(along[:, 0], along.shape[1]), along.ravel())]


def _choices(classes: Array, axis: int) -> int:
    """Classes left when all positions of one index of `axis` are joined."""
    along = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
    _, inverse = np.unique(along, return_inverse=True)
    inverse = inverse.reshape(along.shape) + len(along)
    rows = np.repeat(np.arange(len(along)), along.shape[1])
    return int(_components([(rows, inverse.ravel())], int(inverse.max()) + 1).max()) + 1


# Groups


def _groups(flow: Flow, class_of: Array, stays: Array) -> list[Group]:
    producers = [s for s in flow.ledger.slots.values() if s.producer]
    rows = [class_of[s.ids.numpy()] for s in producers]
    free = [r[~stays[r]] for r in rows]
    links = [(np.full(len(f), f[0]), f) for f in free if len(f)]
    group_of = _components(links, len(stays))
    ledger = flow.ledger
    residual = _marked(ledger.residual, class_of)
    marks = {
        "experts": _marked(ledger.experts, class_of),
        "head-dims": _marked(ledger.head_dims, class_of),
        "heads": _marked(ledger.heads, class_of),
    }
    members: dict[int, list[str]] = {}
    for slot in flow.ledger.slots.values():
        classes = class_of[slot.ids.numpy()]
        if slot.makes:
            for g in set(group_of[classes[~stays[classes]]].tolist()):
                members.setdefault(g, []).append(slot.tensor)
    found: dict[int, list[int]] = {}
    for i, classes in enumerate(free):
        if len(classes):
            found.setdefault(int(group_of[classes[0]]), []).append(i)
    groups = []
    for g, owners in found.items():
        classes = np.concatenate([free[i] for i in owners])
        _, first = np.unique(classes, return_index=True)
        classes = classes[np.sort(first)]
        groups.append(
            Group(
                name=producers[owners[0]].tensor.rpartition(".")[0] or producers[owners[0]].tensor,
                classes=classes,
                producers=tuple(producers[i] for i in owners),
                members=tuple(members.get(g, ())),
                residual=bool(residual[classes].any()),
                width=max(producers[i].size for i in owners),
                kind=_kind(classes, marks, residual, flow, [producers[i] for i in owners]),
            )
        )
    return _distinct_names(groups)


def _marked(ids: Sequence[Tensor], class_of: Array) -> Array:
    """The classes of some ids: bool [classes]."""
    marked = np.zeros(class_of.max() + 1, dtype=bool)
    for own in ids:
        marked[class_of[own.numpy()]] = True
    return marked


def _kind(
    classes: Array, marks: Mapping[str, Array], residual: Array, flow: Flow, makers: Sequence[Slot]
) -> str:
    """What the channels of a group are, of `KINDS`."""
    for kind, marked in marks.items():
        if marked[classes].any():
            return kind
    tensors = flow.ledger.tensors.tensor
    linear = any(tensors[slot.tensor].dim() == 2 for slot in makers)
    if residual[classes].any():
        return "embedding" if linear else "stage"
    return "mlp" if linear else "channels"


def _distinct_names(groups: list[Group]) -> list[Group]:
    """Several groups can share a first producer (a split one): name the later ones by its tensor."""
    seen: dict[str, int] = {}
    out = []
    for group in groups:
        count = seen.setdefault(group.name, 0)
        seen[group.name] += 1
        name = group.name if not count else f"{group.name}#{count}"
        out.append(group if not count else Group(**{**vars(group), "name": name}))
    return out


def _pieces(flow: Flow, class_of: Array, stays: Array) -> list[Array]:
    """Sets of classes of which one must stay, smallest first; those with a frozen one need no care."""
    ledger = flow.ledger
    sets = {}
    different = {id(ids): ids for ids in [*(s.ids for s in ledger.slots.values()), *ledger.pieces]}
    for ids in different.values():
        classes = np.unique(class_of[ids.numpy()])
        if len(classes) and not stays[classes].any():
            sets[classes.tobytes()] = classes
    return sorted(sets.values(), key=len)


def _reasons(flow: Flow) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for freeze in flow.ledger.frozen:
        if bool((freeze.ids != UNCUT).any()):
            where = "" if freeze.node.op == "output" else place(freeze.node)
            text = f"{freeze.why} ({where})" if where else freeze.why
            reasons.setdefault(freeze.node.name, text)
    return reasons


# Fingerprints


def tensors_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the sorted (key, shape) pairs of a state_dict."""
    pairs = sorted((k, tuple(v.shape)) for k, v in state.items())
    return hashlib.sha256(repr(pairs).encode()).hexdigest()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state_dict (extra state left out)."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def graph_fingerprint(traced: Traced) -> str:
    """SHA-256 of the operations and how they are wired."""
    digest = hashlib.sha256()
    for node in traced.graph.nodes:
        line = (
            node.op,
            _target(node),
            node.name,
            repr(node.args),
            repr(sorted(node.kwargs.items())),
        )
        digest.update(repr(line).encode())
    return digest.hexdigest()


def _target(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
