"""What tests let workers do: functions of a module, so that a process that was spawned can import them."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fakes import fake_work, train_rung

from sweep.execution.local import LocalExecutor
from sweep.execution.worker import Work
from sweep.study.records import Measurement, Unit

PLAIN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def workers(n: int) -> Iterator[LocalExecutor]:
    executor = LocalExecutor([PLAIN] * n)
    try:
        yield executor
    finally:
        executor.shutdown()


def pid() -> int:
    return os.getpid()


def environment(*names: str) -> tuple[bool, list[str | None], int]:
    """Whether torch was there before; variables; the threads that torch then takes."""
    before = "torch" in sys.modules
    import torch

    return before, [os.environ.get(name) for name in names], torch.get_num_threads()


def fail(error: BaseException) -> None:
    raise error


class Stubborn(Exception):
    """Cannot be made again from what pickle keeps of it."""

    def __init__(self, one: str, two: str):
        super().__init__(f"{one} and\n{two}")


def fail_stubbornly() -> None:
    raise Stubborn("one", "two")


def fail_locally() -> None:
    class Local(Exception): ...

    raise Local("nobody else knows this class")


def fail_like_torch() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def leave(code: int) -> None:
    os._exit(code)


def die_while_sending() -> None:
    """Half of a message, as a process leaves it that is killed while it sends a large result."""
    for end in [o for o in gc.get_objects() if isinstance(o, Connection) and not o.closed]:
        os.write(end.fileno(), struct.pack("!i", 1000) + b"x" * 10)
    die(signal.SIGKILL)


def meet(folder: Path, n: int) -> int:
    """Wait until n units are here at once; returns this process's id."""
    (folder / str(os.getpid())).touch()
    wait_for(lambda: len(list(folder.iterdir())) >= n, "the others")
    return os.getpid()


def begin_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def wait_for_a_word(folder: Path) -> int:
    """Until there is a file `go`."""
    (folder / str(os.getpid())).touch()
    wait_for((folder / "go").exists, "the word to go on")
    return os.getpid()


def sleep_a_little(folder: Path) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(0.5)
    return os.getpid()


def sleep_with_a_child(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (folder / str(child.pid)).touch()
    begin_and_sleep(folder)


def sum_in_a_child() -> int:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as one:
        return one.submit(sum, [1, 2]).result()


def wait_for(holds: Any, what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not in time"
        time.sleep(0.01)


def is_alive(number: int) -> bool:
    """Whether a process of this id runs; one that has ended and waits to be told of does not.

    Its first thread may have ended before its others, which hold its files until then.
    """
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state not in "ZX" or len(os.listdir(f"/proc/{number}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_stopped(number: int) -> bool:
    """Whether every thread of a process stands still: a signal to stop takes its time on a busy machine."""
    try:
        threads = list(Path(f"/proc/{number}/task").iterdir())
        return all((thread / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for thread in threads)
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent_of(number: int) -> int | None:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


HOW = {
    "killed": partial(die, signal.SIGKILL),
    "exits": partial(leave, 3),
    "stopped": partial(die, signal.SIGSTOP),
    "no memory": partial(fail, MemoryError("no room")),
    "no disk": partial(fail, OSError(28, "No space left on device")),
}


def train_with_fault(marks: Path, how: str, arm: str, times: int, unit: Unit) -> tuple[Measurement, ...]:
    """Trains, but the first `times` packs with a trial of the arm end as `how` says. Leaves a mark for each pack."""
    names = [trial.arm.name for trial in unit.trials]
    number = len(list(marks.iterdir()))
    mark = marks / f"{number:04d}-{os.getpid()}"
    faults = sum(int(path.read_text().split()[0]) for path in marks.iterdir() if path.stat().st_size)
    bad = arm in names and faults < times
    mark.write_text(f"{int(bad)} {unit.start} {len(names)} {' '.join(names)}")
    if bad:
        HOW[how]()
    return train_rung(unit)


def with_fault(marks: Path, how: str, arm: str, times: int = 1000) -> Work:
    marks.mkdir(parents=True)
    return fake_work(partial(train_with_fault, marks, how, arm, times))


def packs_seen(marks: Path) -> list[tuple[bool, int, list[str]]]:
    """Of each pack that a worker began: whether it ended badly, the step it began at, the arms."""
    rows = [path.read_text().split() for path in sorted(marks.iterdir())]
    return [(row[0] == "1", int(row[1]), row[3:]) for row in rows]


def train_but(error: str, arm: str, unit: Unit) -> tuple[Measurement, ...]:
    """Really trains, but packs with a trial of the arm."""
    from sweep.training.rung import train_rung

    if arm in [trial.arm.name for trial in unit.trials]:
        if error == "no memory":
            import torch

            torch.empty(2**50)
        HOW[error]()
    return train_rung(unit)


def train_slowly(seconds: float, unit: Unit) -> tuple[Measurement, ...]:
    time.sleep(seconds)
    return train_rung(unit)


def lose(*args: Any) -> None:
    die(signal.SIGKILL)
