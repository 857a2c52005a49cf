"""What every layer costs, before and after a cut: channels, multiply-adds, parameters.

Promise: rows stand in graph order, and their multiply-adds and parameters add up to those of the
network (`fxprune.cost`) exactly. Modules that share weights, or are called twice, are one row; so
is a functional call with the parameters that its weight is computed from. A product of two
activations has no parameters: its row has the name of its node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.cost import fixed_macs, may_multiply, retained_parameters
from fxprune.graph import op_name, value_of
from fxprune.groups import Analysis, Array
from fxprune.labels import Label
from fxprune.report import LayerRow
from fxprune.trace import Traced

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_FUNCTIONAL_NORMS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")


def layer_rows(analysis: Analysis, keep: Array) -> list[LayerRow]:
    """The rows of the analysed network, whole and with the classes in `keep`, bool [classes]."""
    parameters = retained_parameters(analysis.traced)
    multiplied = {term.node for term in analysis.flow.ledger.macs}
    layers = _layers(analysis.traced, parameters, multiplied)
    counts = [_Counts(analysis, mask, parameters) for mask in (analysis.everything(), keep)]
    fixed = fixed_macs(analysis)
    macs = [_macs(analysis, layers, c, fixed) for c in counts]
    return [
        LayerRow(
            layer.name,
            layer.kind,
            *(_channels(analysis, layer, c) for c in counts),
            *(m[i] for m in macs),
            *(sum(c.numel(name) for name in layer.parameters) for c in counts),
        )
        for i, layer in enumerate(layers)
    ]


def since_original(older: Sequence[LayerRow], rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Rows of a cut on a network that `older` rows describe: before is the first original's.

    A layer that is gone (a batch norm folded between the cuts) stays, with nothing left.
    """
    products = iter([row for row in older if row.kind == "product"])
    found: dict[str, LayerRow] = {}
    for row in rows:  # a second trace may name the nodes of products anew; their order stays
        name = row.name
        if row.kind == "product":
            name = getattr(next(products, None), "name", name)
        found[name] = row
    merged = []
    for old in older:
        new = found.pop(old.name, None)
        merged.append(
            replace(
                old,
                channels_after=new.channels_after if new else 0,
                macs_after=new.macs_after if new else 0,
                params_after=new.params_after if new else 0,
            )
        )
    strangers = (
        replace(r, channels_before=0, macs_before=0, params_before=0) for r in found.values()
    )
    return [*merged, *strangers]


def after_folding(
    rows: Iterable[LayerRow], pairs: Iterable[tuple[str, str]], folded: nn.Module
) -> list[LayerRow]:
    """Rows after batch norms were folded: pairs are (layer, batch norm) by module name."""
    layers, norms = {}, set()
    for layer, norm in pairs:
        layers[layer] = sum(p.numel() for p in folded.get_submodule(layer).parameters())
        norms.add(norm)
    return [
        replace(row, params_after=0, channels_after=0)
        if row.name in norms
        else replace(row, params_after=layers.get(row.name, row.params_after))
        for row in rows
    ]


# ---- which nodes and parameters make a layer ----------------------------------------------------


@dataclass
class _Layer:
    """A row in the making; nodes: those that multiply, or that use the parameters."""

    name: str
    kind: str
    place: int
    nodes: list[Node] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)  # canonical names


class _Book:
    """Layers by name, and whose every parameter is."""

    def __init__(self) -> None:
        self.by_name: dict[str, _Layer] = {}
        self.owner: dict[str, _Layer] = {}

    def enter(self, name: str, kind: str, place: int, node: Node, held: Iterable[str]) -> None:
        """A node uses parameters: in the layer that owns one of them, or in a new one."""
        held = list(held)
        layer = next((self.owner[p] for p in held if p in self.owner), None)
        if layer is None:
            layer = self.by_name.setdefault(name, _Layer(name, kind, place))
        elif layer.kind == "other":
            layer.kind = kind
        layer.nodes.append(node)
        for parameter in held:
            if parameter not in self.owner:
                self.owner[parameter] = layer
                layer.parameters.append(parameter)


