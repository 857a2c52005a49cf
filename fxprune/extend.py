"""Rules from outside: what an operation or a layer that fxprune does not know does to channels.

A rule says it by handing its node to one of the kinds here:

    @fxprune.register_rule(torch.ops.shop.swish)
    def swish(flow, node):
        return extend.elementwise(flow, node)

Promises: a rule that fails or returns something that does not fit its node raises an error that names
          the rule and the user's line; nothing registered is replaced by registering it again.
docs/rules.md walks through a whole example.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import FxPruneError, OptionError, OptionTypeError, UnsupportedOpError
from fxprune.flow import RULES, Flow, Rule, Value, opaque, rule_of
from fxprune.graph import get_path, own_key, place, plain_name, value_of
from fxprune.hints import first_line
from fxprune.labels import Label
from fxprune.rewrites.base import REWRITES, Cut, Rewrite
from fxprune.rules import contraction as products
from fxprune.rules import elementwise as pointwise
from fxprune.rules import movement
from fxprune.surgery import REFITS, Refit
from fxprune.symbolic import LEAVES, RECORDED

Target = Any  # a function, an operator of torch.ops, a leaf module's class, or a plain name
Parameter = str | tuple[str, int]

# ---- registering ---------------------------------------------------------------------------------


def register_rule(*targets: Target) -> Callable[[Rule], Rule]:
    """Say what an operation does to channels: a decorator for `(flow, node) -> label`.

    targets: a function under `@torch.fx.wrap`; an operator (`torch.ops.shop.swish`, one of its
        overloads, or what `torch.library.custom_op` made: the rule holds for all overloads); the
        class of a layer, which is then not traced into (exact class); or the plain name of a method.

    Raises OptionError where a target has a rule already, OptionTypeError where it is nothing of these.
    """
    keys = [_key(target, "register_rule") for target in targets or (None,)]
    for key in keys:
        if key in RULES or (isinstance(key, str) and rule_of(key) is not None):
            raise _twice(key, "rule", RULES.get(key) or rule_of(key))

    def register(function: Rule) -> Rule:
        checked = _checked(_callable(function, "rule"))
        for key in keys:
            RULES[key] = checked
            if isinstance(key, type):
                LEAVES.add(key)
            elif inspect.isfunction(key):
                RECORDED.add(key)
        return function

    return register


def register_rewrite(*targets: Target) -> Callable[[Rewrite], Rewrite]:
    """Make sizes among the arguments of a call follow the cut: a decorator for `(cut, node) -> node`.

    targets as in `register_rule`, without layers (see `register_refit`). The function returns the
    new node, usually `extend.call_with(cut, node, channels=...)`, or None where nothing changes.
    """
    keys = [_key(target, "register_rewrite") for target in targets or (None,)]
    for key in keys:
        if isinstance(key, type):
            raise OptionTypeError(
                f"{_shown(key)} is a layer",
                where="register_rewrite",
                why="a rewrite changes the arguments of a call; a layer keeps sizes as attributes",
                fix="fxprune.register_refit(...) sets them",
            )
        if key in REWRITES:
            raise _twice(key, "rewrite", REWRITES[key])

    def register(function: Rewrite) -> Rewrite:
        _callable(function, "rewrite")

        @functools.wraps(function)
        def guarded(cut: Cut, node: Node) -> Any:
            with _named("rewrite", function, node):
                return function(cut, node)

        for key in keys:
            REWRITES[key] = guarded
        return function

    return register


def register_refit(*kinds: type[nn.Module]) -> Callable[[Refit], Refit]:
    """Make sizes that a layer keeps as attributes follow the cut: a decorator.

    The function gets the new layer, whose tensors are cut, and the shape of its first input after
    the cut (on the example input); it sets attributes: `layer.channels = layer.weight.numel()`.
    """
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise OptionTypeError(
                f"{kind!r} is no class of layers",
                where="register_refit",
                fix="pass an nn.Module class",
            )
        if kind in REFITS:
            raise _twice(kind, "refit", REFITS[kind])

    def register(function: Refit) -> Refit:
        _callable(function, "refit")

        @functools.wraps(function)
        def guarded(layer: nn.Module, shape: tuple[int, ...]) -> None:
            with _named("refit", function, layer):
                function(layer, shape)

        for kind in kinds:
            REFITS[kind] = guarded
        return function

    return register


@contextmanager
def temporarily() -> Iterator[None]:
    """What is registered inside is forgotten at the end."""
    stores: list[Any] = [RULES, LEAVES, RECORDED, REWRITES, REFITS]
    before = [store.copy() for store in stores]
    try:
        yield
    finally:
        for store, saved in zip(stores, before, strict=True):
            store.clear()
            store.update(saved)


def _key(target: Target, asked: str) -> Any:
    """What a call of the target is found under."""
    opoverload = getattr(target, "_opoverload", None)  # what torch.library.custom_op returns
    if isinstance(opoverload, torch._ops.OpOverload):
        target = opoverload
    if isinstance(target, str) and target:
        return target if "." in target else plain_name(target)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return target
    known = callable(target) and not isinstance(target, type | nn.Module)
    if not known:
        raise OptionTypeError(
            f"{asked} got {target!r}",
            where=asked,
            why="it takes a function, an operator of torch.ops, a layer's class or a method's name",
            fix=f"@fxprune.{asked}(torch.ops.namespace.name)",
        )
    return own_key(target)


def _callable(function: Any, kind: str) -> Any:
    if not callable(function):
        raise OptionTypeError(f"the {kind} is a {type(function).__name__}", where=kind)
    return function


def _shown(key: Any) -> str:
    if isinstance(key, str):
        return key
    operator = isinstance(key, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    return str(key) if operator else getattr(key, "__qualname__", "") or str(key)


def _twice(key: Any, kind: str, known: Any) -> OptionError:
    return OptionError(
        f"`{_shown(key)}` has a {kind} already",
        where=f"`{getattr(known, '__module__', '')}.{getattr(known, '__qualname__', '')}`",
        why=f"two {kind}s for one operation would contradict each other",
        fix="drop one; in tests, register inside `with fxprune.extend.temporarily():`",
    )


# ---- checking what rules do ----------------------------------------------------------------------


@contextmanager
def _named(kind: str, function: Any, user: Node | nn.Module) -> Iterator[None]:
    """Any error of a user's function becomes one that says whose it is."""
    try:
        yield
    except FxPruneError:
        raise
    except Exception as error:
        raise _fault(kind, function, user, f"raised {type(error).__name__}: {first_line(error)}") from error  # fmt: skip


