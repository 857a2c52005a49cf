"""fxprune: a graph-transformation compiler for structured pruning of PyTorch models.

>>> import fxprune
>>> pruned = fxprune.compile(model, method="l1", budget=0.5)  # doctest: +SKIP
"""

from fxprune import extend, methods
from fxprune._version import __version__
from fxprune.api import analyze, apply, compile, load, mask, save
from fxprune.budget import Budget
from fxprune.errors import (
    CheckpointError,
    DataError,
    DistributedMismatchError,
    FxPruneError,
    OptionError,
    OptionTypeError,
    PlanError,
    TraceError,
    UnsupportedOpError,
    VerifyError,
)
from fxprune.export import export
from fxprune.extend import register_refit, register_rewrite, register_rule
from fxprune.fit import Recipe
from fxprune.groups import Analysis
from fxprune.plan import Plan
from fxprune.pruned import PrunedModule
from fxprune.recalibrate import recalibrate
from fxprune.sensitivity import Sensitivity, sensitivity
from fxprune.splice import splice

__all__ = [
    "Analysis",
    "Budget",
    "CheckpointError",
    "DataError",
    "DistributedMismatchError",
    "FxPruneError",
    "OptionError",
    "OptionTypeError",
    "Plan",
    "PlanError",
    "PrunedModule",
    "Recipe",
    "Sensitivity",
    "TraceError",
    "UnsupportedOpError",
    "VerifyError",
    "__version__",
    "analyze",
    "apply",
    "compile",
    "export",
    "extend",
    "load",
    "mask",
    "methods",
    "recalibrate",
    "register_refit",
    "register_rewrite",
    "register_rule",
    "save",
    "sensitivity",
    "splice",
]
