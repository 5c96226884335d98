"""Which executor a command asks for, and whether the study's `resources` go with it and are here."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING

from sweep.execution.devices import visible_gpus
from sweep.execution.executor import Executor, InlineExecutor
from sweep.execution.local import LocalExecutor
from sweep.study.errors import FieldError

if TYPE_CHECKING:
    from sweep.study.schema import Resources, Study


class ExecutorName(StrEnum):
    inline = "inline"
    local = "local"
    ray = "ray"


def open_executor(name: ExecutorName, study: Study) -> tuple[Executor, str]:
    """The executor, and what it has in a line.

    Raises FieldError where the study's `resources` do not go with it, NoWorkers where there is no Ray cluster.
    """
    if name is ExecutorName.inline:
        refuse_resources(study.resources)
        return InlineExecutor(), "trials run in this process"
    if name is ExecutorName.ray:
        from sweep.execution.ray import RayExecutor

        cluster = RayExecutor(study.resources, os.environ.get("RAY_ADDRESS"), seconds_without_workers())
        return cluster, cluster.describe()
    cores, gpus = len(os.sched_getaffinity(0)), visible_gpus()
    environments = local_environments(study.resources, gpus, cores, os.environ.get("OMP_NUM_THREADS"))
    return LocalExecutor(environments), describe(environments)


def seconds_without_workers() -> float:
    """How long a study waits for a node when the last one is gone. Raises FieldError."""
    given = os.environ.get("SWEEP_SECONDS_WITHOUT_WORKERS", "120")
    try:
        return float(given)
    except ValueError:
        raise FieldError(("SWEEP_SECONDS_WITHOUT_WORKERS", f"must be a number of seconds, not {given!r}")) from None


def refuse_resources(resources: Resources | None) -> None:
    """Raise FieldError where a study asks for what this process alone cannot give."""
    asked = resources.model_dump(exclude_none=True) if resources else {}
    if asked.get("workers") == 1:
        del asked["workers"]
    if asked:
        key = next(iter(asked))
        wants = "a deadline, and this process cannot end what hangs in it" if key == "seconds_per_rung" else "workers"
        message = f"asks for {wants}: run it with --executor local or ray, in processes of their own, or leave it out"
        raise FieldError((f"resources.{key}", message))


def local_environments(
    resources: Resources | None, gpus: list[str], cores: int, omp_threads: str | None = None
) -> list[dict[str, str]]:
    """What each worker of this machine has in its environment: its GPU and its share of the cores.

    gpus: as CUDA_VISIBLE_DEVICES names them. omp_threads: OMP_NUM_THREADS of the command, which no worker exceeds.
    Raises FieldError where the machine does not have what is asked for.
    """
    asked = resources.workers if resources else None
    share = resources.gpus if resources else None
    cpus = resources.cpus if resources else None
    if share == 0:
        gpus = []
    elif share is not None and not gpus:
        raise FieldError(("resources.gpus", f"{share:g} of a GPU for each worker, and no GPU is here; leave it out"))
    if share:
        room = len(gpus) * times(share, 1.0)
        if asked is not None and asked > room:
            holds = f"the {count(len(gpus), 'GPU')} here {'holds' if len(gpus) == 1 else 'hold'}"
            message = f"{count(asked, 'worker')} with {share:g} of a GPU each are more than {holds} ({room})"
            raise FieldError(("resources.workers", message))
        workers = asked or room
    else:
        workers = asked or max(1, len(gpus))
    if cpus is not None and workers * cpus > cores:
        message = f"{cpus:g} for each of {count(workers, 'worker')} are more than the {count(cores, 'core')} here"
        raise FieldError(("resources.cpus", message))
    threads = max(1, int(cpus) if cpus is not None else cores // workers)
    if omp_threads is not None and omp_threads.isdigit() and int(omp_threads) > 0:
        threads = min(threads, int(omp_threads))
    return [
        {
            "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)] if gpus else "",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        for i in range(workers)
    ]


def describe(environments: list[dict[str, str]]) -> str:
    """Of the workers of this machine, as in "4 workers, one a GPU"."""
    workers, threads = len(environments), int(environments[0]["OMP_NUM_THREADS"])
    gpus = len({environment["CUDA_VISIBLE_DEVICES"] for environment in environments} - {""})
    who = count(workers, "worker")
    if not gpus:
        return f"{who} with {count(threads, 'thread')}" + (" each" if workers > 1 else "")
    return f"{who}, one a GPU" if workers == gpus else f"{who} on {count(gpus, 'GPU')}"


def count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


def times(part: float, whole: float) -> int:
    """How many parts the whole holds, rounding left out."""
    return int(whole / part + 1e-9)
