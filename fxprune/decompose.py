"""nn.MultiheadAttention as what it is made of: projections, attention over heads, a projection.

Promise: the same result as the layer in both modes, from its own parameters under their own names;
         the scale is that of the layer's head size, written as a number, so that it stays when a
         head gets narrower.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.graph import HOOKS

Proxy = Any


def decomposes(module: nn.Module) -> bool:
    """Whether a layer is taken apart; one with hooks stays whole, so that they run."""
    if type(module) is not nn.MultiheadAttention:
        return False
    return not any(getattr(m, hooks) for m in module.modules() for hooks in HOOKS)


def attend(
    layer: nn.MultiheadAttention,
    query: Proxy,
    key: Proxy,
    value: Proxy,
    key_padding_mask: Proxy = None,
    need_weights: bool = True,
    attn_mask: Proxy = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Proxy, Proxy]:
    """The layer's forward on proxies: (output, weights or None), shapes as the layer has them."""
    sequence_first = query.dim() == 3 and not layer.batch_first
    q, k, v = _projected(layer, query, key, value, sequence_first)
    masks = _masks(layer, query, key_padding_mask, attn_mask)
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    by_flag = bool(is_causal and key_padding_mask is None and not need_weights)
    if by_flag:
        masks = []
    k, v = _extended(layer, k, v)
    q, k, v = [
        t.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(-3, -2) for t in (q, k, v)
    ]
    mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]
    scale = 1.0 / math.sqrt(layer.head_dim)
    weights = None
    if need_weights:
        mixed, weights = _explicit(layer, q, k, v, mask, scale)
        if average_attn_weights:
            weights = weights.mean(dim=-3)
            if hasattr(weights, "node"):  # torch.export drops by itself what nobody reads
                weights.node.meta["spare"] = True
    else:
        p = layer.dropout if layer.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p, is_causal=by_flag, scale=scale
        )
    out = layer.out_proj(mixed.transpose(-3, -2).flatten(-2))
    return (out.transpose(0, 1) if sequence_first else out), weights


def _projected(
    layer: nn.MultiheadAttention, query: Proxy, key: Proxy, value: Proxy, sequence_first: bool
) -> tuple[Proxy, Proxy, Proxy]:
    """Queries, keys and values, [..., tokens, embedding]."""
    alone = query is key and key is value
    if sequence_first:
        query = query.transpose(0, 1)
        key, value = (query, query) if alone else (key.transpose(0, 1), value.transpose(0, 1))
    bias = layer.in_proj_bias
    if alone and layer._qkv_same_embed_dim:
        q, k, v = F.linear(query, layer.in_proj_weight, bias).chunk(3, dim=-1)
        return q, k, v
    if layer._qkv_same_embed_dim:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    biases = [None] * 3 if bias is None else bias.chunk(3)
    given = (query, key, value)
    q, k, v = (F.linear(given[i], weights[i], biases[i]) for i in range(3))
    return q, k, v


def _masks(
    layer: nn.MultiheadAttention, query: Proxy, padding: Proxy, attn_mask: Proxy
) -> list[Proxy]:
    """What is added to the scores, each broadcast over [..., heads, queries, keys]."""
    extra = (layer.bias_k is not None) + bool(layer.add_zero_attn)
    masks = []
    if attn_mask is not None:
        mask = _added(attn_mask, query, extra)
        if attn_mask.dim() == 3 and query.dim() == 3:
            mask = mask.unflatten(0, (-1, layer.num_heads))
        masks.append(mask)
    if padding is not None:
        masks.append(_added(padding, query, extra).unsqueeze(-2).unsqueeze(-2))
    return masks


def _added(mask: Proxy, query: Proxy, extra: int) -> Proxy:
    """A mask as numbers to add: -inf where a boolean one says True; nothing for extra keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
    return F.pad(mask, (0, extra)) if extra else mask


def _extended(layer: nn.MultiheadAttention, k: Proxy, v: Proxy) -> tuple[Proxy, Proxy]:
    """Learnt and zero keys and values behind the given ones."""
    if layer.bias_k is not None:
        k, v = (_with_bias(t, bias) for t, bias in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return k, v


def _with_bias(tokens: Proxy, bias: Proxy) -> Proxy:
    more = bias.squeeze(0) if tokens.dim() == 2 else bias.expand(tokens.size(0), -1, -1)
    return torch.cat([tokens, more], dim=-2)


def _explicit(
    layer: nn.MultiheadAttention, q: Proxy, k: Proxy, v: Proxy, mask: Proxy, scale: float
) -> tuple[Proxy, Proxy]:
    """Attention that shows its weights, [..., heads, queries, keys]."""
    scores = torch.matmul(q * scale, k.transpose(-2, -1))
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    if layer.dropout > 0:
        weights = F.dropout(weights, p=layer.dropout, training=layer.training)
    return torch.matmul(weights, v), weights
