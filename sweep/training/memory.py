"""How much memory there is, and what a forward pass takes of it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.rung import Trainee, pack_batches, tokenised, training_losses


def free_bytes() -> int:
    """What a pack may take: free memory of the CUDA device, or of the machine within the limit that it is held to."""
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + cached
    free = (
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in os.sysconf_names else 2**33
    )
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), free)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def memory_limit(held: int) -> int:
    """What a trial alone may take in all: the CUDA device's memory, or what is free here.

    held: bytes of the base that this process has loaded, which are no longer free and which the trial shares.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return free_bytes() + held


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status. Raises OSError or RuntimeError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory cannot be measured here")


def forward_cost(
    setup: Setup, prepared: Prepared, trials: list[TrialSpec], trainee: Trainee, passes: int = 1
) -> tuple[float, int]:
    """Seconds of a forward pass of the pack, the least disturbed of `passes`, and the most bytes that one keeps for the
    backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in trainee.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    times, largest = [], 0
    for step, (batch, _) in enumerate(pack_batches(tokenised(setup), setup, trials, 0, 1 + passes)):
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            for loss_K in training_losses(trainee, batch, setup, prepared, step):  # one at a time, as they train
                loss_K.sum().item()
                largest = max(largest, sum(kept.values()))
                kept.clear()
        times.append(time.perf_counter() - began)
    return min(times[1:]), largest  # the first warms up
