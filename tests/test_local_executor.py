"""Worker processes on this machine: each lives on, dies alone, and leaves nobody behind."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import worker_units as units
from worker_units import is_alive, is_stopped, parent_of, wait_for, workers

from sweep.execution.local import SPAWN, LocalExecutor, _serve
from sweep.study.errors import (
    Damaged,
    FieldError,
    NoWorkers,
    Told,
    WorkerLost,
    in_one_line,
    is_out_of_memory,
    was_killed,
)


def lost(executor: LocalExecutor, fn: Any, *args: Any) -> str:
    error = executor.submit(fn, *args).exception(timeout=60)
    assert isinstance(error, WorkerLost)
    return str(error)


def test_a_worker_lives_on_from_unit_to_unit() -> None:
    with workers(1) as executor:
        found = {executor.submit(units.pid).result() for _ in range(4)}
        assert len(found) == 1 and os.getpid() not in found


def test_units_run_at_once_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    with workers(3) as executor:
        assert executor.slots == 3
        futures = [executor.submit(units.meet, tmp_path, 3) for _ in range(3)]
        assert len({future.result() for future in futures}) == 3


def test_more_units_than_workers_wait_for_one(tmp_path: Path) -> None:
    with workers(2) as executor:
        found = [executor.submit(units.sleep_a_little, tmp_path).result for _ in range(5)]
        assert len({result() for result in found}) == 2


def test_work_one_by_one_stays_with_the_worker_that_has_the_base() -> None:
    with workers(3) as executor:
        assert len({executor.submit(units.pid).result() for _ in range(5)}) == 1


def test_a_worker_has_its_environment_before_torch_is_imported() -> None:
    own = [{"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"} for gpu in (0, 1)]
    executor = LocalExecutor(own)
    try:
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        futures = [executor.submit(units.environment, *names) for _ in own]
        found = sorted(future.result() for future in futures)
    finally:
        executor.shutdown()
    assert found == [(False, ["0", "2"], 2), (False, ["1", "2"], 2)]


@pytest.mark.parametrize(
    "error",
    [
        FieldError(("data.source", "gone"), ("model", "gone too")),
        OSError(errno.ENOSPC, "No space left on device", "file"),
        MemoryError("no room"),
        Damaged("weights.safetensors has changed", 7),
        BrokenProcessPool("a probe's process was killed"),
        ValueError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_unit_raises_crosses_as_itself(error: Exception) -> None:
    with workers(1) as executor:
        before = executor.submit(units.pid).result()
        found = executor.submit(units.fail, error).exception()
        assert type(found) is type(error) and str(found) == str(error)
        assert vars(found).items() >= vars(error).items()
        assert getattr(found, "errno", None) == getattr(error, "errno", None)
        assert was_killed(found) == isinstance(error, BrokenProcessPool)
        assert executor.submit(units.pid).result() == before, "the worker lives on"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_a_unit_that_wants_to_leave_ends_neither_worker_nor_driver(error: BaseException) -> None:
    with workers(1) as executor:
        before = executor.submit(units.pid).result()
        assert isinstance(executor.submit(units.fail, error).exception(), RuntimeError)
        assert executor.submit(units.pid).result() == before


@pytest.mark.parametrize(
    ("fails", "line"),
    [
        (units.fail_stubbornly, "Stubborn: one and two"),
        (units.fail_locally, "Local: nobody else knows this class"),
        (units.fail_like_torch, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_an_error_that_cannot_cross_becomes_its_line(fails: Any, line: str) -> None:
    with workers(1) as executor:
        error = executor.submit(fails).exception()
        assert type(error) is Told and str(error) == in_one_line(error) == line
        assert is_out_of_memory(error) == ("CUDA" in line)


@pytest.mark.parametrize(
    ("dies", "words"),
    [
        ((units.die, signal.SIGKILL), "killed by signal 9, perhaps for want of memory"),
        ((units.die, signal.SIGSEGV), "killed by signal 11 (SIGSEGV)"),
        ((units.leave, 3), "its process ended with exit code 3"),
        ((units.leave, 0), "its process ended"),
        ((units.die_while_sending,), "killed by signal 9, perhaps for want of memory"),
    ],
)
def test_a_worker_that_dies_is_lost_with_the_reason_in_words_and_replaced(dies: Any, words: str) -> None:
    with workers(1) as executor:
        before = executor.submit(units.pid).result()
        assert lost(executor, *dies) == words
        assert executor.submit(units.pid).result() != before


def test_a_worker_that_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    with workers(2) as executor:
        sibling = executor.submit(units.wait_for_a_word, tmp_path)
        wait_for(lambda: any(tmp_path.iterdir()), "the sibling")
        lost(executor, units.die, signal.SIGKILL)
        assert not sibling.done(), "it is still at it"
        (tmp_path / "go").touch()
        assert is_alive(sibling.result())


def test_an_idle_worker_that_was_killed_is_replaced_and_costs_no_unit() -> None:
    with workers(1) as executor:
        before = executor.submit(units.pid).result()
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: not is_alive(before), "its death")
        assert executor.submit(units.pid).result() != before


def test_a_worker_whose_driver_is_gone_before_the_answer_ends_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(theirs, {}))
    process.start()
    theirs.close()
    ours.send_bytes(pickle.dumps((units.pid, ())))
    ours.close()
    process.join(60)
    assert process.exitcode == 0 and capfd.readouterr().err == ""


@pytest.mark.parametrize("stop", [False, True], ids=["sleeps", "is stopped"])
def test_a_unit_that_hangs_can_be_ended(tmp_path: Path, stop: bool) -> None:
    with workers(2) as executor:
        hung = executor.submit(units.begin_and_sleep, tmp_path)
        wait_for(lambda: any(tmp_path.iterdir()), "the unit")
        pid = int(next(tmp_path.iterdir()).name)
        if stop:
            os.kill(pid, signal.SIGSTOP)
        executor.end(hung, "did nothing for 1 s")
        error = hung.exception(timeout=20)
        assert isinstance(error, WorkerLost) and str(error) == "did nothing for 1 s"
        assert not is_alive(pid)
        assert executor.submit(units.pid).result() != pid


def test_ending_a_unit_that_is_over_ends_nothing(tmp_path: Path) -> None:
    with workers(1) as executor:
        over = executor.submit(units.pid)
        before = over.result()
        other = executor.submit(units.wait_for_a_word, tmp_path)
        wait_for(lambda: any(tmp_path.iterdir()), "the next unit")
        executor.end(over, "too late")
        (tmp_path / "go").touch()
        assert other.result() == before


def test_ctrl_c_does_not_end_a_worker(tmp_path: Path) -> None:
    with workers(1) as executor:
        unit = executor.submit(units.wait_for_a_word, tmp_path)
        wait_for(lambda: any(tmp_path.iterdir()), "the unit")
        pid = int(next(tmp_path.iterdir()).name)
        os.kill(pid, signal.SIGINT)
        (tmp_path / "go").touch()
        assert unit.result() == pid


def test_a_worker_may_have_children() -> None:
    with workers(1) as executor:
        assert executor.submit(units.sum_in_a_child).result() == 3


@pytest.mark.parametrize("ends", ["is ended", "is killed", "is shut down"])
def test_a_worker_takes_its_children_with_it(tmp_path: Path, ends: str) -> None:
    """Even those that watch for nothing, and do so at once."""
    with workers(1) as executor:
        unit = executor.submit(units.sleep_with_a_child, tmp_path)
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2, "both")
        pids = sorted(int(path.name) for path in tmp_path.iterdir())
        if ends == "is ended":
            executor.end(unit, "enough")
        elif ends == "is killed":
            os.kill(next(pid for pid in pids if parent_of(pid) == os.getpid()), signal.SIGKILL)
        else:
            executor.shutdown()
        assert isinstance(unit.exception(timeout=20), WorkerLost)
        wait_for(lambda: not any(map(is_alive, pids)), "the end of both", 5)


DRIVER = """
import sys
from pathlib import Path
import worker_units as units