def _layers(
    traced: Traced, parameters: Mapping[str, nn.Parameter], multiplied: Set[str]
) -> list[_Layer]:
    """The layers in graph order: first whatever multiplies, then who holds the other parameters.

    multiplied: names of nodes that count multiply-adds by their rules.
    """
    book = _Book()
    sources = _sources(traced, parameters)
    nodes = list(enumerate(traced.graph.nodes))
    taken = {str(node.target) for _, node in nodes if node.op == "call_module"}
    for place, node in nodes:
        if node.op == "call_module":
            held = [traced.tensors.name(p) or "" for p in traced.module(node).parameters()]
            if held:
                book.enter(str(node.target), _module_kind(traced.module(node)), place, node, held)
                continue
        if node.name not in multiplied and not may_multiply(traced, node):
            continue
        held = list(dict.fromkeys(p for n in node.all_input_nodes for p in sources[n] or ()))
        if held:
            book.enter(_owner(held), _function_kind(node), place, node, held)
        else:
            name = node.name
            while name in taken or name in book.by_name:
                name += "'"
            kind = _function_kind(node)
            book.enter(name, kind if kind == "attention" else "product", place, node, ())
    for place, node in nodes:
        if node.op != "get_attr":
            continue
        held = [p for p in sources[node] or () if p not in book.owner]
        for parameter in held:
            readers = {op_name(user) for user in node.users}
            kind = "norm" if readers & set(_FUNCTIONAL_NORMS) else "other"
            name = parameter.rpartition(".")[0] or parameter
            book.enter(name, kind, place, node, [parameter])
    return sorted(book.by_name.values(), key=lambda layer: layer.place)


def _sources(
    traced: Traced, parameters: Mapping[str, nn.Parameter]
) -> dict[Node, tuple[str, ...] | None]:
    """Per node, the parameters that it is computed from; None where an activation takes part."""
    sources: dict[Node, tuple[str, ...] | None] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = traced.attribute(node)
            name = traced.tensors.name(value) if isinstance(value, Tensor) else None
            sources[node] = (name,) if name in parameters else ()  # type: ignore[assignment]
        elif node.op in ("placeholder", "call_module", "output"):
            sources[node] = None
        else:
            parts = [sources[n] for n in node.all_input_nodes]
            known = [p for part in parts if part is not None for p in part]
            sources[node] = None if None in parts else tuple(dict.fromkeys(known))
    return sources


def _owner(parameters: Sequence[str]) -> str:
    """A functional layer is called like the module that holds its weights, or like the weight."""
    paths = [p.split(".")[:-1] for p in parameters]
    if len(set(map(tuple, paths))) == 1:
        own = next((p for p in parameters if p.endswith(".weight")), "")
        return ".".join(paths[0]) if own and paths[0] else own or parameters[0]
    levels = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in levels) or parameters[0]


