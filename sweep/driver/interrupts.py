"""Ctrl-C and SIGTERM end a study between two writes, and are never lost.

Python raises KeyboardInterrupt at whatever line it stands on. Inside a database library that can be a clean-up
callback, which prints a trace-back and swallows it; inside torch an item of a sequence, which makes it a ValueError.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

_came: list[int] = []  # signals that wait for the end of the outermost `uninterrupted` block
_raised: list[int] = []  # signals of this `interruptible` block that have been raised
_asleep: list[bool] = []  # inside `sleep`


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal waits for the end of the block (or of the function it decorates); a second one does not wait."""
    handlers = _handlers()
    if _note in handlers.values():
        yield
        return
    _came.clear()
    try:
        for number in handlers:
            signal.signal(number, _note)
        yield
    finally:
        _restore(handlers)
        if _came:  # also after a second one, which may have been swallowed
            signal.raise_signal(_came[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """A signal is raised at once, as before, and again by `heed` and at the end of the block if that was swallowed."""
    handlers = {number: handler for number, handler in _handlers().items() if callable(handler)}

    def remember(number: int, frame: FrameType | None) -> None:
        _raised.append(number)
        handlers[number](number, frame)

    _raised.clear()
    try:
        for number in handlers:
            signal.signal(number, remember)
        yield
        heed()
    finally:
        _restore(handlers)


def heed() -> None:
    """Raise KeyboardInterrupt where a signal of this `interruptible` block has come."""
    if _raised:
        raise KeyboardInterrupt


def sleep(seconds: float) -> None:
    """Sleep where nothing is half written: a signal is raised at once, inside an `uninterrupted` block too."""
    _asleep.append(True)
    try:
        if _came and _note in _handlers().values():
            raise KeyboardInterrupt
        time.sleep(seconds)
    finally:
        _asleep.pop()


def _handlers() -> dict[int, signal._HANDLER]:
    """What SIGINT and SIGTERM do, less those that are ignored. Signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}


def _restore(handlers: Mapping[int, signal._HANDLER]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    if len(_came) > 1 or _asleep:
        raise KeyboardInterrupt
