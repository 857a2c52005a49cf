"""Ctrl-C and SIGTERM while something is half done: they wait until it is whole.

Promise: inside `held` a signal waits for the end of the block, a second one does not; elsewhere it
         raises KeyboardInterrupt where it arrives. `whole` says whether the last `held` block was
         left complete. Afterwards the earlier handlers stand again and receive the signal, so that
         the process ends as it would have ended.
Refuses: nothing. Outside the main thread, where Python allows no handlers, signals stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which SIGINT and SIGTERM can be held back; does nothing when not `active`."""

    def __init__(self, active: bool = True) -> None:
        self.whole = True
        self._active = active
        self._busy = False
        self._received: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}  # signal -> handler: a callable or an enum

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM) if self._active else ():
            if signal.getsignal(number) in (signal.SIG_IGN, None):
                continue  # ignored on purpose (nohup), or not Python's to put back
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._received is not None:
            signal.raise_signal(self._received)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that is not interrupted between its first and its last statement."""
        self._busy, self.whole = True, False
        try:
            yield
            self.whole = True
        finally:
            self._busy = False
        if self._received is not None:
            raise KeyboardInterrupt

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        del frame
        forked = os.getpid() != self._process  # a loader's worker has inherited this handler
        second = self._received is not None
        if not forked:  # guard: signals are remembered -> tests/training/test_state.py -k sigterm
            self._received = number
        if forked or second or not self._busy:
            raise KeyboardInterrupt
