"""Plan -> sliced parameters and layers. The only file that cuts weights.

Promises: nothing is shared with the original; device, dtype, memory format, mode, `requires_grad`
and tying stay as they were; kept entries are the original's, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import UnsupportedOpError
from fxprune.graph import Tensors
from fxprune.plan import Slice
from fxprune.rules.norms import groups_attribute

Index = Callable[[Sequence[int]], Tensor]


def cut_tensor(t: Tensor, slices: Sequence[Slice], index: Index = torch.tensor) -> Tensor:
    """The kept entries of a tensor, in memory of their own; `index` makes index tensors."""
    out = t.detach()
    if not slices:
        return out.clone()
    blocked = {s.dim for s in slices if s.size != t.shape[s.dim]}  # these count dim 0's rows: first
    for s in sorted(slices, key=lambda s: (s.dim not in blocked, s.dim)):
        keep = index(s.keep).to(out.device)
        if s.size == t.shape[s.dim]:
            out = out.index_select(s.dim, keep)
        else:
            out = _cut_blocks(out, keep, s.size // t.shape[s.dim])
    return out.contiguous(memory_format=memory_format(t))


def memory_format(t: Tensor) -> torch.memory_format:
    """The format a tensor is stored in: channels last (of images or volumes), or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if last is not None and t.is_contiguous(memory_format=last) and not t.is_contiguous():
        return last
    return torch.contiguous_format


def _cut_blocks(t: Tensor, keep: Tensor, blocks: int) -> Tensor:
    """Dim 1 of a grouped weight: each block of rows keeps its own columns, as many as the others."""
    columns = (keep.view(blocks, -1) % t.shape[1]).repeat_interleave(t.shape[0] // blocks, 0)
    rows = torch.arange(t.shape[0], device=t.device)[:, None]
    return t[rows, columns]


class Surgeon:
    """Copies layers of one model, with cut tensors in place of the original ones."""

    def __init__(self, tensors: Tensors, slices: Iterable[Slice]) -> None:
        self._tensors = tensors
        self._by_tensor: dict[str, list[Slice]] = {}
        for s in slices:
            self._by_tensor.setdefault(s.tensor, []).append(s)
        self._done: dict[str, Tensor] = {}
        self._memo: dict[int, object] = {}
        self._indices: dict[int, tuple[Sequence[int], Tensor]] = {}

    def _index(self, keep: Sequence[int]) -> Tensor:
        """Slices of coupled tensors share one tuple of indices: make its tensor once."""
        if id(keep) not in self._indices:
            self._indices[id(keep)] = keep, torch.tensor(keep)
        return self._indices[id(keep)][1]

    def tensor(self, t: Tensor) -> Tensor:
        """The cut counterpart of a tensor of the model; the same one every time it is asked for."""
        name = self._tensors.name(t)
        if name is None:
            return t.detach().clone()
        if name not in self._done:
            new = cut_tensor(t, self._by_tensor.get(name, ()), self._index)
            if isinstance(t, nn.Parameter):
                new = nn.Parameter(new, requires_grad=t.requires_grad)
            else:
                new.requires_grad_(t.requires_grad)
            self._done[name] = new
        return self._done[name]

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of a layer that holds cut tensors; its size attributes are still the old ones."""
        if _plain(module):
            return self._clone(module)
        for m in module.modules():
            held = [*m._parameters.values(), *m._buffers.values(), *vars(m).values()]
            for t in held:
                if isinstance(t, Tensor):
                    self._memo.setdefault(id(t), self.tensor(t))
        try:
            new: nn.Module = copy.deepcopy(module, self._memo)
        except Exception as error:
            raise UnsupportedOpError(
                f"a {type(module).__name__} cannot be copied: {error}",
                where=f"a layer of class {type(module).__name__}",
                why="pruning returns a new model and so copies every layer",
                fix="make the layer survive copy.deepcopy",
            ) from error
        return new

    def _clone(self, module: nn.Module) -> nn.Module:
        """What copy.deepcopy does to a layer of torch.nn, faster: containers anew, tensors cut."""
        if id(module) not in self._memo:
            new = module.__class__.__new__(module.__class__)
            for key, value in vars(module).items():
                new.__dict__[key] = value.copy() if isinstance(value, _CONTAINERS) else value
            for store in (new._parameters, new._buffers):
                for key, t in store.items():
                    store[key] = None if t is None else self.tensor(t)  # type: ignore[assignment]
            self._memo[id(module)] = new
        clone = self._memo[id(module)]
        assert isinstance(clone, nn.Module)
        return clone


_CONTAINERS = (dict, list, set)
_VALUES = (str, int, float, bool, tuple, type(None), torch.dtype)


def _plain(module: nn.Module) -> bool:
    """A layer of torch.nn without children, hooks or attributes that a shallow copy would share."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not module._modules
        and all(
            isinstance(v, _VALUES) or (isinstance(v, _CONTAINERS) and (not v or k in _SHALLOW))
            for k, v in vars(module).items()
        )
    )


_SHALLOW = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_reversed_padding_repeated_twice")  # fmt: skip


Refit = Callable[[Any, tuple[int, ...]], None]  # gets a layer and its input's shape after the cut
REFITS: dict[type[nn.Module], Refit] = {}


def refit(module: nn.Module, groups: Mapping[nn.Module, int], channels: int | None) -> None:
    """Make a layer's size attributes agree with its cut tensors.

    groups: the new number of groups of convolutions and norms cut by whole groups. channels: the
    channels that reach the layer, for those without a tensor that tells.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        module.groups = groups.get(module, module.groups)
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        pair = (first, second) if module.transposed else (second, first)
        module.in_channels, module.out_channels = pair
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif hasattr(module, "num_features") and channels is not None:
        module.num_features = channels  # type: ignore[assignment]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.input_size = module._parameters["weight_ih_l0"].shape[1]  # type: ignore[union-attr]
        module.hidden_size = module._parameters["weight_hh_l0"].shape[1]  # type: ignore[union-attr]
        module._init_flat_weights()
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    else:
        _refit_norm(module, groups.get(module), channels)


def _refit_norm(module: nn.Module, groups: int | None, channels: int | None) -> None:
    """Shapes and counts that a norm over channels keeps beside its tensors."""
    own = next((t for t in module._parameters.values() if t is not None), None)
    if hasattr(module, "normalized_shape") and own is not None:
        module.normalized_shape = tuple(own.shape)  # type: ignore[assignment]
    attribute = groups_attribute(module)
    if attribute is not None and groups is not None:
        setattr(module, attribute, groups)
        if hasattr(module, "num_channels") and channels is not None:
            module.num_channels = channels  # type: ignore[assignment]
