"""The second front end: torch.export, for what symbolic tracing refuses.

Promises: the same kind of graph as symbolic tracing gives, over the user's own layers and tensor
          names; batch and spatial sizes stay free where the model allows, and a note says which;
          the model is left as it was.
Refuses:  what torch.export refuses, autocast inside forward.
Departs:  train mode is the graph of eval mode. Arguments that differ between the modes follow
          `self.training`; branches that exist only in training are dropped, and whatever else
          differs is named in a note.
"""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fxprune.admission import admit
from fxprune.decompose import attend, decomposes
from fxprune.errors import TraceError
from fxprune.graph import HOOKS, Tensors, op_name
from fxprune.hints import Hints, first_line
from fxprune.lifting import Hole, LayerCall, lift
from fxprune.modes import Flags, Modes, compare_modes
from fxprune.symbolic import (
    TORCH_HOME,
    Capture,
    FxTracer,
    _failing_line,
    at_once,
    refuse_reshaping_in_place,
    set_mode,
    unmarked,
)
from fxprune.trace import Traced


def trace_exported(model: nn.Module, example_inputs: tuple[Any, ...], why: str) -> Traced:
    """As `trace`, through torch.export; `why` says what symbolic tracing refused.

    Raises TraceError where torch.export refuses too.
    """
    admitted = admit(model, example_inputs)
    with at_once(model):
        evaluating, free = capture(model, example_inputs)
        modes = _modes(model, example_inputs, evaluating, free)
    return Traced(
        model,
        evaluating.graph,
        example_inputs,
        Tensors.of(model),
        front_end="export",
        constants=evaluating.constants,
        mode_flags=modes.flags,
        notes=[
            *admitted.notes,
            f"captured by torch.export, since symbolic tracing refused: {why}",
            *modes.notes,
            *evaluating.notes,
        ],
        dropped=modes.dropped,
        hooked=admitted.hooked,
    )


@dataclass(frozen=True)
class Free:
    """Which sizes an export leaves open: a spec per argument of torch.export, and its inputs."""

    inputs: tuple[Any, ...]
    shapes: Any


def capture(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Capture, Free]:
    """The graph of eval mode, with as many free sizes as the model allows; TraceError if none works.

    Symbolic sizes of 1 do not exist in torch: a batch of one is exported as a batch of two.
    """
    refused: Exception | None = None
    for free in _attempts(model, example_inputs):
        try:
            found, open_axes = _export(model, free, training=False)
        except TraceError:
            raise
        except _TooMuch:
            continue
        except Exception as error:  # whatever the user's code or torch.export raises
            refused = refused or error
            continue
        if free.inputs is not example_inputs and 0 not in {axis for axis, _ in open_axes}:
            continue  # made for a batch of two, which is not the example's
        found.hints = Hints(model, example_inputs, constants=found.constants)
        try:
            found.hints.of(next(iter(reversed(found.graph.nodes))))
        except TraceError:
            if free.inputs is example_inputs:
                raise
            continue  # what two samples decide does not hold for the example's one
        found.notes.append(_about_sizes(example_inputs, open_axes))
        found.notes += _defaults_kept(model, len(example_inputs))
        return found, free
    assert refused is not None
    raise TraceError(
        f"{type(model).__name__} cannot be exported: {first_line(refused)}",
        where=_failing_line(refused),
        why="torch.export runs forward on symbolic values, and cannot follow what depends on data",
        fix="prune a sub-module without that part: fxprune.compile(model.backbone, ...)",
    ) from refused


def _attempts(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[Free]:
    """Batch and spatial axes free; the batch alone; nothing."""
    doubled = _doubled(inputs)
    for batch in (doubled, inputs) if doubled is not None else (inputs,):
        for spatial in (True, False):
            given = tuple(value for _, value in _named(model, batch))
            yield Free(batch, pytree.tree_map(partial(_open, spatial=spatial), given))
    yield Free(inputs, None)


def _open(value: Any, *, spatial: bool) -> dict[int, Any] | None:
    """What torch.export is told of one input; integers (tokens) are free along all axes."""
    if not isinstance(value, Tensor):
        return None
    first = 2 if value.is_floating_point() else 1
    axes = [0, *range(first, value.dim())] if spatial else [0]
    return {axis: Dim.AUTO for axis in axes if axis < value.dim()}


def _doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The inputs twice along the batch axis, where all have a batch of one; else None."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    doubled: tuple[Any, ...] = pytree.tree_map(
        lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, inputs
    )
    return doubled


def _about_sizes(inputs: tuple[Any, ...], open_axes: list[tuple[int, int]]) -> str:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    given = [(axis, n) for n, t in enumerate(tensors) for axis in range(t.dim())]
    fixed = sorted(set(given) - set(open_axes), key=lambda pair: (pair[1], pair[0]))
    if not open_axes:
        return "the graph holds for the sizes of the example input only"
    several = len(tensors) > 1
    named = ", ".join(f"{axis} of input {n}" if several else str(axis) for axis, n in open_axes)
    text = f"sizes that may change: axes {named} of the input"
    if any(axis != 1 for axis, _ in fixed):
        text += "; the others are those of the example input"
    return text


