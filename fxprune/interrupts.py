"""Ctrl-C and SIGTERM while something is half done: they wait until it is whole.

Promise: inside `held` a signal waits for the end of the block, a second one does not; elsewhere it
         raises KeyboardInterrupt where it arrives. `whole` says whether the last `held` block was
         left complete. Afterwards the earlier handlers stand again and receive the signal, so that
         the process ends as it would have ended.
Refuses: nothing. Outside the main thread, where Python allows no handlers, signals stay as they are.
"""

from __future__ import annotations

import os
import signal
import threading
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
        if not self._active or threading.current_thread() is not threading.main_thread():
            return self  # handlers belong to the main thread
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler in (signal.SIG_IGN, None):
                    continue  # ignored on purpose (nohup), or not Python's to put back
                self._before[number] = handler
                signal.signal(number, self._arrive)
        except BaseException:  # another handler raised, as that of a loader's dying worker does
            self._put_back()
            raise
        return self

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        try:
            self._put_back()
        except BaseException:
            self._put_back()
            raise
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
