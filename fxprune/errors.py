"""The errors a user can meet. Each says what happened, where, why, and what to do.

Their text goes to terminals and logs, and quotes names that came out of models and files: it holds
no control characters, and no quoted name makes it endless.
"""

from __future__ import annotations

MAX_FACT = 4000  # characters of one fact; the middle of a longer one is left out


def readable(text: str, most: int = MAX_FACT) -> str:
    """The text on one line that any terminal can print.

    Line breaks and tabs become spaces; a colour code, half of a surrogate pair or a mark that turns
    the direction of writing is written as Python would (`\\x1b`, ...). Of more than `most` characters
    the middle is left out.
    """
    if not text.isprintable():
        spaced = (" " if c in "\t\n\v\f\r" else c for c in text)
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in spaced)
    if len(text) <= most:
        return text
    head = 2 * most // 3
    left_out = f" [... {len(text) - most} more characters ...] "
    return text[:head] + left_out + text[head - most :]


class FxPruneError(Exception):
    """Base of every error that fxprune raises on purpose.

    `what` is one sentence; `where` names a node, tensor, file or argument (with the user's
    file:line where known); `why` gives the reason; `fix` says what to do about it. Each is one line
    of printable characters, see `readable`.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = readable(what)
        self.where, self.why, self.fix = (
            None if text is None else readable(text) for text in (where, why, fix)
        )
        lines = [self.what]
        for label, fact in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if fact:
                lines.append(f"  {label + ':':<6} {fact}")
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


class DataError(FxPruneError):
    """A data set is missing, damaged, or not what it should be."""


class DistributedMismatchError(FxPruneError):
    """The ranks of a distributed run disagree."""
