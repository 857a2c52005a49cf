"""One thread, fixed seeds, hypothesis profiles, and the `long` marker.

FXPRUNE_PROFILE picks the profile: `quick` (25 examples), `ci` (200, the default) or `long` (2,000,
not derandomized, and the only one that runs tests marked `long`).
"""

import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("FXPRUNE_PROFILE", "ci")

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a job in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Drawing a network and running it takes milliseconds that a deadline or a health check of one draw
# would count against the code under test.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", _common, max_examples=25, derandomize=True)
settings.register_profile("ci", _common, max_examples=200, derandomize=True)
settings.register_profile("long", _common, max_examples=2_000, derandomize=False, print_blob=True)
settings.load_profile(PROFILE)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Every test leaves the handlers of signals as it found them; the one that does not is named."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `long` tests outside the long profile."""
    if PROFILE == "long":
        return
    dropped = [item for item in items if item.get_closest_marker("long")]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.stash[_dropped] = len(dropped)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests were deselected."""
    if count := terminalreporter.config.stash.get(_dropped, 0):
        terminalreporter.write_line(
            f"{count} long tests deselected: set FXPRUNE_PROFILE=long to run them (now {PROFILE})"
        )


_dropped = pytest.StashKey[int]()
