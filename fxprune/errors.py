"""The errors a user can meet. Each says what happened, where, why, and what to do."""

from __future__ import annotations


class FxPruneError(Exception):
    """Base of every error that fxprune raises on purpose.

    `what` is one sentence; `where` names a node, tensor, file or argument (with the user's
    file:line where known); `why` gives the reason; `fix` says what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        for label, text in (("where", where), ("why", why), ("fix", fix)):
            if text:
                lines.append(f"  {label + ':':<6} {text}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def _rebuild(
    kind: type[FxPruneError], what: str, where: str | None, why: str | None, fix: str | None
) -> FxPruneError:
    """Unpickle an error: keyword-only arguments do not survive the default protocol."""
    return kind(what, where=where, why=why, fix=fix)


class TraceError(FxPruneError):
    """The model cannot be turned into a graph that computes what the model computes."""


class UnsupportedOpError(FxPruneError):
    """An operation was asked for on something that fxprune does not support."""


class PlanError(FxPruneError):
    """A plan cannot be made, read, or applied to this model."""


class OptionError(PlanError, ValueError):
    """An argument has a value that makes no sense."""


class OptionTypeError(PlanError, TypeError):
    """An argument has the wrong type."""


class VerifyError(FxPruneError):
    """The pruned network does not compute what the masked original computes."""


class CheckpointError(FxPruneError):
    """A file cannot be written, or is damaged, or belongs to something else."""


class DistributedMismatchError(FxPruneError):
    """The ranks of a distributed run disagree."""
