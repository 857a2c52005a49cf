"""What cannot be traced, said before anything is tried."""

from __future__ import annotations

import inspect
import keyword
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxprune.errors import OptionError, TraceError
from fxprune.graph import HOOKS
from fxprune.symbolic import FxTracer

_OF_A_GRAPH_MODULE = (set(dir(GraphModule)) - set(dir(nn.Module))) | {
    "plan", "report", "origin", "meta", "_graph", "_code", "_tracer_cls", "_tracer_extras",
    "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env",
}  # fmt: skip


def admit(model: nn.Module, example_inputs: tuple[Any, ...]) -> frozenset[str]:
    """Refuse what tracing would get wrong or lose; returns the names of layers that have hooks."""
    _check_inputs(model, example_inputs)
    _check_modules(model)
    return _check_hooks(model)


def _check_inputs(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    try:
        inspect.signature(model.forward).bind(*example_inputs)
    except TypeError as error:
        takes = inspect.signature(model.forward)
        keywords = any(p.kind is p.KEYWORD_ONLY for p in takes.parameters.values())
        raise OptionError(
            f"forward{takes} does not take {_inputs(len(example_inputs))}: "
            + str(error).replace("'", "`"),
            where="example_inputs",
            why="the example inputs are passed by position"
            + (", and some arguments of forward take a keyword only" if keywords else ""),
            fix="pass a tuple with one entry per argument"
            + (
                ", or wrap the model in one whose forward takes them by position"
                if keywords
                else ""
            ),
        ) from error


def _inputs(count: int) -> str:
    return "1 input" if count == 1 else f"{count} inputs"


def _check_modules(model: nn.Module) -> None:
    """Replaced forwards, names that cannot be kept, lazy tensors: one walk over the modules."""
    for name, module in model.named_modules():
        if "forward" in vars(module):
            where = name or type(model).__name__
            raise TraceError(
                f"`forward` of `{where}` was replaced on the instance",
                where=f"module {where}",
                why="tracing follows the class, and would leave the replacement out",
                fix="put the code into a subclass of the module",
            )
        held = {**module._parameters, **module._buffers}
        for own in (*module._modules, *held):
            _check_name(f"{name}.{own}" if name else own, own)
        for own, t in held.items():
            if t is not None and nn.parameter.is_lazy(t):
                raise TraceError(
                    f"`{name}.{own}` has no shape yet",
                    where=f"parameter {name}.{own}",
                    why="the model has lazy modules that never saw an input",
                    fix="run the model once on an example input, then compile it",
                )


def _check_name(path: str, own: str) -> None:
    """Names that a pruned network uses itself, or that generated code cannot hold."""
    if path in _OF_A_GRAPH_MODULE:
        why = f"`{own}` is a name that a pruned network uses itself"
    elif not _writable(own):
        why = "a graph runs as generated code, which cannot hold this name"
    else:
        return
    raise TraceError(
        f"the name {own!r} cannot be kept",
        where=f"module or parameter {path!r}",
        why=why,
        fix="rename the attribute",
    )


def _writable(part: str) -> bool:
    """Whether generated code can write the name as an attribute or between double quotes."""
    if keyword.iskeyword(part):
        return False
    if part.replace("_", "a").isalnum():
        return True
    return part.isprintable() and '"' not in part and "\\" not in part


def _check_hooks(model: nn.Module) -> frozenset[str]:
    """Hooks on modules that tracing dissolves would be lost: refuse. Names leaves that have hooks."""
    tracer = FxTracer()
    lost: list[str] = []
    kept: list[str] = []
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        leaf = bool(name) and tracer.is_leaf_module(module, name)
        if any(getattr(module, hooks) for hooks in HOOKS):
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
