"""A worker's process in a Ray cluster: how it is placed, what it does, and how Ray tells of its end."""

from __future__ import annotations

import hashlib
import os
import pickle  # noqa: TID251 - our own processes send each other pickles, through Ray
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sweep
from sweep.execution.ray_nodes import Node, Plan, cpus_of_worker
from sweep.execution.worker import answer
from sweep.study.credentials import without_credentials
from sweep.study.errors import FieldError


class Actor:
    """A worker's process. It sees to its environment before torch is imported."""

    def __init__(self, folder: str, gpus: float):
        with suppress(OSError):  # where it is there, the study's relative paths mean what they mean to the driver
            os.chdir(folder)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def code(self) -> str:
        return code()

    def run(self, request: bytes) -> bytes:
        return answer(request)


@cache
def code() -> str:
    """What makes a trial's numbers here: our files, and the versions of the libraries that train."""
    ours = Path(sweep.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(ours.rglob("*.py")):
        digest.update(f"{path.relative_to(ours)}\n".encode() + path.read_bytes())
    libraries = [f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers", "peft")]
    return ", ".join([f"lora-sweep {sweep.__version__} (files {digest.hexdigest()[:8]})", *libraries])


def read_answer(done: Future[bytes], node: Node) -> tuple[Any, Exception | None]:
    """What a unit returned, or raised, from its worker's answer. What is wrong with the study is told with the node's
    address, since it may be wrong there alone: a model or data that this node lacks."""
    try:
        value, error = pickle.loads(done.result())  # noqa: S301 - our own worker wrote it
    except Exception as unreadable:
        return None, RuntimeError(last_line(unreadable))
    if isinstance(error, FieldError):
        error = FieldError(*[(field, f"{message} (on node {node.address})") for field, message in error.problems])
    return value, error


def place_actor(plan: Plan, node: Node) -> Any:
    """An actor that starts on this node as soon as that has what the plan says. Raises nothing: its calls do."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options = {
        "num_cpus": cpus_of_worker(plan, node),
        "num_gpus": plan.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
    }
    return ray.remote(Actor).options(**options).remote(os.getcwd(), plan.gpus)


def how_it_ended(error: BaseException, node: Node) -> str:
    """Ray's long account of an actor's end in a few words."""
    told = str(error)
    if "node has died" in told or "node was terminated" in told:
        return f"its Ray node {node.address} is gone"
    if type(error).__name__ == "ActorUnavailableError":
        return f"the connection to its Ray node {node.address} broke"
    if "process has died" in told:
        return f"its process on {node.address} ended: killed, perhaps for want of memory, or crashed"
    return last_line(error)


def last_line(error: BaseException) -> str:
    """That which says most in an error with somebody's trace-back in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_credentials(lines[-1])[:300] if lines else type(error).__name__
