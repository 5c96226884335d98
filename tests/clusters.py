"""Ray clusters on 127.0.0.1, of real daemons, to join and to break. All of them end with the process of the tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

TOKEN = "7e57" * 16
# What a driver of such a cluster has in its environment, and Ray reads when it is imported.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
}
os.environ.update(ENVIRONMENT)
# A node that stops answering is dead after 2 s and not after 15.
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

        head = {**OWN, "num_cpus": 0, "include_dashboard": False, "_system_config": HASTY}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cpus: int = 1, **options: Any) -> Any:
        return self.cluster.add_node(num_cpus=cpus, **{**OWN, **options})

    def kill(self, node: Any) -> None:
        """As if its machine lost power: nothing says goodbye."""
        self.cluster.remove_node(node, allow_graceful=False)

    def kill_all(self) -> None:
        for node in list(self.cluster.worker_nodes):
            self.kill(node)


@contextmanager
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def soon(found: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `found` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value
