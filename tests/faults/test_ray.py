"""Ray clusters that lose a worker, a node, every node, their head or their driver: real daemons, on this machine."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import clusters
import psutil
import pytest
import ray_units as units
from clusters import Nodes, soon
from driving import records_of, run, undisturbed
from fakes import fake_work, make_study
from test_lost_workers import found
from test_workers import assert_same, quickstart, record_of, running, wait_for_results
from test_workers import finish as wait_for_end
from worker_units import is_alive, pid, wait_for

from sweep.execution.ray import SECONDS_WITHOUT_HEAD, RayExecutor
from sweep.study.errors import NoWorkers, WorkerLost
from sweep.study.home import Home
from sweep.study.schema import Resources


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A test that breaks one of the two puts another in its place."""
    with clusters.cluster(1, 1) as there:
        yield there


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("calm"))


@contextmanager
def executor_on(nodes: Nodes, patience: float = 60.0, **asked: Any) -> Iterator[RayExecutor]:
    executor = RayExecutor(Resources(**asked), nodes.address, patience)
    try:
        yield executor
    finally:
        executor.shutdown()


def node_of(nodes: Nodes, worker: int) -> Any:
    return next(n for n in nodes.cluster.worker_nodes if clusters.raylet(n).pid == psutil.Process(worker).ppid())


def stopped_at_work(nodes: Nodes) -> psutil.Process | None:
    """A worker that stands still in the middle of a unit, so that it surely does not end it."""
    for node in nodes.cluster.worker_nodes:
        for worker in filter(clusters.is_in_a_unit, clusters.raylet(node).children()):
            worker.suspend()
            if clusters.is_in_a_unit(worker):
                return worker
            worker.resume()
    return None


def assert_calm(home: Home, calm: Home) -> None:
    study = make_study()
    assert records_of(home, study).finished_at
    assert found(home, study) == found(calm, study)


@pytest.mark.fault(
    case="a Ray node killed while its worker trains, and another one that joins later",
    happens="another worker trains the pack's rung again; the new node is used",
    lost="nothing",
)
def test_a_killed_node_loses_no_trial_and_one_that_joins_is_used(nodes: Nodes, calm: Home, tmp_path: Path) -> None:
    home, marks = Home(tmp_path / "home"), tmp_path / "marks"
    marks.mkdir()
    with executor_on(nodes) as executor:
        study = Thread(target=run, args=(home, make_study(), units.slow_work(marks, 1.5), executor))
        study.start()
        soon(lambda: units.done(marks) >= 2 and len(units.begun(marks)) == 2)
        worker = units.begun(marks)[0]
        nodes.kill(node_of(nodes, worker))
        soon(lambda: not is_alive(worker))
        nodes.add()
        soon(lambda: executor.slots == 2)
        study.join(120)
        assert not study.is_alive()
    assert len({mark.name.split("-")[1].split(".")[0] for mark in marks.glob("*.done")}) == 3, "the new one trained too"
    assert units.begun(marks) == [worker], "one unit was begun that nobody finished"
    assert_calm(home, calm)


@pytest.mark.slow
@pytest.mark.fault(
    case="a late result of a worker believed dead: the daemon of its node stands still, it goes on",
    happens="another worker trains the pack's rung again; what comes late is not even looked at",
    lost="nothing",
)
def test_a_late_result_of_a_worker_believed_dead_changes_nothing(nodes: Nodes, calm: Home, tmp_path: Path) -> None:
    home, marks = Home(tmp_path / "home"), tmp_path / "marks"
    marks.mkdir()
    work = fake_work(partial(units.train_first_slowly, marks, 15.0))
    with executor_on(nodes) as executor:
        study = Thread(target=run, args=(home, make_study(), work, executor))
        study.start()
        (worker,) = soon(lambda: units.begun(marks)[:1])
        its_node = node_of(nodes, worker)
        clusters.raylet(its_node).suspend()
        study.join(120)
        assert not study.is_alive() and units.begun(marks) == [worker], "all is done but what is late"
        before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}
        assert_calm(home, calm)
        soon(lambda: not units.begun(marks))
        checkpoints = {path for path in home.root.rglob("*") if path.is_file()} - before.keys()
        assert checkpoints and all("checkpoints" in path.parts for path in checkpoints), "it wrote, and over nothing"
        assert all(path.read_bytes() == content for path, content in before.items())
        assert executor.submit(pid).result(60) != worker
    clusters.raylet(its_node).resume()
    nodes.kill(its_node)
    nodes.add()


