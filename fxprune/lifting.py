"""A graph of aten operations -> the calls that a user writes, as symbolic tracing records them.

Promises: every node computes what it did, bit for bit; layers are one call_module node each;
          parameters and buffers are read under the model's own names; sizes stay sizes; device
          arguments that name the device of the input follow the input. Sizes that the export took
          for granted are asserted first: an input of other sizes is refused, not computed wrongly.
Refuses:  contexts of autocast, control flow of torch (cond, scan, ...), results that are no plain
          containers. An operation without a translation stays as it is: the analysis freezes there.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxprune.errors import TraceError
from fxprune.graph import get_path
from fxprune.symbolic import FXPRUNE_HOME, TORCH_HOME

_REFUSAL = (
    "the model was exported for other sizes: compile it for an input of this size. It holds where"
)
END = 2**63 - 1  # aten writes an open end of a slice like this


@dataclass
class LayerCall:
    """One call of a layer while a model was exported.

    given: the tensors and symbolic sizes among the arguments are `Hole`s. returned: the same for
    the result, once it ran.
    """

    name: str
    module: nn.Module
    given: tuple[tuple[Any, ...], dict[str, Any]]
    returned: Any = None


@dataclass(frozen=True)
class Hole:
    """Stands for the tensor (or symbolic size) of that number."""

    index: int
    is_size: bool = False


@dataclass
class Lifted:
    """The graph, the tensors that forward made, and the contexts it entered."""

    graph: Graph
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def lift(
    program: ExportedProgram,
    model: nn.Module,
    arguments: Sequence[tuple[str, Any]],
    layer: OpOverload,
    calls: Mapping[str, LayerCall],
    facts: Sequence[Any] = (),
) -> Lifted:
    """Translate an exported program of `model`.

    arguments: name and example of each argument of forward. layer: the operation that stands for a
    call of a layer; `calls` says by its first argument of which. facts: expressions of sympy about
    sizes of the inputs that the program takes for granted. Raises TraceError.
    """
    return _Lifter(program, model, layer, calls).run(arguments, facts)


class _Lifter:
    def __init__(
        self,
        program: ExportedProgram,
        model: nn.Module,
        layer: OpOverload,
        calls: Mapping[str, LayerCall],
    ) -> None:
        self.program, self.model, self.layer, self.calls = program, model, layer, calls
        self.out = Lifted(Graph())
        self.graph = self.out.graph
        self.read: dict[Node, str] = {}  # placeholder of a tensor that the model holds -> its name
        self.source: tuple[Node, torch.device] | None = None  # the first tensor of the input
        self.where = ""
        self.pure: set[Node] = set()  # nodes that change nothing

    def run(self, arguments: Sequence[tuple[str, Any]], facts: Sequence[Any]) -> Lifted:
        """The whole program: inputs, what must hold for their sizes, operations, results."""
        env = self._inputs(arguments)
        self._assert_sizes(env, facts)
        results = self._body(self.program.graph_module, env)
        self._results(results)
        self._drop_unread()
        self.graph.lint()
        return self.out

    # Inputs

    def _inputs(self, arguments: Sequence[tuple[str, Any]]) -> dict[Node, Any]:
        nodes = [self.graph.placeholder(name) for name, _ in arguments]
        taken = [
            leaf for n, (_, value) in zip(nodes, arguments, strict=True) for leaf in self._take(n, value)
        ]  # fmt: skip
        given = iter(taken)
        env: dict[Node, Any] = {}
        held = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        specs = self.program.graph_signature.input_specs
        for node, spec in zip(held, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                env[node] = next(given)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.read[node] = str(spec.target)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.read[node] = self._constant(str(spec.target))
        return env

    def _take(self, node: Node, value: Any) -> Iterator[Any]:
        """Every leaf of an argument in the order of pytree, taken out of its containers."""
        if isinstance(value, Tensor):
            if self.source is None:
                self.source = node, value.device
            yield node
        elif isinstance(value, dict | list | tuple):
            keys = value if isinstance(value, dict) else range(len(value))
            for key in keys:
                inner = value[key]
                if pytree.tree_leaves(inner):
                    yield from self._take(
                        self.graph.call_function(operator.getitem, (node, key)), inner
                    )
        else:
            yield from pytree.tree_leaves(value)

    def _assert_sizes(self, env: Mapping[Node, Any], facts: Sequence[Any]) -> None:
        """Fixed sizes, equal sizes, and whatever Python decided by sizes."""
        known: dict[Any, Proxy] = {}  # symbol -> the size of an input
        shape_env = None
        for node, given in env.items():
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                here = Proxy(self._new("call_method", "size", (given, axis)))
                expr = size
                if isinstance(size, torch.SymInt):
                    expr, shape_env = size.node.expr, size.node.shape_env
                if getattr(expr, "is_symbol", False) and expr not in known:
                    known[expr] = here
                    continue
                holds: Any = here == (expr if isinstance(expr, int) else _computed(expr, known))  # type: ignore[comparison-overlap]
                said = f"{given}.size({axis}) is {_said(expr, known)}"
                self._assert(
                    holds, said
                )  # guard: fixed sizes -> tests/test_reader_front_ends.py -k export
        for fact in _distinct(facts, shape_env):
            if fact.free_symbols:  # guard: decisions -> tests/test_reader_front_ends.py -k export
                self._assert(_computed(fact, known), _said(fact, known))

    def _assert(self, holds: Any, said: str) -> None:
        self._new("call_function", torch._assert, (holds.node, f"{_REFUSAL} {said}"))

    def _constant(self, name: str) -> str:
        """A tensor that is an attribute of the model, or one that forward made."""
        value = self.program.constants[name]
        try:
            own = get_path(self.model, name)
        except AttributeError:
            own = None
        if isinstance(own, Tensor) and own is value:
            return name
        for known, constant in self.out.constants.items():
            if constant is value:
                return known
        new = f"_tensor_constant{len(self.out.constants)}"
        self.out.constants[new] = value
        return new

    # Operations

    def _body(self, module: GraphModule, env: dict[Node, Any]) -> Any:
        """Translate the nodes of a (sub)graph; returns its results."""
        for node in module.graph.nodes:
            self.where = users_line(node.meta.get("stack_trace") or "") or self.where
            if node.op == "output":
                return map_arg(node.args[0], lambda n: self._value(env, n))
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._value(env, n))
                env[node] = self._call(module, node, list(args), dict(kwargs))
            elif node.op == "get_attr":
                env[node] = get_path(module, str(node.target))
        return ()

    def _value(self, env: dict[Node, Any], node: Node) -> Any:
        """What stands for a node; tensors of the model are read where they are used first."""
        if node not in env:
            env[node] = self._new("get_attr", self.read[node])
        return env[node]

    def _new(self, op: str, target: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Node:
        node = self.graph.create_node(op, target, tuple(args), kwargs or {})
        node.meta["where"] = self.where
        return node

    def _call(
        self, module: GraphModule, node: Node, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        target = node.target
        if target is self.layer:
            return self._layer(self.calls[args[0]], args[1], args[2])
        if target is operator.getitem and not isinstance(args[0], Node):
            return args[0][args[1]]
        if isinstance(target, HigherOrderOperator):
            return self._context(target, args)
        if not isinstance(target, OpOverload):  # arithmetic on sizes
            new = self._new("call_function", target, args, kwargs)
            self.pure.add(new)
            return new
        new = self._aten(target, _rank(node), args, kwargs)
        pure = (
            not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
        )
        if pure and isinstance(new, Node) and all(new is not a for a in args):
            self.pure.add(new)
        return new

    def _layer(self, call: LayerCall, tensors: Sequence[Any], sizes: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_map(
            lambda v: (sizes if v.is_size else tensors)[v.index] if isinstance(v, Hole) else v,
            call.given,
        )
        node = self._new("call_module", call.name, args, kwargs)
        found: dict[int, Any] = {}
        self._unpack(node, call.returned, found)
        return [found[i] for i in range(len(found))]

    def _unpack(self, node: Node, value: Any, found: dict[int, Any]) -> None:
        """The tensors in what a layer returns, by number."""
        if isinstance(value, Hole):
            found[value.index] = node
        elif isinstance(value, dict | list | tuple):
            keys = value if isinstance(value, dict) else range(len(value))
            for key in keys:
                if any(isinstance(v, Hole) for v in pytree.tree_leaves(value[key])):
                    self._unpack(
                        self._new("call_function", operator.getitem, (node, key)), value[key], found
                    )

    def _context(self, target: HigherOrderOperator, args: list[Any]) -> Any:
        """The graph inside `torch.no_grad` is part of the outer one; others are refused."""
        name = target.name()
        autocast = name == "wrap_with_autocast"
        if autocast and not args[2]:
            self._context_note("torch.autocast(enabled=False)", args[4])
            return self._inside(args[4], args[5:])
        if name == "wrap_with_set_grad_enabled":
            if not args[0]:
                self._context_note("torch.no_grad", args[1])
            return self._inside(args[1], args[2:])
        raise TraceError(
            "forward runs a part of itself under torch.autocast"
            if autocast
            else f"forward uses `{name}`",
            where=(_first_line(args[4]) if autocast else "") or self.where or "unknown line",
            why="a graph does not hold contexts, so that part would run in another precision"
            if autocast
            else "what runs is decided by values, and a graph has one course only",
            fix="enter autocast around the whole model, or prune the sub-module inside it"
            if autocast
            else "prune a sub-module without it: fxprune.compile(model.backbone, ...)",
        )

    def _inside(self, inner: GraphModule, given: Sequence[Any]) -> Any:
        held = [n for n in inner.graph.nodes if n.op == "placeholder"]
        return self._body(inner, dict(zip(held, given, strict=True)))

    def _context_note(self, context: str, inner: GraphModule) -> None:
        self.out.notes.append(
            f"`{context}` inside forward ({_first_line(inner) or 'unknown line'}) is not part of a "
            "graph: wrap the pruned network in it"
        )

    def _aten(
        self, target: OpOverload, rank: int | None, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        space, _, name = target._schema.name.partition("::")
        if space != "aten":
            packet = getattr(getattr(torch.ops, space), name)
            return self._new("call_function", packet, args, kwargs)
        if name.startswith(("_assert", "sym_constrain_range")):
            return None
        if name in _SAME:
            return args[0]
        if name == "detach_" or (name == "detach" and _is_constant(args[0])):
            return args[0]
        kwargs = self._portable(name, args, kwargs)
        special = _SPECIAL.get(name)
        if special is not None:
            written = special(target, rank, args, kwargs)
            if written is None:  # it changes nothing
                return args[0]
            return self._new(*written)
        if name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name):
            return self._new("call_method", name, args, kwargs)
        if name in _ATTRIBUTES:
            return self._new("call_function", getattr, (args[0], _ATTRIBUTES[name]))
        if name in _METHODS:
            return self._new("call_method", _METHODS[name], _spread(name, args), kwargs)
        function = _function(name)
        if function is not None:
            return self._new("call_function", function, args, kwargs)
        if callable(getattr(Tensor, name, None)):
            return self._new("call_method", name, args, kwargs)
        return self._new("call_function", target, args, kwargs)

    def _portable(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of a factory, but for those that say nothing; the input's device follows it."""
        out = {k: v for k, v in kwargs.items() if k not in ("layout", "pin_memory") or v}
        out = {k: v for k, v in out.items() if v is not torch.strided}
        if self.source is None:
            return out
        for store, key in [(args, i) for i in range(len(args))] + [(out, k) for k in out]:  # type: ignore[misc]
            value = store[key]  # type: ignore[index]
            if isinstance(value, torch.device) and value == self.source[1]:
                store[key] = self._new("call_function", getattr, (self.source[0], "device"))  # type: ignore[index]
        return out

    # Results

    def _results(self, results: Any) -> None:
        specs = self.program.graph_signature.output_specs
        leaves = []
        for spec, value in zip(specs, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                constant = isinstance(spec.arg, ConstantArgument)
                leaves.append(spec.arg.value if constant else value)  # type: ignore[union-attr]
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                held = self._new("get_attr", str(spec.target))
                self._new("call_method", "copy_", (held, value))
        structure = self.program.call_spec.out_spec
        assert structure is not None
        self.graph.output(self._written(pytree.tree_unflatten(leaves, structure)))

    def _drop_unread(self) -> None:
        """Sizes, parameters, parts and whatever else nobody reads and changes nothing."""
        for node in reversed(self.graph.nodes):
            part = node.op == "get_attr" or node.target in (operator.getitem, getattr)
            if not node.users and (part or node in self.pure):
                self.graph.erase_node(node)

    def _written(self, value: Any) -> Any:
        """A result as a graph can hold it: containers of other classes are made by a call."""
        kind = type(value)
        if kind in (list, tuple):
            return kind(self._written(v) for v in value)
        if kind is dict:
            return {k: self._written(v) for k, v in value.items()}
        if isinstance(value, tuple):
            parts = [self._written(v) for v in value]
            if hasattr(kind, "_fields"):
                return self._new("call_function", kind, parts)
            return _whole(parts) or tuple(parts)  # what torch.max and the like return
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            given = {k: self._written(v) for k, v in fields.items() if v is not None}
            return self._new("call_function", kind, (), given)
        if isinstance(value, dict):
            items = {k: self._written(v) for k, v in value.items()}
            return self._new("call_function", kind, (items,))
        return value


def _whole(parts: Sequence[Any]) -> Node | None:
    """The node of which these are all the entries."""
    first = parts[0].args[0] if isinstance(parts[0], Node) and parts[0].args else None
    taken = [isinstance(p, Node) and p.target is operator.getitem and p.args == (first, i) for i, p in enumerate(parts)]  # fmt: skip
    return first if all(taken) and isinstance(first, Node) else None


def _distinct(facts: Sequence[Any], shape_env: Any) -> list[Any]:
    """Facts in terms of the symbols that are left, each once."""
    return list(dict.fromkeys(map(shape_env.replace, facts))) if shape_env is not None else []


def _computed(expr: Any, known: Mapping[Any, Proxy]) -> Any:
    """An expression of sympy as operations on the sizes that its symbols stand for."""
    return sympy_interp(PythonReferenceAnalysis, dict(known), expr)


def _said(expr: Any, known: Mapping[Any, Proxy]) -> str:
    """An expression of sympy in terms of the inputs."""
    sizes = {str(symbol): "{}.size({})".format(*size.node.args) for symbol, size in known.items()}
    return re.sub(r"\w+", lambda word: sizes.get(word[0], word[0]), str(expr))


def users_line(stack: str) -> str:
    """file:line of the innermost frame of a stack trace that is neither torch's nor ours."""
    for file, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', stack)):
        if not file.startswith((TORCH_HOME, FXPRUNE_HOME, "<", "torch/")):
            return f"{file}:{line}"
    return ""


def _first_line(inner: GraphModule) -> str:
    """The user's first line in a graph."""
    stacks = [n.meta.get("stack_trace") or "" for n in inner.graph.nodes]
    return next(filter(None, map(users_line, stacks)), "")


def _rank(node: Node) -> int | None:
    """Axes of the first argument of a node of aten."""
    first = node.args[0] if node.args else None
    value = first.meta.get("val") if isinstance(first, Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _is_constant(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


# How operations are written. A writer gets the overload, the rank of the first argument, arguments
# and keywords, and returns (op, target, args, kwargs), or None where nothing happens.

Written = tuple[str, Any, Sequence[Any], dict[str, Any]] | None
Writer = Callable[[OpOverload, int | None, list[Any], dict[str, Any]], Written]

_SAME = {"alias", "lift_fresh", "lift_fresh_copy", "lift"}

# aten's name -> the method; all take their arguments in the order of aten
_METHODS = {
    name: name
    for name in [
        "view", "reshape", "permute", "transpose", "t", "expand", "expand_as", "unsqueeze",
        "squeeze", "flatten", "unflatten", "repeat", "contiguous", "clone", "detach", "unbind",
        "chunk", "type_as", "masked_fill", "view_as", "reshape_as", "movedim", "narrow",
        "mean", "sum", "unfold", "new_zeros", "new_ones", "new_full", "new_empty", "swapaxes",
        "float", "double", "half",
    ]
}  # fmt: skip
_METHODS |= {"sym_size": "size", "sym_numel": "numel", "size": "size", "__and__": "__and__"}


_ATTRIBUTES = {"mT": "mT", "mH": "mH", "numpy_T": "T", "matrix_H": "H"}


def _spread(name: str, args: list[Any]) -> list[Any]:
    """x.view(a, b), not x.view([a, b])."""
    if name in ("view", "reshape", "permute", "expand", "repeat") and len(args) == 2:
        return [args[0], *args[1]] if isinstance(args[1], list | tuple) else args
    return args


_FUNCTIONAL = {
    "linear", "dropout", "alpha_dropout", "rms_norm", "silu",
    "gelu", "hardtanh", "leaky_relu", "softplus", "mish", "glu", "hardswish", "hardsigmoid",
    "relu6", "pad", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d",
    "relu", "one_hot", "pixel_shuffle", "pixel_unshuffle", "local_response_norm", "bilinear",
}  # fmt: skip
_HOMES = (("linalg_", torch.linalg), ("special_", torch.special), ("fft_", torch.fft))


def _function(name: str) -> Any:
    """The function of torch that takes the arguments of aten in their order."""
    if name in _FUNCTIONAL:
        return getattr(F, name)
    for prefix, home in _HOMES:
        if name.startswith(prefix):
            return getattr(home, name.removeprefix(prefix), None)
    return getattr(torch, name, None) or getattr(torch._C._nn, name, None)


def _filled(args: list[Any], *defaults: Any) -> list[Any]:
    """The arguments, with defaults for those that aten left out."""
    return [*args, *defaults[len(args) :]]


def _index(rank: int, axis: int, item: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * (axis % rank), item)


def _slice(op: OpOverload, rank: int | None, args: list[Any], kwargs: dict[str, Any]) -> Written:
    """x[:, a:b:c]."""
    assert rank is not None
    x, axis, start, stop, step = _filled(args, None, 0, None, None, 1)
    start = None if isinstance(start, int) and start == 0 else start
    stop = None if isinstance(stop, int) and stop == END else stop
    step = None if isinstance(step, int) and step == 1 else step
    if (start, stop, step) == (None, None, None):
        return None
    return (
        "call_function",
        operator.getitem,
        (x, _index(rank, axis, slice(start, stop, step))),
        {},
    )


def _select(op: OpOverload, rank: int | None, args: list[Any], kwargs: dict[str, Any]) -> Written:
    """x[:, i]."""
    assert rank is not None
    x, axis, index = args
    return "call_function", operator.getitem, (x, _index(rank, axis, index)), {}


def _take(op: OpOverload, rank: int | None, args: list[Any], kwargs: dict[str, Any]) -> Written:
    """x[:, tensor]."""
    items = tuple(slice(None) if i is None else i for i in args[1])
    return "call_function", operator.getitem, (args[0], items), {}


def _batch_norm(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    x, weight, bias, mean, var, training, momentum, eps, *_ = a
    return "call_function", F.batch_norm, (x, mean, var, weight, bias, training, momentum, eps), {}


def _instance_norm(
    op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]
) -> Written:
    x, weight, bias, mean, var, *rest = a
    return "call_function", F.instance_norm, (x, mean, var, weight, bias, *rest[:3]), {}


def _without_last(function: Any, count: int) -> Writer:
    """A function that takes the first arguments only (aten's last one picks a kernel)."""

    def write(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
        return "call_function", function, a[:count], kwargs

    return write


def _embedding(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    weight, indices, padding, *_ = _filled(a, None, None, -1)
    options = {"padding_idx": padding} if padding != -1 else {}
    return "call_function", F.embedding, (indices, weight), options


def _interpolate(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    """F.interpolate, of which aten has one operation per mode."""
    name = op._schema.name.removeprefix("aten::").removeprefix("_")
    if op._overloadname != "vec":
        return "call_function", op, a, kwargs
    kind, antialias = name.removeprefix("upsample_").removesuffix("_aa"), name.endswith("_aa")
    modes = {"bilinear2d": "bilinear", "bicubic2d": "bicubic", "linear1d": "linear",
             "trilinear3d": "trilinear"}  # fmt: skip
    named = (
        dict(zip([argument.name for argument in op._schema.arguments], a, strict=False)) | kwargs
    )
    options: dict[str, Any] = {}
    if named.get("output_size") is not None:
        options["size"] = named["output_size"]
    else:
        options["scale_factor"] = named["scale_factors"]
        options["recompute_scale_factor"] = False
    options["mode"] = modes.get(kind) or ("nearest-exact" if "exact" in kind else "nearest")
    if kind in modes:
        options["align_corners"] = named["align_corners"]
    if antialias:
        options["antialias"] = True
    return "call_function", F.interpolate, (named["input"],), options


def _to(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    """x.to(...): whatever aten writes out beside dtype, device and copy says nothing."""
    names = [argument.name for argument in op._schema.arguments]
    named = dict(zip(names, a, strict=False)) | kwargs
    options = {k: v for k, v in named.items() if k in ("dtype", "device", "copy") and v}
    if named.get("memory_format") not in (None, torch.preserve_format):
        options["memory_format"] = named["memory_format"]
    if op._schema.name == "aten::_to_copy":
        options["copy"] = True
    first = (named[names[0]], *([named["other"]] if "other" in named else []))
    return "call_method", "to", first, options


def _arithmetic(function: Any) -> Writer:
    """x + y; aten's `alpha` and rounding modes keep the function of torch."""

    def write(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
        if kwargs or len(a) != 2:
            return "call_function", getattr(torch, op._schema.name[6:]), a, kwargs
        return "call_function", function, a, {}

    return write


def _attention(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    """With all options by name, so that both modes write the same ones."""
    mask, p, causal = _filled(a[3:], None, 0.0, False)
    options = {"attn_mask": mask, "dropout_p": p, "is_causal": causal, **kwargs}
    return "call_function", F.scaled_dot_product_attention, a[:3], options


def _split(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    return "call_function", torch.split, a, kwargs


def _einsum(op: OpOverload, rank: int | None, a: list[Any], kwargs: dict[str, Any]) -> Written:
    return "call_function", torch.einsum, (a[0], *a[1]), {}


_SPECIAL: dict[str, Writer] = {
    "slice": _slice,
    "select": _select,
    "index": _take,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _without_last(F.layer_norm, 5),
    "group_norm": _without_last(F.group_norm, 5),
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "to": _to,
    "_to_copy": _to,
    "split": _split,
    "split_with_sizes": _split,
    "einsum": _einsum,
    "constant_pad_nd": lambda op, rank, a, kw: (
        "call_function", F.pad, (a[0], a[1], "constant", *(a[2:] or [0])), {},
    ),
    "im2col": _without_last(F.unfold, 5),
    "col2im": _without_last(F.fold, 6),
    "log_sigmoid": _without_last(F.logsigmoid, 1),
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    "div": _arithmetic(operator.truediv),
    "pow": _arithmetic(operator.pow),
    **{
        f"{prefix}upsample_{kind}": _interpolate
        for prefix, kinds in {
            "": "nearest1d nearest2d nearest3d linear1d bilinear2d bicubic2d trilinear3d",
            "_": "nearest_exact1d nearest_exact2d nearest_exact3d bilinear2d_aa bicubic2d_aa",
        }.items()
        for kind in kinds.split()
    },
}  # fmt: skip