def _fault(kind: str, function: Any, user: Node | nn.Module, what: str) -> UnsupportedOpError:
    name = getattr(function, "__qualname__", repr(function))
    where, calls = f"a layer of class {type(user).__name__}", "layer is"
    if isinstance(user, Node):
        where, calls = f"node {user.name} at {place(user) or 'unknown line'}", "node calls"
    return UnsupportedOpError(
        f"the {kind} `{name}` {what}",
        where=where,
        why=f"it is registered for what the {calls}",
        fix="correct it: docs/rules.md says what it gets and returns",
    )


def _checked(function: Rule) -> Rule:
    @functools.wraps(function)
    def checked(flow: Flow, node: Node) -> Value:
        with _named("rule", function, node):
            value = function(flow, node)
        wrong = _misfit(value_of(node), value, flow.ledger.next_id)
        if wrong:  # guard: labels fit -> tests/test_register_rule.py -k misfits
            raise _fault("rule", function, node, f"returned {wrong}")
        return value

    return checked


def _misfit(expected: Any, given: Any, known: int) -> str:
    """What is wrong with the labels of a value; "" where they fit it."""
    if isinstance(expected, Tensor):
        if not isinstance(given, Label):
            return f"{_a(given)}, where a tensor of shape {tuple(expected.shape)} needs a Label"
        return _misfit_of_label(tuple(expected.shape), given, known)
    if isinstance(expected, tuple | list):
        if not isinstance(given, tuple | list) or len(given) != len(expected):
            return f"{_a(given)}, where the operation gives {len(expected)} values"
        return next((w for e, g in zip(expected, given, strict=True) if (w := _misfit(e, g, known))), "")  # fmt: skip
    return f"{_a(given)}, where the operation gives no tensor" if isinstance(given, Label) else ""


