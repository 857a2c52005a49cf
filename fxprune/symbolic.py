"""Symbolic tracing of one mode: user code runs once on proxies, and leaves no mark on the model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import linecache
import operator
import os
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.utils import _pytree as pytree

from fxprune.decompose import attend, decomposes
from fxprune.errors import TraceError
from fxprune.graph import arguments, op_name
from fxprune.hints import UNKNOWN, Hints, first_line
from fxprune.interrupts import Interrupts
from fxprune.proxies import FACTORIES, Hinted, Site, numbers_stay_nodes

__all__ = ["Capture", "FxTracer", "at_once", "capture", "first_line", "set_mode", "unmarked"]

TORCH_HOME = str(Path(torch.__file__).parent) + os.sep
FXPRUNE_HOME = str(Path(__file__).parent) + os.sep
LEAF_CLASSES = {
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "torchvision.ops.stochastic_depth.StochasticDepth",
    *(f"timm.layers.drop.{kind}" for kind in ("DropPath", "DropBlock2d")),
    *(f"timm.layers.std_conv.{kind}" for kind in (
        "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")),
}  # fmt: skip
LEAVES: set[type[nn.Module]] = set()  # classes that have a rule: it says what the layer does
RECORDED: set[Any] = set()  # functions that have a rule: they stay one node, as under torch.fx.wrap
THROUGH = {
    nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
}  # fmt: skip
LIBRARIES = ("torchvision.models.", "timm.")  # their functions under torch.fx.wrap are code too
FIXED = {
    "dim", "ndim", "ndimension", "is_floating_point", "is_complex", "requires_grad", "layout",
    "is_contiguous", "is_sparse", "is_quantized", "is_nested",
}  # fmt: skip
KINDS = {"dtype", "device", "is_cuda", "get_device", "type"}


@dataclass
class Capture:
    """A graph, the tensors that forward made while it was traced, and what the graph leaves out."""

    graph: Graph
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hints: Hints | None = None


class FxTracer(Tracer):
    """Symbolic tracing with torch's own modules as leaves; notes the user's line of every node."""

    proxy_buffer_attributes = True  # buffers are read when the graph runs, not while it is traced

    def __init__(self, hints: Hints | None = None) -> None:
        super().__init__(autowrap_functions=(*FACTORIES, *RECORDED))
        self._autowrap_search.append(torch)
        self.hints = hints
        self.live = True  # whether proxies still make nodes
        self.running = False  # whether layers run for their shapes, rather than being traced
        self.outside = _contexts()
        self.inside: dict[str, str] = {}  # a context that forward enters -> the first line in it
        self.by_kind: list[str] = []  # lines that decide by dtypes and devices
        self._paths: dict[int, str] = {}  # id of a parameter or buffer -> its name
        self._of_input: set[Node] = set()  # nodes that depend on the input
        self._decided: dict[Any, Any] = {}
        self._pending: list[tuple[Hinted, int, Site]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn modules, classes with a rule, and classes known not to trace stay one node."""
        kind = type(m)
        if kind in LEAVES:
            return True
        if f"{kind.__module__}.{kind.__qualname__}" in LEAF_CLASSES:
            return True
        if kind in THROUGH or decomposes(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> Any:
        """Proxies know what they stand for."""
        return Hinted(node, self)

    def create_arg(self, a: Any) -> Any:
        """As the base class; what looks like a tensor may be a proxy, and results keep their class."""
        if issubclass(type(a), Proxy):
            return a.node
        if isinstance(a, dict) and dataclasses.is_dataclass(a):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
            given = {k: v for k, v in fields.items() if v is not None}
            return self.create_proxy("call_function", type(a), (), given).node
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, (dict(a),), {}).node
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base class; inputs that are None, a truth or a word are what they are."""
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if self.hints is not None and _is_input(proxy.node):
            value = self.hint(proxy.node)
            literal = value is None or isinstance(value, bool | str)
            if literal:  # guard: words -> tests/test_reader_front_ends.py -k words
                same = operator.is_ if value is None else operator.eq
                holds = self.create_node("call_function", same, (proxy.node, value), {})
                said = f"the network was traced for {proxy.node}={value!r}"
                self.create_node("call_function", torch._assert, (holds, said), {})
                return value
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """As the base class, and remember who asked."""
        if self._pending:
            self._confirm()
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = _users_line()
        if node.op == "placeholder" or any(n in self._of_input for n in node.all_input_nodes):
            self._of_input.add(node)
        for name, state in _contexts().items():
            if state != self.outside[name]:
                self.inside.setdefault(name, node.meta["where"])
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are proxies; the table of their names is made once."""
        if self.running or not isinstance(attr_val, Tensor) or issubclass(type(attr_val), Proxy):
            return attr_val
        if not self._paths:
            self._paths = {
                id(t): name
                for name, t in [*self.root.named_buffers(), *self.root.named_parameters()]
            }
        name = self._paths.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
            self.hint(parameter_proxy_cache[name].node)  # before forward puts another in its place
        return parameter_proxy_cache[name]

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """As the base class; attention is taken apart, and what runs for its shape is no node."""
        if self.running:
            return forward(*args, **kwargs)
        if isinstance(m, nn.MultiheadAttention) and decomposes(m):
            return attend(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    # What proxies ask

    def hint(self, node: Node) -> Any:
        """What the node gives on the example input."""
        if "val" in node.meta:
            return node.meta["val"]
        if self.hints is None or node.graph is not self.graph:
            return UNKNOWN
        self.running = True
        try:
            return self.hints.of(node)
        finally:
            self.running = False

    def decided(self, proxy: Any, value: Any, exact: bool = False) -> Any:
        """Python goes on with `value`: the graph refuses inputs that give another one."""
        node = proxy.node
        reads = self._reads(node)
        if reads & KINDS:
            self.by_kind.append(_users_line())
        if not reads - KINDS or _never_true(node):
            return value
        key = (_expression(node), value, exact)
        if key not in self._decided:
            self._decided[key] = value
            line = _users_line()
            if exact:
                holds = proxy == value
            elif isinstance(self.hint(node), bool):
                holds = proxy
                if not value:
                    holds = self.create_proxy("call_function", operator.not_, (proxy,), {})
            else:
                holds = (proxy != 0) if value else (proxy == 0)
            self.create_proxy("call_function", torch._assert, (holds, _refusal(line)), {})
        return value

    def used_as_index(self, proxy: Hinted, value: int, site: Site) -> None:
        """A number is asked for; where torch only parses its arguments, the node is used."""
        self._pending.append((proxy, value, site))

    def was_only_parsed(self, site: Site) -> None:
        """The call at `site` becomes a node: what it asked for was not used."""
        self._pending = [entry for entry in self._pending if entry[2] != site]

    def iterated(self, proxy: Any) -> None:
        """A loop over the pieces of a tensor: their number is decided by its length."""
        stack = [proxy.node]
        while stack:
            node = stack.pop()
            if op_name(node) in ("split", "chunk", "unbind", "tensor_split", "split_with_sizes"):
                unbind = op_name(node) == "unbind"
                given = arguments(
                    node, *(("input", "dim") if unbind else ("input", "sections", "dim"))
                )
                if isinstance(given["input"], Node):
                    int(self.proxy(given["input"]).size(given.get("dim", 0)))
            else:  # some of the pieces, or more
                stack += [n for n in node.all_input_nodes if isinstance(self.hint(n), tuple | list)]

    def keep_buffers(self, before: dict[str, tuple[Any, dict[str, Any]]]) -> None:
        """What forward put in the place of a buffer is written into it at the end."""
        for prefix, (buffers, kept) in before.items():
            for own, old in kept.items():
                new = buffers.get(own)
                if not isinstance(old, Tensor) or not issubclass(type(new), Hinted):
                    continue
                buffers[own] = old
                self._write_buffer(f"{prefix}.{own}".lstrip("."), old, new)

    def _write_buffer(self, name: str, old: Tensor, new: Any) -> None:
        value, line = self.hint(new.node), str(new.node.meta["where"])
        if not isinstance(value, Tensor) or value.shape != old.shape:
            raise TraceError(
                f"forward replaces the buffer `{name}` by something of another shape",
                where=line,
                why="a graph has one shape for every tensor that it reads",
                fix="keep it in a plain attribute that forward only writes, or outside the model",
            )
        with self.graph.inserting_before(next(iter(reversed(self.graph.nodes)))):
            held = self.create_node("get_attr", name, (), {})
            copied = self.create_node("call_method", "copy_", (held, new.node), {})
        held.meta["where"] = copied.meta["where"] = line

    def finish(self) -> None:
        """Confirm what is pending, and fill in what every node gives."""
        self._confirm()
        if self.hints is not None:
            self.hint(next(iter(reversed(self.graph.nodes))))

    def _confirm(self) -> None:
        pending, self._pending = self._pending, []
        for proxy, value, _ in pending:
            self.decided(proxy, value, exact=True)

    def _reads(self, node: Node) -> set[str]:
        """Facts about tensors of the input, or numbers of the input, that a number is made of."""
        found: set[str] = set()
        stack, seen = [node], set()
        while stack:
            here = stack.pop()
            if here in seen or here not in self._of_input:
                continue
            seen.add(here)
            if here.op == "placeholder":
                found.add("input")
            for source in here.all_input_nodes:
                if not isinstance(self.hint(source), Tensor):
                    stack.append(source)
                elif source in self._of_input:
                    name = str(here.args[1]) if here.target is getattr else op_name(here)
                    found |= {name} - FIXED
        return found


def _is_input(node: Node) -> bool:
    """Whether a node is an argument of forward, or an entry of one."""
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "placeholder"


def _never_true(node: Node) -> bool:
    """`n == -1` and the like: sizes are never negative."""
    if node.target not in (operator.eq, operator.ne) or len(node.args) != 2:
        return False
    size, number = node.args if isinstance(node.args[0], Node) else reversed(node.args)
    whole = isinstance(number, int) and number < 0 and isinstance(size, Node)
    if whole and op_name(size) == "getitem":  # type: ignore[arg-type]
        size = size.args[0]  # type: ignore[union-attr]
    return whole and (op_name(size) == "size" or tuple(size.args[1:]) == ("shape",))  # type: ignore[arg-type,union-attr]


def _expression(node: Node) -> Any:
    """How a number is computed, for comparing; tensors are told apart by their nodes."""
    if node.op not in ("call_function", "call_method") or isinstance(node.meta.get("val"), Tensor):
        return node
    entries = pytree.tree_map_only(Node, _expression, (list(node.args), dict(node.kwargs)))
    return str((node.target, entries))


def _refusal(line: str) -> str:
    file, _, number = line.rpartition(":")
    text = linecache.getline(file, int(number)).strip() if number.isdigit() else ""
    return (
        "forward takes another way for an input of this size than for the example input, at "
        f"`{text}` in {Path(file).name}: compile the model for this size"
    )


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


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    training: bool,
    earlier: Hints | None = None,
) -> Capture:
    """Trace `forward` in one mode; TraceError names the user's line that is in the way.

    earlier: the hints of the other mode's capture, which spares running the same nodes again.
    """
    set_mode(model, training)
    tracer = FxTracer(Hints(model, example_inputs, earlier))
    before = set(vars(model))
    buffers = {name: (m._buffers, dict(m._buffers)) for name, m in model.named_modules()}
    own = {name: dict(vars(m)) for name, m in model.named_modules()}
    defaults = _defaults(model, len(example_inputs))
    try:
        with libraries_unwrapped(), numbers_stay_nodes():
            graph = tracer.trace(model, defaults)
            tracer.keep_buffers(buffers)
            tracer.finish()
    except TraceError:
        raise
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
    finally:
        tracer.live = False
    refuse_reshaping_in_place(graph)
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
    if stored := _stored(model, own):
        notes.append(
            f"forward stores {', '.join(f'`{name}`' for name in stored)} on the model: a graph does "
            "not, and starts each time from what was there"
        )
    if tracer.by_kind:
        lines = ", ".join(sorted(set(tracer.by_kind))[:3])
        notes.append(f"forward decides by dtype or device ({lines}): as for the example input")
    _drop_dead(graph)
    return Capture(graph, constants, notes, tracer.hints)


