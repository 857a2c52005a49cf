"""nn.Module -> graph with a shape on every node, in both modes, without touching the model.

Promises: the model is left as it was; every node carries `meta["val"]` (a meta tensor, a number,
a tuple) and, where known, `meta["where"]` (the user's file:line).
Refuses:  control flow that depends on data, hooks that would be lost, train and eval modes that
compute different things. Differences that are only an argument (`dropout(x, training=...)`)
follow `self.training` afterwards; branches that exist only in training are dropped and named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from fxprune.admission import admit
from fxprune.errors import TraceError
from fxprune.graph import Tensors, get_path, op_name
from fxprune.hints import Hints, to_meta, twin
from fxprune.modes import Flags, compare_modes
from fxprune.symbolic import at_once, capture, set_mode, unmarked

__all__ = ["Traced", "assertion", "batch_size", "to_meta", "trace", "twin"]


@dataclass
class Traced:
    """A graph over the user's own modules (shared, never changed) and what the front end learnt."""

    model: nn.Module
    graph: Graph
    example_inputs: tuple[Any, ...]
    tensors: Tensors
    front_end: str = "fx"
    constants: dict[str, Tensor] = field(default_factory=dict)  # tensors that forward makes
    mode_flags: dict[Node, Flags] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: frozenset[str] = frozenset()  # children that only train mode uses
    hooked: frozenset[str] = frozenset()  # leaf modules with hooks
    _modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """Samples in the example input: the length of its first tensor that has a batch axis."""
        return batch_size(self.example_inputs)

    def module(self, node: Node) -> nn.Module:
        """The module that a call_module node calls."""
        name = str(node.target)
        if name not in self._modules:
            self._modules[name] = get_path(self.model, name)
        return self._modules[name]

    def attribute(self, node: Node) -> Any:
        """What a get_attr node reads: a parameter, a buffer, or a tensor that forward made."""
        name = str(node.target)
        return self.constants[name] if name in self.constants else get_path(self.model, name)


def batch_size(inputs: Any) -> int:
    """The length of the first tensor with at least two axes; 1 where there is none."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() > 1]
    return max(tensors[0].shape[0], 1) if tensors else 1


def trace(model: nn.Module, example_inputs: tuple[Any, ...]) -> Traced:
    """Trace `model` in both modes and put shapes on every node; TraceError says what is in the way."""
    admitted = admit(model, example_inputs)
    try:
        with at_once(model):
            with unmarked(model, noise=False):  # forward may keep what it computed
                evaluating = capture(model, example_inputs, training=False)
            training = capture(model, example_inputs, training=True, earlier=evaluating.hints)
    except TraceError as refused:
        return _by_export(model, example_inputs, refused)
    modes = compare_modes(evaluating, training)
    return Traced(
        model,
        evaluating.graph,
        example_inputs,
        Tensors.of(model),
        constants=evaluating.constants,
        mode_flags=modes.flags,
        notes=[*admitted.notes, *modes.notes, *evaluating.notes],
        dropped=modes.dropped,
        hooked=admitted.hooked,
    )


def _by_export(model: nn.Module, example_inputs: tuple[Any, ...], refused: TraceError) -> Traced:
    """The second front end, for what symbolic tracing refuses; where both refuse, the first says why."""
    from fxprune.exported import trace_exported

    try:
        return trace_exported(model, example_inputs, str(refused).splitlines()[0])
    except TraceError as again:
        refused.add_note(f"torch.export refuses it, too: {str(again).splitlines()[0]}")
        raise refused from again


def _shapes(traced: Traced) -> None:
    """Fill in what every node gives, where the front end has not."""
    set_mode(traced.model, False)
    hints = Hints(traced.model, traced.example_inputs, constants=traced.constants)
    hints.of(next(iter(reversed(traced.graph.nodes))))


def assertion(node: Node) -> bool:
    """Whether a node only checks something, and gives no tensor."""
    return op_name(node) in ("_assert", "_assert_is_none", "_assert_async")
