"""Joining a Ray cluster, or starting one on this machine for as long as the command runs; and leaving it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sweep.execution.devices import visible_gpus
from sweep.execution.ray_nodes import Node
from sweep.study.errors import NoWorkers, in_one_line
from sweep.study.lifeline import temporary_folder

OBJECT_STORE_BYTES = 100 * 2**20  # units and measurements are small; tensors stay in files
SECONDS_TO_ANSWER = 5
LONGEST_FOLDER = 40  # Ray's sockets lie in it, and the path of a socket has at most 107 characters
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What Ray reads when it is imported.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # what its daemons tell every driver would tear the live table
}
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # its only switch that makes 127.0.0.1 a node's address
AT_FULL_SPEED = {"RAY_worker_niceness": "0"}  # by Ray's default workers give way to whatever else runs
IMPATIENT = {
    "RAY_gcs_server_port_wait_time_s": "1",  # tries to get in; one takes 40 s where a stranger listens
    "RAY_gcs_server_request_timeout_seconds": "30",  # to find the node on this machine, which may just start
}


@dataclass(frozen=True)
class Cluster:
    head: str  # HOST:PORT
    own_node: str  # the id of that which the driver is attached to


@contextmanager
def joined(address: str | None, here: Node) -> Iterator[Cluster]:
    """The cluster whose head is at HOST:PORT; without an address one of our own, with the CPUs and GPUs of `here`.

    Our own listens on 127.0.0.1 alone, wants a token that nobody else has, and is stopped at the end with all that it
    wrote. To be entered in a thread: in the main one Ray takes SIGTERM for itself. Its daemons end with that thread.
    Raises NoWorkers where there is no cluster, or none that takes us.
    """
    # Daemons and threads that Ray starts from here leave both to the driver, also where a whole group gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    _default(QUIET)
    with _existing(address) if address else _own(here) as cluster:
        yield cluster


def this_machine() -> Node:
    """What of this machine may be used."""
    return Node("", "127.0.0.1", len(os.sched_getaffinity(0)), len(visible_gpus()))


def list_nodes() -> list[Node]:
    """Those that are alive. Blocks while the head does not answer."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    has = [node["Resources"] for node in alive]
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], its.get("CPU", 0.0), its.get("GPU", 0.0))
        for node, its in zip(alive, has, strict=True)
    ]


def answers(place: str) -> bool:
    """Whether somebody takes connections at HOST:PORT."""
    host, _, port = place.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER):
            return True
    except (OSError, ValueError, OverflowError):
        return False


@contextmanager
def _own(here: Node) -> Iterator[Cluster]:
    # Set for good: later clusters of this process have the same, and Ray reads some of it only once.
    _default(AT_FULL_SPEED)
    _default({**ON_LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    if here.gpus:  # Ray counts whole GPUs by itself: not the parts of one that is divided
        _default({"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus())})
    usual = tempfile.gettempdir()
    short = usual if len(usual) < LONGEST_FOLDER - len("/sweep-ray-12345678/in") else "/tmp"  # noqa: S108 - a new folder
    with (
        temporary_folder("sweep-ray-", short) as folder,
        _connected(
            "no Ray starts on this machine",
            address="local",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            num_cpus=int(here.cpus),
            num_gpus=int(here.gpus),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        ) as context,
    ):
        yield Cluster(context.gcs_address, context.get_node_id())


@contextmanager
def _existing(address: str) -> Iterator[Cluster]:
    if not re.fullmatch(r"[^/\s]+:\d+", address):
        raise NoWorkers("RAY_ADDRESS: give HOST:PORT of the head, and run the command on a node of the cluster")
    if not answers(address):
        raise NoWorkers(f"RAY_ADDRESS: no Ray cluster answers at {address}; start its head, or unset it for one here")
    if address.rpartition(":")[0].strip("[]") in LOOPBACK:  # else Ray asks at this machine's outside address
        _default(ON_LOOPBACK)
    _default(IMPATIENT)
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        _default({"RAY_AUTH_MODE": "token"})
    with _connected(f"the Ray cluster at {address} does not take this command", address=address) as context:
        yield Cluster(context.gcs_address, context.get_node_id())


@contextmanager
def _connected(refused: str, **options: Any) -> Iterator[Any]:
    """Ray's context. Raises NoWorkers."""
    try:
        import ray
    except ImportError as error:
        raise NoWorkers("--executor ray needs Ray: pip install 'lora-sweep[ray]'") from error
    assert not ray.is_initialized(), "a process can be in one cluster at a time"
    try:
        try:
            with _no_stderr():
                ray.init(log_to_driver=False, logging_level="CRITICAL", **options)
        except Exception as error:
            raise NoWorkers(f"{refused}: {_why(error)}") from error
        yield ray.get_runtime_context()
    finally:
        ray.shutdown(wait_for_processes=True)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Ray's own part writes there, a line for each try, and knows no other way to be silent."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _why(error: BaseException) -> str:
    """What a user can do about an error of ray.init."""
    text = f"{error} {error.__cause__ or ''}"
    if "InvalidAuthToken" in text or type(error).__name__ == "AuthenticationError":
        return "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of its nodes"
    if "No node info found" in text:
        return "none of its nodes is on this machine; start one here (`ray start --address=HOST:PORT`), or go to one"
    return in_one_line(error)


def _default(wanted: Mapping[str, str]) -> None:
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
