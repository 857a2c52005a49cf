"""What every node of a growing graph gives on the example input: shapes and numbers, on demand.

Promises: `node.meta["val"]` is a meta tensor, a number, a tuple, ...; nothing is computed before it
          is asked for, and nothing of the model changes. Where an operation has no meta form, real
          tensors (copies) are used from there on; numbers that come from data are `UNKNOWN`.
Refuses:  example inputs that the model does not accept (TraceError names node and line).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph import get_path, place

SAME_SHAPE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.ChannelShuffle,
)  # fmt: skip


_SAME_IN_BOTH_MODES = ("drop", "batch_norm", "instance_norm")  # names of calls that take `training`


class Unknown:
    """A number that depends on data: nothing can be decided by it."""


UNKNOWN = Unknown()


class Hints:
    """Runs the nodes of a graph in order, as far as somebody asks.

    earlier: the hints of the other mode's graph; nodes that are the same there are not run again.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        earlier: Hints | None = None,
        constants: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.earlier = earlier
        self.constants = constants
        self.names: dict[str, Node] = {}
        self.last: Node | None = None
        self._inputs: Iterator[Any] = iter(example_inputs)
        self._same: dict[Node, Node] = {}  # a node here -> the same node there
        self._twins: dict[int, nn.Module] = {}
        self._real: dict[Node, Any] | None = None  # values, once meta tensors did not do
        self._from_data: set[Node] = set()

    def of(self, node: Node) -> Any:
        """What the node gives; all nodes before it are run first."""
        while "val" not in node.meta:
            self.last = next(iter(node.graph.nodes)) if self.last is None else self.last.next
            self._visit(self.last)
        return node.meta["val"]

    def _visit(self, node: Node) -> None:
        self.names[node.name] = node
        with torch.no_grad():
            if self._real is not None:
                self._run_real(node)
            elif not self._known(node):
                try:
                    values = {n: n.meta["val"] for n in node.all_input_nodes}
                    node.meta["val"] = on_meta(self._run(node, values, to_meta))
                except Exception:
                    self._start_real(node)

    def _known(self, node: Node) -> bool:
        """Take the value of the same node in the other mode's graph."""
        other = self.earlier.names.get(node.name) if self.earlier else None
        if (
            other is None
            or (other.op, other.target) != (node.op, node.target)
            or node.op == "output"
        ):
            return False
        same = self._same.get
        if any(kind in node.name for kind in _SAME_IN_BOTH_MODES):
            if list(map(same, node.all_input_nodes)) != other.all_input_nodes:
                return False
        elif map_arg(node.args, same) != other.args or map_arg(node.kwargs, same) != other.kwargs:
            return False
        if node.op == "placeholder":
            next(self._inputs, None)
        self._same[node] = other
        node.meta["val"] = other.meta["val"]
        return True

    def _start_real(self, node: Node) -> None:
        """An operation without a meta form: everything so far runs again, on real tensors."""
        self._real = {}
        self._inputs = iter(self.example_inputs)
        self._twins = {}
        for before in node.graph.nodes:
            self._run_real(before, first=before is node)
            if before is node:
                return

    def _run_real(self, node: Node, first: bool = False) -> None:
        assert self._real is not None
        try:
            value = self._run(node, self._real, copied)
        except Exception as error:
            raise TraceError(
                f"{type(self.model).__name__} does not accept the example input: {first_line(error)}",
                where=f"node {node.name} at {place(node) or 'unknown line'}",
                why=f"the example input is {_shapes_of(self.example_inputs)}",
                fix=_remedy(self.model, self.example_inputs),
            ) from error
        self._real[node] = value
        leaves = pytree.tree_leaves(value)
        numbers = any(isinstance(v, int | float) for v in leaves)
        made_of_data = first and (numbers or node.op == "call_method" or _is_torchs(node))
        if made_of_data or any(n in self._from_data for n in node.all_input_nodes):
            self._from_data.add(node)
        if node in self._from_data and not any(isinstance(v, Tensor) for v in leaves):
            node.meta["val"] = UNKNOWN
        else:
            node.meta["val"] = on_meta(value)

    def _run(self, node: Node, values: dict[Node, Any], like: Callable[[Any], Any]) -> Any:
        real = like is copied
        if node.op == "placeholder":
            return like(self._input(node))
        if node.op == "get_attr":
            name = str(node.target)
            value = self.constants[name] if name in self.constants else get_path(self.model, name)
            return value if real and isinstance(value, nn.Parameter) else like(value)
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            module = get_path(self.model, str(node.target))
            plain = not real and isinstance(module, SAME_SHAPE) and args
            if plain and isinstance(args[0], Tensor):
                return args[0]
            if not real or module.training:
                module = twin(module, like, self._twins)
            return module.forward(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0]

    def _input(self, node: Node) -> Any:
        name = str(node.target)
        if name.startswith("*"):
            return {} if name.startswith("**") else tuple(self._inputs)
        return next(self._inputs, node.args[0] if node.args else None)


def _is_torchs(node: Node) -> bool:
    home = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_function" and home.split(".")[0] in ("torch", "_operator")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _shapes_of(inputs: tuple[Any, ...]) -> str:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    return ", ".join(f"{_dtype(t.dtype)} of shape {tuple(t.shape)}" for t in tensors)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remedy(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """What to pass instead, as far as types tell."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    given = next((t.dtype for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)), own)
    if own is not None and given != own:
        return (
            f"the parameters are {_dtype(own)}: pass x.to(torch.{_dtype(own)}), if it is an image"
        )
    return "pass example_inputs=... of the shape that forward expects, with a batch dimension"


def to_meta(value: Any) -> Any:
    """Tensors replaced by meta tensors of the same shape, dtype and strides.

    Quantized ones stay as they are: torch has them on the meta device in name only.
    """
    if not isinstance(value, Tensor) or value.is_quantized:
        return value
    return torch.empty_like(value, device="meta")


def on_meta(value: Any) -> Any:
    """As `to_meta`, for whatever a node gives; sizes stay `torch.Size`."""
    if isinstance(value, Tensor):
        return value if value.is_meta else to_meta(value)
    if isinstance(value, int | float | torch.Size):
        return value
    return pytree.tree_map(to_meta, value, is_leaf=lambda v: isinstance(v, torch.Size))


def copied(value: Any) -> Any:
    """Tensors replaced by copies, so that what a graph does in place stays inside it."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def twin(
    module: nn.Module, like: Callable[[Any], Any], twins: dict[int, nn.Module] | None = None
) -> nn.Module:
    """A copy of a layer with other tensors in place of its own, sharing everything else.

    What its forward leaves on it (a weight that a hook computes, ...), it leaves on the copy.
    """
    twins = {} if twins is None else twins
    if id(module) not in twins:
        new = module.__class__.__new__(module.__class__)
        new.__dict__ = dict(module.__dict__)
        new.__dict__["_parameters"] = {k: like(v) for k, v in module._parameters.items()}
        new.__dict__["_buffers"] = {k: like(v) for k, v in module._buffers.items()}
        new.__dict__["_modules"] = {
            k: None if m is None else twin(m, like, twins) for k, m in module._modules.items()
        }
        if isinstance(new, nn.RNNBase):  # it keeps a list of its parameters
            new._flat_weights = [getattr(new, name, None) for name in new._flat_weights_names]
        twins[id(module)] = new
    return twins[id(module)]
