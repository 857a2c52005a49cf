"""nn.Module -> graph with a shape on every node, in both modes, without touching the model.

Promises: the model is left as it was; every node carries `meta["val"]` (a meta tensor, a number,
a tuple) and, where known, `meta["where"]` (the user's file:line).
Refuses:  control flow that depends on data, hooks that would be lost, train and eval modes that
compute different things. Differences that are only an argument (`dropout(x, training=...)`)
follow `self.training` afterwards; branches that exist only in training are dropped and named.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph import Tensors, get_path, op_name, place, signature

TORCH_HOME = str(Path(torch.__file__).parent)
FXPRUNE_HOME = str(Path(__file__).parent)
LEAF_CLASSES = {"torchvision.ops.misc.FrozenBatchNorm2d", "torchvision.ops.stochastic_depth.StochasticDepth"}  # fmt: skip
SAME_SHAPE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.ChannelShuffle,
)  # fmt: skip


class ModeCall(nn.Module):
    """A function call whose arguments differ between modes: it follows `self.training`.

    `flags[arg] = (value in eval, value in train)`, where arg is a position or a keyword.
    """

    def __init__(
        self, function: Callable[..., Any], flags: dict[int | str, tuple[Any, Any]]
    ) -> None:
        super().__init__()
        self.function = function
        self.flags = flags

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the arguments of the present mode."""
        changed = list(args)
        for key, values in self.flags.items():
            value = values[1] if self.training else values[0]
            if isinstance(key, int):
                changed[key] = value
            else:
                kwargs[key] = value
        return self.function(*changed, **kwargs)

    def extra_repr(self) -> str:
        """Name the function in `print(model)`."""
        return getattr(self.function, "__name__", repr(self.function))


