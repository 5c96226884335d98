"""What a study's arms will cost, foretold: counted tensors and a forward pass each, set right by a few probe steps.

Nothing here is what the report calls measured: that comes from probes after the last trial.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sweep.lora.optim import moment_count
from sweep.study.arms import Arm
from sweep.study.errors import FieldError, in_one_line, is_out_of_memory, was_killed
from sweep.study.records import Cost, Forecast, Prepared, Setup, StudyForecast, TrialSpec
from sweep.training.base import check_arm, frozen_bytes
from sweep.training.calibration import mixed_trials
from sweep.training.memory import forward_cost, memory_limit
from sweep.training.probe import fresh_process, probe
from sweep.training.quantization import base_bytes
from sweep.training.rung import base_for, start_trainee, tell, tokenised
from sweep.training.tasks import evaluation_batches, score

WARMUP_STEPS, PROBE_STEPS = 2, 3  # of a solo probe here; the report's own have more
PASSES = 3  # forward passes that are timed


@dataclass(frozen=True)
class Counted:
    """Of one arm alone, without a step. Bytes and seconds."""

    arm: Arm
    trainable_params: int
    peak_memory_bytes: int
    step_time_s: float | None  # None: it could not be tried
    note: str = ""


def forecast(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> StudyForecast:
    """A forecast of every cost_key, the memory that a trial alone may take, and the seconds of an evaluation.

    Each arm is counted (see `count_arms`). The smallest arm that adapts the base, the largest, and full fine-tuning are
    then probed: alone, in a fresh process, a few steps. Probed arms are forecast as that says. The others are scaled:
    what the probes found beyond the counted memory (workspace, temporaries, what the allocator keeps) and their times
    over the forward pass's are interpolated by the number of trainable parameters.
    An arm whose weights, gradients and moments alone exceed the memory is not tried at all, and one whose forward pass
    found none is not probed. Raises FieldError where model or data cannot be read.
    """
    limit = memory_limit(base_bytes(base_for(setup, prepared, arms[0]).model))
    by_key = {arm.cost_key: arm for arm in reversed(arms)}
    counted = count_arms(setup, prepared, list(reversed(by_key.values())), limit)
    probes: dict[str, Cost] = {}
    errors: dict[str, Exception] = {}
    for found in to_probe([c for c in counted if c.step_time_s is not None and c.peak_memory_bytes <= limit]):
        try:
            probes[found.arm.cost_key] = probe(setup, prepared, found.arm, WARMUP_STEPS, PROBE_STEPS)
        except FieldError:
            raise
        except Exception as error:  # an arm that cannot be probed keeps what was counted
            errors[found.arm.cost_key] = error
    validation_s, test_s = evaluation_times(setup, prepared, [c.arm for c in counted if c.step_time_s is not None])
    forecasts = tuple(_forecast_one(c, counted, probes, errors.get(c.arm.cost_key), limit) for c in counted)
    return StudyForecast(forecasts, limit, validation_s, test_s)


def count_arms(setup: Setup, prepared: Prepared, arms: Sequence[Arm], limit: int) -> list[Counted]:
    """Memory and time of each arm from its tensors and a forward pass.

    Memory: base, trained weights, their gradients and moments (4 bytes each), and what the forward pass keeps for
    the backward pass, counted. Time: the forward pass costs 2·N·tokens, a LoRA step 4·N·tokens (twice as much), and a
    step of full fine-tuning 6·N·tokens (three times as much).
    The passes run in a process of their own, since a system may end the one that asks for too much; then in a new one.
    """
    counted = []
    one = fresh_process()
    try:
        for arm in arms:
            found = _count_tensors(setup, prepared, arm)
            if found.peak_memory_bytes > limit:
                note = "not tried: its weights, gradients and optimizer state alone exceed the memory"
                counted.append(replace(found, note=note))
                continue
            try:
                seconds, kept = one.submit(forward_pass, setup, prepared, arm).result()
            except (RuntimeError, MemoryError) as error:
                killed = was_killed(error)
                if killed:
                    one.shutdown()
                    one = fresh_process()
                elif not is_out_of_memory(error):
                    raise
                why = ", perhaps for want of memory" if killed else ""
                counted.append(replace(found, note=f"a forward pass ended in {in_one_line(error)}{why}"))
                continue
            peak, times = found.peak_memory_bytes + kept, 3 if arm.is_full else 2
            counted.append(replace(found, peak_memory_bytes=peak, step_time_s=seconds * times))
    finally:
        one.shutdown()
    return counted


def _count_tensors(setup: Setup, prepared: Prepared, arm: Arm) -> Counted:
    base = base_for(setup, prepared, arm)
    trainable = check_arm(base, arm)
    weights = base_bytes(base.model) + (0 if arm.is_full else 4 * trainable + frozen_bytes(base, arm))
    beside = 4 * (1 + moment_count(setup.train.optimizer, setup.train.betas)) * trainable
    return Counted(arm, trainable, weights + beside, None)


def forward_pass(setup: Setup, prepared: Prepared, arm: Arm) -> tuple[float, int]:
    """Seconds of a forward pass of the arm alone, and the bytes that it keeps for the backward pass."""
    trial = TrialSpec(-1, arm, 0.0, 0, "forecast", "")
    trainee = start_trainee(setup, prepared, [trial], 0)
    try:
        return forward_cost(setup, prepared, [trial], trainee, PASSES)
    finally:
        trainee.close()


def to_probe(counted: Iterable[Counted]) -> list[Counted]:
    """The smallest and the largest arm that adapts the base, and full fine-tuning."""
    ordered = sorted(counted, key=lambda c: c.trainable_params)
    adapted = [c for c in ordered if not c.arm.is_full]
    ends = adapted if len(adapted) < 2 else [adapted[0], adapted[-1]]
    return ends + [c for c in ordered if c.arm.is_full]


def evaluation_times(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> tuple[float, float]:
    """Seconds of evaluating one trial of a pack on all validation rows and on all test rows; 0 without an arm.

    The middle one of the validation's passes is timed, and counts for all.
    """
    if not arms:
        return 0.0, 0.0
    adapted = [arm for arm in arms if not arm.is_full]
    trials = mixed_trials(setup, adapted or arms, prepared.pack_size if adapted else 1)
    data, trainee = tokenised(setup), start_trainee(setup, prepared, trials, 0)
    try:
        model, pad_token_id, k = trainee.model, data.pad_token_id, trainee.trials
        passes = list(evaluation_batches(model, data.validation, setup.task, k, pad_token_id))
        batch = passes[len(passes) // 2]
        times = []
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            tell(trainee, batch, None)
            with torch.no_grad():
                score(model, batch, setup.task, k, trainee.plain_head).loss_K.sum().item()
            times.append(time.perf_counter() - began)
    finally:
        trainee.close()
    a_token = times[-1] / batch.tokens  # of all trials of the pack
    return a_token * float(data.validation.lengths.sum()), a_token * float(data.test.lengths.sum())


def _forecast_one(
    counted: Counted, others: Sequence[Counted], probes: Mapping[str, Cost], error: Exception | None, limit: int
) -> Forecast:
    key, peak, seconds, note = counted.arm.cost_key, counted.peak_memory_bytes, counted.step_time_s, counted.note
    cost, short = probes.get(key), False
    if cost is not None:
        peak, seconds = cost.peak_memory_bytes, cost.step_time_s
    elif error is not None:
        short = is_out_of_memory(error) or was_killed(error)
        why = ", perhaps for want of memory" if was_killed(error) else ""
        note = f"its probe ended in {in_one_line(error)}{why}"
    elif seconds is not None and not counted.arm.is_full:
        ends = [(c, probes[c.arm.cost_key]) for c in others if c.arm.cost_key in probes and not c.arm.is_full]
        beyond = [(c.trainable_params, cost.peak_memory_bytes - c.peak_memory_bytes) for c, cost in ends]
        slower = [(c.trainable_params, cost.step_time_s / c.step_time_s) for c, cost in ends if c.step_time_s]
        peak += round(_between(counted.trainable_params, beyond, 0.0))
        seconds *= _between(counted.trainable_params, slower, 1.0)
    fits = peak <= limit and not short and seconds is not None
    return Forecast(key, counted.trainable_params, peak, seconds, fits, cost is not None, note)


def _between(x: float, points: Sequence[tuple[float, float]], otherwise: float) -> float:
    """The value at x on the line between the points; that of the nearer end outside."""
    if not points:
        return otherwise
    at, values = zip(*sorted(points), strict=True)
    return float(np.interp(x, at, values))
