"""How channels flow through each operation: one file per kind. Importing this registers them all."""

from fxprune.flow import Flow, Value, flow_through, opaque, rule, rule_where
from fxprune.rules import contraction, elementwise, movement, other_axes, per_channel, sizes

__all__ = [
    "Flow",
    "Value",
    "contraction",
    "elementwise",
    "flow_through",
    "movement",
    "opaque",
    "other_axes",
    "per_channel",
    "rule",
    "rule_where",
    "sizes",
]
