"""The walk over a graph: every node gets a label by the rule of its operation.

Rules live in `fxprune.rules`, one file per kind of operation, and are registered here with `@rule`.
An operation without a rule freezes the channels that reach it: the model stays valid, and the
report names the node and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.graph import first_argument, op_name, value_of
from fxprune.labels import Label, Ledger, uncut
from fxprune.symbolic import LEAVES
from fxprune.trace import Traced, assertion

Value = Any  # Label, or a tuple of values, or None for what is not a tensor


@dataclass
class Flow:
    """The walk over one graph: labels so far, and the ledger."""

    traced: Traced
    ledger: Ledger
    labels: dict[Node, Value] = field(default_factory=dict)

    def of(self, arg: Any) -> Label | None:
        """The label of an argument, or None where it is no tensor."""
        value = self.labels.get(arg) if isinstance(arg, Node) else None
        return value if isinstance(value, Label) else None

    def first(self, node: Node) -> Label:
        """The label of the first argument, which is a tensor."""
        label = self.of(first_argument(node))
        return label if label is not None else uncut(getattr(value_of(node), "shape", ()))

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
RULES: dict[str | type[nn.Module], Rule] = {}


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


def flow_through(traced: Traced, whole_groups: Mapping[str, bool] = MappingProxyType({})) -> Flow:
    """Walk the graph once and label every node; how grouped weights are cut may be given."""
    flow = Flow(traced, Ledger(traced.tensors, whole_groups=dict(whole_groups)))
    for node in traced.graph.nodes:
        flow.labels[node] = _visit(flow, node)
        _note_whole_reads(flow, node)
        for label in leaves(flow.labels[node]):
            several = len(label.varying) > 1
            if several:  # guard: rectangles -> tests/test_law.py -k shuffle_view
                flow.ledger.arrays.append(label.ids)
    flow.ledger.freeze_whole()  # guard: read whole -> tests/bad_input/test_kept.py -k "elsewhere or read"
    return flow


def _note_whole_reads(flow: Flow, node: Node) -> None:
    """A parameter of several axes that the node's rule did not read along known axes stays whole."""
    for source in node.all_input_nodes:
        label = flow.labels.get(source)
        if (
            isinstance(label, Label)
            and label.param
            and (label.param, node) not in flow.ledger.claimed
        ):
            why = f"`{label.param}` is read as a whole"
            flow.ledger.whole.setdefault(label.param, (node, why))


def _visit(flow: Flow, node: Node) -> Value:
    if node.op == "placeholder":
        return uncut_like(value_of(node))
    if node.op == "get_attr":
        return _attribute(flow, node)
    if node.op == "output":  # guard: outputs stay -> tests/test_groups.py -k outputs
        for label in flow.inputs(node):
            flow.ledger.freeze(label.ids, node, "outputs of the model keep their channels")
        return None
    if node.op == "call_module":
        return _visit_module(flow, node)
    found = rule_of(op_name(node))
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
    """A parameter or buffer: one axis longer than 1 gets ids at once, several on demand."""
    t = flow.traced.attribute(node)
    if not isinstance(t, Tensor):
        return None
    name = flow.ledger.tensors.add(str(node.target), t)
    long = [d for d, n in enumerate(t.shape) if n > 1]
    if t.dim() > 1 and node.users and all(_is_weight(node, user) for user in node.users):
        return Label(
            tuple(t.shape), uncut(t.shape).ids, param=name
        )  # its axes are told apart there
    if unsliceable(t) or not long:
        return uncut(t.shape)
    if len(long) > 1:
        return Label(tuple(t.shape), uncut(t.shape).ids, param=name)
    return Label(tuple(t.shape), axis_ids(flow, name, t, long[0], node))


def _is_weight(node: Node, user: Node) -> bool:
    """Whether a node is the weight of a convolution or linear that a function computes."""
    weight = user.args[1] if len(user.args) > 1 else user.kwargs.get("weight")
    return weight is node and op_name(user).startswith(("conv", "linear"))


def axis_ids(flow: Flow, name: str, t: Tensor, axis: int, node: Node) -> Tensor:
    """Ids of one axis of a parameter, shaped to broadcast against it."""
    known = flow.ledger.slots.get((name, axis))
    ids = known.ids if known else flow.ledger.fresh(t.shape[axis])
    ids = flow.ledger.slot(name, axis, "out", ids, node)
    return ids.view([-1 if d == axis else 1 for d in range(t.dim())])
