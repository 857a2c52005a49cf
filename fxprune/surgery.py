"""Plan -> sliced parameters and layers. The only file that cuts weights.

Promises: nothing is shared with the original; device, dtype, memory format, mode, `requires_grad`
and tying stay as they were; kept entries are the original's, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxprune.errors import UnsupportedOpError
from fxprune.graph import Tensors
from fxprune.plan import Slice


def cut_tensor(t: Tensor, slices: Sequence[Slice]) -> Tensor:
    """The kept entries of a tensor, in memory of their own."""
    out = t.detach()
    blocked = {s.dim for s in slices if s.size != t.shape[s.dim]}  # these count dim 0's rows: first
    for s in sorted(slices, key=lambda s: (s.dim not in blocked, s.dim)):
        keep = torch.tensor(s.keep, device=out.device)
        if s.size == t.shape[s.dim]:
            out = out.index_select(s.dim, keep)
        else:
            out = _cut_blocks(out, keep, s.size // t.shape[s.dim])
    if out.data_ptr() == t.data_ptr() or out is t:
        out = out.clone()
    if t.dim() == 4 and _channels_last(t):
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def _channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


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

    def tensor(self, t: Tensor) -> Tensor:
        """The cut counterpart of a tensor of the model; the same one every time it is asked for."""
        name = self._tensors.name(t)
        if name is None:
            return t.detach().clone()
        if name not in self._done:
            new = cut_tensor(t, self._by_tensor.get(name, ()))
            if isinstance(t, nn.Parameter):
                new = nn.Parameter(new, requires_grad=t.requires_grad)
            else:
                new.requires_grad_(t.requires_grad)
            self._done[name] = new
        return self._done[name]

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of a layer that holds cut tensors; its size attributes are still the old ones."""
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
                why="pruning returns a new model and so copies every layer",
                fix="make the layer survive copy.deepcopy",
            ) from error
        return new


def refit(module: nn.Module, groups: Mapping[nn.Module, int], channels: int | None) -> None:
    """Make a layer's size attributes agree with its cut tensors.

    groups: the new number of groups of convolutions cut by whole groups. channels: the channels
    that reach the layer, for those without a tensor that tells.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        module.groups = groups.get(module, module.groups)
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        pair = (first, second) if module.transposed else (second, first)
        module.in_channels, module.out_channels = pair
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif hasattr(module, "num_features") and channels is not None:
        module.num_features = channels
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
