"""What cannot be traced, said before anything is tried.

Promises: returns what of the model a graph does not hold (hooks of layers, which stay and freeze them;
          hooks of tensors and of state_dict, which stay behind and are named).
Refuses:  replaced forwards, hooks that would never run again, names that cannot be kept, wrappers
          inside the model, sharded tensors, lazy tensors, inputs that do not bind.
"""

from __future__ import annotations

import inspect
import keyword
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.errors import OptionError, TraceError, UnsupportedOpError
from fxprune.graph import HOOKS
from fxprune.symbolic import FxTracer

_OF_A_GRAPH_MODULE = (set(dir(GraphModule)) - set(dir(nn.Module))) | {
    "plan", "report", "origin", "meta", "_graph", "_code", "_tracer_cls", "_tracer_extras",
    "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env",
}  # fmt: skip


@dataclass(frozen=True)
class Admitted:
    """hooked: names of layers that have hooks. notes: what of the model stays behind."""

    hooked: frozenset[str]
    notes: tuple[str, ...]


def admit(model: nn.Module, example_inputs: tuple[Any, ...]) -> Admitted:
    """Refuse what tracing would get wrong or lose; returns what is to be said of the rest."""
    for name, module in model.named_modules():
        refuse_sharded(module, name)
        if name:
            _refuse_wrapper(module, name)
    _refuse_exported(model)
    _check_inputs(model, example_inputs)
    _check_modules(model)
    return _check_hooks(model)


def refuse_sharded(module: nn.Module, name: str = "") -> None:
    """UnsupportedOpError for a module whose parameters are spread over ranks."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        raise UnsupportedOpError(
            f"`{name}` is sharded by FSDP" if name else "the model is sharded by FSDP",
            where=f"module {name}" if name else type(module).__name__,
            why="its parameters are spread over ranks",
            fix="prune first, then shard",
        )
    for own, t in [*module._parameters.items(), *module._buffers.items()]:
        if t is not None and hasattr(t, "full_tensor"):
            path = f"{name}.{own}" if name else own
            raise UnsupportedOpError(
                f"`{path}` is sharded (a {type(t.data).__name__})",
                where=f"tensor {path}",
                why="it is spread over ranks, each of which holds a part",
                fix="prune first, then shard; or gather it: nn.Parameter(t.full_tensor())",
            )


def _refuse_wrapper(module: nn.Module, name: str) -> None:
    """Wrappers inside a model hide what is in them; around it, `unwrap` has taken them off."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"`{name}` is a TorchScript module",
            where=f"module {name}",
            why="scripted code cannot be traced",
            fix="put the Python module in its place that it was scripted from",
        )
    if kind in ("DataParallel", "DistributedDataParallel"):
        own = "module"
    elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
        own = "_orig_mod"
    else:
        return
    raise UnsupportedOpError(
        f"`{name}` is wrapped by {'torch.compile' if own == '_orig_mod' else kind}",
        where=f"module {name}",
        why="a graph would hold the wrapper as one opaque layer",
        fix=f"take it off before (model.set_submodule('{name}', model.get_submodule('{name}.{own}'))), "
        "and wrap the pruned network",
    )


def _refuse_exported(model: nn.Module) -> None:
    if isinstance(model, GraphModule) and "_guards_fn" in model._modules:
        raise TraceError(
            "the model comes from torch.export",
            where=type(model).__name__,
            why="its graph holds single operations of aten, with guards on the sizes of its example",
            fix="compile the Python model it was exported from",
        )


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


def _check_hooks(model: nn.Module) -> Admitted:
    """Hooks on modules that tracing dissolves would never run: refuse. Others are named."""
    tracer = FxTracer()
    lost: list[str] = []
    kept: list[str] = []
    saving: list[str] = []
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        leaf = bool(name) and tracer.is_leaf_module(module, name)
        if any(getattr(module, hooks) for hooks in HOOKS):
            (kept if leaf else lost).append(name or type(model).__name__)
        if not leaf:
            if any(vars(module).get(hooks) for hooks in _SAVING):
                saving.append(name or type(model).__name__)
            stack.extend((f"{name}.{k}".lstrip("."), m) for k, m in module.named_children())
    if lost:  # guard: lost hooks -> tests/bad_input/test_hooks.py
        raise TraceError(
            f"the model has hooks that tracing would lose, on {', '.join(sorted(lost))}",
            where=f"module {sorted(lost)[0]}",
            why="a traced graph calls the layers directly, so hooks of the modules around them "
            "would never run",
            fix="remove the hooks (handle.remove()) and register them again on the pruned model",
        )
    notes = []
    tensors = [name for name, p in model.named_parameters() if _has_hooks(p)]
    for what, names in (("state_dict", saving), ("tensors", tensors)):
        if names:
            notes.append(
                f"hooks of {what} stay with the original, on {', '.join(sorted(names))}: "
                "register them again on the pruned network"
            )
    return Admitted(frozenset(kept), tuple(notes))


_SAVING = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def _has_hooks(t: Tensor) -> bool:
    return bool(t._backward_hooks) or bool(getattr(t, "_post_accumulate_grad_hooks", None))
