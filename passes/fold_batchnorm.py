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
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

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
    calls = Counter(n.target for n in gm.graph.nodes if n.op == "call_module")
    uses = Counter(id(p) for m in gm.modules() for p in m._parameters.values() if p is not None)
    folded: list[tuple[str, str]] = []
    skipped: dict[str, str] = {}
    for layer, bn in _pairs(gm):
        names = (str(layer.target), str(bn.target))
        if only is not None and names not in only:
            continue
        reason = _obstacle(gm, layer, bn, calls, uses)
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


def _pairs(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Batch norms that read a convolution or linear directly."""
    for bn in list(gm.graph.nodes):
        if bn.op != "call_module" or type(gm.get_submodule(str(bn.target))) not in (
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
        ):
            continue
        layer = bn.args[0]
        called = isinstance(layer, Node) and layer.op == "call_module"
        if called and type(gm.get_submodule(str(layer.target))) in _LAYERS:
            yield layer, bn


def _obstacle(
    gm: GraphModule,
    layer: Node,
    bn: Node,
    calls: Mapping[object, int],
    uses: Mapping[int, int],
) -> str:
    first, norm = gm.get_submodule(str(layer.target)), gm.get_submodule(str(bn.target))
    if len(layer.users) > 1:
        return f"`{layer.target}` has {len(layer.users)} readers"
    for name in (layer.target, bn.target):
        if calls[name] > 1:
            return f"module `{name}` is called by {calls[name]} nodes"
    if norm.running_mean is None:
        return "it has no running statistics"
    if any(uses[id(p)] > 1 for m in (first, norm) for p in m._parameters.values() if p is not None):
        return "a parameter of the pair is shared with another layer"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (first, norm)):
        return "one of the two has hooks"
    if getattr(first, "transposed", False) and first.groups != 1:  # type: ignore[operator]
        return "the convolution is transposed and grouped"
    if isinstance(first, nn.Linear) and type(norm) is not nn.BatchNorm1d:
        return "a linear before a norm of images"
    return ""


def _fuse(layer: nn.Module, bn: nn.Module) -> None:
    """Scale the layer's rows and move the shift into its bias, in place."""
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
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