def _stored(model: nn.Module, before: dict[str, dict[str, Any]]) -> list[str]:
    """Plain attributes that forward has changed."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, value in _changed(vars(module), before[prefix])
    ]


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[tuple[str, Any]]:
    if len(now) == len(before) and all(map(operator.is_, now.values(), before.values())):
        return []
    return [
        (name, value)
        for name, value in now.items()
        if not name.startswith("_tensor_constant")
        and (name not in before or before[name] is not value)
    ]


_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout)


def _drop_dead(graph: Graph) -> None:
    """Numbers that only Python looked at are no part of the graph, nor what is not called for."""
    for node in reversed(graph.nodes):
        if (getattr(node.target, "__module__", None) or "torch").startswith(("torch", "math")):
            node.meta.pop("is_wrapped", None)  # needs no torch.fx.wrap to be called
        if node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        leaves = pytree.tree_leaves(node.meta.get("val"))
        number = bool(leaves) and all(isinstance(v, _PLAIN) for v in leaves)
        if number or node.op == "get_attr" or "spare" in node.meta:
            graph.erase_node(node)


@contextlib.contextmanager
def libraries_unwrapped() -> Iterator[None]:
    """Inside, functions that torchvision and timm mark with torch.fx.wrap are traced through."""
    registry = torch.fx._symbolic_trace._wrapped_fns_to_patch
    ours = {
        key: frame
        for key, frame in registry.items()
        if f"{frame.get('__name__', '')}.".startswith(LIBRARIES)
    }
    for key in ours:
        del registry[key]
    try:
        yield
    finally:
        registry.update(ours)


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


def refuse_reshaping_in_place(graph: Graph) -> None:
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
def unmarked(model: nn.Module, *, noise: bool = True) -> Iterator[None]:
    """Whatever runs inside, every attribute, parameter, buffer and mode is put back.

    noise: whether random numbers start again, too.
    """
    modules = list(model.modules())
    before: list[tuple[dict[str, Any], Any]] = [
        (held, held.copy())
        for m in modules
        for held in (m.__dict__, m._parameters, m._buffers, m._modules)
    ]
    caches = [found for held in _held(modules) for v in held for found in _containers(v)]
    state = torch.get_rng_state()
    try:
        yield
    finally:
        if noise:
            torch.set_rng_state(state)
        for store, kept in before:
            if store.keys() != kept.keys() or any(store[k] is not v for k, v in kept.items()):
                store.clear()
                store.update(kept)
        for cache, held in caches:  # guard: caches -> tests/test_tracing_hints.py -k cache
            if len(cache) != len(held) or any(a is not b for a, b in zip(_items(cache), _items(held), strict=True)):  # fmt: skip
                cache.clear()
                cache.extend(held) if isinstance(cache, list | deque) else cache.update(held)


_OF_TORCH = frozenset(vars(nn.Module()))
_CACHES = (dict, list, set, deque)
_PLAIN_VALUES = (int, float, str, type(None), Tensor, nn.Module, type)


def _held(modules: list[nn.Module]) -> Iterator[list[Any]]:
    """What every module holds itself, and the caches that the user's classes hold for all of theirs."""
    for module in modules:
        yield [v for k, v in module.__dict__.items() if k not in _OF_TORCH]
    for kind in {kind for module in modules for kind in type(module).__mro__}:
        if not kind.__module__.startswith(("torch.", "builtins")):
            yield [v for v in vars(kind).values() if isinstance(v, _CACHES)]


def _containers(value: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """The containers and plain objects that an attribute holds, each with a copy of what is in it."""
    if isinstance(value, _PLAIN_VALUES) or not depth:
        return
    if not isinstance(value, _CACHES):
        value = None if callable(value) else getattr(value, "__dict__", None)
    if isinstance(value, _CACHES):
        yield value, copy.copy(value)
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner, depth - 1)


def _items(cache: Any) -> list[Any]:
    """What a container holds, one after the other; keys of a dict, too."""
    return [*cache, *cache.values()] if isinstance(cache, dict) else list(cache)


@contextlib.contextmanager
def at_once(model: nn.Module) -> Iterator[None]:
    """As `unmarked`, and Ctrl-C waits until that is done (a second one does not).

    For what is soon over: while torch.fx traces, it has changed `nn.Module` itself, and cut short
    it would leave every module of the process broken.
    """
    with Interrupts() as interrupts, interrupts.held(), unmarked(model):
        yield
