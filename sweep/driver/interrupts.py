"""Ctrl-C and SIGTERM before or after what is written of a trial, in its journal and in Optuna, and not amid it.

Python raises KeyboardInterrupt at whatever line it stands on; inside a database library that can be a clean-up
callback, which prints a traceback and swallows it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came: list[int] = []  # signals that wait for the end of the outermost block


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal waits for the end of the block (or of the function it decorates); a second one does not wait."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # signals reach no other
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if not in_main_thread or _note in handlers.values():
        yield
        return
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    _came.clear()
    try:
        for number in before:
            signal.signal(number, _note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _came:  # also after a second one, which may have been swallowed
            signal.raise_signal(_came[0])


def _note(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    if len(_came) > 1:
        raise KeyboardInterrupt