def _defaults_kept(model: nn.Module, given: int) -> list[str]:
    extra = [
        p
        for p in list(inspect.signature(model.forward).parameters.values())[given:]
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is not p.empty
    ]
    if not extra:
        return []
    named = ", ".join(f"{p.name}={p.default!r}" for p in extra)
    return [f"arguments of forward beyond the example inputs keep their defaults: {named}"]


# One export


def _export(
    model: nn.Module, free: Free, *, training: bool
) -> tuple[Capture, list[tuple[int, int]]]:
    """The graph of one mode, and the free (axis, input) pairs."""
    set_mode(model, training)
    with (
        unmarked(model, noise=False),
        _layers_whole(model) as calls,
        _effort_bounded(),
        _noting_decisions() as decisions,
        _quiet(),
        torch.enable_grad(),
    ):
        program = torch.export.export(model, free.inputs, dynamic_shapes=free.shapes, strict=False)
    facts = decisions.facts(program)
    lifted = lift(program, model, _named(model, free.inputs), _layer_op(), calls, facts)
    refuse_reshaping_in_place(lifted.graph)
    notes = list(dict.fromkeys(lifted.notes))
    return Capture(lifted.graph, lifted.constants, notes), _axes(program)


def _named(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Name and value of every argument; `*args` are one tuple."""
    given: list[tuple[str, Any]] = []
    for p in inspect.signature(model.forward).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            rest = inputs[len(given) :]
            return [*given, (f"*{p.name}", rest)] if rest else given
        if len(given) < len(inputs):
            given.append((p.name, inputs[len(given)]))
    return given


def _axes(program: ExportedProgram) -> list[tuple[int, int]]:
    """The axes of the inputs whose sizes stayed symbols."""
    given = {name: n for n, name in enumerate(program.graph_signature.user_inputs)}
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in given and isinstance(value, Tensor):
            symbols = [_is_symbol(size) for size in value.shape]
            found += [(axis, given[node.name]) for axis, is_free in enumerate(symbols) if is_free]
    return found


def _is_symbol(size: int | torch.SymInt) -> bool:
    """Whether a size can change; one that forward has fixed is a number in disguise."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


@contextmanager
def _quiet() -> Iterator[None]:
    """No fused encoder layers; and torch.export tells of its retries on warnings, loggers, stderr."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)


EFFORT = 20_000  # operations in the formulas of sizes that torch.export may simplify: seconds


class _TooMuch(BaseException):
    """Free sizes whose formulas grow too long; no Exception, since torch catches those."""


@contextmanager
def _effort_bounded() -> Iterator[None]:
    """Sizes of padded windows and the like have formulas that take minutes to reason about.

    The work is counted, not timed, so that the same model gives the same graph.
    """
    simplify = ShapeEnv.simplify
    done = 0

    def counted(self: ShapeEnv, expr: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += int(expr.count_ops())
        if done > EFFORT:
            raise _TooMuch
        return simplify(self, expr, *args, **kwargs)

    ShapeEnv.simplify = counted  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ShapeEnv.simplify = simplify  # type: ignore[assignment,method-assign]


@dataclass
class Decisions:
    """What was decided by free sizes, so that the graph takes it for granted.

    special: expressions of sympy by which the user's code goes another way for a size of 1;
    torch.export takes every free size for at least 2, and writes nothing down where that decides.
    layout: guards (by id) about strides, which say nothing about values.
    """

    special: list[Any] = field(default_factory=list)
    layout: set[int] = field(default_factory=set)

    def facts(self, program: ExportedProgram) -> list[Any]:
        """Everything that must hold for the sizes of an input."""
        env = _shape_env(program)
        guards = [] if env is None else env.guards
        said = [g.expr for g in guards if id(g) not in self.layout and not _about_layout(g)]
        return [*said, *self.special]


def _shape_env(program: ExportedProgram) -> ShapeEnv | None:
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    sizes: list[Any] = [size for v in values if isinstance(v, Tensor) for size in v.shape]
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def _about_layout(guard: Any) -> bool:
    """Whether torch asked for strides when it made a guard."""
    place = guard.sloc.framework_loc
    file, name = getattr(place, "filename", ""), getattr(place, "name", "")
    return file.startswith(TORCH_HOME + "_prims_common") and name != "infer_size"


@contextmanager
def _noting_decisions() -> Iterator[Decisions]:
    decide = torch.SymBool.__bool__
    found = Decisions()

    def noted(self: torch.SymBool) -> bool:
        expr, guards = self.node.expr, self.node.shape_env.guards  # type: ignore[union-attr]
        before = len(guards)
        value = decide(self)
        frame = sys._getframe(1)
        while frame.f_code.co_filename == torch.__file__ and frame.f_back:  # SymInt.__bool__, ...
            frame = frame.f_back
        file = frame.f_code.co_filename
        if file.startswith(TORCH_HOME) and not file.startswith(TORCH_HOME + "nn"):
            found.layout.update(id(guard) for guard in guards[before:])
        elif any(expr.subs(symbol, 1) == (not value) for symbol in expr.free_symbols):
            found.special.append(expr if value else ~expr)
        return value

    torch.SymBool.__bool__ = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.SymBool.__bool__ = decide  # type: ignore[method-assign]


# Layers stay whole: while a model is exported, each calls one operation that stands for it.

_CALLS: dict[str, LayerCall] = {}
_RUNNING: list[LayerCall] = []
_LIBRARY: list[torch.library.Library] = []


@cache
def _layer_op() -> OpOverload:
    """fxprune::layer, which runs the layer that its first argument names."""
    library = torch.library.Library("fxprune", "FRAGMENT")
    library.define("layer(str call, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")
    library.impl("layer", _run_layer, "CompositeExplicitAutograd")
    _LIBRARY.append(library)
    op: OpOverload = torch.ops.fxprune.layer.default
    torch.fx.node.has_side_effect(op)
    return op


def _run_layer(call: str, tensors: Sequence[Tensor], sizes: Sequence[Any]) -> list[Tensor]:
    """What the layer gives; results that are its inputs are copied, as operations must."""
    record = _CALLS[call]
    args, kwargs = pytree.tree_map(
        lambda v: (sizes if v.is_size else tensors)[v.index] if isinstance(v, Hole) else v,
        record.given,
    )
    _RUNNING.append(record)
    try:
        result = type(record.module).forward(record.module, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        _RUNNING.pop()
    results: list[Tensor] = []

    def hole(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = any(value is t or value._is_view() for t in tensors)
        results.append(value.clone() if own else value)
        return Hole(len(results) - 1)

    record.returned = pytree.tree_map(hole, result)
    return results


@contextmanager
def _layers_whole(model: nn.Module) -> Iterator[dict[str, LayerCall]]:
    """Every leaf of symbolic tracing calls `fxprune::layer`; the forwards are put back at the end."""
    layers = dict(_leaves(model))
    _CALLS.clear()
    count = itertools.count()
    op = _layer_op()

    def stand_in(name: str, module: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if _RUNNING:  # a layer of a layer
                return type(module).forward(module, *args, **kwargs)  # type: ignore[attr-defined]
            tensors: list[Tensor] = []
            sizes: list[Any] = []

            def hole(value: Any) -> Any:
                if isinstance(value, Tensor):
                    tensors.append(value)
                    return Hole(len(tensors) - 1)
                if isinstance(value, torch.SymInt):
                    sizes.append(value)
                    return Hole(len(sizes) - 1, is_size=True)
                return value

            key = str(next(count))
            _CALLS[key] = LayerCall(name, module, pytree.tree_map(hole, (args, kwargs)))
            results = op(key, tensors, sizes)
            return pytree.tree_map(
                lambda v: results[v.index] if isinstance(v, Hole) else v, _CALLS[key].returned
            )

        return forward

    attentions = [
        m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and decomposes(m)
    ]
    hooked = [(m, key, vars(m)[key]) for m in layers.values() for key in HOOKS if vars(m)[key]]
    for name, module in layers.items():
        module.__dict__["forward"] = stand_in(name, module)
    for module, key, hooks in hooked:  # they run where the layer is called
        module.__dict__[key] = type(hooks)()
    for module in attentions:
        module.__dict__["forward"] = partial(attend, module)
    try:
        yield _CALLS
    finally:
        for module in (*layers.values(), *attentions):
            module.__dict__.pop("forward", None)
        for module, key, hooks in hooked:
            module.__dict__[key] = hooks


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that symbolic tracing calls whole, under their first names."""
    tracer = FxTracer()
    for name, module in model.named_modules():
        if name and tracer.is_leaf_module(module, name):
            yield name, module


# Modes

_FOLLOWS = {"dropout": 2, "batch_norm": 5, "instance_norm": 5, "alpha_dropout": 2, "feature_dropout": 2}  # fmt: skip


def _modes(
    model: nn.Module, example_inputs: tuple[Any, ...], evaluating: Capture, free: Free
) -> Modes:
    """Arguments that differ in train mode, by a second export; where that fails, by their names."""
    try:
        training, _ = _export(model, free, training=True)
        hints = Hints(model, free.inputs, constants=training.constants)
        hints.of(next(iter(reversed(training.graph.nodes))))
        return compare_modes(evaluating, training)
    except (
        Exception,
        _TooMuch,
    ) as error:  # training is not what the graph is for: it is said, not refused
        modes = Modes({}, [])
        for node in evaluating.graph.nodes:
            key = _FOLLOWS.get(op_name(node))
            if node.op == "call_function" and key is not None and node.args[key:] and node.args[key] is False:  # fmt: skip
                flags: Flags = {key: (False, True)}
                modes.flags[node] = flags
        modes.notes.append(
            "in train mode the network is the graph of eval mode, in which batch norm and dropout "
            f"follow `training`; the train mode of the original differs: {first_line(error)}"
        )
        return modes