def _module_kind(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "depthwise" if module.groups == module.in_channels > 1 else "conv"
    if isinstance(module, nn.Linear | nn.Bilinear):
        return "linear"
    if isinstance(module, _NORMS):
        return "norm"
    return "attention" if isinstance(module, nn.MultiheadAttention) else "other"


def _function_kind(node: Node) -> str:
    name = op_name(node)
    return "conv" if name.startswith("conv") else "attention" if "attention" in name else "linear"


# ---- what they count ----------------------------------------------------------------------------


class _Counts:
    """Kept counts under one mask; tensors that are coupled share their ids, and one count."""

    def __init__(
        self, analysis: Analysis, keep: Array, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._analysis, self._keep, self._parameters = analysis, keep, parameters
        self._kept: dict[int, int] = {}
        self._slots: dict[str, list[tuple[int, int]]] = {}  # tensor -> (size, kept) of its dims
        for s in analysis.slots:
            kept = self.of(s.ids)
            self._slots.setdefault(s.tensor, []).append((s.size, kept))

    def of(self, ids: Tensor) -> int:
        """Ids that are left of an array."""
        if id(ids) not in self._kept:
            kept = self._keep[self._analysis.classes(ids)]
            self._kept[id(ids)] = int(np.count_nonzero(kept))
        return self._kept[id(ids)]

    def numel(self, name: str) -> int:
        """Elements of a parameter that are left."""
        dims = self._slots.get(name, ())
        total = self._parameters[name].numel()
        return total * math.prod(k for _, k in dims) // max(math.prod(s for s, _ in dims), 1)

    def along(self, label: Label, axis: int) -> int:
        """Indices left along an axis of an activation."""
        kept: Array = self._keep[self._analysis.classes(label.ids)]
        others = tuple(d for d in range(kept.ndim) if d != axis)
        return int(np.broadcast_to(kept.any(axis=others), (label.shape[axis],)).sum())


def _channels(analysis: Analysis, layer: _Layer, counts: _Counts) -> int:
    """Channels that a layer makes; 0 where it has no axis of them."""
    if layer.kind in ("product", "attention", "other"):
        return 0
    if layer.kind == "norm":
        dims = [counts.numel(p) for p in layer.parameters]
        return dims[0] if dims else 0
    node = layer.nodes[0]
    made = [v for v in pytree.tree_leaves(value_of(node)) if isinstance(v, Tensor)]
    if not made or not made[0].dim():
        return 0
    axis = made[0].dim() - 1 - _spatial(analysis.traced, node)
    label = analysis.flow.labels.get(node)
    if node.op == "call_function" and not op_name(node) and isinstance(label, Label):
        axis = next(iter(label.varying), axis)  # a function of a user's: its rule knows
    return counts.along(label, axis) if isinstance(label, Label) else made[0].shape[axis]


def _spatial(traced: Traced, node: Node) -> int:
    """Axes behind that of the channels."""
    if node.op == "call_module":
        module = traced.module(node)
        return len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0
    name = op_name(node)
    return int(name[-2]) if name.startswith("conv") else 0


def _macs(
    analysis: Analysis, layers: Sequence[_Layer], counts: _Counts, fixed: Mapping[str, int]
) -> list[int]:
    """Multiply-adds per layer, whole numbers whose sum is what `Cost` says of the network."""
    of_node = {node.name: i for i, layer in enumerate(layers) for node in layer.nodes}
    costs = np.zeros(len(layers))
    terms = analysis.flow.ledger.macs
    by_rule = [t.factor * math.prod(counts.of(d) for d in t.dims) for t in terms]
    for term, cost in zip(terms, by_rule, strict=True):
        costs[of_node[term.node]] += cost
    for node, count in fixed.items():
        if count:
            costs[of_node[node]] += count / analysis.traced.batch
    total = round(float(np.sum(by_rule))) + round(sum(fixed.values()) / analysis.traced.batch)
    return _apportioned(costs, total)


def _apportioned(costs: Array, total: int) -> list[int]:
    """Whole numbers near the costs that sum to the total: the largest remainders are rounded up.

    The total is a sum of two rounded numbers, and may be less than that of the rounded costs. A row
    that costs nothing gets nothing.
    """
    whole = np.floor(costs + 1e-6).astype(np.int64)
    missing = total - int(whole.sum())
    order = np.argsort(whole - costs, kind="stable")
    while missing > 0:
        rows = order[costs[order] > 0][:missing]
        whole[rows] += 1
        missing -= len(rows)
    while missing < 0:  # guard: rounded down twice -> tests/test_layers.py -k apportioned
        rows = order[whole[order] > 0][missing:]
        whole[rows] -= 1
        missing += len(rows)
    return [int(n) for n in whole]