@pytest.mark.fault(
    case="every Ray node killed",
    happens="the study waits for one; none comes, and it ends with a line that says so, exit code 1; "
    "the same command goes on once there is a node",
    lost="nothing",
)
def test_without_any_node_the_study_stops_and_goes_on_once_there_is_one(
    nodes: Nodes, calm: Home, tmp_path: Path
) -> None:
    command = units.start(tmp_path, nodes.address, 0.5, "--set", "resources.cpus=1", SWEEP_SECONDS_WITHOUT_WORKERS="4")
    units.wait_until(command, lambda: units.done(tmp_path / "marks") >= 2)
    nodes.kill_all()
    code, lines = units.finish(command)
    assert code == 1 and lines[-1] == (
        "no Ray node that offers 1 CPU came within 4 s: start one and run the same command again"
    ), lines
    assert "Traceback" not in "\n".join(lines)
    nodes.add(), nodes.add()
    code, lines = units.finish(units.start(tmp_path, nodes.address, 0.0))
    assert code == 0, lines
    assert_calm(Home(tmp_path / "home"), calm)
    code, lines = units.finish(units.start(tmp_path, "nowhere:1", 0.0))
    assert code == 0 and "study fake is complete: nothing to train" in lines, "which takes no cluster"


@pytest.mark.slow
@pytest.mark.fault(
    case="no Ray node is left for a while",
    happens="units wait, and a node that comes in time takes them",
    lost="nothing",
)
def test_units_wait_for_a_node_that_comes_in_time(nodes: Nodes, calm: Home, tmp_path: Path) -> None:
    home, marks = Home(tmp_path / "home"), tmp_path / "marks"
    marks.mkdir()
    with executor_on(nodes, patience=20.0, cpus=1.0) as executor:
        study = Thread(target=run, args=(home, make_study(), units.slow_work(marks, 0.5), executor))
        study.start()
        soon(lambda: units.done(marks) >= 2 and units.begun(marks))
        nodes.kill_all()
        soon(lambda: executor.describe() == "0 workers on 0 Ray nodes")
        before = units.done(marks)
        nodes.add()
        study.join(120)
        assert not study.is_alive() and units.done(marks) > before
        assert_calm(home, calm)
        nodes.kill_all()
        soon(lambda: isinstance(executor.submit(pid).exception(), NoWorkers))
        assert executor.slots == 1
        waiting = executor.submit(pid)
        nodes.add()
        assert waiting.result(60), "too late for one unit, in time for the next"
        nodes.add()
        soon(lambda: executor.slots == 2)


