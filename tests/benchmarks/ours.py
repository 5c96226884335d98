"""(a) our packs, and (e) full fine-tuning by our own arm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from sweep.study.arms import full_arm
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.data import TokenisedData
from sweep.training.rung import Trainee, pack_batches, start_trainee, train_step

from .work import RATE, SEED


@dataclass(frozen=True)
class Steps:
    """Of each measured step: its seconds, collation included, and those of its optimizer."""

    seconds: tuple[float, ...]
    optimizer_s: tuple[float, ...]


def time_pack(
    setup: Setup, prepared: Prepared, data: TokenisedData, trials: Sequence[TrialSpec], warmup: int, steps: int
) -> Steps:
    """Train a pack afresh and time its steps after `warmup` ones."""
    trainee = start_trainee(setup, prepared, list(trials), 0)
    try:
        optimizer_s: list[float] = []
        _time_optimizer(trainee, optimizer_s)
        batches = pack_batches(data, setup, list(trials), 0, warmup + steps)
        seconds = []
        for step in range(warmup + steps):
            began = time.perf_counter()
            batch, _ = next(batches)
            train_step(trainee, batch, setup, prepared, step)
            seconds.append(time.perf_counter() - began)
    finally:
        trainee.close()
    return Steps(tuple(seconds[warmup:]), tuple(optimizer_s[warmup:]))


def count_flops(setup: Setup, prepared: Prepared, data: TokenisedData, trials: Sequence[TrialSpec]) -> float:
    """Of all matrix products of one step, a token."""
    trainee = start_trainee(setup, prepared, list(trials), 0)
    in_place = {torch.ops.aten.baddbmm_: _in_place_flops}  # torch counts its namesake alone
    try:
        batch, _ = next(pack_batches(data, setup, list(trials), 0, 1))
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            train_step(trainee, batch, setup, prepared, 0)
    finally:
        trainee.close()
    return float(counter.get_total_flops() / batch.input_ids_RT.size)


def _in_place_flops(_: torch.Size, a_GNr: torch.Size, b_GrO: torch.Size, **__: object) -> int:
    return 2 * a_GNr.numel() * b_GrO[-1]


def full_trial() -> TrialSpec:
    return TrialSpec(0, full_arm(), RATE, SEED, "benchmark", "")


def _time_optimizer(trainee: Trainee, seconds: list[float]) -> None:
    """Time this trainee's optimizer where the step calls it: alone it would find its gradients in no cache."""
    step = trainee.step

    def timed(*arguments: object, **named: object) -> object:
        began = time.perf_counter()
        found = step(*arguments, **named)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - began)
        return found

    trainee.step = timed  # type: ignore[assignment]
