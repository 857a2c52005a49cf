"""What a plan has to mean, said a second time and without the package: masks, slices, errors, MACs.

A plan is the dict of its JSON (design section 3). Tensors are keys of the original state_dict; a
tensor with several names stands in the plan under the first, and is followed here under all.
Where a slice on dim 1 says `size` = groups * shape[1], it indexes channels across the groups of a
grouped convolution: rows of block g see the channels g * shape[1] .. (g + 1) * shape[1] - 1.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

Plan = Mapping[str, Any]  # parsed JSON


@torch.no_grad()
def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy at the original widths in which everything that read a removed channel reads zero.

    Zeroed: the removed entries of every "in" slice, and weights outside the rows x cols of their
    grouping. Norms over channels count the kept ones only: calls that end in torch.layer_norm,
    rms_norm or group_norm with parameters that the plan cuts, and the layers of HAND_WRITTEN.
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
    _count_kept_only(model, plan)
    return model


def _count_kept_only(model: nn.Module, plan: Plan) -> None:
    """Norms inside `model` weigh every channel with 1 or 0, by formulas written out here."""
    first = _first_names(model)
    cut = {entry["tensor"] for entry in plan["slices"]}
    ones = {key: t for key, t in _tensors(model).items() if key in first and first[key] in cut}
    counts = {key: torch.ones(t.shape, dtype=torch.bool) for key, t in ones.items()}
    for entry in plan["slices"]:
        for key in counts:
            if first[key] == entry["tensor"] and entry["size"] == counts[key].shape[entry["dim"]]:
                _zero(counts[key], entry["dim"], entry["size"], entry["keep"])
    for name, module in model.named_modules():
        formula = HAND_WRITTEN.get(type(module).__name__)
        own = counts.get(f"{name}.weight" if name else "weight")
        if formula is not None and own is not None:
            module.forward = partial(formula, module, own)
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        live = {id(t): counts[key] for key, t in _tensors(model).items() if key in counts}
        originals = {name: getattr(torch, name) for name in _FORMULAS}
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for name, formula in _FORMULAS.items():
                setattr(torch, name, partial(formula, originals[name], live))
            return forward(*args, **kwargs)
        finally:
            for name, function in originals.items():
                setattr(torch, name, function)
            torch.backends.mha.set_fastpath_enabled(fast)

    model.forward = run


def _counted(live: Mapping[int, Tensor], *own: Tensor | None) -> Tensor | None:
    return next((live[id(t)] for t in own if t is not None and id(t) in live), None)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _moments(x: Tensor, one: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared distances to it, and count of the entries where `one` is true."""
    n = one.expand_as(x).sum(dims, keepdim=True).clamp(min=1)
    mean = (x * one).sum(dims, keepdim=True) / n
    return mean, ((x - mean).square() * one).sum(dims, keepdim=True), n


def _layer_norm(original, live, x, shape, weight=None, bias=None, eps=1e-5, *rest):
    one = _counted(live, weight, bias)
    if one is None:
        return original(x, shape, weight, bias, eps, *rest)
    mean, spread, n = _moments(x, one, tuple(range(-len(shape), 0)))
    return _affine((x - mean) / (spread / n + eps).sqrt(), weight, bias)


def _rms_norm(original, live, x, shape, weight=None, eps=None):
    one = _counted(live, weight)
    if one is None:
        return original(x, shape, weight, eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    power = (x.square() * one).sum(-1, keepdim=True) / one.sum()
    return x / (power + eps).sqrt() * weight


def _group_norm(original, live, x, groups, weight=None, bias=None, eps=1e-5, *rest):
    one = _counted(live, weight, bias)
    if one is None:
        return original(x, groups, weight, bias, eps, *rest)
    y = _per_group(x, one, groups, eps)
    shape = (-1, *[1] * (x.dim() - 2))
    return _affine(y, *(None if t is None else t.view(shape) for t in (weight, bias)))


def _per_group(x: Tensor, one: Tensor, groups: int, eps: float, centre: bool = True) -> Tensor:
    """x [B, C, ...] by the deviation of its group of channels."""
    blocks = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    mean, spread, n = _moments(blocks, one.view(groups, -1, 1), (2, 3))
    return ((blocks - mean * centre) / (spread / n + eps).sqrt()).view(x.shape)


_FORMULAS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}


def _column(t: Tensor, axis: int) -> Tensor:
    """A vector that broadcasts along an axis of a batch of images, or along the last one."""
    return t.view(-1, 1, 1) if axis == 1 else t


def _response(module: nn.Module, one: Tensor, x: Tensor) -> Tensor:
    axis = module.channel_dim
    size = x.square().sum(module.spatial_dim, keepdim=True).sqrt()
    mean = (size * _column(one, axis)).sum(axis, keepdim=True) / one.sum()
    gain = size / (mean + module.eps)
    return x + x * gain * _column(module.weight, axis) + _column(module.bias, axis)


def _rms(module: nn.Module, one: Tensor, x: Tensor) -> Tensor:
    power = (x.square() * _column(one, 1)).sum(1, keepdim=True) / one.sum()
    return x / (power + module.eps).sqrt() * _column(module.weight, 1)


def _simple(axis: int, module: nn.Module, one: Tensor, x: Tensor) -> Tensor:
    _, spread, n = _moments(x, _column(one, axis), (axis,))
    return x / (spread / (n - 1) + module.eps).sqrt() * _column(module.weight, axis)


def _evo(module: nn.Module, one: Tensor, x: Tensor) -> Tensor:
    y = _per_group(x, one, module.groups, module.eps, centre=False)
    gate = (x * _column(module.v, 1)).sigmoid()
    return _affine(y * gate, _column(module.weight, 1), _column(module.bias, 1))


HAND_WRITTEN = {  # layers of timm that normalise by code of their own, by the name of the class
    "GlobalResponseNorm": _response,
    "RmsNorm2d": _rms,
    "SimpleNorm": partial(_simple, -1),
    "SimpleNorm2d": partial(_simple, 1),
    "EvoNorm2dS0": _evo,
}


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

    Convolutions and matrix products; the fast path of attention, which it does not see, is off, and
    einsum, which multiplies elementwise where a sum has one term, counts by its equation.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    trained = [p for p in model.parameters() if p.requires_grad]  # views of them confuse hooks
    try:
        for p in trained:
            p.requires_grad_(False)
        with FlopCounterMode(display=False) as counter, _Einsum(counter) as einsum:
            model(x)
    finally:
        for p in trained:
            p.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast)
    return (counter.get_total_flops() + einsum.unseen) / 2 / x.shape[0]


class _Einsum(TorchFunctionMode):
    """Counts what a flop counter misses of einsum: a product of the sizes of all its letters."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.unseen = counter, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if func is torch.functional.einsum:
            terms = args[0].replace(" ", "").split("->")[0].split(",")
            sizes = {c: n for term, x in zip(terms, args[1:], strict=True)
                     for c, n in zip(_spelt(term, x.dim()), x.shape, strict=True)}  # fmt: skip
            self.unseen += 2 * math.prod(sizes.values()) - (self.counter.get_total_flops() - before)
        return out


def _spelt(term: str, rank: int) -> str:
    """A term of an einsum with a capital for each axis that its `...` stands for."""
    return term.replace("...", "ABCDEFGH"[8 - rank + len(term) - 3 :]) if "." in term else term


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
