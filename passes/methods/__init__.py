"""Pruning methods: configs by name. Each file registers one method and stands beside its paper."""

from fxprune.passes.methods.l1 import L1, PRESETS

__all__ = ["L1", "PRESETS"]
