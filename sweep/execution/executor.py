"""Where work runs, in the words of concurrent.futures: `submit` a function, get a Future."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from sweep.execution.worker import let_go
from sweep.study.errors import NoWorkers, broke_device, in_one_line


class Executor(Protocol):
    """A future ends in what its function returned or raised, or in one of two errors of the executor's own:
    WorkerLost, with the reason, where the process that ran it ended, and NoWorkers where nothing can run it."""

    @property
    def slots(self) -> int:
        """How many units run at once; it may change over time."""
        ...

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...

    def end(self, future: Future[Any], reason: str) -> None:
        """Stop the worker that runs it: the future ends in WorkerLost(reason), unless it has ended by then."""
        ...

    def shutdown(self) -> None:
        """Stop every worker, with what it runs. May be called again."""
        ...


class InlineExecutor:
    """Runs each call at once, in this process: the base model is loaded once and stays.

    What hangs here hangs the command: nobody is left to end it. What is killed is the command.
    """

    slots = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """The finished Future of fn(*args). Interrupts (KeyboardInterrupt, SystemExit) pass through."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            let_go(error)  # or what failed for want of memory keeps its own until the retry is over
            future.set_exception(_of_device(error) if broke_device(error) else error)
        return future

    def end(self, future: Future[Any], reason: str) -> None:
        """Never needed: futures of this executor have ended when they are seen."""

    def shutdown(self) -> None:
        """Nothing to stop."""


def _of_device(error: Exception) -> NoWorkers:
    again = "run the same command again; with --executor local a new process takes over by itself"
    return NoWorkers(f"the GPU failed and serves this process no more ({in_one_line(error)}): {again}")
