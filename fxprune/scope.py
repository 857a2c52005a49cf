"""Which groups may be cut at all: `scope`, `ignore`, and a clear word when nothing is left."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fxprune.errors import OptionTypeError, PlanError
from fxprune.groups import KINDS, Analysis, Array, Group
from fxprune.plan import Note, Plan


@dataclass(frozen=True)
class Resolved:
    """What `ignore` meant on the model that the user passed, for later cuts of what is left of it:
    there, containers have lost their classes, and what forward does not use is gone."""

    names: frozenset[str]  # of parameters and buffers
    asked: str  # `ignore` as it is shown

    def __repr__(self) -> str:
        return self.asked


Ignore = Sequence[str] | Callable[[nn.Module, str], bool] | Resolved


def resolved(analysis: Analysis, ignore: Ignore) -> Resolved:
    """The tensors whose output channels `ignore` freezes."""
    if isinstance(ignore, Resolved):
        return ignore
    shown = "filter_fn" if callable(ignore) else f"{ignore!r}"
    names = _ignored_names(analysis, ignore)
    owned = analysis.traced.tensors.names  # first name -> all; later networks know only the first
    first = {n for n, aliases in owned.items() if not names.isdisjoint(aliases)}
    return Resolved(frozenset(names | first), shown)


def check_scope(scope: object, ignore: object) -> None:
    """OptionTypeError for what cannot be a scope or patterns to ignore."""
    if not isinstance(scope, str | list | tuple) or not all(isinstance(s, str) for s in scope):
        raise OptionTypeError(
            f"scope is {scope!r}",
            where="scope",
            why='it must be "all", "free", or patterns of names',
        )
    if not callable(ignore) and not isinstance(ignore, str | list | tuple | set | frozenset):
        raise OptionTypeError(
            f"ignore is {ignore!r}",
            where="ignore",
            why="it must be patterns of names, or filter_fn(module, name) -> bool",
        )


def choose_groups(analysis: Analysis, scope: str | Sequence[str], ignore: Ignore) -> list[Group]:
    """The groups that scope and ignore leave; PlanError for a pattern that matches nothing."""
    frozen = _ignored_classes(analysis, ignore)
    groups = [g for g in analysis.groups if not frozen[g.classes].any()]
    if scope == "free":
        groups = [g for g in groups if not g.residual]
    elif scope != "all":
        patterns = [scope] if isinstance(scope, str) else list(scope)
        names = {g.name: {g.name, *g.members, *(m.rpartition(".")[0] for m in g.members)} for g in groups}  # fmt: skip
        for g in groups:
            names[g.name] |= {g.kind, "all"}
        for pattern in patterns:
            if not any(fnmatch.filter(n, pattern) for n in names.values()):
                raise no_match("scope", pattern, sorted(names))
        groups = [g for g in groups if any(fnmatch.filter(names[g.name], p) for p in patterns)]
    if not groups:
        raise _nothing(analysis, scope, ignore)
    return groups


def left_whole(
    analysis: Analysis, plan: Plan, *, scope: str | Sequence[str], ignore: Ignore, align: int
) -> list[Note]:
    """Why groups that could have been cut were not: ignored, out of scope, or nothing had to go."""
    frozen = _ignored_classes(analysis, ignore)
    chosen = {g.name for g in choose_groups(analysis, scope, ignore)}
    cut = {s.tensor for s in plan.slices}
    names: dict[str, list[str]] = {}
    shown = resolved(analysis, ignore)
    for group in analysis.groups:
        if frozen[group.classes].any():
            why = f"kept by ignore={shown}, alone or through a coupled layer"
        elif group.name not in chosen:
            why = f"left out by scope={scope!r}"
        elif any(slot.tensor in cut for slot in group.producers):
            continue
        elif align > 1:
            why = f"the share that fits, rounded to align={align}, is its whole width"
        else:
            why = "the share that fits is its whole width"
        names.setdefault(why, []).append(group.name)
    return [Note(", ".join(owners), why) for why, owners in names.items()]


def no_match(where: str, pattern: str, names: Sequence[str]) -> PlanError:
    """The error for a pattern that matches none of the names."""
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    words = ["all", "free", *KINDS] if where == "scope" else []
    known = [word for word in [*words, *names] if word != pattern]  # a kind may match nothing, too
    near = difflib.get_close_matches(pattern, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    choice = (
        f'"all", "free", a kind ({", ".join(KINDS)}) or patterns'
        if where == "scope"
        else "patterns"
    )
    return PlanError(
        f"the pattern {pattern!r} in {where} matches nothing",
        where=where,
        why=f"there are, for example, {some}" if names else "there is nothing to match",
        fix=f"{hint}{where} takes {choice} of fnmatch over names of modules and parameters",
    )


def _nothing(analysis: Analysis, scope: object, ignore: object) -> PlanError:
    if analysis.groups:
        why = f"scope={scope!r} and ignore={ignore!r} leave none of {len(analysis.groups)} groups"
    else:
        reasons = [f"{node}: {text}" for node, text in analysis.frozen.items()]
        opaque = {str(node.name): why for node, why in analysis.flow.ledger.whole.values()}
        reasons += [
            f"{node}: {text}" for node, text in opaque.items() if node not in analysis.frozen
        ]
        why = "every channel is frozen. " + "; ".join(reasons[:8]) if reasons else "the model has no layer with channels to cut"  # fmt: skip
    return PlanError(
        "nothing can be pruned",
        where=type(analysis.traced.model).__name__,
        why=why,
        fix="print(fxprune.analyze(model)) shows what is frozen and why",
    )


def _ignored_classes(analysis: Analysis, ignore: Ignore) -> Array:
    """Classes that hold an output channel of an ignored module or parameter: bool [classes]."""
    frozen = np.zeros(len(analysis.stays), dtype=bool)
    tensors = analysis.traced.tensors
    ignored = resolved(analysis, ignore).names
    for slot in analysis.slots:
        makes = slot.makes or analysis.flow.ledger.whole_groups.get(slot.tensor, False)
        if makes and not ignored.isdisjoint(tensors.names.get(slot.tensor, [slot.tensor])):
            frozen[analysis.classes(slot.ids)] = True
    return frozen


def _ignored_names(
    analysis: Analysis, ignore: Sequence[str] | Callable[[nn.Module, str], bool]
) -> set[str]:
    model = analysis.traced.model
    names = [n for owned in analysis.traced.tensors.names.values() for n in owned]
    if callable(ignore):
        keep = {n: m for n, m in model.named_modules() if n and not ignore(m, n)}
        return {n for n in names if any(n.startswith(m + ".") for m in keep)}
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    modules = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    ignored: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionTypeError("ignore holds " + (type(pattern).__name__ if isinstance(pattern, nn.Module) else repr(pattern)), where="ignore", why="patterns are strings: the names of modules, as model.named_modules() gives them")  # fmt: skip
        hit_modules = fnmatch.filter(modules, pattern)
        hit = set(fnmatch.filter(names, pattern))
        hit |= {n for n in names for m in hit_modules if n.startswith(m + ".")}
        if not hit and not hit_modules:
            raise no_match("ignore", pattern, modules)
        ignored |= hit
    return ignored
