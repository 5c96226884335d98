"""What an executor makes of a broken GPU, of a worker that no signal ends, and of trouble of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worker_units as units
from driving import Threads, records_of, run
from fakes import fake_work, fingerprints, make_study, train_rung
from worker_units import wait_for, workers

from sweep.driver.failures import call
from sweep.driver.patience import Patience, StorageError, patiently
from sweep.execution import local, ray, ray_cluster
from sweep.execution.executor import InlineExecutor
from sweep.execution.ray_nodes import Node
from sweep.study.errors import NoWorkers, WorkerLost, broke_device
from sweep.study.home import Home
from sweep.study.records import Measurement, Setup, Unit

BROKEN = RuntimeError("CUDA error: an illegal memory access was encountered")


class AcceleratorError(RuntimeError):
    """As torch names it."""


def test_a_broken_gpu_is_told_from_one_that_is_full() -> None:
    assert broke_device(BROKEN) and broke_device(AcceleratorError("whatever"))
    assert broke_device(RuntimeError("RuntimeError: CUDA error: device-side assert triggered"))
    assert not broke_device(RuntimeError("CUDA error: out of memory"))
    assert not broke_device(AcceleratorError("CUDA error: out of memory"))
    assert not broke_device(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not broke_device(ValueError("x"))


def test_a_process_whose_gpu_broke_gets_no_other_unit() -> None:
    with workers(1) as executor:
        before = executor.submit(units.pid).result()
        error = executor.submit(units.fail, BROKEN).exception()
        assert type(error) is WorkerLost and str(error) == f"its GPU failed (RuntimeError: {BROKEN})"
        assert executor.submit(units.pid).result() != before


def test_a_gpu_that_breaks_in_the_command_itself_stops_the_study_and_fails_no_trial(tmp_path: Path) -> None:
    study, home = make_study(), Home(tmp_path)
    with pytest.raises(NoWorkers, match=r"^the GPU failed .*illegal memory access.*: run the same command again"):
        run(home, study, fake_work(lambda unit: units.fail(BROKEN)))  # type: ignore[arg-type,return-value]
    assert not any(trial.state for trial in records_of(home, study).trials)
    assert type(InlineExecutor().submit(units.fail, MemoryError("no room")).exception()) is MemoryError


def test_shutdown_does_not_wait_for_a_unit_whose_thread_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    executor = local.LocalExecutor([units.PLAIN])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        executor.submit(units.pid)
    ends = threading.Thread(target=executor.shutdown, daemon=True)
    ends.start()
    ends.join(5)
    assert not ends.is_alive()


def test_without_a_thread_there_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with workers(1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            error = executor.submit(units.pid).exception(timeout=5)
        assert type(error) is NoWorkers and str(error).startswith("no worker can be started: can't start new thread; ")


def test_a_unit_can_be_ended_whose_worker_no_signal_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with workers(1) as executor:
        future = executor.submit(units.begin_and_sleep, tmp_path)
        wait_for(lambda: list(tmp_path.iterdir()), "the unit")
        stuck = int(next(tmp_path.iterdir()).name)
        with monkeypatch.context() as patch:
            patch.setattr(local, "_kill", lambda worker: None)
            patch.setattr(local, "SECONDS_TO_DIE", 0.2)
            executor.end(future, "did nothing for 9 s")
            error = future.exception(timeout=20)
        os.kill(stuck, signal.SIGKILL)
        assert type(error) is WorkerLost and str(error) == "did nothing for 9 s"
        assert executor.submit(units.pid).result() != stuck


def test_what_is_no_rung_is_ended_too_when_its_time_is_over(tmp_path: Path) -> None:
    with workers(1) as executor, pytest.raises(WorkerLost, match=r"lost 3 times while probing: did nothing for 2 s"):
        call(executor, "probing", units.begin_and_sleep, tmp_path, seconds=2)


class Nobody(Threads):
    """Has no worker for the units of a rung, and says so after a while."""

    def submit(self, fn: Any, *args: Any) -> Future[Any]:
        if fn is not train_rung:
            return super().submit(fn, *args)
        future: Future[Any] = Future()
        threading.Timer(1.0, lambda: future.done() or future.set_exception(NoWorkers("none came"))).start()
        return future

    def end(self, future: Future[Any], reason: str) -> None:
        future.set_exception(WorkerLost(reason))


def test_a_pack_that_waits_for_a_worker_does_not_hang(tmp_path: Path) -> None:
    study, home = make_study(resources={"seconds_per_rung": 0.1}), Home(tmp_path)
    with Nobody(1) as executor, pytest.raises(NoWorkers, match="none came"):
        run(home, study, fake_work(), executor)
    assert not any(trial.state for trial in records_of(home, study).trials)


def test_an_error_of_ray_itself_is_no_trials_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def failing(address: str | None, here: Node) -> Iterator[None]:
        raise RuntimeError("failed to connect to GCS")
        yield

    monkeypatch.setattr(ray, "joined", failing)
    with pytest.raises(
        NoWorkers, match=r"^Ray failed \(RuntimeError: failed to connect to GCS\): run the same command"
    ):
        ray.RayExecutor(None, "127.0.0.1:1")


def test_the_cluster_of_a_command_knows_the_parts_of_a_divided_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected(refused: str, **options: Any) -> Iterator[Any]:
        seen.append((os.environ.get("CUDA_VISIBLE_DEVICES"), options["num_gpus"]))
        raise NoWorkers("enough")
        yield

    seen: list[Any] = []
    for name in ("CUDA_VISIBLE_DEVICES", *ray_cluster.ON_LOOPBACK, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "x")  # so that it is as it was afterwards
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(ray_cluster, "visible_gpus", lambda: ["MIG-1", "MIG-2"])
    monkeypatch.setattr(ray_cluster, "_connected", connected)
    with pytest.raises(NoWorkers, match="enough"), ray_cluster._own(Node("", "127.0.0.1", 2, 2)):
        pass
    assert seen == [("MIG-1,MIG-2", 2)]


def test_an_error_of_our_own_is_not_told_as_a_damaged_storage() -> None:
    def fail(again: bool) -> None:
        raise KeyError("slot")

    with pytest.raises(KeyError):
        patiently(Patience("sqlite:///optuna.db"), fail)
    with pytest.raises(StorageError, match="is damaged"):
        patiently(Patience("sqlite:///optuna.db"), fail, reads=True)


def test_the_lock_names_its_holder_while_inputs_are_read(tmp_path: Path) -> None:
    study, home, seen = make_study(), Home(tmp_path), []

    def fail(unit: Unit) -> tuple[Measurement, ...]:
        raise OSError(28, "No space left on device")

    def look(setup: Setup) -> tuple[str, str, str]:
        seen.append(home.study(study.name).lock.read_text())
        return fingerprints(setup)

    with pytest.raises(OSError):
        run(home, study, fake_work(fail))
    home.study(study.name).lock.write_text("")
    run(home, study, replace(fake_work(), fingerprints=look))
    assert [int(name) for name in seen] == [os.getpid()]
