"""How nodes follow a cut: one file per kind of operation. Importing this registers them all."""

from fxprune.rewrites import indexing, layers, movement, norms, sizes
from fxprune.rewrites.base import REWRITES, Cut, Rewrite, rewrite, rewrite_of

__all__ = [
    "REWRITES",
    "Cut",
    "Rewrite",
    "indexing",
    "layers",
    "movement",
    "norms",
    "rewrite",
    "rewrite_of",
    "sizes",
]
