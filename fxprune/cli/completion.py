"""What the shell asks while a command line is typed.

bash breaks words at `:` and `=`, and hands over `zoo:resnet56` as three words; here they are joined
again, and what stands before the last colon is taken off the answers, since bash keeps it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

_ASKED = "_FXPRUNE_COMPLETE"


@contextmanager
def whole_words() -> Iterator[None]:
    """Inside, a completion that bash asks for sees whole words; does nothing otherwise."""
    if os.environ.get(_ASKED) != "complete_bash":
        yield
        return
    before = dict(os.environ)
    text = os.environ.get("COMP_WORDS", "")
    between = "\n" if "\n" in text else " "  # typer's script sets IFS to a line's end
    broken = text.split(between)
    place = int(os.environ.get("COMP_CWORD") or len(broken) - 1)
    broken += [""] * (place + 1 - len(broken))
    words, place = _joined(broken, place)
    os.environ |= {"COMP_WORDS": between.join(words), "COMP_CWORD": str(place)}
    kept = words[place].rpartition(":")[0]
    stdout, sys.stdout = sys.stdout, StringIO()
    try:
        yield
    finally:
        answers, sys.stdout = sys.stdout.getvalue().splitlines(), stdout
        os.environ.clear()
        os.environ |= before
        prefix = f"{kept}:" if kept else ""
        print("\n".join(answer.removeprefix(prefix) for answer in answers))


def _joined(words: list[str], place: int) -> tuple[list[str], int]:
    """Words around a colon as one word, and where the one at `place` is then."""
    whole: list[str] = []
    new = 0
    for i, word in enumerate(words):
        glued = whole and i > 1 and (word == ":" or whole[-1].endswith(":"))
        if glued:
            whole[-1] += word
        else:
            whole.append(word)
        if i == place:
            new = len(whole) - 1
    return whole, new