@pytest.mark.slow
@pytest.mark.fault(
    case="Ctrl-C or SIGTERM while workers of a Ray cluster train",
    happens="the command says that the state is saved and ends with exit code 130; its workers end, the cluster stays",
    lost="nothing",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_command_and_its_workers(
    nodes: Nodes, calm: Home, tmp_path: Path, number: signal.Signals
) -> None:
    command = units.start(tmp_path, nodes.address, 0.5)
    units.wait_until(command, lambda: units.done(tmp_path / "marks") >= 1 and units.begun(tmp_path / "marks"))
    workers = units.begun(tmp_path / "marks")
    began = time.monotonic()
    os.killpg(command.pid, number)
    code, lines = units.finish(command)
    assert code == 130 and time.monotonic() - began < 15, lines
    assert lines[-1] == "interrupted; the state is saved, and the same command goes on from there"
    assert "Traceback" not in "\n".join(lines) and "SIGTERM" not in "\n".join(lines)
    for worker in workers:
        wait_for(lambda worker=worker: not is_alive(worker), "the end of a worker")
    code, lines = units.finish(units.start(tmp_path, nodes.address, 0.0))
    assert code == 0, lines
    assert_calm(Home(tmp_path / "home"), calm)


@pytest.mark.slow
@pytest.mark.fault(
    case="the driver of a Ray cluster killed with SIGKILL",
    happens="its workers end; the same command goes on",
    lost="nothing",
)
def test_no_worker_outlives_a_driver_that_is_killed(nodes: Nodes, calm: Home, tmp_path: Path) -> None:
    command = units.start(tmp_path, nodes.address, 1.0)
    units.wait_until(command, lambda: units.done(tmp_path / "marks") >= 1 and len(units.begun(tmp_path / "marks")) == 2)
    workers = units.begun(tmp_path / "marks")
    command.kill()
    for worker in workers:
        wait_for(lambda worker=worker: not is_alive(worker), "the end of a worker")
    code, lines = units.finish(units.start(tmp_path, nodes.address, 0.0))
    assert code == 0, lines
    assert_calm(Home(tmp_path / "home"), calm)


@pytest.mark.slow
@pytest.mark.fault(
    case="the head of a Ray cluster killed",
    happens="after 30 s the study ends with a line that says so, exit code 1; the same command goes on with a new head",
    lost="nothing",
)
def test_a_head_that_is_killed_is_told_of_and_the_same_command_goes_on_with_another(calm: Home, tmp_path: Path) -> None:
    with clusters.cluster(1, 1) as broken:
        address = broken.address
        command = units.start(tmp_path, address, 3.0)
        units.wait_until(command, lambda: units.done(tmp_path / "marks") >= 1)
        broken.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        code, lines = units.finish(command)
    assert code == 1 and lines[-1] == (
        f"the head of the Ray cluster ({address}) is gone: start it and run the same command again"
    ), lines
    assert SECONDS_WITHOUT_HEAD == 30, "as the row says"
    with clusters.cluster(1, 1) as other:
        code, lines = units.finish(units.start(tmp_path, other.address, 0.0))
    assert code == 0, lines
    assert_calm(Home(tmp_path / "home"), calm)


@pytest.mark.slow
@pytest.mark.fault(
    case="a Ray worker killed while a probe of its own runs",
    happens="seen at the executor alone: the probe's processes end with it, and another worker takes its place",
    lost="nothing",
)
@pytest.mark.parametrize("how", ["killed", "ended", "node killed"])
def test_the_processes_of_a_probe_end_with_their_worker(nodes: Nodes, tmp_path: Path, how: str) -> None:
    with executor_on(nodes) as executor:
        future = executor.submit(units.wait_in_a_probe, tmp_path)
        pids = soon(lambda: len(there := [int(path.name) for path in tmp_path.iterdir()]) == 2 and there, 120)
        worker = next(psutil.Process(pid) for pid in pids if psutil.Process(pid).name().startswith("ray::"))
        family = [worker, *worker.children(recursive=True)]
        assert len(family) >= 3, "the worker, its fork server, and what that forked"
        if how == "killed":
            worker.kill()
        elif how == "ended":
            executor.end(future, "enough")
        else:
            nodes.kill(node_of(nodes, worker.pid))
            nodes.add()
        assert isinstance(future.exception(60), WorkerLost)
        for process in family:
            wait_for(lambda process=process: not is_alive(process.pid), "the end of a probe")
        assert executor.submit(pid).result(60) != worker.pid


@pytest.mark.fault(
    case="a Ray worker process killed in the middle of a rung",
    happens="another takes its place on the node and trains the pack's rung again; the command ends with exit code 0",
    lost="nothing",
)
def test_a_killed_worker_process_loses_no_trial(nodes: Nodes, calm: Home, tmp_path: Path) -> None:
    command, marks = units.start(tmp_path, nodes.address, 1), tmp_path / "marks"
    units.wait_until(command, lambda: units.done(marks) >= 2)
    before = units.done(marks)
    units.wait_until(command, lambda: units.done(marks) > before and units.begun(marks))  # one that has just begun
    worker = units.begun(marks)[0]
    os.kill(worker, signal.SIGKILL)
    code, lines = units.finish(command)
    assert code == 0, lines
    assert units.begun(marks) == [worker], "one unit was begun that nobody finished"
    assert "was lost, and another tries again: " in " ".join(lines)
    assert_calm(Home(tmp_path / "home"), calm)


@pytest.mark.slow
@pytest.mark.fault(
    case="a Ray node killed under a real study",
    happens="another worker trains the pack's rung again; the loss curves are those of one process, undisturbed",
    lost="nothing",
)
def test_a_study_on_two_nodes_has_the_loss_curves_of_one_in_this_process(nodes: Nodes, tmp_path: Path) -> None:
    with running(tmp_path / "calm", quickstart(tmp_path), "quickstart") as calm:
        code, log = wait_for_end(calm)
        assert code == 0, log
    with (
        clusters.changed(RAY_ADDRESS=nodes.address),
        running(tmp_path / "shaken", quickstart(tmp_path, "--executor", "ray"), "quickstart") as shaken,
    ):
        wait_for_results(shaken, 2)
        worker = soon(lambda: stopped_at_work(nodes))
        nodes.kill(node_of(nodes, worker.pid))
        worker.kill()
        nodes.add()
        code, log = wait_for_end(shaken)
        assert code == 0 and "2 workers on 2 Ray nodes" in log, log
        said = " ".join(log.split())
        assert re.search(r"was lost, and another tries again: [^:]*its Ray node 127\.0\.0\.1", said), log
    assert_same(record_of(shaken), record_of(calm), 1e-5)
