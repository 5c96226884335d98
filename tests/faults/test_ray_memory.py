"""Ray nodes that run out of memory: Ray ends workers there once a part of the machine's memory is taken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray_units as units
from clusters import Nodes
from driving import records_of, run
from fakes import fake_work, make_study
from test_lost_workers import found
from test_ray import calm as calm
from test_ray import executor_on
from test_ray import nodes as nodes
from worker_units import pid

from sweep.study.errors import NoWorkers
from sweep.study.home import Home
from sweep.study.records import INFEASIBLE

HOG = "import time; held = b'x' * {count}; print('taken', flush=True); time.sleep(600)"


@contextmanager
def node_short_of_memory(nodes: Nodes) -> Iterator[int]:
    """A node with a GPU, the only one, that ends workers once a quarter of what is left now is taken: so much is left
    to tests beside this one. Yields what is left now, in bytes."""
    memory = psutil.virtual_memory()
    threshold = 1 - memory.available * 3 / 4 / memory.total
    node = nodes.add(1, gpus=1, RAY_memory_usage_threshold=f"{threshold:.6f}", RAY_memory_monitor_refresh_ms="100")
    try:
        yield memory.available
    finally:
        nodes.kill(node)


@contextmanager
def taken(count: int) -> Iterator[None]:
    """So many bytes by another process."""
    hog = subprocess.Popen([sys.executable, "-S", "-c", HOG.format(count=count)], stdout=subprocess.PIPE, text=True)
    assert hog.stdout is not None
    try:
        assert hog.stdout.readline() == "taken\n"
        yield
    finally:
        hog.kill()
        hog.wait()
        hog.stdout.close()


@pytest.mark.slow
@pytest.mark.fault(
    case="a Ray node that runs out of memory",
    happens="Ray ends its worker, and that counts as out of memory: the pack is tried in halves, then a trial alone, "
    "which tells for all that cost the same; the others finish",
    lost="nothing: that a trial does not fit on the node is a result",
)
def test_a_worker_that_ray_ends_for_want_of_memory_is_out_of_memory(nodes: Nodes, calm: Home, tmp_path: Path) -> None:
    home, study = Home(tmp_path / "home"), make_study()
    with node_short_of_memory(nodes) as left, executor_on(nodes, gpus=1.0) as executor:
        heard = run(home, study, fake_work(partial(units.train_but_fill, left * 3 // 4, 2)), executor)
    why = "Ray ended it, since 127.0.0.1 ran out of memory"
    halved = [p.message for p in heard if "failed together and are tried in halves: " in p.message]
    assert len(halved) >= 2 and all(why in message for message in halved)
    small = [trial for trial in records_of(home, study).trials if trial.spec.arm.r == 2]
    assert len(small) == 6 and {trial.state for trial in small} == {INFEASIBLE}
    reasons = [trial.reason for trial in small if "as trial" not in trial.reason]
    assert reasons == [f"does not fit on this device (MemoryError: {why})"]
    assert (heard[-1].infeasible, heard[-1].failed) == (6, 0) and records_of(home, study).finished_at
    others = [{k: v for k, v in found(of, study).items() if not k[0].startswith("r2-")} for of in (home, calm)]
    assert others[0] == others[1]


@pytest.mark.slow
@pytest.mark.fault(
    case="a Ray node without memory for a worker to start",
    happens="seen at the executor alone: units wait for it to have some again; where that takes too long, they end "
    "with a line that says so",
    lost="nothing",
)
def test_a_worker_that_finds_no_memory_to_start_is_waited_for(nodes: Nodes) -> None:
    why = "Ray ended it, since its node ran out of memory"
    with node_short_of_memory(nodes) as left, ExitStack() as hog:
        hog.enter_context(taken(left // 2))
        with executor_on(nodes, 8.0, gpus=1.0) as impatient:
            error = impatient.submit(pid).exception(60)
        assert isinstance(error, NoWorkers)
        assert str(error) == f"no worker started within 8 s ({why}): put that right and run the same command again"
        with executor_on(nodes, 120.0, gpus=1.0) as patient:
            waiting = patient.submit(pid)
            assert patient.describe() == f"0 workers on 0 Ray nodes; none on 127.0.0.1 ({why})"
            hog.close()
            assert waiting.result(180)
