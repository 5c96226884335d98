"""The time that journals tell. Whatever the machine's clock is set to, it never goes back, nor jumps in a session."""

from __future__ import annotations

import time

_base = [time.time() - time.monotonic()]  # what to add to the monotonic clock


def now() -> float:
    """Seconds since the epoch: the clock's time when the session began, and what has passed since."""
    return _base[0] + time.monotonic()


def begin_session(told: float) -> None:
    """Take the time from the clock again, but none before `told`, the latest that a journal of the study tells."""
    _base[0] = max(time.time(), told) - time.monotonic()