def _misfit_of_label(shape: tuple[int, ...], label: Label, known: int) -> str:
    ids = label.ids
    if tuple(label.shape) != shape:
        return f"a Label of shape {tuple(label.shape)} for a tensor of shape {shape}"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        return "a Label whose ids are no tensor of int64"
    if ids.dim() != len(shape) or any(
        i not in (1, n) for i, n in zip(ids.shape, shape, strict=True)
    ):
        return f"a Label with ids of shape {tuple(ids.shape)} for a tensor of shape {shape}"
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        return "a Label with ids that nobody made (flow.ledger.fresh makes new ones)"
    return ""


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# ---- the kinds of operation ----------------------------------------------------------------------


def elementwise(flow: Flow, node: Node) -> Value:
    """Every element of the output depends on the elements at its position (after broadcasting)."""
    if node.op == "call_module":
        module = flow.traced.module(node)
        own = [name for name, p in module.named_parameters() if p.numel() > 1]
        if own:
            raise _misuse(
                node, f"the layer has a parameter per channel, `{own[0]}`: use per_channel"
            )
    return pointwise.elementwise(flow, node)


def per_channel(flow: Flow, node: Node, *parameters: Parameter, axis: int = 1) -> Value:
    """Channels of `axis` stay apart; each has its own entry in the named parameters.

    parameters: names of attributes of a layer ("weight", "gate.bias") or of arguments of a function;
    each holds as many entries as `axis`, along its only dimension longer than 1 or, as
    `(name, dim)`, along the one given. A parameter with one entry is shared by all channels.
    """
    x, axis = _first(flow, node, axis)
    ids = products.channel_ids(flow, node, x, axis)
    for parameter in parameters:
        name, dim = parameter if isinstance(parameter, tuple) else (parameter, None)
        _own(flow, node, name, dim, ids)
    return _along(node, axis, ids)


def contraction(
    flow: Flow, node: Node, weight: str, bias: str | None = None, *, axis: int = 1, groups: int = 1
) -> Value:
    """A convolution or linear map: along `axis`, channels end in `weight` and new ones begin.

    weight [out, in / groups, ...] and bias [out] are attributes of a layer or arguments of a
    function that are parameters of the model; its multiply-adds are counted as a convolution's.
    """
    x, axis = _first(flow, node, axis, same=False)
    names = [_parameter(flow, node, name) if name else None for name in (weight, bias)]
    if names[0] is None:
        return opaque(flow, node, f"`{weight}` is computed, not a parameter")
    shape = tuple(flow.ledger.tensors.tensor[names[0]].shape)
    for name in names:
        if name:
            t = flow.ledger.tensors.tensor[name]
            flow.ledger.claimed.update((name, d, node) for d in range(t.dim()))
    w = products.Weight(names[0], shape, names[1], groups)
    if (shape[0], shape[1] * groups) != (value_of(node).shape[axis], x.shape[axis]):
        raise _misuse(node, f"`{weight}` {shape} does not map axis {axis} of {x.shape}")
    return products.contract(flow, node, x, w, axis)


def over_axes(flow: Flow, node: Node, *axes: int, why: str = "") -> Value:
    """The operation works along `axes`, which stay whole; channels along other axes stay apart."""
    x = flow.first(node)
    whole = [d % len(x.shape) for d in axes]
    out = tuple(value_of(node).shape)
    kept = flow.ledger.complete(x, whole, node, why or f"`{_shown(node.target)}` mixes channels")
    changed = [d for d in kept.varying if d >= len(out) or out[d] != x.shape[d]]
    if changed or len(out) != len(x.shape):
        raise _misuse(
            node, f"axis {(changed or [len(out)])[0]} of {x.shape} has another length in {out}"
        )
    return Label(out, kept.ids)


def rearrangement(flow: Flow, node: Node) -> Value:
    """The operation only moves elements: it is run on the channels' ids (int64) to see where to."""
    return movement.move(flow, node)


def freeze(flow: Flow, node: Node, why: str) -> Value:
    """The channels that reach the operation stay, and the report gives the reason."""
    return opaque(flow, node, why)


def _misuse(node: Node, why: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"the rule of `{_shown(node.target)}` does not fit it: {why}",
        where=f"node {node.name} at {place(node) or 'unknown line'}",
        fix="correct the rule that was registered with fxprune.register_rule",
    )


