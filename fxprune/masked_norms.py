"""Norms over the channels that stay, inside a network that still has all of them.

A norm whose parameters a plan cuts is computed on the kept channels alone, by torch's own function
or the layer's own code on a narrower input; removed channels come out as they always did (nobody reads
them, and what is finite stays finite). Every module that holds such a parameter, or contains one
that does, gets a `forward` of its own that looks for calls of `layer_norm`, `rms_norm` and
`group_norm` while it runs. Nothing holds on to tensors: they are found by name in each call, so the
network can be cast, moved, copied, and called with other tensors in place of its own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.errors import PlanError
from fxprune.graph import Tensors, get_path
from fxprune.plan import Slice
from fxprune.rules.norms import channels_of, groups_attribute
from fxprune.trace import twin

Kept = Mapping[int, Sequence[int]]  # dimension of a norm's parameter -> indices that stay


def keep_statistics(model: nn.Module, tensors: Tensors, slices: Iterable[Slice]) -> None:
    """Make `model` take the statistics of norms over the channels that `slices` keep, in place."""
    kept: dict[str, dict[int, Sequence[int]]] = {}
    for s in slices:
        whole = s.size == tensors.tensor[s.tensor].shape[s.dim]
        for name in tensors.names[s.tensor] if whole else ():
            if _may_normalise(model, name):
                kept.setdefault(name, {})[s.dim] = s.keep
    below: dict[nn.Module, dict[str, Kept]] = {}
    for name, dims in kept.items():
        for path in _paths(name):
            holder = get_path(model, path)
            below.setdefault(holder, {})[name.removeprefix(f"{path}." if path else "")] = dims
    for module, names in below.items():
        if not isinstance(module, _CONTAINERS):
            axis = channels_of(module)
            own = {name: dims for name, dims in names.items() if "." not in name}
            run = _Narrow(module, axis, own) if axis is not None else _Watched(module, names)
            module.forward = run


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _may_normalise(model: nn.Module, name: str) -> bool:
    """Whether a parameter can be that of a norm: other layers of torch have no norms inside."""
    holder = get_path(model, name.rpartition(".")[0])
    foreign = not type(holder).__module__.startswith("torch.nn.modules.")
    return foreign or isinstance(holder, (*_NORMS, *_CONTAINERS))


def _paths(name: str) -> Iterator[str]:
    """The module that holds a tensor, and all that contain it."""
    while name:
        name = name.rpartition(".")[0]
        yield name


class _Forward:
    """A `forward` in place of a module's own; it lives in the module and is copied with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner = vars(module).get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._inner())

    def _inner(self) -> Callable[..., Any]:
        if self.inner is not None:
            inner: Callable[..., Any] = self.inner
            return inner
        return type(self.module).forward.__get__(self.module)  # type: ignore[no-any-return]


class _Watched(_Forward):
    """Runs the module's own forward, and watches for norms with the given parameters."""

    def __init__(self, module: nn.Module, names: Mapping[str, Kept]) -> None:
        super().__init__(module)
        self.names = names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _watching(self.module, self.names):
            return self._inner()(*args, **kwargs)


class _Narrow(_Forward):
    """Runs a layer that normalises by its own code: a narrow copy of it, on the kept channels."""

    def __init__(self, module: nn.Module, axis: int, own: Mapping[str, Kept]) -> None:
        super().__init__(module)
        self.axis, self.own = axis, own

    def __call__(self, x: Tensor) -> Tensor:
        dims = next(iter(self.own.values()))
        held = [getattr(self.module, name) for name in self.own]
        first = self.axis % x.dim() + 1 - held[0].dim()
        ids = {id(t) for t in held}
        layer = twin(self.module, lambda t: _narrow(t, dims) if id(t) in ids else t)
        layer.__dict__.pop("forward", None)
        _resize(layer, self.module, dims)
        y = type(self.module).forward(self.module, x)
        return _on_kept(layer.forward, x, y, {first + d: keep for d, keep in dims.items()})


def _resize(layer: nn.Module, original: nn.Module, dims: Kept) -> None:
    """Sizes that a narrow copy of a layer reads while it runs."""
    if hasattr(original, "normalized_shape"):
        shape = tuple(original.normalized_shape)  # type: ignore[arg-type]
        layer.normalized_shape = tuple(len(dims.get(d, range(n))) for d, n in enumerate(shape))  # type: ignore[assignment]
    attribute = groups_attribute(original)
    if attribute is not None:
        size = next(t for t in original._parameters.values() if t is not None).shape[0]
        setattr(layer, attribute, _groups(dims[0], size, int(getattr(original, attribute))))


# ---- watching -----------------------------------------------------------------------------------

_state = threading.local()


