"""The walk over a graph: every node gets a label by the rule of its operation.

Rules live in `fxprune.rules`, one file per kind of operation, and are registered here with `@rule`.
An operation without a rule freezes the channels that reach it: the model stays valid, and the
report names the node and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.graph import first_argument, in_place, op_name, own_key, value_of
from fxprune.labels import UNCUT, Label, Ledger, Part, uncut
from fxprune.symbolic import LEAF_CLASSES, LEAVES
from fxprune.trace import Traced, assertion

Value = Any  # Label, or a tuple of values, or None for what is not a tensor


@dataclass
class Flow:
    """The walk over one graph: labels so far, and the ledger."""

    traced: Traced
    ledger: Ledger
    labels: dict[Node, Value] = field(default_factory=dict)

    computed: set[Node] = field(default_factory=set)  # from the input; others are constants

    def of(self, arg: Any) -> Label | None:
        """The label of an argument, or None where it is no tensor."""
        value = self.labels.get(arg) if isinstance(arg, Node) else None
        return value if isinstance(value, Label) else None

    def first(self, node: Node) -> Label:
        """The label of the first argument, which is a tensor."""
        label = self.of(first_argument(node))
        return label if label is not None else uncut(getattr(value_of(node), "shape", ()))

    def bind(
        self,
        node: Node,
        label: Label,
        axes: Sequence[int],
        *,
        role: str = "out",
        producer: bool = False,
    ) -> Label:
        """A tensor made of parameters takes ids along `axes`, on which what it meets has channels.

        Of a parameter that has several dimensions there, the first takes ids and the others stay.
        Labels of activations are returned as they are.
        """
        if not label.parts or not label.uncut:
            return label
        met = [p for p in label.parts if any(p.index.shape[d] > 1 for d in axes)]
        first: dict[str, int] = {}
        for part in met:
            first.setdefault(part.tensor, part.dim)
        bound: list[Tensor] = []
        for part in met:
            if first[part.tensor] == part.dim:
                bound.append(self._placed(node, part, role, producer))
        if not bound:
            return Label(label.shape, label.ids)
        ids, *others = bound
        for other in others:
            both = (ids != UNCUT) & (other != UNCUT)
            if bool(both.any()):
                a, b = torch.broadcast_tensors(ids, other)
                self.ledger.couple(a[both], b[both], node)
            ids = torch.where(ids != UNCUT, ids, other)
        beside = [d for d in range(ids.dim()) if ids.shape[d] > 1 and d not in axes]
        why = f"part of `{met[0].tensor}` is read whole"
        return Label(label.shape, self.ledger.couple_along(ids, beside, node, why))

    def couple_all(self, node: Node, labels: Sequence[Label]) -> Tensor:
        """Tensors that lie beside each other are cut alike; returns the ids that they share."""
        widest = max(labels, key=lambda label: label.ids.numel())
        for other in labels:
            why = "it lies beside a tensor whose channels cannot be cut"
            self.ledger.couple(widest.ids, other.ids, node, why)
        return widest.ids

    def _placed(self, node: Node, part: Part, role: str, producer: bool) -> Tensor:
        """The ids of one dimension of a parameter, where they lie in a tensor made of it."""
        ledger = self.ledger
        if part.key in ledger.made:
            ledger.claimed.add((*part.key, node))
            ledger.bound.add(part.key)
            ids = ledger.made[part.key]
            return torch.where(part.index >= 0, ids[part.index.clamp(min=0)], UNCUT)
        length = ledger.tensors.tensor[part.tensor].shape[part.dim]
        known = ledger.slots.get(part.key)
        ids = known.ids if known else ledger.fresh(length)
        ids = ledger.slot(part.tensor, part.dim, role, ids, node, producer=producer)
        ledger.claimed.add((*part.key, node))
        return torch.where(part.index >= 0, ids[part.index.clamp(min=0)], UNCUT)

    def inputs(self, node: Node) -> list[Label]:
        """Labels of all tensors among the arguments."""
        found: list[Label] = []
        for n in node.all_input_nodes:
            found += leaves(self.labels.get(n))
        return found


def leaves(value: Value) -> list[Label]:
    """The labels in a value."""
    if isinstance(value, Label):
        return [value]
    if value is None:
        return []
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Label)]


Rule = Callable[[Flow, Node], Value]
RULES: dict[Any, Rule] = {}  # by plain name, class of a module, or the function itself


def rule(*keys: str | type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for functions and methods (by plain name) and modules.

    Modules are matched by exact class, or by its full dotted name where importing it is too much.
    A class with a rule is not traced into.
    """

    def register(function: Rule) -> Rule:
        for key in keys:
            if key in RULES:
                raise ValueError(f"two rules for {key}")
            RULES[key] = function
            if isinstance(key, type):
                LEAVES.add(key)
            elif "." in key:
                LEAF_CLASSES.add(key)
        return function

    return register


