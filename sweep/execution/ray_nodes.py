"""How many workers each node of a Ray cluster holds, and what each of them takes of it. No Ray in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sweep.execution.choose import count, times
from sweep.study.errors import FieldError
from sweep.study.schema import Resources


@dataclass(frozen=True)
class Node:
    id: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Plan:
    """What a worker takes of its node. Fixed once the first nodes are known, so that all workers are alike."""

    cpus: float | None  # None: all that the node has, shared by its workers
    gpus: float  # 0: workers on the CPU, which see no GPU
    most: int | None = None  # workers; None: as many as fit


def plan_workers(resources: Resources | None, nodes: Sequence[Node]) -> Plan | None:
    """From the study's `resources` and the nodes that are there; None where these do not yet tell.

    Without `gpus` a worker takes one, or none where no node has any. Without `cpus` the workers of a node share its
    CPUs; on CPUs alone there is one a node, or `workers` of them, each with as many CPUs as let that number fit.
    """
    asked = resources or Resources()
    gpus, cpus = asked.gpus, asked.cpus
    if gpus is None:
        if not any(node.cpus or node.gpus for node in nodes):
            return None
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    if not gpus and cpus is None and asked.workers is not None:
        if not any(node.cpus for node in nodes):
            return None
        cpus = _share([node.cpus for node in nodes], asked.workers)
    return Plan(cpus, gpus, asked.workers)


def count_workers(plan: Plan, node: Node) -> int:
    """How many workers the node holds. A worker's share of a GPU lies on one GPU."""
    limits = []
    if plan.gpus:
        limits.append(int(node.gpus) * times(plan.gpus, 1.0))
    if plan.cpus:
        limits.append(times(plan.cpus, node.cpus))
    return min(limits, default=min(1, int(node.cpus)))


def cpus_of_worker(plan: Plan, node: Node) -> float:
    """What Ray is asked for, which makes it the worker's threads."""
    return plan.cpus if plan.cpus is not None else float(node.cpus // max(1, count_workers(plan, node)))


def refuse_more(resources: Resources | None, here: Node) -> None:
    """Raise FieldError where a machine alone holds fewer workers than are wanted, or none."""
    plan = plan_workers(resources, [here])
    if plan is None or count_workers(plan, here) >= (plan.most or 1):
        return
    key = "workers" if count_workers(plan, here) else "gpus" if plan.gpus else "cpus"
    wanted = f"{count(plan.most or 1, 'worker')} with {_words(plan.gpus, plan.cpus)} each"
    message = f"{wanted} are more than this machine has: {_words(here.gpus, here.cpus)}"
    raise FieldError((f"resources.{key}", message))


def what_a_worker_needs(resources: Resources | None) -> str:
    """As in "0.5 GPUs and 2 CPUs"; for messages."""
    gpus, cpus = (resources.gpus, resources.cpus) if resources else (None, None)
    return "a GPU or a CPU" if gpus is None and cpus is None else _words(gpus, cpus)


def _words(gpus: float | None, cpus: float | None) -> str:
    found = [count(amount, kind) for amount, kind in ((gpus, "GPU"), (cpus, "CPU")) if amount]
    return " and ".join(found) or "a CPU"


def _share(cpus: Sequence[float], workers: int) -> float:
    """The most CPUs that each of so many workers can have; Ray takes whole ones, or ten-thousandths of one."""
    shares = {float(n // k) if n >= k else math.floor(1e4 * n / k) / 1e4 for n in cpus for k in range(1, workers + 1)}
    fitting = [s for s in shares if s > 0 and sum(times(s, n) for n in cpus) >= workers]
    return max(fitting, default=1.0)
