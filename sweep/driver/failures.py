"""What becomes of a pack that ended in an error, and of other work whose worker was lost. No state: who asks, acts."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any

from sweep.driver.interrupts import heed
from sweep.driver.packing import Pack, halves, name_trials
from sweep.execution.executor import Executor
from sweep.study.credentials import without_credentials
from sweep.study.errors import FieldError, NoWorkers, WorkerLost, in_one_line, is_out_of_memory
from sweep.study.records import FAILED, INFEASIBLE

LOOK_EVERY = 5.0  # seconds: whether what waits for a worker has one
LOSSES = 3  # of the worker of one trial; so many are no accident


@dataclass(frozen=True)
class Decision:
    """Packs to try again, or the state in which the pack's only trial ends; and what to say."""

    message: str
    again: tuple[Pack, ...] = ()
    state: str = ""
    reason: str = ""
    most: int | None = None  # trials in a pack from now on


def is_passing(error: Exception) -> bool:
    """Whether an error is no trial's fault and may be over when the command is run again: files, disks, networks."""
    return isinstance(error, FieldError | NoWorkers) or (isinstance(error, OSError) and error.errno != errno.ENOMEM)


def decide(pack: Pack, error: Exception, shared: bool) -> Decision:
    """What to do about a pack that ended in an error which is not passing.

    shared: other packs may have been in training at the time. Then a trial that found no memory is tried once more
    without them, before it is said not to fit.
    """
    who, why = name_trials(pack), in_one_line(error)
    if isinstance(error, WorkerLost):
        return _after_loss(pack, error)
    if len(pack.slots) > 1:
        most = max(1, len(pack.slots) // 2) if is_out_of_memory(error) else None
        return Decision(f"{who} failed together and are tried in halves: {why}", halves(pack), most=most)
    if is_out_of_memory(error):
        if shared and not pack.exclusive:
            return Decision(f"{who} found no memory beside others and waits for them: {why}", (_apart(pack),))
        return Decision(
            f"{who} does not fit on this device: {why}", (), INFEASIBLE, f"does not fit on this device ({why})"
        )
    return Decision(f"{who} failed: {why}", (), FAILED, why)


def call(executor: Executor, doing: str, fn: Callable[..., Any], *args: Any, seconds: float | None = None) -> Any:
    """fn(*args), run by a worker; where that is lost another takes over, and after three WorkerLost is raised.

    seconds: that it may take before it is taken for hung and its worker ended; None: as long as it takes.
    """
    reason = ""
    for _ in range(LOSSES):
        future = executor.submit(fn, *args)
        try:
            if seconds is not None:
                _end_if_hung(executor, future, seconds)
            return future.result()
        except WorkerLost as error:
            heed()
            reason = str(error)
    raise WorkerLost(f"the worker was lost {LOSSES} times while {doing}: {reason}")


def _end_if_hung(executor: Executor, future: Future[Any], seconds: float) -> None:
    """Wait for a future, and end it when its time is over, which begins as soon as it has a worker."""
    due: float | None = None
    while not future.done():
        if due is None and future.running():
            due = time.monotonic() + seconds
        wait([future], min(seconds, LOOK_EVERY) if due is None else max(0.0, due - time.monotonic()))
        if due is not None and time.monotonic() >= due:
            executor.end(future, f"did nothing for {seconds:.0f} s")
            return


def _after_loss(pack: Pack, error: WorkerLost) -> Decision:
    """Whole once more, for the worker may have been at fault; then in halves, so that one trial takes no other with it.

    The last try of a trial is made without others beside it: the system ends what takes memory, whoever asked last.
    """
    who, why = name_trials(pack), without_credentials(" ".join(str(error).split()))
    lost = replace(pack, losses=pack.losses + 1)
    if len(pack.slots) > 1 and pack.losses:
        parts = halves(replace(pack, losses=1))
        most = max(1, len(pack.slots) // 2) if "want of memory" in why else None
        return Decision(f"the worker of {who} was lost again, and they are tried in halves: {why}", parts, most=most)
    if lost.losses < LOSSES:
        last = len(pack.slots) == 1 and lost.losses == LOSSES - 1
        again = (_apart(lost) if last else lost,)
        return Decision(f"the worker of {who} was lost, and another tries again: {why}", again)
    reason = f"its worker was lost {LOSSES} times: {why}"
    return Decision(f"{who} failed: {reason}", (), FAILED, reason)


def _apart(pack: Pack) -> Pack:
    return replace(pack, exclusive=True)