@contextmanager
def _watching(module: nn.Module, names: Mapping[str, Kept]) -> Iterator[None]:
    """Norms in the block whose parameters have these names take statistics over what stays."""
    around: _Statistics | None = getattr(_state, "watching", None)
    found = {name: get_path(module, name) for name in names}
    if around is not None and all(id(t) in around.kept for t in found.values()):
        yield  # a module around this one watches for them already
        return
    _state.watching = _Statistics(
        {id(t): names[name] for name, t in found.items()}, [*found.values()]
    )
    try:
        with _state.watching:
            yield
    finally:
        _state.watching = around


class _Statistics(TorchFunctionMode):
    """Sees every call of a torch function; follows parameters through casts and scalings."""

    def __init__(self, kept: dict[int, Kept], alive: list[Tensor]) -> None:
        super().__init__()
        self.kept, self.alive = kept, alive  # ids are unique as long as their tensors live
        self.shapes = {t.shape for t in alive}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", "")).split(".")[0]
        if name in _FUNCTIONS:
            given = dict(zip(_FUNCTIONS[name], args, strict=False)) | kwargs
            own = [given.get(key) for key in ("weight", "bias")]
            dims = next(
                (self.kept[id(t)] for t in own if t is not None and id(t) in self.kept), None
            )
            if dims is not None:
                return _FORMS[name](func, given, dims)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.shape in self.shapes and id(out) not in self.kept:
            self._follow(out, args[:1] if name in ("to", "type_as") else (args, kwargs))
        return out

    def _follow(self, out: Tensor, given: Any) -> None:
        """What is computed of one parameter alone, entry by entry, stands for it."""
        sources = {id(t): t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)}
        if len(sources) == 1:
            ((key, source),) = sources.items()
            if key in self.kept and source.shape == out.shape:
                self.kept[id(out)] = self.kept[key]
                self.alive.append(out)


def _layer_norm(func: Any, given: dict[str, Any], dims: Kept) -> Tensor:
    """layer_norm and rms_norm: the last axes, as many as the parameters have."""
    x, shape = given["input"], given["normalized_shape"]
    first = x.dim() - len(shape)
    sizes = [len(dims.get(d, range(n))) for d, n in enumerate(shape)]
    narrow = _narrowed(given, dims) | {"normalized_shape": sizes}
    axes = {first + d: keep for d, keep in dims.items()}
    return _on_kept(lambda part: func(**narrow | {"input": part}), x, func(**given), axes)


def _group_norm(func: Any, given: dict[str, Any], dims: Kept) -> Tensor:
    """group_norm: blocks of axis 1 that keep channels, as many in each."""
    x = given["input"]
    groups = _groups(dims[0], x.shape[1], given["num_groups"])
    narrow = _narrowed(given, dims) | {"num_groups": groups}
    axes = {1: dims[0]}
    return _on_kept(lambda part: func(**narrow | {"input": part}), x, func(**given), axes)


def _narrowed(given: dict[str, Any], dims: Kept) -> dict[str, Any]:
    own = {k: given[k] for k in ("weight", "bias") if given.get(k) is not None}
    return {**given, **{k: _narrow(t, dims) for k, t in own.items()}}


_FUNCTIONS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}
_FORMS = {"layer_norm": _layer_norm, "rms_norm": _layer_norm, "group_norm": _group_norm}


def _groups(keep: Sequence[int], size: int, groups: int) -> int:
    """Groups that keep channels; PlanError where they do not keep equally many."""
    per = size // groups
    counts = [sum(i // per == g for i in keep) for g in range(groups)]
    left = [n for n in counts if n]
    if len(set(left)) > 1:  # guard: unequal groups -> tests/test_norms.py -k unequal
        raise PlanError(
            f"the groups of a group norm keep different numbers of channels: {counts}",
            where=f"a norm of {size} channels in {groups} groups",
            why="its statistics are taken over groups of equal size",
            fix="use the plan with the architecture that it was made for",
        )
    return len(left)


# ---- parts --------------------------------------------------------------------------------------


def _index(keep: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(keep, device=like.device)


def _narrow(t: Tensor, dims: Kept) -> Tensor:
    """The kept entries of some dimensions."""
    for d, keep in dims.items():
        t = t.index_select(d, _index(keep, t))
    return t


def _on_kept(compute: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, axes: Kept) -> Tensor:
    """`y` with compute(x) on the kept entries of some axes."""
    part = compute(_narrow(x, axes))
    for d in sorted(axes, reverse=True):  # widen one axis after the other; what is not kept is y's
        outer = {a: axes[a] for a in axes if a < d}
        part = _narrow(y, outer).index_copy(d, _index(axes[d], y), part)
    return part