@dataclass
class Traced:
    """A graph over the user's own modules (shared, never changed) and what the front end learnt."""

    model: nn.Module
    graph: Graph
    example_inputs: tuple[Any, ...]
    tensors: Tensors
    front_end: str = "fx"
    mode_flags: dict[Node, dict[int | str, tuple[Any, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hooked: frozenset[str] = frozenset()  # leaf modules with hooks

    @property
    def batch(self) -> int:
        """Samples in the example input: the length of its first tensor that has a batch axis."""
        return batch_size(self.example_inputs)

    def module(self, node: Node) -> nn.Module:
        """The module that a call_module node calls."""
        found: nn.Module = get_path(self.model, str(node.target))
        return found


def batch_size(inputs: Any) -> int:
    """The length of the first tensor with at least two axes; 1 where there is none."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() > 1]
    return max(tensors[0].shape[0], 1) if tensors else 1


class FxTracer(Tracer):
    """Symbolic tracing with torch's own modules as leaves; notes the user's line of every node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn modules, and classes known not to trace, stay one node."""
        kind = type(m)
        if f"{kind.__module__}.{kind.__qualname__}" in LEAF_CLASSES or isinstance(m, ModeCall):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """As the base class, and remember who asked."""
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = _users_line()
        return node


def _users_line() -> str:
    """file:line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH_HOME, FXPRUNE_HOME, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def trace(model: nn.Module, example_inputs: tuple[Any, ...]) -> Traced:
    """Trace `model` in both modes and put shapes on every node; TraceError says what is in the way."""
    hooked = _check_hooks(model)
    _check_lazy(model)
    with _modes_restored(model):
        training = _symbolic(model, example_inputs, training=True)
        graph = _symbolic(model, example_inputs, training=False)
        traced = Traced(model, graph, example_inputs, Tensors.of(model), hooked=hooked)
        _compare_modes(traced, training)
        _shapes(traced)
    return traced


# Modes


@contextlib.contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    """Give every module its `training` flag back, whatever happens inside."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.__dict__["training"] = mode


def _set_mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():  # not model.train(): users override it
        module.__dict__["training"] = training


def _compare_modes(traced: Traced, training: Graph) -> None:
    """Match every eval node with a train node; what is left over exists only in training."""
    twins: dict[Node, Node] = {}
    by_key: dict[Any, list[Node]] = {}
    for node in training.nodes:
        by_key.setdefault((node.op, node.target, _shape_of_args(node)), []).append(node)
    unmatched = set(training.nodes)
    for node in traced.graph.nodes:
        if node.op == "output":
            _compare_outputs(node, training, twins)
            continue
        for other in by_key.get((node.op, node.target, _shape_of_args(node)), ()):
            if other in unmatched and (flags := _differing_flags(node, other, twins)) is not None:
                twins[node] = other
                unmatched.remove(other)
                if flags:
                    traced.mode_flags[node] = flags
                break
        else:
            raise TraceError(
                "the model computes different things in train and eval mode",
                where=f"node {node.name} at {place(node) or 'unknown line'}, in eval mode only",
                why="a branch on `self.training` that is more than a `training` argument "
                "or an auxiliary head would be frozen into one of its sides",
                fix="move the branch into a module of its own and keep it out of the traced part, "
                "or prune a sub-module without it",
            )
    left = [n for n in training.nodes if n in unmatched and n.op != "output"]
    if left:
        heads = sorted({str(n.target).split(".")[0] for n in left if n.op == "call_module"})
        named = ", ".join(heads) or f"{len(left)} operations at {place(left[0])}"
        traced.notes.append(f"branches that exist only in training were dropped: {named}")


def _shape_of_args(node: Node) -> tuple[int, tuple[str, ...]]:
    return len(node.args), tuple(node.kwargs)


def _differing_flags(
    node: Node, other: Node, twins: dict[Node, Node]
) -> dict[int | str, tuple[Any, Any]] | None:
    """The arguments in which two calls differ, if all are plain booleans; None otherwise."""
    flags: dict[int | str, tuple[Any, Any]] = {}
    pairs = [*enumerate(zip(node.args, other.args, strict=True))]
    pairs += [(k, (node.kwargs[k], other.kwargs[k])) for k in node.kwargs]  # type: ignore[misc]
    for key, (a, b) in pairs:
        if _same(a, b, twins):
            continue
        if node.op != "call_function" or not (isinstance(a, bool) and isinstance(b, bool)):
            return None
        flags[key] = (a, b)
    return flags


def _same(a: Any, b: Any, twins: dict[Node, Node]) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return isinstance(a, Node) and twins.get(a) is b
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y, twins) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], twins) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step), twins)
    return type(a) is type(b) and bool(a == b)


def _compare_outputs(output: Node, training: Graph, twins: dict[Node, Node]) -> None:
    """The eval output must be the train output, or its first part (an auxiliary head follows)."""
    (theirs,) = next(n for n in reversed(training.nodes) if n.op == "output").args
    (ours,) = output.args
    if _same(ours, theirs, twins):
        return
    parts: Sequence[Any] = ()
    if isinstance(theirs, Node) and hasattr(theirs.target, "_fields"):  # a named tuple
        parts = [*theirs.args, *theirs.kwargs.values()]
    elif isinstance(theirs, tuple | list):
        parts = list(theirs)
    elif isinstance(theirs, dict):
        parts = list(theirs.values())
        if isinstance(ours, dict) and all(
            k in theirs and _same(v, theirs[k], twins) for k, v in ours.items()
        ):
            return
    if any(_same(ours, part, twins) for part in parts):
        return
    raise TraceError(
        "the model returns different things in train and eval mode",
        where=f"forward of {type(output.graph.owning_module).__name__}"
        if output.graph.owning_module
        else "the output of forward",
        why="the eval output is not among the train outputs",
        fix="return the same thing in both modes, or prune the sub-module before the branch",
    )


# Symbolic tracing


def _symbolic(model: nn.Module, example_inputs: tuple[Any, ...], training: bool) -> Graph:
    _set_mode(model, training)
    try:
        return FxTracer().trace(model, _defaults(model, len(example_inputs)))
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: {_first_line(error)}",
            where=_failing_line(error),
            why="symbolic tracing cannot follow control flow that depends on the data "
            "or on sizes, nor calls that need real values",
            fix="make that branch a module of its own, replace the condition by a constant, "
            "or prune a sub-module that traces: fxprune.compile(model.backbone, ...)",
        ) from error


def _defaults(model: nn.Module, given: int) -> dict[str, Any] | None:
    """Arguments of forward beyond the example inputs keep their defaults, made concrete."""
    params = list(signature(model.forward).parameters.values())
    extra = [
        p
        for p in params[given:]
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is not p.empty
    ]
    return {p.name: p.default for p in extra} or None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _failing_line(error: BaseException) -> str:
    """The innermost user line of a traceback, with its text."""
    found = "unknown line"
    tb = error.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if not file.startswith((TORCH_HOME, FXPRUNE_HOME, "<")):
            import linecache

            found = f"{file}:{tb.tb_lineno}: {linecache.getline(file, tb.tb_lineno).strip()}"
        tb = tb.tb_next
    return found


# Shapes


def _shapes(traced: Traced) -> None:
    """Run the graph on meta tensors; where an operation has no meta form, on real ones."""
    _set_mode(traced.model, False)
    try:
        with torch.no_grad():
            _propagate(traced, real=False)
    except Exception:
        _set_mode(traced.model, False)
        try:
            with torch.no_grad():
                _propagate(traced, real=True)
        except Exception as error:
            node = getattr(error, "_fxprune_node", None)
            raise TraceError(
                f"{type(traced.model).__name__} does not accept the example input: {_first_line(error)}",
                where=f"node {node.name} at {place(node) or 'unknown line'}" if node else None,
                why=f"the example input has shape {_shapes_of(traced.example_inputs)}",
                fix="pass example_inputs=... of the shape that the model expects",
            ) from error


def _shapes_of(inputs: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in inputs if isinstance(t, Tensor)) or "no tensor"


def to_meta(value: Any) -> Any:
    """Tensors replaced by meta tensors of the same shape, dtype and strides."""
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


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
        value = get_path(traced.model, str(node.target))
        return value if real else to_meta(value)
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        module = traced.module(node)
        if not real:
            if isinstance(module, SAME_SHAPE) and isinstance(args[0], Tensor):
                return args[0]
            module = _meta_twin(module, twins)
        return module.forward(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return args[0]


def _meta_twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A copy of a leaf module with meta tensors, sharing everything else."""
    if id(module) not in twins:
        twin = module.__class__.__new__(module.__class__)
        twin.__dict__ = dict(module.__dict__)
        twin.__dict__["_parameters"] = {k: to_meta(v) for k, v in module._parameters.items()}
        twin.__dict__["_buffers"] = {k: to_meta(v) for k, v in module._buffers.items()}
        twin.__dict__["_modules"] = {
            k: None if m is None else _meta_twin(m, twins) for k, m in module._modules.items()
        }
        twins[id(module)] = twin
    return twins[id(module)]


# What cannot be traced


def _check_hooks(model: nn.Module) -> frozenset[str]:
    """Hooks on modules that tracing dissolves would be lost: refuse. Names leaves that have hooks."""
    tracer = FxTracer()
    lost: list[str] = []
    kept: list[str] = []
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        leaf = bool(name) and tracer.is_leaf_module(module, name)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            (kept if leaf else lost).append(name or type(model).__name__)
        if not leaf:
            stack.extend((f"{name}.{k}".lstrip("."), m) for k, m in module.named_children())
    if lost:  # guard: lost hooks -> tests/test_bad_input.py -k hook
        raise TraceError(
            f"the model has hooks that tracing would lose, on {', '.join(sorted(lost))}",
            where=f"module {sorted(lost)[0]}",
            why="a traced graph calls the layers directly, so hooks of the modules around them "
            "would never run",
            fix="remove the hooks (handle.remove()) and register them again on the pruned model",
        )
    return frozenset(kept)


def _check_lazy(model: nn.Module) -> None:
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(t):
            raise TraceError(
                f"`{name}` has no shape yet",
                where=f"parameter {name}",
                why="the model has lazy modules that never saw an input",
                fix="run the model once on an example input, then compile it",
            )


def assertion(node: Node) -> bool:
    """Whether a node only checks something, and gives no tensor."""
    return op_name(node) in ("_assert", "_assert_is_none", "_assert_async")
