"""R3: fold eval-mode batch norm into the convolution or linear that feeds it.

Invariant: eval outputs agree to rounding; one node fewer per fold; the input module is untouched.
Refuses:   a layer with a second reader, or called (or its weight used) elsewhere; a norm without
           running statistics; grouped transposed convolutions; layers with hooks.
Source:    Ioffe & Szegedy 2015 (arXiv:1502.03167), the inference form of batch norm.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from fxprune.graph import HOOKS

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)  # fmt: skip


@dataclass(frozen=True)
class FoldBatchnormReport:
    """folded: (layer, batch norm) names in graph order. skipped: batch norm -> reason."""

    folded: tuple[tuple[str, str], ...]
    skipped: Mapping[str, str]


def fold_batchnorm(
    gm: GraphModule, only: Collection[tuple[str, str]] | None = None
) -> tuple[GraphModule, FoldBatchnormReport]:
    """A copy of `gm` with batch norms folded; `only` restricts it to these (layer, norm) pairs."""
    gm = copy.deepcopy(gm)
    use = _uses(gm)
    folded: list[tuple[str, str]] = []
    skipped: dict[str, str] = {}
    for layer, bn in _pairs(gm):
        names = (str(layer.target), str(bn.target))
        if only is not None and names not in only:
            continue
        reason = _obstacle(gm, layer, bn, use)
        if reason:  # guard: fold refuses -> tests/passes/test_fold_batchnorm.py
            skipped[names[1]] = reason
            continue
        _fuse(gm.get_submodule(names[0]), gm.get_submodule(names[1]))
        bn.replace_all_uses_with(layer)
        gm.graph.erase_node(bn)
        gm.delete_submodule(names[1])
        folded.append(names)
    gm.graph.lint()
    gm.recompile()
    return gm, FoldBatchnormReport(tuple(folded), skipped)


@dataclass(frozen=True)
class _Uses:
    """Who else uses what: calls by module, holders by parameter, tensors that the graph reads."""

    calls: Mapping[int, int]
    holders: Mapping[int, int]
    read: frozenset[str]


def _uses(gm: GraphModule) -> _Uses:
    nodes = list(gm.graph.nodes)
    called = [gm.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
    held = [p for m in gm.modules() for p in m._parameters.values() if p is not None]
    return _Uses(
        Counter(map(id, called)),
        Counter(map(id, held)),
        frozenset(str(n.target) for n in nodes if n.op == "get_attr"),
    )


def _pairs(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Batch norms that read a convolution or linear directly."""
    for bn in list(gm.graph.nodes):
        if bn.op != "call_module" or type(gm.get_submodule(str(bn.target))) not in _NORMS:
            continue
        layer = bn.args[0] if bn.args else None
        if not isinstance(layer, Node) or layer.op != "call_module":
            continue
        if isinstance(gm.get_submodule(str(layer.target)), _LAYERS):
            yield layer, bn


def _obstacle(gm: GraphModule, layer: Node, bn: Node, use: _Uses) -> str:
    """Why the pair cannot be folded; "" when it can."""
    first, norm = gm.get_submodule(str(layer.target)), gm.get_submodule(str(bn.target))
    if len(layer.users) > 1:
        return f"`{layer.target}` has {len(layer.users)} readers"
    for name, module in ((layer.target, first), (bn.target, norm)):
        if use.calls[id(module)] > 1:
            return f"module `{name}` is called by {use.calls[id(module)]} nodes"
        for kind in (*module._parameters, *module._buffers):
            if f"{name}.{kind}" in use.read:
                return f"the graph also reads `{name}.{kind}`"
        if any(use.holders[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return "a parameter of the pair is shared with another layer"
        if parametrize.is_parametrized(module):
            return f"`{name}` is parametrized"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return "one of the two has hooks"
    if type(first) not in _LAYERS:
        return f"`{layer.target}` is a {type(first).__name__}, a class of its own"
    if norm.running_mean is None:
        return "it has no running statistics"
    return _misfit(layer, first, norm)


def _misfit(layer: Node, first: nn.Module, norm: nn.Module) -> str:
    """Layers whose output channels are not the axis that the norm scales."""
    if isinstance(first, nn.modules.conv._ConvNd):
        if first.transposed and first.groups != 1:
            return "the convolution is transposed and grouped"
        if _rank(layer) not in (None, len(first.kernel_size) + 2):
            return f"`{layer.target}` works on an unbatched input"
    elif norm.num_features != first.out_features or _rank(layer) != 2:
        return f"`{layer.target}` does not make [N, C], as far as the graph knows"
    return ""


def _rank(node: Node) -> int | None:
    """Dimensions of what a node makes, where the graph tells."""
    known = node.meta.get("tensor_meta")
    rank: int | None = node.meta.get("rank") if known is None else len(known.shape)
    return rank


def _fuse(layer: nn.Module, bn: nn.Module) -> None:
    """Scale the layer's rows and move the shift into its bias, in place."""
    scale = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight  # type: ignore[arg-type]
    shift = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias  # type: ignore[arg-type]
    statistics = (bn.running_mean, bn.running_var, bn.eps, scale, shift)
    kept = layer.weight.requires_grad
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)  # type: ignore[arg-type]
        else:
            weight, bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, *statistics, transpose=layer.transposed  # type: ignore[arg-type]
            )  # fmt: skip
    layer.weight = nn.Parameter(weight.detach(), requires_grad=bool(kept))
    layer.bias = nn.Parameter(bias.detach(), requires_grad=bool(kept))
