"""Workers on the nodes of a Ray cluster. Ray places them and tells of their end; retries and checkpoints are our own.

All that happens is an entry of one queue, handled by one thread: submissions, starts and ends of workers, and what a
second thread sees of the cluster. So nothing is locked, and the driver's own thread is never inside Ray.
"""

from __future__ import annotations

import pickle  # noqa: TID251 - our own processes send each other pickles, through Ray
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from sweep.execution.choose import count
from sweep.execution.ray_actor import code, how_it_ended, last_line, place_actor, read_answer
from sweep.execution.ray_cluster import Cluster, answers, joined, list_nodes, this_machine
from sweep.execution.ray_nodes import (
    Node,
    Plan,
    count_workers,
    plan_workers,
    refuse_more,
    what_a_worker_needs,
)
from sweep.study.errors import NoWorkers, WorkerLost, in_one_line
from sweep.study.schema import Resources

SECONDS_TO_START = 30.0  # that the first workers are waited for
SECONDS_WITHOUT_HEAD = 30.0  # Ray itself ends this process after 60, without a word
LOOK_EVERY = 1.0
STARTS = 3  # that fail on a node, but for want of memory, before nothing more is expected of it
RUN_AGAIN = "run the same command again"


@dataclass(eq=False)
class Call:
    """A unit on its way. `since`: when it came, by the executor's own clock."""

    request: bytes
    future: Future[Any]
    since: float


@dataclass(eq=False)
class Worker:
    node: Node
    actor: Any
    ready: bool = False
    used: float = 0.0
    call: Call | None = None


@dataclass(frozen=True)
class Trouble:
    """Of a node on which no worker has started yet, for all the tries. `failures`: those that had no want of memory."""

    reason: str
    tries: int
    failures: int
    again: float


