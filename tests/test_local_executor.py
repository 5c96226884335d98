"""Worker processes on this machine: each lives on, dies alone, and leaves nobody behind."""

from __future__ import annotations

import errno
import os
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
from commands import sweep
from worker_units import is_alive, parent_of, wait_for, workers

from sweep.execution import devices
from sweep.execution.choose import ExecutorName, describe, local_environments, open_executor
from sweep.execution.executor import InlineExecutor
from sweep.execution.local import LocalExecutor
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
from sweep.study.schema import Resources


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


def test_a_driver_that_is_killed_leaves_no_worker_and_no_child_of_one(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    paths = {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env={**os.environ, **paths})
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2, "both")
    finally:
        driver.kill()
        driver.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
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


def of(**asked: Any) -> Resources:
    return Resources.model_validate(asked)


@pytest.mark.parametrize(
    ("resources", "gpus", "cores", "devices", "threads", "line"),
    [
        (None, "", 8, [""], 8, "1 worker with 8 threads"),
        (of(workers=2), "", 8, ["", ""], 4, "2 workers with 4 threads each"),
        (of(workers=2), "", 2, ["", ""], 1, "2 workers with 1 thread each"),
        (of(workers=3), "", 2, ["", "", ""], 1, "3 workers with 1 thread each"),
        (of(workers=2, cpus=3), "", 8, ["", ""], 3, "2 workers with 3 threads each"),
        (None, "0123", 8, list("0123"), 2, "4 workers, one a GPU"),
        (of(workers=2), "0123", 8, ["0", "1"], 4, "2 workers, one a GPU"),
        (of(gpus=0.5), "01", 8, list("0101"), 2, "4 workers on 2 GPUs"),
        (of(workers=2, gpus=0.5), "0", 8, ["0", "0"], 4, "2 workers on 1 GPU"),
        (of(gpus=0), "01", 8, [""], 8, "1 worker with 8 threads"),
        (of(workers=2, gpus=0), "01", 8, ["", ""], 4, "2 workers with 4 threads each"),
        (of(seconds_per_rung=5), "7", 8, ["7"], 8, "1 worker, one a GPU"),
    ],
)
def test_workers_share_gpus_and_cores(
    resources: Resources | None, gpus: str, cores: int, devices: list[str], threads: int, line: str
) -> None:
    found = local_environments(resources, list(gpus), cores)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == devices
    assert {one["OMP_NUM_THREADS"] for one in found} == {one["MKL_NUM_THREADS"] for one in found} == {str(threads)}
    assert describe(found) == line


@pytest.mark.parametrize(("omp", "threads"), [("1", "1"), ("99", "4"), ("", "4"), ("4,2", "4")])
def test_no_worker_takes_more_threads_than_the_command_was_given(omp: str, threads: str) -> None:
    assert {one["OMP_NUM_THREADS"] for one in local_environments(of(workers=2), [], 8, omp)} == {threads}


@pytest.mark.parametrize(
    ("resources", "gpus", "field", "words"),
    [
        (of(gpus=0.5), "", "resources.gpus", "no GPU is here"),
        (of(workers=3, gpus=0.5), "0", "resources.workers", "more than the 1 GPU here holds"),
        (of(workers=4, cpus=3), "", "resources.cpus", "more than the 8 cores here"),
    ],
)
def test_more_than_there_is_is_refused(resources: Resources, gpus: str, field: str, words: str) -> None:
    with pytest.raises(FieldError) as caught:
        local_environments(resources, list(gpus), 8)
    ((found, message),) = caught.value.problems
    assert found == field and words in message


LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-90a1)
  MIG 3g.40gb     Device  0: (UUID: MIG-11)
  MIG 3g.40gb     Device  1: (UUID: MIG-22)
"""


@pytest.mark.parametrize(
    ("outer", "found"),
    [
        (None, ["0", "MIG-11", "MIG-22"]),
        ("1,0", ["1", "0"]),
        ("GPU-90a1", ["GPU-90a1"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_counted_without_torch_and_within_what_the_command_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str | None, found: list[str]
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{LISTING}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    assert devices.visible_gpus() == found


def test_a_machine_without_gpus_has_none_whatever_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "ask_nvidia_smi", lambda: "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.visible_gpus() == []


@pytest.mark.parametrize("asked", [{"workers": 2}, {"cpus": 1}, {"gpus": 0}, {"seconds_per_rung": 5}])
def test_what_the_inline_executor_cannot_give_is_refused(asked: dict[str, float]) -> None:
    from fakes import make_study

    with pytest.raises(FieldError, match="--executor local") as caught:
        open_executor(ExecutorName.inline, make_study(resources=asked))
    assert [field for field, _ in caught.value.problems] == [f"resources.{next(iter(asked))}"]
    executor, line = open_executor(ExecutorName.inline, make_study(resources={"workers": 1}))
    assert isinstance(executor, InlineExecutor) and line == "trials run in this process"


def test_a_wrong_combination_is_refused_in_one_line_that_names_the_field(tmp_path: Path) -> None:
    study = Path("studies/quickstart.yaml").absolute()
    done = sweep("run", str(study), "--home", "home", "--set", "resources.workers=2", cwd=tmp_path)
    assert done.returncode == 2
    reason = "asks for workers: run it with --executor local or ray, in processes of their own, or leave it out"
    assert done.stderr == f"--set: resources.workers: {reason}\n"
    for asked in ("workers=0", "gpus=1.5", "gpus=-1", "cpus=0", "seconds_per_rung=0", "wrkers=1", "workers=1.5"):
        done = sweep("run", str(study), "--home", "home", "--set", f"resources.{asked}", cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(f"--set: resources.{asked.split('=')[0]}: ")