def _first(flow: Flow, node: Node, axis: int, same: bool = True) -> tuple[Label, int]:
    """The first input, and the axis counted from the front; of the same length in the output."""
    x, out = flow.first(node), value_of(node)
    if not isinstance(out, Tensor) or not -len(x.shape) <= axis < len(x.shape):
        raise _misuse(node, f"it has no axis {axis} in its input {x.shape}, or no tensor as output")
    axis %= len(x.shape)
    fits = len(out.shape) == len(x.shape) and (not same or out.shape[axis] == x.shape[axis])
    if not fits:
        raise _misuse(node, f"axis {axis} of {x.shape} has another length in {tuple(out.shape)}")
    return x, axis


def _along(node: Node, axis: int, ids: Tensor) -> Label:
    out = tuple(value_of(node).shape)
    return Label(out, ids.view([-1 if d == axis else 1 for d in range(len(out))]))


def _own(flow: Flow, node: Node, name: str, dim: int | None, ids: Tensor) -> None:
    """Tie one dimension of a parameter to the channels with these ids."""
    if node.op == "call_module":
        t = _of_layer(flow, node, name)
        shape = () if t is None else tuple(t.shape)
    else:
        label = flow.of(argument(node, name))
        shape = () if label is None else label.shape
    long = [d for d, n in enumerate(shape) if n > 1]
    if not long:
        return
    dim = dim if dim is not None else long[0]
    if (len(long) > 1 and dim not in long) or not 0 <= dim < len(shape) or shape[dim] != len(ids):
        raise _misuse(node, f"`{name}` {shape} has no entry for each of {len(ids)} channels")
    if node.op == "call_module":
        flow.ledger.slot(flow.ledger.tensors.name(t), dim, "out", ids, node)
        return
    assert label is not None
    bound = flow.bind(node, label, [dim])
    if bound.uncut:
        flow.ledger.freeze(ids, node, f"`{name}` cannot be cut")
    else:
        flow.ledger.couple(ids, products.channel_ids(flow, node, bound, dim), node)


def _of_layer(flow: Flow, node: Node, name: str) -> Tensor | None:
    module = flow.traced.module(node)
    try:
        t = get_path(module, name)
    except AttributeError:
        t = module
    if t is not None and not isinstance(t, Tensor):
        raise _misuse(node, f"a {type(module).__name__} has no tensor `{name}`")
    return t


def _parameter(flow: Flow, node: Node, name: str) -> str | None:
    """The model's name of a layer's tensor, or of an argument that is a parameter."""
    if node.op == "call_module":
        return flow.ledger.tensors.name(_of_layer(flow, node, name))
    given = argument(node, name)
    if not (isinstance(given, Node) and given.op == "get_attr"):
        return None
    return flow.ledger.tensors.name(flow.traced.attribute(given))


# ---- arguments and sizes -------------------------------------------------------------------------


def argument(node: Node, name: str) -> Any:
    """An argument of a function by its name in the signature; None where it was not passed.

    A Node, where it was computed: `fxprune.extend.value(node)` is what it was on the example input.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    position = _names(node).index(name) if name in _names(node) else len(node.args)
    if name not in _names(node):
        raise _misuse(node, f"it has no argument `{name}`")
    return node.args[position] if position < len(node.args) else None


def value(node: Node) -> Any:
    """What a node gives on the example input: a tensor on the meta device, a number, a tuple."""
    return value_of(node)


def size_after(cut: Cut, node: Node, axis: int) -> int:
    """How long an axis of a node's tensor is after the cut."""
    label = cut.label(node)
    if label is None:
        raise _misuse(node, "it gives no tensor")
    return cut.sizes(label)[axis]


def call_with(cut: Cut, node: Node, **arguments: Any) -> Node:
    """The same call in the new graph with some arguments replaced, by name."""
    args, kwargs = list(cut.new(node.args)), dict(cut.new(node.kwargs))
    names = _names(node)
    for name, new in arguments.items():
        if name not in names:
            raise _misuse(node, f"it has no argument `{name}`")
        if names.index(name) < len(args):
            args[names.index(name)] = new
        else:
            kwargs[name] = new
    made = cut.graph.create_node(node.op, node.target, tuple(args), kwargs)
    made.meta = {key: node.meta[key] for key in ("where", "is_wrapped") if key in node.meta}
    return made


def _names(node: Node) -> Sequence[str]:
    """The names of the arguments of what a node calls."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        return [a.name for a in target._schema.arguments]
    try:
        return list(inspect.signature(target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _misuse(node, "its arguments have no names that Python knows") from None
