"""Where work runs, in the words of concurrent.futures: `submit` a function, get a Future."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from sweep.execution.worker import let_go


class Executor(Protocol):
    @property
    def slots(self) -> int:
        """How many units run at once."""
        ...

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...

    def shutdown(self, wait: bool = True) -> None: ...


class InlineExecutor:
    """Runs each call at once, in this process: the base model is loaded once and stays."""

    slots = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """The finished Future of fn(*args). Interrupts (KeyboardInterrupt, SystemExit) pass through."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            let_go(error)  # or what failed for want of memory keeps its own until the retry is over
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True) -> None:
        """Nothing to stop."""
