"""Multiply-adds and parameters of a network, whole and after any cut, in closed form.

`macs` counts convolutions and every matrix product, per sample, as half of what
`torch.utils.flop_counter` reports; bias, normalisation and activations cost nothing. The price of a
cut is a sum of products of kept counts, so a budget search never runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.graph import evaluating, op_name, value_of
from fxprune.groups import Analysis, Array
from fxprune.trace import Traced, batch_size, to_meta, twin

_PRODUCTS = [
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "addbmm",
    "einsum",
    "linear",
    "bilinear",
    "tensordot",
    "dot",
    "mv",
    "inner",
    "outer",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "shifted_window_attention",
]


@dataclass
class Cost:
    """Closed-form costs of an analysed network as functions of a keep mask, bool [classes]."""

    rows_per_class: Any  # csr [kinds of slots, classes]: how many rows belong to a class
    mac_factors: Array
    mac_dims: Array  # int [terms, dims]: kinds of slots; the last one always counts 1
    param_factors: Array
    param_dims: Array
    fixed_macs: int

    @classmethod
    def of(cls, analysis: Analysis) -> Cost:
        """Collect the terms of an analysed graph."""
        slots = analysis.slots
        terms = analysis.flow.ledger.macs
        kinds = {id(s.ids): s.ids for s in slots}  # coupled tensors share their ids: count once
        kinds |= {id(ids): ids for t in terms for ids in t.dims}
        row = {key: i for i, key in enumerate(kinds)}
        index = {(s.tensor, s.dim): row[id(s.ids)] for s in slots}
        size = {(s.tensor, s.dim): s.size for s in slots}
        one = len(kinds)
        classes = [analysis.classes(ids).ravel() for ids in kinds.values()]
        rows = np.repeat(np.arange(one), [len(c) for c in classes])
        cols = np.concatenate([*classes, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        rows, cols = np.append(rows, one), np.append(cols, analysis.class_of[0])
        incidence = csr_matrix(
            (np.ones(len(rows)), (rows, cols)), shape=(one + 1, len(analysis.stays))
        )
        params = retained_parameters(analysis.traced)
        by_tensor: dict[str, list[tuple[str, int]]] = {}
        for key in index:
            by_tensor.setdefault(key[0], []).append(key)
        factors, dims = [], []
        for name, t in params.items():
            own = by_tensor.get(name, [])
            factors.append(t.numel() / max(math.prod(size[key] for key in own), 1))
            dims.append([index[key] for key in own])
        return cls(
            rows_per_class=incidence,
            mac_factors=np.array([t.factor for t in terms]),
            mac_dims=_padded([[row[id(d)] for d in t.dims] for t in terms], one),
            param_factors=np.array(factors),
            param_dims=_padded(dims, one),
            fixed_macs=_fixed_macs(analysis),
        )

    def macs(self, keep: Array) -> int:
        """Multiply-adds per sample when the classes in `keep` stay."""
        return self._sum(self.mac_factors, self.mac_dims, keep) + self.fixed_macs

    def params(self, keep: Array) -> int:
        """Parameters when the classes in `keep` stay."""
        return self._sum(self.param_factors, self.param_dims, keep)

    def _sum(self, factors: Array, dims: Array, keep: Array) -> int:
        if not len(factors):
            return 0
        count = self.rows_per_class @ keep.astype(np.float64)
        return round(float((factors * count[dims].prod(axis=1)).sum()))


def _padded(dims: list[list[int]], one: int) -> Array:
    """Rows of one length: int64 [terms, most dims of a term]."""
    most = max(map(len, dims), default=0)
    rows = [d + [one] * (most - len(d)) for d in dims]
    return np.array(rows, dtype=np.int64).reshape(len(dims), most)


def retained_tensors(traced: Traced) -> dict[str, Tensor]:
    """Parameters and buffers that the traced graph uses, by canonical name."""
    used: dict[str, Tensor] = {}
    for node in traced.graph.nodes:
        held: list[Any] = []
        if node.op == "call_module":
            module = traced.module(node)
            held = [*module.parameters(), *module.buffers()]
        elif node.op == "get_attr":
            held = [traced.attribute(node)]
        for t in held:
            name = traced.tensors.name(t) if isinstance(t, Tensor) else None
            if name is not None:
                used[name] = t
    return used


def retained_parameters(traced: Traced) -> dict[str, nn.Parameter]:
    """Parameters that the traced graph uses, by canonical name."""
    return {k: v for k, v in retained_tensors(traced).items() if isinstance(v, nn.Parameter)}


def _fixed_macs(analysis: Analysis) -> int:
    return round(sum(fixed_macs(analysis).values()) / analysis.traced.batch)


def fixed_macs(analysis: Analysis) -> dict[str, int]:
    """Node -> multiply-adds of a whole batch, of the products that no rule cuts.

    They are counted by torch on meta tensors.
    """
    counted = {term.node for term in analysis.flow.ledger.macs}
    return {
        node.name: _count(analysis.traced, node)
        for node in analysis.traced.graph.nodes
        if node.name not in counted and may_multiply(analysis.traced, node)
    }


def may_multiply(traced: Traced, node: Node) -> bool:
    """Whether a node can hold a convolution or matrix product."""
    if node.op == "call_module":
        module = traced.module(node)
        return any(p.dim() > 1 for p in module.parameters())
    return op_name(node) in _PRODUCTS


def _count(traced: Traced, node: Node) -> int:
    """On meta tensors; a layer that looks at values has no meta form, and is run on zeros."""
    try:
        return _flops(traced, node, to_meta)
    except Exception:
        with torch.random.fork_rng(devices=[]):
            return _flops(traced, node, _zeros)


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value


def _flops(traced: Traced, node: Node, like: Callable[[Any], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # it looks for triton when imported

    args = pytree.tree_map(like, map_arg(node.args, value_of))
    kwargs = pytree.tree_map(like, map_arg(node.kwargs, value_of))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if node.op == "call_module":
            twin(traced.module(node), like).forward(*args, **kwargs)
        elif node.op == "call_method":
            getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.target(*args, **kwargs)  # type: ignore[operator]
    return int(counter.get_total_flops()) // 2


def macs(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """Multiply-adds of any module per sample: half of torch's flop counter, in eval mode."""
    from torch.utils.flop_counter import FlopCounterMode  # it looks for triton when imported

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = pytree.tree_map(
        lambda v: v.to(device) if isinstance(v, Tensor) else v, tuple(example_inputs)
    )
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:  # the counter's hooks fail on views of them, made without a gradient
            p.requires_grad_(False)
        with evaluating(model), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
    finally:
        for p in trained:
            p.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2 // batch_size(inputs)


def thop(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """Multiply-adds per sample as the thop package counts them: `macs` + 2 x batch-norm elements."""
    elements = 0

    def count(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal elements
        elements += out.numel()

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_hook(count) for m in norms]
    try:
        total = macs(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total + 2 * elements // batch_size(example_inputs)
