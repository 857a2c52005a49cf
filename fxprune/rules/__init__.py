"""How channels flow through each operation: one file per kind. Importing this registers them all."""

from fxprune.flow import Flow, Value, flow_through, opaque, rule, rule_where
from fxprune.rules import (
    contraction,
    creation,
    elementwise,
    indexing,
    movement,
    norms,
    other_axes,
    per_channel,
    products,
    recurrent,
    sampling,
    shuffles,
    sizes,
    zeros,
)

__all__ = [
    "Flow",
    "Value",
    "contraction",
    "creation",
    "elementwise",
    "flow_through",
    "indexing",
    "movement",
    "norms",
    "opaque",
    "other_axes",
    "per_channel",
    "products",
    "recurrent",
    "rule",
    "rule_where",
    "sampling",
    "shuffles",
    "sizes",
    "zeros",
]
