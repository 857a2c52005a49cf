"""Plan -> the original network with removed inputs zeroed: the oracle pruning is compared with.

It runs the user's own class, untraced, so it also vouches for the trace.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fxprune.errors import OptionTypeError, PlanError, UnsupportedOpError
from fxprune.graph import Tensors
from fxprune.inputs import unwrap
from fxprune.masked_norms import keep_statistics
from fxprune.plan import Plan, Slice


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with every removed entry of an "in" slice set to zero.

    Norms over channels (layer, RMS, group and response norms) take their statistics over the kept
    ones. In eval mode it computes what the pruned network computes (design: the law of the Plan).
    Raises PlanError when the plan belongs to another architecture.
    """
    model, _ = unwrap(model)
    if not isinstance(plan, Plan):
        raise OptionTypeError(
            f"plan is a {type(plan).__name__}", where="plan", fix="Plan.from_json(text) reads one"
        )
    try:
        held = {id(t): t for t in (*model.parameters(), *model.buffers())}
        masked = copy.deepcopy(model, {key: _copied(t) for key, t in held.items()})
    except Exception as error:
        raise UnsupportedOpError(
            f"{type(model).__name__} cannot be copied: {error}",
            where=f"copy.deepcopy of {type(model).__name__}",
            why="the masked original is a copy of the model",
            fix="make the model survive copy.deepcopy",
        ) from error
    tensors = Tensors.of(masked)
    with torch.no_grad():
        for s in plan.slices:
            t = tensors.tensor.get(s.tensor)
            if t is None or not _fits(t, s):
                raise PlanError(
                    f"the plan cuts `{s.tensor}` of size {s.size} along dimension {s.dim}",
                    where=f"`{s.tensor}`",
                    why="the model has no such tensor" if t is None else f"its shape is {tuple(t.shape)}",
                    fix="use the plan with the architecture that it was made for",
                )  # fmt: skip
            if s.role == "in":
                zero_inputs(t, s)
    keep_statistics(masked, tensors, plan.slices)  # guard: kept -> tests/test_norms.py -k images
    return masked


def _fits(t: Tensor, s: Slice) -> bool:
    """Whether a tensor has that dimension; blocks share dimension 1, and divide dimension 0."""
    if s.dim >= t.dim() or not t.shape[s.dim]:
        return False
    blocks, rest = divmod(s.size, t.shape[s.dim])
    return not rest and (blocks == 1 or (s.dim == 1 and not t.shape[0] % blocks))


def _copied(t: Tensor) -> Tensor:
    """A tensor of its own, as deepcopy makes one; also of layouts that deepcopy does not know."""
    new = t.detach().clone()
    if isinstance(t, nn.Parameter):
        return nn.Parameter(new, requires_grad=t.requires_grad)
    return new


def zero_inputs(t: Tensor, s: Slice) -> None:
    """Zero the removed entries of one dimension, in place; blocked in a grouped convolution."""
    removed = torch.ones(s.size, dtype=torch.bool, device=t.device)
    removed[list(s.keep)] = False
    blocks = s.size // t.shape[s.dim]
    if blocks == 1:
        t.movedim(s.dim, 0)[removed] = 0
    else:
        grouped = t.view(blocks, t.shape[0] // blocks, *t.shape[1:])
        grouped.movedim(2, 1)[removed.view(blocks, -1)] = 0
