"""Documents that several tests take apart."""

from __future__ import annotations

from typing import Any


def plan_document() -> dict[str, Any]:
    """The document of the schema, with one of everything."""
    return {
        "schema_version": 1,
        "fxprune_version": "0.1.0",
        "method": {"name": "l1", "order": "smallest", "ratio": None},
        "budget": {"macs": 0.5},
        "scope": "all",
        "seed": 0,
        "fingerprint": {"tensors": "ab", "graph": "cd"},
        "weights": "cut",
        "slices": [
            {"tensor": "conv.weight", "dim": 0, "role": "out", "size": 6, "keep": [0, 2, 3, 5]},
            {"tensor": "conv.weight", "dim": 1, "role": "in", "size": 4, "keep": [0, 1, 3]},
        ],
        "groupings": [
            {"tensor": "conv.weight", "rows": [[0, 3], [2, 5]], "cols": [[0, 1], [1, 3]]}
        ],
        "folds": [{"conv": "conv", "bn": "bn", "compactor": False}],
        "inexact": [{"node": "mean_3", "why": "because"}],
        "frozen": [{"node": "view_3", "why": "it must"}],
        "metrics": {"macs_before": 9, "macs_after": 4, "params_before": 8, "params_after": 3},
    }
