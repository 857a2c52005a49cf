"""nn.Module -> graph with a shape on every node, in both modes, without touching the model.

Promises: the model is left as it was; every node carries `meta["val"]` (a meta tensor, a number,
a tuple) and, where known, `meta["where"]` (the user's file:line).
Refuses:  control flow that depends on data, hooks that would be lost, train and eval modes that
compute different things. Differences that are only an argument (`dropout(x, training=...)`)
follow `self.training` afterwards; branches that exist only in training are dropped and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.admission import admit
from fxprune.errors import TraceError
from fxprune.graph import Tensors, get_path, op_name, place
from fxprune.modes import Flags, compare_modes
from fxprune.symbolic import at_once, capture, first_line, set_mode

SAME_SHAPE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.ChannelShuffle,
)  # fmt: skip


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
    with at_once(model):
        training = capture(model, example_inputs, training=True)
        evaluating = capture(model, example_inputs, training=False)
    modes = compare_modes(evaluating, training)
    traced = Traced(
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
    with at_once(model):
        _shapes(traced)
    return traced


# Shapes


def _shapes(traced: Traced) -> None:
    """Run the graph on meta tensors; where an operation has no meta form, on real ones."""
    set_mode(traced.model, False)
    try:
        with torch.no_grad():
            _propagate(traced, real=False)
    except Exception:
        set_mode(traced.model, False)
        try:
            with torch.no_grad():
                _propagate(traced, real=True)
        except Exception as error:
            node = getattr(error, "_fxprune_node", None)
            raise TraceError(
                f"{type(traced.model).__name__} does not accept the example input: {first_line(error)}",
                where=f"node {node.name} at {place(node) or 'unknown line'}" if node else None,
                why=f"the example input is {_shapes_of(traced.example_inputs)}",
                fix=_remedy(traced),
            ) from error


def _shapes_of(inputs: tuple[Any, ...]) -> str:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    return ", ".join(f"{_dtype(t.dtype)} of shape {tuple(t.shape)}" for t in tensors)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remedy(traced: Traced) -> str:
    """What to pass instead, as far as types tell."""
    own = next((p.dtype for p in traced.model.parameters() if p.is_floating_point()), None)
    given = next((t.dtype for t in pytree.tree_leaves(traced.example_inputs) if isinstance(t, Tensor)), own)  # fmt: skip
    if own is not None and given != own:
        return (
            f"the parameters are {_dtype(own)}: pass x.to(torch.{_dtype(own)}), if it is an image"
        )
    return "pass example_inputs=... of the shape that forward expects, with a batch dimension"


def to_meta(value: Any) -> Any:
    """Tensors replaced by meta tensors of the same shape, dtype and strides.

    Quantized ones stay as they are: torch has them on the meta device in name only.
    """
    if not isinstance(value, Tensor) or value.is_quantized:
        return value
    return torch.empty_like(value, device="meta")


def _propagate(traced: Traced, real: bool) -> None:
    inputs = iter(traced.example_inputs)
    twins: dict[int, nn.Module] = {}
    values: dict[Node, Any] = {}
    for node in traced.graph.nodes:
        try:
            values[node] = _run(traced, node, values, inputs, twins, real)
        except Exception as error:
            error._fxprune_node = node  # type: ignore[attr-defined]
            raise
        node.meta["val"] = pytree.tree_map(to_meta, values[node]) if real else values[node]


def _run(
    traced: Traced,
    node: Node,
    values: dict[Node, Any],
    inputs: Iterator[Any],
    twins: dict[int, nn.Module],
    real: bool,
) -> Any:
    if node.op == "placeholder":
        value = next(inputs, node.args[0] if node.args else None)
        return value if real else to_meta(value)
    if node.op == "get_attr":
        value = traced.attribute(node)
        return value if real else to_meta(value)
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        module = traced.module(node)
        if not real:
            if isinstance(module, SAME_SHAPE) and isinstance(args[0], Tensor):
                return args[0]
            module = twin(module, to_meta, twins)
        return module.forward(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return args[0]


def twin(
    module: nn.Module, like: Callable[[Any], Any], twins: dict[int, nn.Module] | None = None
) -> nn.Module:
    """A copy of a layer with other tensors in place of its own, sharing everything else.

    What its forward leaves on it (a weight that a hook computes, ...), it leaves on the copy.
    """
    twins = {} if twins is None else twins
    if id(module) not in twins:
        new = module.__class__.__new__(module.__class__)
        new.__dict__ = dict(module.__dict__)
        new.__dict__["_parameters"] = {k: like(v) for k, v in module._parameters.items()}
        new.__dict__["_buffers"] = {k: like(v) for k, v in module._buffers.items()}
        new.__dict__["_modules"] = {
            k: None if m is None else twin(m, like, twins) for k, m in module._modules.items()
        }
        if isinstance(new, nn.RNNBase):  # it keeps a list of its parameters
            new._flat_weights = [getattr(new, name, None) for name in new._flat_weights_names]
        twins[id(module)] = new
    return twins[id(module)]


def assertion(node: Node) -> bool:
    """Whether a node only checks something, and gives no tensor."""
    return op_name(node) in ("_assert", "_assert_is_none", "_assert_async")
