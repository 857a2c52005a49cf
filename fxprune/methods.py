"""The methods' configs: `fxprune.methods.L1(...)`; `PRESETS` are networks of papers by name."""

from fxprune.passes.methods import *  # noqa: F403
from fxprune.passes.methods import __all__ as __all__
