"""What a plan has to mean, said a second time and without the package: masks, slices, errors, MACs.

A plan is the dict of its JSON (design section 3). Tensors are keys of the original state_dict; a
tensor with several names stands in the plan under the first, and is followed here under all.
Where a slice on dim 1 says `size` = groups * shape[1], it indexes channels across the groups of a
grouped convolution: rows of block g see the channels g * shape[1] .. (g + 1) * shape[1] - 1.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

Plan = Mapping[str, Any]  # parsed JSON


@torch.no_grad()
def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy at the original widths in which everything that read a removed channel reads zero.

    Zeroed: the removed entries of every "in" slice, and weights outside the rows x cols of their
    grouping. Statistics over channels are left alone, so a plan that cuts below a GroupNorm or a
    channel softmax is not described by this.
    """
    model = copy.deepcopy(model)
    tensors = _tensors(model)
    for entry in plan["slices"]:
        if entry["role"] == "in":
            _zero(tensors[entry["tensor"]], entry["dim"], entry["size"], entry["keep"])
    for entry in plan.get("groupings", ()):
        weight = tensors[entry["tensor"]]
        kept = torch.zeros(weight.shape[:2], dtype=torch.bool, device=weight.device)
        for rows, cols in zip(entry["rows"], entry["cols"], strict=True):
            kept[torch.tensor(rows)[:, None], torch.tensor(cols)] = True
        weight[~kept] = 0
    return model


@torch.no_grad()
def sliced_state(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The state_dict of the pruned model, bit for bit, if `plan` only slices.

    Raises ValueError where a slice does not fit its tensor, where the blocks of a grouped
    convolution keep different counts, or where the plan holds groupings or folds.
    """
    if plan.get("groupings") or plan.get("folds"):
        raise ValueError("sliced_state speaks about slices only")
    first = _first_names(model)
    by_tensor: dict[str, dict[int, Mapping[str, Any]]] = {}
    for entry in plan["slices"]:
        if by_tensor.setdefault(entry["tensor"], {}).setdefault(entry["dim"], entry) is not entry:
            raise ValueError(f"two slices of {entry['tensor']} on dim {entry['dim']}")
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    if unknown := by_tensor.keys() - set(first.values()):
        raise ValueError(f"not a first name in the state_dict: {sorted(unknown)}")
    return {key: _cut(key, t, by_tensor.get(first[key], {})) for key, t in state.items()}


def relative_error(a: Any, b: Any) -> float:
    """max|a - b| / max|a| of two outputs of one structure, the worst of their tensors.

    Infinite where a difference is not a number, or where a is all zero and b is not. Raises
    ValueError where structures or shapes differ.
    """
    (left, structure), (right, other) = tree_flatten(a), tree_flatten(b)
    if structure != other:
        raise ValueError(f"structures differ: {structure} and {other}")
    return max((_error(x, y) for x, y in zip(left, right, strict=True)), default=0.0)


@torch.no_grad()
def flops(model: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates per sample: half of what torch.utils.flop_counter counts.

    Convolutions and matrix products; the fast path of attention, which it does not see, is off.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2 / x.shape[0]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every key of the state_dict -> the first name of its tensor."""
    first: dict[int, str] = {}
    saved = model.state_dict().keys()
    tensors = {key: tensor for key, tensor in _tensors(model).items() if key in saved}
    return {key: first.setdefault(id(tensor), key) for key, tensor in tensors.items()}


def _groups(tensor: Tensor, dim: int, size: int) -> int:
    """1 for a plain slice, the number of groups where `size` counts channels across them."""
    if size == tensor.shape[dim]:
        return 1
    groups, rest = divmod(size, tensor.shape[dim])
    if dim != 1 or rest or tensor.shape[0] % groups:
        raise ValueError(f"size {size} does not fit dim {dim} of {tuple(tensor.shape)}")
    return groups


def _zero(tensor: Tensor, dim: int, size: int, keep: Sequence[int]) -> None:
    """Zero the entries of `dim` that are not kept."""
    groups, per = _groups(tensor, dim, size), tensor.shape[dim]
    rows = tensor.shape[0] // groups
    for channel in set(range(size)) - set(keep):
        block, column = divmod(channel, per)
        part = tensor[block * rows : (block + 1) * rows] if groups > 1 else tensor
        part.select(dim, column).zero_()


def _cut(key: str, tensor: Tensor, slices: Mapping[int, Mapping[str, Any]]) -> Tensor:
    """The tensor with all of its slices applied; rows of a group take that group's columns."""
    for dim, entry in slices.items():
        keep = entry["keep"]
        if sorted({*keep}) != [*keep] or not all(0 <= i < entry["size"] for i in keep):
            raise ValueError(f"{key}: the kept indices of dim {dim} are not ascending in range")
    across = 1 in slices and _groups(tensor, 1, slices[1]["size"]) > 1
    if not across:
        for dim, entry in slices.items():
            _groups(tensor, dim, entry["size"])
            tensor = tensor.index_select(dim, torch.tensor(entry["keep"], device=tensor.device))
        return tensor
    per, groups = tensor.shape[1], _groups(tensor, 1, slices[1]["size"])
    block = tensor.shape[0] // groups
    columns = [[i % per for i in slices[1]["keep"] if i // per == g] for g in range(groups)]
    rows = slices[0]["keep"] if 0 in slices else range(tensor.shape[0])
    counts = {len(columns[row // block]) for row in rows}
    if len(counts) > 1:
        raise ValueError(f"{key}: the groups keep different counts of channels: {sorted(counts)}")
    return torch.stack([tensor[row, columns[row // block]] for row in rows])


def _error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    difference, scale = (a - b).abs().max().item(), a.abs().max().item()
    if difference == 0:
        return 0.0
    error = difference / scale if scale > 0 else float("inf")
    return error if error == error else float("inf")  # a NaN is an error of any size