with units.workers(1) as executor:
    executor.submit(units.sleep_with_a_child, Path(sys.argv[1])).result()
"""


@pytest.mark.parametrize("stands_still", [False, True])
def test_a_driver_that_is_killed_leaves_no_worker_and_no_child_of_one(tmp_path: Path, stands_still: bool) -> None:
    """One that stands still has no thread to see it, but the kernel wakes a stopped group that it orphans."""
    tests = Path(__file__).parent
    paths = {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env={**os.environ, **paths})
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2, "both")
        pids = [int(path.name) for path in tmp_path.iterdir()]
        for pid in pids if stands_still else []:
            os.kill(pid, signal.SIGSTOP)
        if stands_still:  # one that is only told to stop when the driver ends is not woken: it stops after that
            wait_for(lambda: all(map(is_stopped, pids)), "their standing still")
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not any(map(is_alive, pids)), "the end of both", 10)


def test_shutdown_stops_every_worker_at_once(tmp_path: Path) -> None:
    with workers(2) as executor:
        idle = executor.submit(units.pid).result()
        busy = [executor.submit(units.begin_and_sleep, tmp_path) for _ in range(2)]
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2, "both")
        began = time.monotonic()
        executor.shutdown()
        assert time.monotonic() - began < 10
        assert not any(is_alive(int(path.name)) for path in tmp_path.iterdir()) and not is_alive(idle)
        wait(busy, timeout=10)
        assert all(isinstance(future.exception(), WorkerLost) for future in busy)
        executor.shutdown()


def test_a_system_that_gives_no_process_leaves_no_workers() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with workers(1) as executor:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
        try:
            error = executor.submit(units.pid).exception()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(error, NoWorkers)
        assert str(error).startswith("no worker process can be started: Too many open files; end other programs, allow")
        assert executor.submit(units.pid).result(), "as soon as it gives some, it goes on"
