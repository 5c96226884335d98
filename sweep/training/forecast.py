"""What an arm will cost, foretold from one forward pass and counted tensors: no step is taken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sweep.lora.optim import moment_count
from sweep.study.arms import Arm
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.base import check_arm, frozen_bytes
from sweep.training.quantization import base_bytes
from sweep.training.rung import Trainee, base_for, pack_batches, start_trainee, tokenised, training_losses


@dataclass(frozen=True)
class Forecast:
    """Of one arm alone. Bytes and seconds."""

    arm: Arm
    trainable_params: int
    peak_memory_bytes: int
    step_seconds: float


def forecast(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> list[Forecast]:
    """A forecast for every arm; arms of one cost_key share a measurement.

    Memory: base, trained weights, their gradients and moments (4 bytes each), and what the forward pass keeps for
    the backward pass, counted. Time: the forward pass costs 2·N·tokens, a LoRA step 4·N·tokens (twice as much), and a
    step of full fine-tuning 6·N·tokens (three times as much).
    """
    by_key: dict[str, Forecast] = {}
    for arm in arms:
        if arm.cost_key not in by_key:
            by_key[arm.cost_key] = _forecast_one(setup, prepared, arm)
    return [replace(by_key[arm.cost_key], arm=arm) for arm in arms]


def _forecast_one(setup: Setup, prepared: Prepared, arm: Arm) -> Forecast:
    base = base_for(setup, prepared, arm)
    held = base_bytes(base.model)
    trial = TrialSpec(-1, arm, 0.0, 0, "forecast", "")
    trainee = start_trainee(setup, prepared, [trial], 0)
    try:
        seconds, kept = forward_cost(setup, prepared, [trial], trainee)
    finally:
        trainee.close()
    trainable = check_arm(base, arm)
    weights = held if arm.is_full else held + 4 * trainable + frozen_bytes(base, arm)
    beside = 4 * (1 + moment_count(setup.train.optimizer, setup.train.betas)) * trainable
    return Forecast(arm, trainable, weights + beside + kept, seconds * (3 if arm.is_full else 2))


def forward_cost(setup: Setup, prepared: Prepared, trials: list[TrialSpec], trainee: Trainee) -> tuple[float, int]:
    """Seconds of a forward pass of the pack, and the bytes that it keeps for the backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in trainee.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds, largest = 0.0, 0
    for step, (batch, _) in enumerate(pack_batches(tokenised(setup), setup, trials, 0, 2)):  # the first warms up
        began = time.perf_counter()
        largest = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            for loss_K in training_losses(trainee, batch, setup, prepared, step):  # one at a time, as they train
                loss_K.sum().item()
                largest = max(largest, sum(kept.values()))
                kept.clear()
        seconds = time.perf_counter() - began
    return seconds, largest
