"""Workers on the nodes of a real Ray cluster, all of it on this machine: each lives on, dies alone, and is replaced."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clusters
import pytest
import worker_units as units
from clusters import Nodes, soon
from worker_units import is_alive, wait_for

from sweep.execution.choose import seconds_without_workers
from sweep.execution.ray import RayExecutor
from sweep.study.errors import Damaged, FieldError, Told, WorkerLost, is_out_of_memory
from sweep.study.schema import Resources


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with clusters.cluster(1, 1) as found:
        yield found


@contextmanager
def executor_on(nodes: Nodes, **asked: Any) -> Iterator[RayExecutor]:
    executor = RayExecutor(Resources(**asked), nodes.address, 30.0)
    try:
        yield executor
    finally:
        executor.shutdown()


@pytest.fixture(scope="module")
def shared(nodes: Nodes) -> Iterator[RayExecutor]:
    with executor_on(nodes, workers=2) as executor:
        yield executor


def lost(executor: RayExecutor, fn: Any, *args: Any) -> str:
    error = executor.submit(fn, *args).exception(timeout=60)
    assert isinstance(error, WorkerLost), repr(error)
    return str(error)


def test_units_run_at_once_on_all_nodes_each_in_a_process_that_lives_on(shared: RayExecutor, tmp_path: Path) -> None:
    assert shared.slots == 2 and shared.describe() == "2 workers on 2 Ray nodes"
    futures = [shared.submit(units.meet, tmp_path, 2) for _ in range(2)]
    pids = {future.result(60) for future in futures}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {shared.submit(units.pid).result(60) for _ in range(4)} < pids, "the one that ran last has the base"
    assert {future.result(60) for future in [shared.submit(units.sleep_a_little, tmp_path) for _ in range(4)]} == pids


def test_a_worker_has_its_threads_before_torch_is_imported(shared: RayExecutor) -> None:
    torch_before, (threads, gpus), torch_threads = shared.submit(
        units.environment, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
    ).result(120)
    assert (torch_before, threads, gpus, torch_threads) == (False, "1", "", 1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "weights.safetensors"),
        MemoryError("no room"),
        Damaged("checkpoint of step 4 is damaged", 3),
        KeyError("a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_one_that_the_unit_raised(shared: RayExecutor, error: Exception) -> None:
    found = shared.submit(units.fail, error).exception(60)
    assert type(found) is type(error) and str(found) == str(error)
    for name in ("errno", "trial"):
        assert getattr(found, name, None) == getattr(error, name, None)


def test_what_a_node_lacks_is_told_with_its_address(shared: RayExecutor) -> None:
    error = FieldError(("data.source", "rows.csv: there is no such file or folder"), ("model", "gone"))
    found = shared.submit(units.fail, error).exception(60)
    assert isinstance(found, FieldError) and found.problems == (
        ("data.source", "rows.csv: there is no such file or folder (on node 127.0.0.1)"),
        ("model", "gone (on node 127.0.0.1)"),
    )


def test_an_error_that_cannot_be_sent_is_one_line_of_it(shared: RayExecutor) -> None:
    found = shared.submit(units.fail_stubbornly).exception(60)
    assert type(found) is Told and str(found) == "Stubborn: one and two"
    found = shared.submit(units.fail_like_torch).exception(60)
    assert type(found) is Told and is_out_of_memory(found)


def test_a_process_whose_gpu_broke_gets_no_other_unit(shared: RayExecutor) -> None:
    broken = RuntimeError("CUDA error: device-side assert triggered")
    before = shared.submit(units.pid).result(60)
    assert lost(shared, units.fail, broken) == f"its GPU failed (RuntimeError: {broken})"
    assert before not in {shared.submit(units.pid).result(60) for _ in range(4)}


def test_a_process_that_dies_is_a_lost_worker_and_is_replaced(shared: RayExecutor) -> None:
    before = shared.submit(units.pid).result(60)
    said = "its process on 127.0.0.1 ended: killed, perhaps for want of memory, or crashed"
    assert lost(shared, units.die, signal.SIGKILL) == said
    assert lost(shared, units.leave, 3) == said
    soon(lambda: shared.slots == 2)
    assert shared.submit(units.pid).result(60) != before


@pytest.mark.parametrize("stopped", [False, True])
def test_a_unit_that_is_ended_is_a_lost_worker_with_the_reason(
    shared: RayExecutor, tmp_path: Path, stopped: bool
) -> None:
    future = shared.submit(units.begin_and_sleep, tmp_path)
    (name,) = soon(lambda: [path.name for path in tmp_path.iterdir()])
    if stopped:  # it does not even hear that it is to end
        os.kill(int(name), signal.SIGSTOP)
    shared.end(future, "did nothing for 60 s")
    error = future.exception(60)
    assert isinstance(error, WorkerLost) and str(error) == "did nothing for 60 s"
    wait_for(lambda: not is_alive(int(name)), "its end")
    soon(lambda: shared.slots == 2)


def test_a_unit_that_still_waits_can_be_ended(shared: RayExecutor, tmp_path: Path) -> None:
    busy = [shared.submit(units.sleep_a_little, tmp_path) for _ in range(2)]
    waiting = shared.submit(units.begin_and_sleep, tmp_path)
    shared.end(waiting, "not wanted any more")
    assert str(waiting.exception(60)) == "not wanted any more"
    assert all(future.result(60) for future in busy)
    shared.end(busy[0], "too late")
    assert busy[0].exception() is None


def test_the_wait_for_workers_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_without_workers() == 120
    monkeypatch.setenv("SWEEP_SECONDS_WITHOUT_WORKERS", "7.5")
    assert seconds_without_workers() == 7.5
    monkeypatch.setenv("SWEEP_SECONDS_WITHOUT_WORKERS", "soon")
    with pytest.raises(FieldError, match="SWEEP_SECONDS_WITHOUT_WORKERS: must be a number of seconds, not 'soon'"):
        seconds_without_workers()
