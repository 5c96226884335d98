"""Worker processes on this machine. Each loads the base once and lives on; one that dies is replaced.

A pipe and a thread for each, and not a ProcessPoolExecutor: that one waits for ever for the rest of a result when its
process is killed while it sends, since it holds the sending end of the pipe itself; and it does not tell how a process
ended.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle  # noqa: TID251 - our own processes send each other pickles, over pipes of their own
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_ready
from multiprocessing.process import BaseProcess
from queue import LifoQueue
from typing import Any

from sweep.execution.worker import answer
from sweep.study.errors import NoWorkers, WorkerLost
from sweep.study.lifeline import die_with_parent

SPAWN = multiprocessing.get_context("spawn")
SECONDS_TO_DIE = 5.0
MORE = "end other programs, allow more (ulimit -n, ulimit -u) or ask for fewer workers, and run the same command again"


@dataclass
class Worker:
    """A place for a process, and the process in it, if there is one."""

    environment: Mapping[str, str]  # set in it before torch is imported
    process: BaseProcess | None = None
    connection: Connection | None = None


@dataclass
class Call:
    """One unit on its way: its request, the worker that runs it, and why it was ended."""

    request: bytes
    worker: Worker | None = None
    ended: str | None = None


class LocalExecutor:
    """As many units at once as there are environments, each in a process of its own that has that environment.

    Processes start with their first unit. They are not interrupted by Ctrl-C, may have children, and die with this one.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]):
        self.workers = [Worker(environment) for environment in environments]
        self.slots = len(self.workers)
        self._idle: LifoQueue[Worker] = LifoQueue()  # the last one that ran is the next: it has the base
        for worker in reversed(self.workers):
            self._idle.put(worker)
        self._calls: dict[Future[Any], Call] = {}
        self._lock = threading.Lock()  # over processes: who starts, ends and waits for them
        self._closed = False
        atexit.register(self.shutdown)  # a second Ctrl-C may cut the first one's shutdown short

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """More than `slots` at once wait for a worker. fn and its arguments are pickled here and now."""
        call = Call(pickle.dumps((fn, args)))
        future: Future[Any] = Future()
        with self._lock:
            self._calls[future] = call
        future.add_done_callback(self._forget)
        # A daemon, which the interpreter does not wait for at its end: it may wait for a worker that waits for us.
        thread = threading.Thread(target=self._run, args=(future, call), name="worker", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            future.set_exception(NoWorkers(f"no worker can be started: {error}; {MORE}"))
        return future

    def end(self, future: Future[Any], reason: str) -> None:
        with self._lock:
            call = self._calls.get(future)
            if call is not None:
                call.ended = reason
                _kill(call.worker)
                _hang_up(call.worker)

    def shutdown(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self.workers:
                _kill(worker)
                _hang_up(worker)
            running = list(self._calls)
        # Those that can be cancelled have no thread: an interrupt came before it.
        wait([future for future in running if not future.cancel()], 2 * SECONDS_TO_DIE)
        for worker in self.workers:
            _bury(worker)
        atexit.unregister(self.shutdown)

    def _run(self, future: Future[Any], call: Call) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(self._answer(call))
            except BaseException as error:
                future.set_exception(error)

    def _answer(self, call: Call) -> Any:
        worker = self._idle.get()
        try:
            connection = self._begin(worker, call)
            try:
                connection.send_bytes(call.request)
                reply = connection.recv_bytes()
            except (EOFError, OSError):  # what it sent before is lost with it, were it all but the last byte
                raise self._lost(worker, call) from None
            value, error = pickle.loads(reply)  # noqa: S301 - our own worker wrote it
            with self._lock:
                call.worker = None
                if isinstance(error, WorkerLost):  # its device is of no more use to it
                    _kill(worker)
                    _bury(worker)
        finally:
            self._idle.put(worker)
        if error is not None:
            raise error
        return value

    def _begin(self, worker: Worker, call: Call) -> Connection:
        """The connection to a living process that from now on runs the call. Raises WorkerLost or NoWorkers."""
        with self._lock:
            if self._closed or call.ended is not None:
                raise WorkerLost(call.ended or "stopped")
            call.worker = worker
            if _is_dead(worker):
                _bury(worker)
                try:
                    _start(worker)
                except OSError as error:
                    raise NoWorkers(f"no worker process can be started: {error.strerror}; {MORE}") from error
            assert worker.connection is not None
            return worker.connection

    def _lost(self, worker: Worker, call: Call) -> WorkerLost:
        with self._lock:
            call.worker = None
            code = _bury(worker)
            return WorkerLost(call.ended or how_it_ended(code))

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._calls.pop(future, None)


def how_it_ended(code: int | None) -> str:
    """A process's exit code in words."""
    if code is None or code >= 0:
        return "its process ended" + (f" with exit code {code}" if code else "")
    if -code == signal.SIGKILL:
        return "killed by signal 9, perhaps for want of memory"
    with suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"


def _start(worker: Worker) -> None:
    """Raises OSError where the system gives no process."""
    ours, theirs = SPAWN.Pipe()
    resource_tracker.ensure_running()  # as `start` does, and lets SIGINT through again where that starts one
    # The process inherits it: Ctrl-C reaches a whole process group, and the driver decides.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = SPAWN.Process(target=_serve, args=(theirs, dict(worker.environment)), name="sweep worker")
    try:
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()  # so that nobody but the worker holds it, and its death is seen
    worker.process, worker.connection = process, ours


def _kill(worker: Worker | None) -> None:
    """The worker, and at the same moment all that it started. Not once it has been waited for: its number is free."""
    if worker is not None and worker.process is not None and worker.process.pid is not None:
        with suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.kill()


def _hang_up(worker: Worker | None) -> None:
    """Let nobody wait for a word of one that is being ended: it does not die while it waits for a disk that is gone."""
    if worker is not None and worker.connection is not None:
        with suppress(OSError), socket.socket(fileno=os.dup(worker.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)


def _is_dead(worker: Worker) -> bool:
    """Told without waiting for it, as `is_alive` would."""
    return worker.process is None or bool(wait_ready([worker.process.sentinel], 0))


def _bury(worker: Worker) -> int | None:
    """Wait for the end of a worker that is dying or done with; returns its exit code."""
    code = None
    if worker.process is not None:
        wait_ready([worker.process.sentinel], 1.0)  # its pipe is closed: it ends by itself, in a way worth telling
        _kill(worker)
        worker.process.join(SECONDS_TO_DIE)  # one that waits for a disk that is gone does not even die
        code = worker.process.exitcode
    if worker.connection is not None:
        worker.connection.close()
    worker.process = worker.connection = None
    return code


def _serve(connection: Connection, environment: Mapping[str, str]) -> None:
    """What a worker does until its driver is gone."""
    os.setpgrp()  # what it starts ends with it
    die_with_parent(with_group=True)
    os.environ.update(environment)
    with suppress(EOFError, ConnectionError):  # the driver is gone before the next unit, or before the answer
        while True:
            connection.send_bytes(answer(connection.recv_bytes()))