class RayExecutor:
    """As many units at once as there are workers in the cluster. Nodes that join are used, those that die are dropped.

    address: see `joined`. seconds_without_workers: how long units wait while no worker is left, before they end in
    NoWorkers. Raises NoWorkers where there is no cluster, and FieldError where the one that it starts on this machine
    does not hold what `resources` ask for.
    """

    def __init__(
        self,
        resources: Resources | None = None,
        address: str | None = None,
        seconds_without_workers: float = 120.0,
    ):
        here = this_machine()
        if not address:  # nothing will join what we start
            refuse_more(resources, here)
        self.slots = 1  # a unit may wait for the first worker, or for the next
        self._resources, self._patience = resources, seconds_without_workers
        self._todo: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._workers: list[Worker] = []
        self._waiting: deque[Call] = deque()
        self._nodes: dict[str, Node] | None = None  # until the first look
        self._troubles: dict[str, Trouble] = {}  # by node
        self._plan: Plan | None = None
        # Seconds that the executor was awake: a command that was stopped for an hour has not waited for an hour.
        self._now = self._worker_seen = self._head_seen = 0.0
        self._over: Exception | None = None  # what units end in from now on
        self._closed = threading.Event()
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(address, here), name="ray", daemon=True)
        self._thread.start()
        try:
            self._opened.result()
        except BaseException:
            self.shutdown()
            raise
        _take_back_sigterm()

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """More than `slots` at once wait for a worker. fn and its arguments are pickled here and now."""
        future: Future[Any] = Future()
        self._todo.put(partial(self._take_in, pickle.dumps((fn, args)), future))
        return future

    def end(self, future: Future[Any], reason: str) -> None:
        self._todo.put(partial(self._end, future, reason))

    def shutdown(self) -> None:
        self._closed.set()
        self._todo.put(lambda: None)  # so that it is seen at once
        self._thread.join()
        _take_back_sigterm()

    def describe(self) -> str:
        """What there is, in a line, and which nodes start no worker."""
        ready, nodes = [worker for worker in self._workers if worker.ready], self._nodes or {}
        found = f"{count(len(ready), 'worker')} on {count(len({worker.node.id for worker in ready}), 'Ray node')}"
        troubles = [(nodes[at], trouble) for at, trouble in dict(self._troubles).items() if at in nodes]
        return "; none on ".join([found, *sorted(f"{node.address} ({why.reason})" for node, why in troubles)])

    # What follows runs in the executor's own thread.

    def _serve(self, address: str | None, here: Node) -> None:
        try:
            with joined(address, here) as cluster:
                threading.Thread(target=self._watch, args=(cluster,), name="ray nodes", daemon=True).start()
                try:
                    self._handle(cluster)
                    self._give_up(WorkerLost("stopped"))
                except Exception as error:
                    self._give_up(_no_workers(error))
        except Exception as error:
            self._give_up(_no_workers(error))
        while not (self._closed.is_set() and self._todo.empty()):
            self._todo.get()()

    def _handle(self, cluster: Cluster) -> None:
        """Until the executor is closed. Raises NoWorkers where the cluster is gone."""
        before = time.monotonic()
        while not self._closed.is_set():
            with suppress(Empty):
                self._todo.get(timeout=LOOK_EVERY)()
            self._now += min(time.monotonic() - before, 2 * LOOK_EVERY)
            before = time.monotonic()
            if self._now - self._head_seen > SECONDS_WITHOUT_HEAD:
                raise NoWorkers(f"the head of the Ray cluster ({cluster.head}) is gone: start it and {RUN_AGAIN}")
            if self._nodes is None:
                continue
            if cluster.own_node not in self._nodes:
                raise NoWorkers(f"the Ray node of this machine is gone: start it and {RUN_AGAIN}")
            if self._plan is None:
                self._plan = plan_workers(self._resources, list(self._nodes.values()))
            self._start_workers()
            self._give_out()
            self._lose_patience()
            if not self._opened.done() and (all(w.ready for w in self._workers) or self._now > SECONDS_TO_START):
                self._opened.set_result(None)

    def _watch(self, cluster: Cluster) -> None:
        """In a thread of its own, since Ray does not return while the head is silent."""
        while not self._closed.is_set() and self._over is None:
            if answers(cluster.head):
                with suppress(Exception):  # a head that goes away just now; or Ray has been left
                    self._todo.put(partial(self._see, {node.id: node for node in list_nodes()}))
            self._closed.wait(LOOK_EVERY)

    def _see(self, nodes: dict[str, Node]) -> None:
        self._head_seen, self._nodes = self._now, nodes
        for worker in [worker for worker in self._workers if worker.node.id not in nodes]:
            self._lose(worker, f"its Ray node {worker.node.address} is gone")

    def _start_workers(self) -> None:
        """One after the other, each on the node that has fewest of those with room."""
        while self._plan is not None and (self._plan.most is None or len(self._workers) < self._plan.most):
            there = Counter(worker.node.id for worker in self._workers)
            free = [node for node in self._with_room() if there[node.id] < count_workers(self._plan, node)]
            free = [node for node in free if node.id not in self._troubles or self._troubles[node.id].again < self._now]
            if not free:
                return
            node = min(free, key=lambda node: there[node.id])
            worker = Worker(node, place_actor(self._plan, node))
            self._workers.append(worker)
            self._when_done(worker.actor.code.remote(), partial(self._started, worker))

    def _with_room(self) -> list[Node]:
        """The nodes that could hold a worker if nothing else ran on them."""
        nodes = (self._nodes or {}).values()
        return [node for node in nodes if self._plan is not None and count_workers(self._plan, node)]

    def _started(self, worker: Worker, done: Future[str]) -> None:
        from ray.exceptions import OutOfMemoryError

        if worker not in self._workers:
            return
        error, node = done.exception(), worker.node
        if error is None and done.result() == code():
            worker.ready = True
            self._troubles.pop(node.id, None)
            self._count_slots()
            return
        before = self._troubles.get(node.id, Trouble("", 0, 0, 0.0))
        tries, failures = before.tries + 1, before.failures
        if isinstance(error, OutOfMemoryError):  # others may give some back
            reason = "Ray ended it, since its node ran out of memory"
        else:
            reason = last_line(error) if error is not None else f"{done.result()}, not {code()}"
            failures += 1
        self._troubles[node.id] = Trouble(reason, tries, failures, self._now + tries)
        self._drop(worker)

    def _take_in(self, request: bytes, future: Future[Any]) -> None:
        if self._over is not None:
            future.set_exception(self._over)
        else:
            self._waiting.append(Call(request, future, self._now))

    def _give_out(self) -> None:
        """Waiting units to idle workers; first to the one that ran last, since it has the base."""
        idle = sorted((w for w in self._workers if w.ready and w.call is None), key=lambda worker: worker.used)
        while idle and self._waiting:
            worker, call = idle.pop(), self._waiting.popleft()
            worker.call = call
            call.future.set_running_or_notify_cancel()  # its time begins; nobody cancels it, it is only ended
            self._when_done(worker.actor.run.remote(call.request), partial(self._finished, worker, call))

    def _finished(self, worker: Worker, call: Call, done: Future[bytes]) -> None:
        from ray.exceptions import OutOfMemoryError, RayTaskError

        if worker.call is not call:  # late: it was believed dead, or ended
            return
        error = done.exception()
        if isinstance(error, OutOfMemoryError):
            self._drop(worker)
            call.future.set_exception(MemoryError(f"Ray ended it, since {worker.node.address} ran out of memory"))
        elif error is not None and not isinstance(error, RayTaskError):
            self._lose(worker, how_it_ended(error, worker.node))
        else:
            value, found = read_answer(done, worker.node)
            if isinstance(found, WorkerLost):  # its device is of no more use to it
                self._lose(worker, str(found))
                return
            worker.call, worker.used = None, self._now
            if found is None:
                call.future.set_result(value)
            else:
                call.future.set_exception(found)

    def _end(self, future: Future[Any], reason: str) -> None:
        for worker in [worker for worker in self._workers if worker.call and worker.call.future is future]:
            self._lose(worker, reason)
        for call in [call for call in self._waiting if call.future is future]:
            self._waiting.remove(call)
            future.set_exception(WorkerLost(reason))

    def _lose(self, worker: Worker, reason: str) -> None:
        call = worker.call
        self._drop(worker)
        if call is not None:
            call.future.set_exception(WorkerLost(reason))

    def _drop(self, worker: Worker) -> None:
        """Another will take its place."""
        import ray

        worker.call = None
        self._workers.remove(worker)
        self._count_slots()
        with suppress(Exception):  # it may be gone, or its node, or Ray
            ray.kill(worker.actor)

    def _count_slots(self) -> None:
        self.slots = max(1, sum(worker.ready for worker in self._workers))

    def _lose_patience(self) -> None:
        """End what has waited too long for a worker, or waits for one that cannot start."""
        if any(worker.ready for worker in self._workers):
            self._worker_seen = self._now
            return
        troubles = [self._troubles.get(node.id) for node in self._with_room()]
        hopeless = bool(troubles) and all(t is not None and t.failures >= STARTS for t in troubles)
        reasons = "; ".join(sorted({trouble.reason for trouble in troubles if trouble is not None}))
        if hopeless:
            needs = f"each needs {code()}, and the token of this command"
            why = f"no worker starts on the nodes of the Ray cluster ({reasons}): {needs}; then {RUN_AGAIN}"
        elif reasons:
            why = f"no worker started within {self._patience:g} s ({reasons}): put that right and {RUN_AGAIN}"
        else:
            needs = what_a_worker_needs(self._resources)
            why = f"no Ray node that offers {needs} came within {self._patience:g} s: start one and {RUN_AGAIN}"
        for call in list(self._waiting):
            if hopeless or self._now - max(self._worker_seen, call.since) > self._patience:
                self._waiting.remove(call)
                call.future.set_exception(NoWorkers(why))

    def _give_up(self, error: Exception) -> None:
        """End everything, now and from now on, in this error."""
        self._over = error
        calls = [worker.call for worker in self._workers if worker.call is not None] + list(self._waiting)
        for worker in list(self._workers):
            self._drop(worker)
        self._waiting.clear()
        for call in calls:
            call.future.set_exception(error)
        if not self._opened.done():
            self._opened.set_exception(error)

    def _when_done(self, reference: Any, then: Callable[[Future[Any]], None]) -> None:
        reference.future().add_done_callback(lambda done: self._todo.put(partial(then, done)))


def _no_workers(error: Exception) -> NoWorkers:
    """Whatever goes wrong in here is no trial's fault."""
    if isinstance(error, NoWorkers):
        return error
    return NoWorkers(f"Ray failed ({in_one_line(error)}): {RUN_AGAIN}")


def _take_back_sigterm() -> None:
    """Under Python's handler Ray puts one that prints stacks, and when it is left none at all."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