FALLBACKS: list[tuple[Callable[[str], bool], Rule]] = []


def rule_where(known: Callable[[str], bool]) -> Callable[[Rule], Rule]:
    """Register a rule for all functions and methods whose plain name satisfies `known`."""

    def register(function: Rule) -> Rule:
        FALLBACKS.append((known, function))
        return function

    return register


def rule_of(name: str) -> Rule | None:
    """The rule of a function or method by its plain name."""
    if name in RULES:
        return RULES[name]
    return next((function for known, function in FALLBACKS if known(name)), None)


def flow_through(
    traced: Traced,
    whole_groups: Mapping[str, bool] = MappingProxyType({}),
    by_head_dims: bool = False,
) -> Flow:
    """Walk the graph once and label every node; how grouped weights are cut may be given.

    by_head_dims: attention loses the same dimensions of all heads, not whole heads.
    """
    ledger = Ledger(traced.tensors, whole_groups=dict(whole_groups), by_head_dims=by_head_dims)
    ledger.saved = frozenset(traced.model.state_dict())
    flow = Flow(traced, ledger)
    for node in traced.graph.nodes:
        if node.op == "placeholder" or not flow.computed.isdisjoint(node.all_input_nodes):
            flow.computed.add(node)
        flow.labels[node] = _visit(flow, node)
        _write_back(flow, node)
        _pin_what_is_lost(flow, node)
        for label in leaves(flow.labels[node]):
            several = len(label.varying) > 1 and node not in flow.ledger.loose
            if several:  # guard: rectangles -> tests/test_movement.py -k elsewhere
                flow.ledger.arrays.append(label.ids)
    flow.ledger.freeze_whole()
    return flow


_VIEWS = {
    "view", "getitem", "select", "narrow", "transpose", "permute", "unsqueeze", "squeeze", "expand",
    "chunk", "split", "unbind", "flatten", "reshape", "t", "detach", "unflatten", "movedim",
}  # fmt: skip


def _write_back(flow: Flow, node: Node) -> None:
    """A tensor made of parameters that is changed in place is, from here on, what was written."""
    written = first_argument(node)
    made, before = flow.labels[node], flow.labels.get(written) if isinstance(written, Node) else None  # fmt: skip
    if not in_place(node) or not isinstance(made, Label) or not isinstance(before, Label):
        return
    held = {part.key for part in before.parts}
    new = [part for part in made.parts if part.key not in held]
    if not new or made.shape != before.shape:
        return
    flow.labels[written] = made
    if op_name(written) in _VIEWS:  # guard: written view -> tests/test_products.py -k written
        for part in made.parts:
            why = f"`{part.tensor}` is written into a part of another tensor"
            flow.ledger.pinned.setdefault(part.key, (node, why))


_SHARING = _VIEWS | {  # results that may share memory with the first argument
    "contiguous", "to", "type_as", "float", "double", "split_with_sizes", "tensor_split", "unfold",
    "dropout", "diagonal", "expand_as", "view_as", "reshape_as", "broadcast_to", "ravel", "getattr",
}  # fmt: skip


def writers(flow: Flow, node: Node, reader: Node | None = None) -> list[Node]:
    """The calls that write into a tensor's memory after it is made (and before `reader` reads it)."""
    root: Any = node
    while isinstance(root, Node) and _shares(flow, root):
        root = first_argument(root)
    shared, found = [root] if isinstance(root, Node) else [], []
    for alias in shared:
        for user in alias.users:
            if first_argument(user) is not alias or user in shared:
                continue
            if _writes(flow, user) and node < user and (reader is None or user < reader):
                found.append(user)
            if _shares(flow, user):
                shared.append(user)
    return found


def _shares(flow: Flow, node: Node) -> bool:
    if node.op == "call_module":
        module = flow.traced.module(node)
        kinds = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
        return isinstance(module, kinds) or _writes(flow, node)
    return node.op.startswith("call_") and (op_name(node) in _SHARING or in_place(node))


def _writes(flow: Flow, node: Node) -> bool:
    """Whether a call writes into its first argument."""
    if node.op == "call_module":
        return getattr(flow.traced.module(node), "inplace", False) is True
    return in_place(node)


def _pin_what_is_lost(flow: Flow, node: Node) -> None:
    """Dimensions of parameters that a node reads, and neither understands nor passes on, stay."""
    given = [p for n in node.all_input_nodes for label in leaves(flow.labels.get(n)) for p in label.parts]  # fmt: skip
    if not given or _only_tells(node):
        return
    passed = {part.key for label in leaves(flow.labels[node]) for part in label.parts}
    for part in given:
        lost = part.key not in passed and (*part.key, node) not in flow.ledger.claimed
        if lost:  # guard: read whole -> tests/bad_input/test_kept.py -k "elsewhere or read"
            why = f"`{part.tensor}` is read as a whole"
            flow.ledger.pinned.setdefault(part.key, (node, why))


