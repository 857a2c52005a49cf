"""What methods look at beside weights: draws of their own, and statistics of feature maps.

Promise: nothing is computed that no method asks for; the model is run in eval mode, without
gradients, and is as before afterwards; the same seed and data give the same answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxprune.errors import OptionError, PlanError
from fxprune.groups import Analysis, Group
from fxprune.labels import Label, Slot
from fxprune.recalibrate import first_input
from fxprune.symbolic import set_mode, unmarked
from fxprune.training.batches import as_floats, check_loader

Statistics = Mapping[str, Tensor]  # name -> float64 [channels]
_Rows = Callable[[Slot, Group, Tensor], Tensor]  # rows of a producer -> one entry per class


class Evidence:
    """Answers a method's questions about the groups of one analysis.

    data: batches of inputs or (input, target); read anew whenever maps of so many samples are first
    asked for. rows: turns a producer's rows [size, ...] into [C, ...], one entry per class.
    """

    def __init__(
        self, analysis: Analysis, *, seed: int, data: Iterable[Any] | None, rows: _Rows
    ) -> None:
        self._analysis, self._seed, self._data, self._rows = analysis, seed, data, rows
        self._maps: dict[int, dict[str, Statistics]] = {}

    def generator(self, name: str) -> torch.Generator:
        """Draws for the group of that name: no group's draws depend on what others there are."""
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def maps(self, group: Group, samples: int) -> list[Statistics]:
        """Per producer, statistics of its C channels' maps over `samples` images (or all there are).

        With x_n the map of image n: "mean-mean", "mean-std", "mean-l1", "mean-l2" are means over n
        of its mean, standard deviation, 1-norm and 2-norm; "var-l2" is the variance of its 2-norm.
        Rows of a producer that live together are summed.
        """
        if samples not in self._maps:
            self._maps[samples] = _observe(self._analysis, self._data, samples)
        seen = self._maps[samples]
        found: list[Statistics] = []
        for slot in group.producers:
            if slot.tensor not in seen:
                raise PlanError(
                    f"the feature maps of `{slot.tensor}` cannot be told channel by channel",
                    where=f"group `{group.name}`",
                    why="no node gives its channels along one axis",
                    fix='rank by="weights", or leave the layer out with ignore=',
                )
            statistics = seen[slot.tensor]
            found.append(
                {
                    name: self._rows(slot, group, rows[:, None]).flatten(1).sum(1)
                    for name, rows in statistics.items()
                }
            )
        return found


def _observe(analysis: Analysis, data: Iterable[Any] | None, samples: int) -> dict[str, Statistics]:
    """Run the traced graph over the data; statistics by the name of the producing tensor."""
    if data is None:
        raise OptionError(
            "this method looks at feature maps and has no data",
            where="data",
            fix="pass data=loader with (input, target) batches",
        )
    traced = analysis.traced
    check_loader(data, "data")
    if len(traced.example_inputs) > 1:  # guard: one input -> tests/methods -k several_inputs
        raise OptionError(
            "feature maps of a model with several inputs cannot be taken from data",
            where="data",
            why="a batch is (input, target): it has one input",
            fix='rank by="weights", or prune the part of the model that has one input',
        )
    watched = _producing_nodes(analysis)
    totals = {tensor: _Total() for tensor, _ in watched.values()}
    seen = 0
    with unmarked(traced.model), torch.no_grad():
        set_mode(traced.model, False)
        for batch in data:
            x = first_input(batch)[: samples - seen]
            seen += len(x)
            if len(x):
                _run(analysis, x, watched, totals)
            if seen >= samples:
                break
    if not seen:
        raise OptionError(
            "the data for feature maps gave no batch",
            where="data",
            fix="pass an iterable of (input, target) batches; a generator can be read only once",
        )
    return {tensor: total.statistics() for tensor, total in totals.items()}


def _producing_nodes(analysis: Analysis) -> dict[Node, tuple[str, int]]:
    """Node -> the producer's tensor and the axis of its channels; a shared one has several nodes."""
    traced = analysis.traced
    slots = {s.tensor: s for s in analysis.slots if s.producer}
    found = {}
    for node in traced.graph.nodes:
        label = analysis.flow.labels.get(node)
        if not isinstance(label, Label):
            continue
        for tensor in _own_tensors(analysis, node):
            slot = slots.get(tensor)
            if slot is None:
                continue
            classes = analysis.classes(slot.ids)
            # A weight has one axis more than its maps have behind the channels, also where there is
            # one channel only, which no id tells from the other axes.
            axis = len(label.shape) - traced.tensors.tensor[tensor].dim() + 1
            along = set(label.varying) <= {axis}
            if along and np.array_equal(analysis.classes(label.ids).ravel(), classes):
                found[node] = tensor, axis
    return found


def _own_tensors(analysis: Analysis, node: Node) -> list[str]:
    """Names of the tensors that a node's own module, or its arguments, bring to it."""
    traced = analysis.traced
    if node.op == "call_module":
        held: list[Any] = [*traced.module(node).parameters(), *traced.module(node).buffers()]
    elif node.op in ("call_function", "call_method"):
        held = [traced.attribute(n) for n in node.all_input_nodes if n.op == "get_attr"]
    else:
        return []
    names = [traced.tensors.name(t) for t in held if isinstance(t, Tensor)]
    return [name for name in names if name is not None]


def _run(
    analysis: Analysis,
    x: Tensor,
    watched: Mapping[Node, tuple[str, int]],
    totals: Mapping[str, _Total],
) -> None:
    """One batch through the graph; a value is dropped as soon as nobody reads it any more."""
    traced = analysis.traced
    device = next((p.device for p in traced.model.parameters()), x.device)
    inputs = iter((as_floats(traced.model, x.to(device)), *traced.example_inputs[1:]))
    values: dict[Node, Any] = {}
    readers = {node: len(node.users) for node in traced.graph.nodes}
    for node in traced.graph.nodes:
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(inputs, node.args[0] if node.args else None)
        elif node.op == "get_attr":
            values[node] = traced.attribute(node)
        elif node.op == "call_module":
            values[node] = traced.module(node)(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if node in watched:
            tensor, axis = watched[node]
            totals[tensor].add(values[node], axis)
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source]:
                del values[source]


class _Total:
    """Sums over images of what the statistics need, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, maps: Tensor, axis: int) -> None:
        """maps: a batch, images along axis 0 (unless that is the channels' axis: then one image)."""
        maps = maps.double()
        maps = maps.movedim(axis, 0)[None] if axis == 0 else maps.movedim(axis, 1)
        flat = maps.reshape(maps.shape[0], maps.shape[1], -1)
        norm = torch.linalg.vector_norm(flat, dim=2)
        parts = (flat.mean(2), flat.std(2, correction=0), flat.abs().sum(2), norm, norm**2)
        sums = torch.stack([part.sum(0) for part in parts]).cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(flat)

    def statistics(self) -> Statistics:
        """Means over the images, and the variance of the 2-norm."""
        assert self.sums is not None
        mean, std, l1, l2, square = self.sums / self.count
        variance = (square - l2**2).clamp_min(0)
        return {
            "mean-mean": mean,
            "mean-std": std,
            "mean-l1": l1,
            "mean-l2": l2,
            "var-l2": variance,
        }
