"""The public verbs: analyze, compile, apply, mask, save, load. The whole story in one screen each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import fit as training
from fxprune import pipeline, storage
from fxprune.budget import Budget
from fxprune.config import Method, Preset, check_share, resolve
from fxprune.cost import Cost
from fxprune.errors import OptionError, OptionTypeError, PlanError, UnsupportedOpError
from fxprune.evaluation import Evaluate, check_evaluate, score
from fxprune.fit import Recipe
from fxprune.graph import modes_kept
from fxprune.groups import Analysis, analyze_model, by_head_dims, state_of, tensors_fingerprint
from fxprune.inputs import find_inputs, guessed, unwrap
from fxprune.mask import mask as mask
from fxprune.plan import Plan
from fxprune.planning import mask_of, write_plan
from fxprune.pruned import PrunedModule, plan_now
from fxprune.recalibrate import recalibrate
from fxprune.scope import Ignore, check_scope, left_whole, resolved
from fxprune.selection import check_align, first_step, select
from fxprune.training.batches import check_loader

Inputs = Tensor | tuple[Any, ...] | None
Fit = Callable[[PrunedModule], object]  # trains in place


def analyze(
    model: nn.Module, example_inputs: Inputs = None, *, scope: str | Sequence[str] = "all"
) -> Analysis:
    """Which channels of `model` live or die together, which are frozen, and why.

    example_inputs: a tensor or tuple, found as in `compile` when omitted. scope: as in `compile`; here
    only "head-dims" tells (attention by dimensions of all heads, not by whole heads). Prints as a table; see
    `Analysis.groups`, `.frozen`, `.plan(...)`, `.to_networkx()`. Raises TraceError.
    """
    model, _ = unwrap(model)
    inputs, _ = find_inputs(model, example_inputs, None)
    check_scope(scope, ())
    return _analyze(model, inputs, scope)


def _analyze(
    model: nn.Module, inputs: tuple[Any, ...], scope: str | Sequence[str] = "all"
) -> Analysis:
    lineage = model.origin.lineage if isinstance(model, PrunedModule) else None
    return analyze_model(model, inputs, lineage, by_head_dims(scope))


def compile(
    model: nn.Module,
    example_inputs: Inputs = None,
    *,
    method: str | object = "l1",
    budget: float | Budget | None = None,
    scope: str | Sequence[str] = "all",
    ignore: Ignore = (),
    align: int = 1,
    data: Iterable[Any] | None = None,
    fit: Recipe | Fit | None = None,
    evaluate: Evaluate | None = None,
    repair: str | None = None,
    fold: bool = False,
    seed: int = 0,
    progress: bool = True,
    verify: bool = True,
) -> PrunedModule:
    """Prune `model` and return the smaller network; the argument is never modified.

    example_inputs: tensor or tuple; omitted, the first batch of `data`, the model's
        `example_input_array`, timm's input size, or (1, C, 224, 224) are tried.
    method: a name ("l1"), a config (`fxprune.methods.L1(ratio=0.3)`), or `(group, weights) -> scores`.
    budget: what may remain, as a fraction of the MACs, or a `Budget`. None: the config's own ratio,
        else 0.5 of the MACs.
    scope: "all", "free" (no channels that an addition couples), or a list of patterns of names and of
        kinds: "heads", "head-dims" (the same dimensions of all heads, instead of whole heads),
        "mlp", "embedding", "stage", "experts", "channels".
    ignore: fnmatch patterns of module or parameter names, or `filter_fn(module, name) -> bool`
        (True: may be pruned); freezes output channels.
    align: kept counts are multiples of it (or whole widths).
    data: batches (input, target) for `repair`, `fit`, example inputs and methods that look at data.
    evaluate: `(model) -> float`, or a loader for top-1 accuracy; the score before, after the cut,
        after the repair and after training stands in the report.
    fit: trains the pruned network after a one-shot cut (after each, when the method has `steps`): a
        `Recipe` for the built-in trainer on `data`, or a callable `(pruned) -> None`.
    repair: "bn" recalibrates batch norms on `data` after the cut.
    fold: fold batch norms into convolutions at the end (inference form).
    seed: for methods that draw. progress: name the step at work on a terminal.
    verify: compare with the masked original on the example input (float64, 1e-9); a mismatch raises.

    Raises OptionError, TraceError, PlanError, VerifyError, all `FxPruneError`s.
    """
    chosen, limit = _check_options(method, budget, align, scope, ignore, seed, fit, repair, data)
    if evaluate is not None:
        check_evaluate(evaluate)
    model, notes = unwrap(model)
    steps = pipeline.Progress(progress)
    if guessed(model, example_inputs, data):
        notes.append("no example input was given: sizes and MACs are those of a guessed one")
    inputs, data = find_inputs(model, example_inputs, data)
    scores: dict[str, float] = {}

    def scored(stage: str, network: nn.Module) -> None:
        if evaluate is not None:
            with steps.step("evaluate"):
                scores[stage] = score(network, evaluate)

    scored("before", model)
    network, first = model, None
    for number in range(1, chosen.steps + 1):
        which = f", step {number} of {chosen.steps}" if chosen.steps > 1 else ""
        with steps.step("analyse"):
            analysis = _analyze(network, inputs, scope)
        first = first or first_step(analysis)
        # Names and classes of modules are those of the user's model, also in later steps.
        ignore = resolved(analysis, ignore)  # guard: ignore once -> tests/methods -k stay_ignored
        with steps.step("select"):
            selection = select(
                analysis,
                chosen,
                limit,
                scope=scope,
                ignore=ignore,
                align=align,
                seed=seed,
                data=data,
                step=replace(first, number=number, of=chosen.steps),
            )
        said = [*notes, *selection.notes]
        pruned = pipeline.cut(
            analysis, selection.plan, selection.keep, steps, check=verify, notes=said
        )
        whole = left_whole(analysis, pruned.plan, scope=scope, ignore=ignore, align=align)
        pruned.report.frozen += whole
        pruned = pipeline.sealed(pruned)
        scored("after the cut" + which, pruned)
        if repair == "bn":
            assert data is not None
            with steps.step("repair"):
                pruned = recalibrate(pruned, data)
            scored("recalibrated" + which, pruned)
        if fit is not None:
            with steps.step("fit"):
                _fit(pruned, fit, data, progress)
            pruned.plan = plan_now(pruned)
            scored("fine-tuned" + which, pruned)
        network = pruned
    if fold:
        pruned = pipeline.sealed(pipeline.fold(pruned, steps, check=verify))
    pruned.report.stages = scores
    return pruned


def _fit(
    pruned: PrunedModule, fit: Recipe | Fit, data: Iterable[Any] | None, progress: bool
) -> None:
    """Train in place; every module's mode is as before."""
    with modes_kept(pruned):
        if isinstance(fit, Recipe):
            assert data is not None
            training.train(pruned, data, fit, progress=progress)
        else:
            before = _tensors_of(pruned)
            returned = fit(pruned)
            _check_trained(pruned, before, returned)


