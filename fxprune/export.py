"""Write a network as ONNX or as a torch.export program, and prove that the file computes the same."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.checkpoint import atomic_path
from fxprune.errors import OptionError, UnsupportedOpError, VerifyError
from fxprune.pruned import PrunedModule

BOUND = 1e-4  # relative, float32 on both sides with other kernels


def export(
    pruned: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Any, ...] | None = None
) -> Path:
    """Write `pruned` in eval mode to `path`, ".onnx" (dynamo exporter) or ".pt2" (torch.export).

    The batch size stays dynamic where the model allows. The file is run (onnxruntime, or torch)
    and compared before this returns: relative difference at most 1e-4, else VerifyError and no file.
    example_inputs: as for `compile`; a PrunedModule remembers its own.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise OptionError(
            f"`{path.name}` is neither .onnx nor .pt2",
            where="path",
            fix='export(pruned, "net.onnx") or export(pruned, "net.pt2")',
        )
    model = copy.deepcopy(pruned).cpu()
    for module in model.modules():
        module.training = False
    inputs = _two_of_each(_inputs(pruned, example_inputs))
    with torch.no_grad():
        expected = _leaves(model(*inputs))
    with atomic_path(path) as temporary:
        write = _onnx if path.suffix == ".onnx" else _pt2
        got = write(model, inputs, Path(temporary))
        _compare(expected, got, path)
    return path


def _inputs(model: nn.Module, given: Tensor | tuple[Any, ...] | None) -> tuple[Any, ...]:
    if given is not None:
        return (given,) if isinstance(given, Tensor) else tuple(given)
    if not isinstance(model, PrunedModule):
        raise OptionError(
            "export needs example_inputs for a model that fxprune did not prune",
            where="example_inputs",
            fix="export(model, path, example_inputs=x)",
        )
    inputs = tuple(spec.example() for spec in model.origin.inputs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return tuple(x.to(dtype) if dtype and x.is_floating_point() else x for x in inputs)


def _two_of_each(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Batch 1 would be taken for a constant: double it."""

    def double(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        v = v.cpu()
        return torch.cat([v, v.flip(0)]) if v.dim() and len(v) == 1 else v

    return tuple(pytree.tree_map(double, inputs))


def _dynamic(inputs: tuple[Any, ...]) -> Any:
    auto = torch.export.Dim.AUTO
    return pytree.tree_map(
        lambda v: {0: auto} if isinstance(v, Tensor) and v.dim() else None, tuple(inputs)
    )


def _program(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(model, inputs, dynamic_shapes=_dynamic(inputs))
    except Exception as error:
        raise UnsupportedOpError(
            f"torch.export cannot capture the model: {str(error).splitlines()[0]}",
            where=type(model).__name__,
            fix="torch.export.export(model.eval(), inputs) shows the whole reason",
        ) from error


def _onnx(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> list[Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnsupportedOpError(
            f"ONNX export needs the package {error.name}",
            fix='pip install "fxprune[export]"',
        ) from error
    with _quiet():
        program = torch.onnx.export(
            _program(model, inputs), inputs, dynamo=True, verbose=False, external_data=False
        )
        assert program is not None
        program.save(str(path), external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, ["CPUExecutionProvider"])
    tensors = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    names = [i.name for i in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return [torch.as_tensor(v) for v in session.run(None, feed)]


def _pt2(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> list[Tensor]:
    buffer = io.BytesIO()
    torch.export.save(_program(model, inputs), buffer)
    path.write_bytes(buffer.getvalue())
    buffer.seek(0)
    with torch.no_grad():
        return _leaves(torch.export.load(buffer).module()(*inputs))


def _leaves(outputs: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor)]


def _compare(expected: list[Tensor], got: list[Tensor], path: Path) -> None:
    if len(expected) != len(got):
        raise VerifyError(f"`{path.name}` gives {len(got)} outputs, the model {len(expected)}")
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        scale = max(float(a.abs().max()), 1e-12) if a.numel() else 1.0
        gap = float((a.double() - b.double()).abs().max()) / scale if a.numel() else 0.0
        if a.shape != b.shape or not gap <= BOUND:
            raise VerifyError(
                f"`{path.name}` does not compute what the model computes: relative {gap:.3g}",
                where=f"output {i}",
                why=f"the bound is {BOUND:g}",
                fix="nothing was written; try the other format (.pt2 or .onnx)",
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own chatter is of no use to the reader."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
