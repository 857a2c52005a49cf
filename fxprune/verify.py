"""Does the pruned network compute what the masked original computes? In numbers, or an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.errors import VerifyError
from fxprune.graph import evaluating

BOUND_64, BOUND_32 = 1e-9, 1e-4


def verify(
    masked: nn.Module,
    pruned: nn.Module,
    example_inputs: tuple[Any, ...],
    bound: float = BOUND_64,
) -> str:
    """Compare both in eval mode on the example input; returns a sentence for the report.

    max|a - b| / max|a| must stay within 1e-9 in float64; where float64 cannot run, within 1e-4 in
    float32, and the sentence says so. Raises VerifyError otherwise; the arguments are not changed.
    """
    try:
        error, largest = _difference(masked, pruned, example_inputs, torch.float64)
        dtype = "float64"
    except VerifyError:
        raise
    except Exception as reason:  # whatever an operation without a float64 form raises
        try:
            error, largest = _difference(masked, pruned, example_inputs, torch.float32)
        except VerifyError:
            raise
        except Exception as failure:
            raise VerifyError(
                f"the pruned network cannot be compared with the original: {failure}",
                where="on the example input, in float64 and in float32",
                why="the original or the pruned network fails on it",
                fix="if the original accepts this input, please report the model; else pass another",
            ) from failure
        bound, dtype = BOUND_32, f"float32 (float64 cannot run: {str(reason).splitlines()[0][:80]})"
    if not error <= bound:  # guard: verify -> tests/bad_input/test_verify.py -k wrong_cut
        raise VerifyError(
            f"the pruned network differs from the masked original by {error:.3g} (bound {bound:g})",
            where=f"outputs on the example input, {dtype}",
            why="the trace or a rewrite is wrong for this model: nothing is returned",
            fix="please report it with the model; ignore=... the layers concerned until then",
        )
    if not largest:  # guard: zeros -> tests/bad_input/test_verify.py -k zeros
        return (
            "nothing was compared: all outputs are zero on the example input "
            "(a last layer of zeros?); give the model weights, and compile it again"
        )
    return f"max relative difference {error:.2g} in {dtype} against the masked original (bound {bound:g})"


def _difference(
    masked: nn.Module, pruned: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype
) -> tuple[float, float]:
    """The relative difference, and the largest output of the masked original."""
    a = _outputs(masked, inputs, dtype)
    b = _outputs(pruned, inputs, dtype)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        raise VerifyError(
            "the pruned network returns something of another shape than the original",
            where=f"{[tuple(x.shape) for x in a]} against {[tuple(y.shape) for y in b]}",
        )
    worst = largest = 0.0
    for x, y in zip(a, b, strict=True):
        if not bool(torch.isfinite(x).all()):
            raise VerifyError(
                "the masked original returns NaN or infinity on the example input",
                where="outputs of the original with the plan's inputs zeroed",
                why="nothing can be compared then",
                fix="pass other example_inputs, or verify=False",
            )
        scale = float(x.abs().max()) if x.numel() else 0.0
        largest = max(largest, scale)
        gap = float((x - y).abs().max()) if x.numel() else 0.0
        worst = max(worst, gap / scale if scale else gap) if gap == gap else float("nan")
    return worst, largest


def _outputs(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Floating outputs in eval mode with every tensor at the given dtype; the model is put back."""
    buffers = dict(model.named_buffers())
    tensors = {**dict(model.named_parameters()), **buffers}
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")

    def cast(v: Any, copy: bool = True) -> Any:  # forward may write into buffers and inputs
        return v.detach().to(device, dtype if v.is_floating_point() else v.dtype, copy=copy)

    with evaluating(model), torch.no_grad(), _AsPrecise(dtype):
        outputs = torch.func.functional_call(
            model,
            {name: cast(t, name in buffers) for name, t in tensors.items()},
            pytree.tree_map(lambda v: cast(v) if isinstance(v, Tensor) else v, inputs),
        )
    return [
        t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()
    ]


class _AsPrecise(TorchFunctionMode):
    """Layers that compute in float32 whatever they are given compute in float64 where that is asked.

    Else their rounding would hide an error of the cut.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.double = dtype == torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out casts of float64 to float32."""
        kwargs = kwargs or {}
        if self.double and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
