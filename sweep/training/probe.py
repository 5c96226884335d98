"""A solo probe: what one arm costs alone, in a fresh process, over a few steps after warm-up.

Packed time and memory are joint and never a trial's own; this is where an arm's cost comes from.
"""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from sweep.lora.adapter import linear_modules
from sweep.lora.optim import moment_count
from sweep.study.arms import Arm
from sweep.study.lifeline import die_with_parent
from sweep.study.records import Cost, Prepared, Setup, TrialSpec
from sweep.training.base import check_arm, find_device, frozen_bytes
from sweep.training.memory import status_bytes
from sweep.training.prepare import device_name
from sweep.training.quantization import base_bytes
from sweep.training.rung import base_for, pack_batches, start_trainee, timed_steps, tokenised

WARMUP_STEPS, MEASURED_STEPS = 3, 7


def probe(setup: Setup, prepared: Prepared, arm: Arm, warmup: int = WARMUP_STEPS, steps: int = MEASURED_STEPS) -> Cost:
    """Measure the arm in a process of its own, see `fresh_process`.

    Raises what the measurement raises, and BrokenProcessPool where its process is killed (out of memory).
    """
    with fresh_process() as one:
        return one.submit(measure, setup, prepared, arm, warmup, steps).result()


def fresh_process() -> ProcessPoolExecutor:
    """One process, forked from one that has imported the libraries and done nothing else. It dies with this one."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process keeps for later would be missing there
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__, "transformers.modeling_utils"])
    return ProcessPoolExecutor(max_workers=1, mp_context=fresh, initializer=die_with_parent)


def measure(setup: Setup, prepared: Prepared, arm: Arm, warmup: int, steps: int) -> Cost:
    """The same in this process, which must be a fresh one: the high-water mark is the process's.

    Weights, gradients (4 bytes a trainable parameter) and optimizer state (AdamW: 8) are computed from the
    parameters' number; activations are what else the peak holds, workspace among it. On the CPU the peak is the bytes
    of the loaded base and the rise of the resident high-water mark over it; on CUDA the peak of the allocator.
    """
    device = find_device()
    data = tokenised(setup)
    base = base_for(setup, prepared, arm)
    _touch(base.model)
    held = base_bytes(base.model)
    trainable_bytes, carried_bytes = 4 * check_arm(base, arm), frozen_bytes(base, arm)
    layers = linear_modules(base.model)
    head = sum(p.numel() for name in base.head for p in layers[name].parameters())
    total = prepared.total_params + (0 if arm.is_full else trainable_bytes // 4 - head)  # the head counts once
    trial = TrialSpec(-1, arm, 1e-5, 0, "probe", "")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = 0
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
        before = status_bytes("VmRSS")
    trainee = start_trainee(setup, prepared, [trial], 0)
    times = timed_steps(setup, prepared, [trial], trainee, warmup, steps)
    rise = torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM") - before
    peak = rise if device.type == "cuda" else held + rise
    if arm.is_full:  # the copy that trains is the model; the untouched base beside it is only our spare
        peak -= held
    weights = held + (0 if arm.is_full else trainable_bytes + carried_bytes)
    moments = moment_count(setup.train.optimizer, setup.train.betas) * trainable_bytes
    tokens = [batch.tokens for batch, _ in pack_batches(data, setup, [trial], 0, warmup + steps)]
    return Cost(
        cost_key=arm.cost_key,
        trainable_params=trainable_bytes // 4,
        total_params=total,
        peak_memory_bytes=peak,
        memory={
            "weights": weights,
            "gradients": trainable_bytes,
            "optimizer": moments,
            "activations": max(0, peak - weights - trainable_bytes - moments),
        },
        step_time_s=statistics.median(times),
        step_times_s=tuple(times),
        tokens_per_second=sum(tokens[warmup:]) / sum(times),
        adapter_bytes=_saved_bytes(trainee.states(0)[0]),
        device=device_name(device),
    )


def _touch(model: nn.Module) -> None:
    """Every weight, so that none is still only mapped from its file; packed ones were made, not mapped."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _saved_bytes(state: dict[str, torch.Tensor]) -> int:
    return len(save(state, metadata={"format": "pt"}))