def _only_tells(node: Node) -> bool:
    """Whether a node tells a size, a type or a device of a tensor, and nothing of what it holds."""
    made = pytree.tree_leaves(value_of(node))
    return node.op != "output" and not any(isinstance(v, Tensor) for v in made)


def _visit(flow: Flow, node: Node) -> Value:
    if node.op == "placeholder":
        return uncut_like(value_of(node))
    if node.op == "get_attr":
        return _attribute(flow, node)
    if node.op == "output":  # guard: outputs stay -> tests/test_groups.py -k outputs
        for label in flow.inputs(node):
            flow.ledger.freeze(label.ids, node, "outputs of the model keep their channels")
        return None
    if isinstance(node.target, type) and all(user.op == "output" for user in node.users):
        for label in flow.inputs(node):
            flow.ledger.freeze(label.ids, node, "outputs of the model keep their channels")
        return None
    if node.op == "call_module":
        return _visit_module(flow, node)
    own = RULES.get(own_key(node.target)) if node.op == "call_function" else None
    found = own or rule_of(op_name(node))
    if found is not None:
        return found(flow, node)
    if assertion(node) or not flow.inputs(node):
        return uncut_like(value_of(node))
    shown = getattr(node.target, "__name__", str(node.target))
    return opaque(flow, node, f"fxprune has no rule for `{shown}`")


def _visit_module(flow: Flow, node: Node) -> Value:
    module = flow.traced.module(node)
    name = type(module).__name__
    if _computed(module):  # guard: computed weight -> tests/bad_input/test_weights.py -k norm
        return opaque(
            flow,
            node,
            f"`{node.target}.weight` is computed by a hook; torch.nn.utils.remove_weight_norm, "
            "remove_spectral_norm or prune.remove makes it prunable",
        )
    if node.target in flow.traced.hooked:  # guard: hooks -> tests/bad_input/test_hooks.py
        return opaque(flow, node, f"`{node.target}` has hooks that may change what it computes")
    parametrized = hasattr(module, "parametrizations")
    if parametrized:  # guard: parametrized -> tests/bad_input/test_weights.py -k parametrized
        why = f"`{node.target}` is parametrized; torch.nn.utils.parametrize.remove_parametrizations"
        return opaque(flow, node, why + " makes it prunable")
    kind = type(module)
    found = RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}")
    if found is None:
        return opaque(flow, node, f"fxprune has no rule for the module {name}")
    for key, t in [*module._parameters.items(), *module._buffers.items()]:
        if t is not None and t.dim() and (why := unsliceable(t)):
            return opaque(flow, node, f"`{node.target}.{key}` is {why}")
    return found(flow, node)


def _computed(module: nn.Module) -> bool:
    """Whether hooks compute the weight: old weight_norm, spectral_norm, and pruning by masks."""
    parts = ("weight_g", "weight_v", "weight_orig", "weight_mask", "bias_orig")
    plain = any(isinstance(vars(module).get(own), Tensor) for own in ("weight", "bias"))
    return plain or any(part in module._parameters for part in parts)


def unsliceable(t: Tensor) -> str:
    """Why a tensor cannot be sliced; "" when it can."""
    if t.is_complex():
        return "complex"
    if t.is_quantized:
        return "quantized"
    if t.layout is not torch.strided:
        return f"stored as {t.layout}"
    return ""


def uncut_like(value: Any) -> Value:
    """Labels of values that no pruning touches."""
    if isinstance(value, Tensor):
        return uncut(value.shape)
    return pytree.tree_map(lambda v: uncut(v.shape) if isinstance(v, Tensor) else None, value)


def opaque(flow: Flow, node: Node, why: str) -> Value:
    """Freeze all channels that reach the node; what leaves it cannot be cut."""
    for label in flow.inputs(node):  # guard: unknown freezes -> tests/test_groups.py -k unknown
        flow.ledger.freeze(label.ids, node, why)
    if node.op == "call_module":
        for t in flow.traced.module(node).state_dict(keep_vars=True).values():
            name = flow.ledger.tensors.name(t)
            if name is not None:
                flow.ledger.whole.setdefault(name, (node, why))
    return uncut_like(value_of(node))


def _attribute(flow: Flow, node: Node) -> Value:
    """A parameter or buffer: its dimensions get ids where they meet channels."""
    t = flow.traced.attribute(node)
    if not isinstance(t, Tensor):
        return None
    name = flow.ledger.tensors.add(str(node.target), t)
    if unsliceable(t):
        return uncut(t.shape)
    parts = [
        Part(name, d, torch.arange(n).view([-1 if d == axis else 1 for axis in range(t.dim())]))
        for d, n in enumerate(t.shape)
        if n > 1
    ]
    return Label(tuple(t.shape), uncut(t.shape).ids, tuple(parts))
