"""Symbolic tracing of one mode: user code runs once on proxies, and leaves no mark on the model."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer

from fxprune.errors import TraceError
from fxprune.interrupts import Interrupts

TORCH_HOME = str(Path(torch.__file__).parent) + os.sep
FXPRUNE_HOME = str(Path(__file__).parent) + os.sep
LEAF_CLASSES = {"torchvision.ops.misc.FrozenBatchNorm2d", "torchvision.ops.stochastic_depth.StochasticDepth"}  # fmt: skip
LEAVES: set[type[nn.Module]] = set()  # classes that have a rule: it says what the layer does


@dataclass
class Capture:
    """A graph, the tensors that forward made while it was traced, and what the graph leaves out."""

    graph: Graph
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class FxTracer(Tracer):
    """Symbolic tracing with torch's own modules as leaves; notes the user's line of every node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn modules, classes with a rule, and classes known not to trace stay one node."""
        kind = type(m)
        if kind in LEAVES:
            return True
        if f"{kind.__module__}.{kind.__qualname__}" in LEAF_CLASSES or hasattr(m, "follows_mode"):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    proxy_buffer_attributes = True  # buffers are read when the graph runs, not while it is traced

    def __init__(self) -> None:
        super().__init__()
        self.outside = _contexts()
        self.inside: dict[str, str] = {}  # a context that forward enters -> the first line in it

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """As the base class, and remember who asked."""
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = _users_line()
        for name, state in _contexts().items():
            if state != self.outside[name]:
                self.inside.setdefault(name, node.meta["where"])
        return node


def _contexts() -> dict[str, bool]:
    return {
        "torch.no_grad": torch.is_grad_enabled(),
        "torch.autocast": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
    }


def _users_line() -> str:
    """file:line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH_HOME, FXPRUNE_HOME, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def capture(model: nn.Module, example_inputs: tuple[Any, ...], *, training: bool) -> Capture:
    """Trace `forward` in one mode; TraceError names the user's line that is in the way."""
    set_mode(model, training)
    tracer = FxTracer()
    before = set(vars(model))
    defaults = _defaults(model, len(example_inputs))
    try:
        graph = tracer.trace(model, defaults)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: {first_line(error)}",
            where=_failing_line(error),
            why="symbolic tracing cannot follow control flow that depends on the data "
            "or on sizes, nor calls that need real values",
            fix="keep that part whole: what is not traced into is a function under @torch.fx.wrap, or "
            "a layer whose class has a rule (fxprune.register_rule); or decide by an argument with a "
            "default and leave it out of example_inputs; or prune a sub-module that traces: "
            "fxprune.compile(model.backbone, ...)",
        ) from error
    _refuse_reshaping_in_place(graph)
    made = {k: v for k, v in vars(model).items() if k not in before}
    constants = {k: v for k, v in made.items() if k.startswith("_tensor_constant")}
    for name in constants:
        del model.__dict__[name]
    if "torch.autocast" in tracer.inside:
        raise TraceError(
            "forward runs a part of itself under torch.autocast",
            where=tracer.inside["torch.autocast"],
            why="a graph does not hold contexts, so that part would run in another precision",
            fix="enter autocast around the whole model, or prune the sub-module inside it",
        )
    notes = [
        f"`{context}` inside forward ({line}) is not part of a graph: wrap the pruned network in it"
        for context, line in tracer.inside.items()
    ]
    if defaults:
        named = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
        notes.append(f"arguments of forward beyond the example inputs keep their defaults: {named}")
    return Capture(graph, constants, notes)


_IN_PLACE = {
    f"{name}_"
    for name in [
        "squeeze",
        "unsqueeze",
        "transpose",
        "t",
        "swapaxes",
        "swapdims",
        "resize",
        "resize_as",
        "set",
        "as_strided",
    ]
}


def _refuse_reshaping_in_place(graph: Graph) -> None:
    """A tensor whose shape changes under the same name has no one shape to reason about."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target in _IN_PLACE:
            raise TraceError(
                f"forward changes the shape of a tensor in place, with `{node.target}`",
                where=str(node.meta.get("where", "")),
                why="the tensor would have two shapes under one name",
                fix=f"use `{str(node.target)[:-1]}` and its result",
            )


def _defaults(model: nn.Module, given: int) -> dict[str, Any] | None:
    """Arguments of forward beyond the example inputs keep their defaults, made concrete."""
    params = list(inspect.signature(model.forward).parameters.values())
    extra = [
        p
        for p in params[given:]
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is not p.empty
    ]
    return {p.name: p.default for p in extra} or None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _failing_line(error: BaseException) -> str:
    """The innermost user line of a traceback, with its text."""
    found = "unknown line"
    tb = error.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if not file.startswith((TORCH_HOME, FXPRUNE_HOME, "<")):
            found = f"{file}:{tb.tb_lineno}: {linecache.getline(file, tb.tb_lineno).strip()}"
        tb = tb.tb_next
    return found


def set_mode(model: nn.Module, training: bool) -> None:
    """Put every module in one mode; not model.train(), which users override."""
    for module in model.modules():
        module.__dict__["training"] = training


@contextlib.contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, every attribute, parameter, buffer and mode is put back."""
    before = [
        (
            m.__dict__,
            dict(m.__dict__),
            [(d, dict(d)) for d in (m._parameters, m._buffers, m._modules)],
        )
        for m in model.modules()
    ]
    noise = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(noise)
        for attributes, saved, stores in before:
            for store, kept in [(attributes, saved), *stores]:
                if store.keys() != kept.keys() or any(store[k] is not v for k, v in kept.items()):
                    store.clear()
                    store.update(kept)


@contextlib.contextmanager
def at_once(model: nn.Module) -> Iterator[None]:
    """As `unmarked`, and Ctrl-C waits until that is done (a second one does not).

    For what is soon over: while torch.fx traces, it has changed `nn.Module` itself, and cut short
    it would leave every module of the process broken.
    """
    with Interrupts() as interrupts, interrupts.held(), unmarked(model):
        yield
