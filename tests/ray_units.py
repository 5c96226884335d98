"""What tests let workers of a Ray cluster do, and a command that lets them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import clusters
import fakes
from worker_units import begin_and_sleep

from sweep.execution.worker import Work
from sweep.study.file import dump_study
from sweep.study.records import Measurement, Unit

COMMAND = """
import sys
from pathlib import Path
import fake_sweep, ray_units
from functools import partial
from sweep.driver import driver
marks, seconds = Path(sys.argv[1]), float(sys.argv[2])
driver.run_study = partial(driver.run_study, work=ray_units.slow_work(marks, seconds))
sys.argv[1:3] = ["{}"]
fake_sweep.main()
"""


def train_slowly(marks: Path, seconds: float, unit: Unit) -> tuple[Measurement, ...]:
    """Leaves a mark with its process's id as it begins, and another name once its checkpoints are written."""
    mark = marks / f"{time.time_ns()}-{os.getpid()}"
    mark.touch()
    time.sleep(seconds)
    found = fakes.train_rung(unit)
    mark.rename(mark.with_suffix(".done"))
    return found


def train_first_slowly(marks: Path, seconds: float, unit: Unit) -> tuple[Measurement, ...]:
    """The same, and all but the first unit at once."""
    return train_slowly(marks, 0.0 if any(marks.iterdir()) else seconds, unit)


def wait_in_a_probe(marks: Path) -> None:
    """As a solo probe does, in a process of its own."""
    from sweep.training.probe import fresh_process

    (marks / str(os.getpid())).touch()
    with fresh_process() as one:
        one.submit(begin_and_sleep, marks).result()


def fill(count: int) -> None:
    """Take so many bytes of memory and keep them, if nobody ends this process before."""
    held = []
    for _ in range(count // 2**26):
        held.append(b"x" * 2**26)
        time.sleep(0.02)
    time.sleep(60)


def train_but_fill(count: int, r: int, unit: Unit) -> tuple[Measurement, ...]:
    """Trains, but takes so many bytes of memory for a pack with an arm of that rank."""
    if any(trial.arm.r == r for trial in unit.trials):
        fill(count)
    return fakes.train_rung(unit)


def slow_work(marks: Path, seconds: float) -> Work:
    return fakes.fake_work(partial(train_slowly, marks, seconds))


def begun(marks: Path) -> list[int]:
    """The processes of units that have begun and not ended."""
    return [int(mark.name.split("-")[1]) for mark in sorted(marks.iterdir()) if not mark.suffix]


def done(marks: Path) -> int:
    return len(list(marks.glob("*.done")))


def start(root: Path, address: str, seconds: float, *words: str, **environment: str) -> subprocess.Popen[str]:
    """`sweep run --executor ray` with the fake trainer, in a process group of its own, as a terminal gives it."""
    (root / "marks").mkdir(exist_ok=True)
    (root / "fake.yaml").write_text(dump_study(fakes.make_study()))
    script = [sys.executable, "-c", COMMAND, str(root / "marks"), str(seconds)]
    return subprocess.Popen(
        [*script, "run", "fake.yaml", "--home", "home", "--executor", "ray", *words],
        cwd=root,
        env=clusters.environment(RAY_ADDRESS=address, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(command: subprocess.Popen[str], holds: Callable[[], object]) -> None:
    """While the command runs."""
    clusters.soon(lambda: holds() or command.poll() is not None, 120)
    assert command.poll() is None, finish(command)


def finish(command: subprocess.Popen[str], seconds: float = 120) -> tuple[int, Sequence[str]]:
    """Exit code and lines."""
    try:
        output, _ = command.communicate(timeout=seconds)
    finally:
        command.kill()
    return command.returncode, output.splitlines()
