"""Ray clusters on 127.0.0.1, of real daemons, to join and to break. All of them end with the process of the tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).parent
TOKEN = "7e57" * 16
# What nodes and drivers have in their environment, and Ray reads when it is imported.
JOINED = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
}
for _name, _value in JOINED.items():
    os.environ.setdefault(_name, _value)  # a driver that a job started has that job's
# A node that does not answer is dead after 2 s and not after 15.
HASTY = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
OWN = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}


class Nodes:
    """A head that no worker fits on, and nodes that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        with changed(**paths()):
            head = {**OWN, "num_cpus": 0, "include_dashboard": False, "_system_config": HASTY}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cpus: int = 1, gpus: int = 0, **environment: str | None) -> Any:
        """A node, which takes its threads from what Ray gives a worker, and not from the environment of the tests."""
        with changed(**{**paths(), "OMP_NUM_THREADS": None, **environment}):
            return self.cluster.add_node(num_cpus=cpus, num_gpus=gpus, **OWN)

    def kill(self, node: Any) -> None:
        """As if its machine lost power: nothing says goodbye."""
        self.cluster.remove_node(node, allow_graceful=False)

    def kill_all(self) -> None:
        for node in list(self.cluster.worker_nodes):
            self.kill(node)


@contextmanager
def cluster(*cpus: int) -> Iterator[Nodes]:
    """With a node for each number."""
    nodes = Nodes()
    try:
        for n in cpus:
            nodes.add(n)
        yield nodes
    finally:
        nodes.cluster.shutdown()


def raylet(node: Any) -> psutil.Process:
    """The daemon of a node, whose children are its workers."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def title(process: psutil.Process) -> str:
    """What a process calls itself, nothing where it has ended: Ray's workers say what they run."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def is_in_a_unit(worker: psutil.Process) -> bool:
    return title(worker).startswith("ray::Actor.run")


def environment(**more: str) -> dict[str, str]:
    """Of a driver in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SWEEP_", "MLFLOW_"))}
    return {**clean, **paths(), **more}


def paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}


@contextmanager
def changed(**wanted: str | None) -> Iterator[None]:
    """This process's environment for a while, None for a variable that is to be missing."""
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(wanted: dict[str, str | None]) -> None:
    for name, value in wanted.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def soon(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `found` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value