def _tensors_of(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    state = state_of(module)
    return {k: (tuple(t.shape), t.dtype, t.device) for k, t in state.items()}


def _check_trained(
    pruned: PrunedModule, before: dict[str, tuple[Any, ...]], returned: object
) -> None:
    """Training changes values and nothing else; what it returns is not looked at."""
    if isinstance(returned, nn.Module) and returned is not pruned:
        raise OptionTypeError(
            f"fit returned another {type(returned).__name__}",
            where="fit",
            why="it must train the network that it gets, in place; a copy would be lost",
            fix="train the argument itself, or copy the weights back: pruned.load_state_dict(...)",
        )
    after = _tensors_of(pruned)
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    if changed:  # guard: only values -> tests/methods -k only_values
        name = changed[0]
        was, now = (" ".join(map(str, d[name])) if name in d else "absent" for d in (before, after))
        raise OptionError(
            f"fit changed `{name}`: it was {was}, and is {now}",
            where="fit",
            why="the plan says which channels are left; training may change values only",
            fix="train without replacing, moving or converting layers",
        )


def _check_options(
    method: object,
    budget: float | Budget | None,
    align: object,
    scope: object,
    ignore: object,
    seed: object,
    fit: object,
    repair: object,
    data: object,
) -> tuple[Method, Budget | None]:
    """Everything that can be said of the arguments before the model is touched."""
    chosen = resolve(method)
    if budget is not None and not isinstance(budget, Budget):
        budget = Budget(macs=check_share("budget", budget, least_ok=False, most_ok=True))
    if budget is not None and chosen.shares is not None:
        given = "preset" if isinstance(chosen.shares, Preset) else "ratio"
        raise OptionError(
            f"both a budget and a {given} ({chosen.record[given]}) were given",
            where="budget, method",
            why="each of them decides alone how much goes",
            fix="drop one: budget=0.5, or method=fxprune.methods.L1(ratio=0.5)",
        )
    check_align(align)
    check_scope(scope, ignore)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionTypeError(f"seed is {seed!r}", where="seed", why="it must be a whole number")
    trains = callable(fit) and not isinstance(fit, type | nn.Module)
    if fit is not None and not isinstance(fit, Recipe) and not trains:
        raise OptionTypeError(
            f"fit is {fit!r}",
            where="fit",
            why="it must be a fxprune.Recipe, or a callable (pruned) -> None that trains in place",
        )
    for needs, what in (
        (isinstance(fit, Recipe), "fit=Recipe(...)"),
        (chosen.looks_at_data, f"method {chosen.name!r}, which looks at feature maps,"),
    ):
        if needs and data is None:
            raise OptionError(
                f"{what} needs data",
                where="data",
                fix="pass data=loader with (input, target) batches",
            )
    if data is not None:
        check_loader(data, "data")
        reads = chosen.steps * (chosen.looks_at_data + (repair == "bn") + isinstance(fit, Recipe))
        if reads > 1 and isinstance(data, Iterator):
            raise OptionError(
                f"data can be read only once, and is needed {reads} times",
                where="data",
                why=f"it is a {type(data).__name__}",
                fix="pass a DataLoader or a list of batches",
            )
    if repair not in (None, "bn"):
        raise OptionError(f"repair is {repair!r}", where="repair", why='it must be None or "bn"')
    if repair == "bn" and data is None:
        raise OptionError(
            'repair="bn" needs data',
            where="data",
            fix="pass data=loader with (input, target) batches",
        )
    return chosen, budget


def apply(model: nn.Module, plan: Plan, example_inputs: Inputs = None) -> PrunedModule:
    """Replay a plan on the architecture it was made for; `model` is not modified.

    A plan whose weights are "changed" gives the structure with sliced weights, and says so.
    Raises PlanError when tensors or couplings do not fit the plan.
    """
    model, notes = unwrap(model)
    if not isinstance(plan, Plan):
        raise OptionTypeError(
            f"plan is a {type(plan).__name__}", where="plan", fix="Plan.from_json(text) reads one"
        )
    inputs, _ = find_inputs(model, example_inputs, None)
    return _apply(model, plan, inputs, notes)


def _apply(model: nn.Module, plan: Plan, inputs: tuple[Any, ...], notes: list[str]) -> PrunedModule:
    if plan.groupings or any(f.compactor for f in plan.folds):
        raise UnsupportedOpError(
            "the plan groups convolutions or merges compactors",
            where="groupings" if plan.groupings else "folds",
            why=f"fxprune {plan.fxprune_version} made it; this version only slices and folds",
            fix="use the version that made the plan",
        )
    _check_tensors(model, plan)  # guard: fingerprint -> tests/bad_input/test_plans.py -k another
    steps = pipeline.Progress(False)
    with steps.step("analyse"):
        analysis = _analyze(model, inputs, plan.scope)
    keep = mask_of(analysis, plan)
    if analysis.fingerprint != dict(plan.fingerprint):
        notes = [
            *notes,
            "the graph differs from the plan's; every slice was checked to be complete",
        ]
    if plan.weights == "changed":
        notes = [
            *notes,
            "the plan's weights were changed after the cut; these are sliced, not loaded",
        ]
    fresh = write_plan(analysis, keep, Cost.of(analysis), method=plan.method)
    pruned = pipeline.cut(
        analysis, replace(plan, metrics=fresh.metrics), keep, steps, check=False, notes=notes
    )
    if plan.folds:
        pruned = pipeline.fold(pruned, steps, plan.folds)
    return pipeline.sealed(pruned)


def _check_tensors(model: nn.Module, plan: Plan) -> None:
    """The tensors of the model must be those of the plan's original."""
    state = state_of(model)
    if tensors_fingerprint(state) == plan.fingerprint["tensors"]:
        return
    differing: list[str] = []
    for s in plan.slices:
        t = state.get(s.tensor)
        if t is None:
            differing.append(f"{s.tensor} (missing)")
        elif (
            s.dim >= t.dim() or s.size % t.shape[s.dim] or (s.size > t.shape[s.dim] and s.dim != 1)
        ):
            differing.append(f"{s.tensor} (shape {tuple(t.shape)}, the plan cuts {s.size})")
    raise PlanError(
        f"the plan belongs to another architecture than this {type(model).__name__}",
        where=", ".join(differing[:5]) or ", ".join(_not_in(plan, state)) + " (not in the plan)",
        why="names and shapes of the tensors differ from the original's (fingerprint)",
        fix="pass the model that the plan was made for, before any pruning",
    )


def _not_in(plan: Plan, state: Mapping[str, Tensor]) -> list[str]:
    """The last tensors of a model that its plan does not mention: the likely strangers."""
    mentioned = {s.tensor for s in plan.slices}
    return [name for name in state if name not in mentioned][-5:]


def save(pruned: PrunedModule, path: str | Path) -> None:
    """Write weights, plan and checksum to one safetensors file; see `fxprune.storage.save`."""
    storage.save(pruned, path)


def load(path: str | Path, model: nn.Module, example_inputs: Inputs = None) -> PrunedModule:
    """Read a file written by `save`; `model` is the original architecture, its weights irrelevant.

    The tensors and their dtype come from the file; device, memory format and `requires_grad` from
    `model`. Raises CheckpointError for damaged or foreign files, PlanError for another architecture.
    """
    model, notes = unwrap(model)
    plan, _, specs, tensors = storage.read(path)
    if example_inputs is not None:
        inputs, _ = find_inputs(model, example_inputs, None)
    else:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = tuple(spec.blank(dtype) for spec in specs)
    pruned = _apply(model, replace(plan, weights="cut"), inputs, notes)
    storage.fill(pruned, tensors, path)
    pruned.plan = plan
    pruned.report.metrics = dict(plan.metrics)
    return pipeline.sealed(pruned)
