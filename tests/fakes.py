"""A trainer that trains nothing: losses are pure functions of (arm, rate, seed, step), so that results can be told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweep.execution.worker import Work
from sweep.study.arms import Arm
from sweep.study.records import (
    Cost,
    Forecast,
    Measurement,
    Prepared,
    Setup,
    SourceText,
    StudyForecast,
    TrialSpec,
    Unit,
)
from sweep.study.schema import Study
from sweep.tracking.store import OPTIMIZER, TEST_ROWS, WEIGHTS, opened, save


def make_study(**changes: Any) -> Study:
    """2 ranks × 2 ratios × 3 rates and full fine-tuning × 3; `changes` replace whole sections."""
    raw: dict[str, Any] = {
        "name": "fake",
        "question": "Does the driver ask what it should?",
        "model": "none",
        "task": "sequence-classification",
        "data": {"source": "none"},
        "arms": {"rank": [2, 8], "alpha_ratio": [1.0, 2.0], "full_finetuning": True},
        "tune": {
            "learning_rate": {"low": 1e-3, "high": 1e-1, "values": 3},
            "full_finetuning": {"learning_rate": {"low": 1e-5, "high": 1e-3, "values": 3}},
        },
        "train": {"steps": 4, "batch_size": 1},
        "search": {"rungs": [1, 2, 4], "keep": 0.5, "seed": 0},
        "confirm": {"seeds": [1, 2], "reference": 8, "epsilon": 0.05},
    }
    return Study.model_validate({**raw, **changes})


def loss_of(arm: Arm, rate: float, seed: int, step: int) -> float:
    """Falls with steps; best at 1e-2 (full fine-tuning: 1e-4); larger ranks and ratio 2 are a little better."""
    away = abs(math.log10(rate / (1e-4 if arm.is_full else 1e-2)))
    size = 1 / arm.r + 0.01 * abs(arm.alpha_ratio - 2) if arm.r else 0.0
    return round(1 / step + away + 0.1 * size + 0.001 * seed, 9)


def content(trial: TrialSpec, step: int) -> bytes:
    """What stands in the files of a checkpoint."""
    return f"{trial.arm.name} at {trial.learning_rate}, seed {trial.seed}, step {step}".encode()


def measure(unit: Unit, trial: TrialSpec) -> Measurement:
    """One trial's rung: leaves a checkpoint, tensors apart, and wants the one it goes on from."""
    if unit.start:
        with opened(trial, unit.checkpoints[unit.trials.index(trial)], (WEIGHTS, OPTIMIZER)) as folder:
            assert (folder / WEIGHTS).read_bytes() == content(trial, unit.start), "the checkpoint to go on from"

    def write(folder: Path) -> None:
        for name in (WEIGHTS, OPTIMIZER, *([TEST_ROWS] if unit.test else [])):
            (folder / name).write_bytes(content(trial, unit.stop))

    saved = save(trial, unit.stop, {}, write)
    steps = range(unit.start + 1, unit.stop + 1)
    loss = loss_of(trial.arm, trial.learning_rate, trial.seed, unit.stop)
    return Measurement(
        number=trial.number,
        start=unit.start,
        stop=unit.stop,
        train_loss=tuple(loss_of(trial.arm, trial.learning_rate, trial.seed, step) for step in steps),
        eval_loss=loss,
        eval_metrics={"eval_accuracy": 0.5},
        test_metrics={"test_loss": loss} if unit.test else {},
        checkpoint=saved.name,
        checkpoint_sha256=saved.sha256,
        diverged_at=None,
        pack_size=len(unit.trials),
        pack_seconds=0.0,
        tokens=len(steps),
    )


def diverged(unit: Unit, trial: TrialSpec) -> Measurement:
    """A rung in which the trial's first step was not finite."""
    return Measurement(
        trial.number, unit.start, unit.stop, (), None, {}, {}, "", unit.start + 1, len(unit.trials), 0.0, 0
    )


def train_rung(unit: Unit) -> tuple[Measurement, ...]:
    return tuple(measure(unit, trial) for trial in unit.trials)


def prepare(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
    return Prepared(
        rows={"train": 1, "validation": 1, "test": 1},
        duplicates_removed=0,
        data_fingerprint="d",
        labels=("a", "b"),
        model_fingerprint="m",
        total_params=1,
        trainable_params={arm.name: arm.r for arm in arms},
        device="cpu",
        precision="float32",
        attention="eager",
        pack_size=5,
        source_text=SourceText(1, 1, 0, "t", False, 3.0, 3.0) if setup.forgetting else None,
    )


def fingerprints(setup: Setup) -> tuple[str, str, str]:
    return "d", "m", "t" if setup.forgetting else ""


def forecast(setup: Setup, prepared: Prepared, arms: tuple[Arm, ...], limit: int = 10) -> StudyForecast:
    """An arm needs as many bytes as its rank; full fine-tuning 9."""
    peaks = {arm.cost_key: arm.r or 9 for arm in arms}
    every = tuple(Forecast(key, peak, peak, 0.1, peak <= limit, False) for key, peak in peaks.items())
    return StudyForecast(every, limit, 0.01, 0.02)


def probe(setup: Setup, prepared: Prepared, arm: Arm) -> Cost:
    return Cost(arm.cost_key, arm.r, 1, 1, {"weights": 1}, 0.1, (0.1,), 1.0, 1, "cpu")


def fake_work(train: Callable[[Unit], tuple[Measurement, ...]] = train_rung) -> Work:
    return Work(prepare=prepare, fingerprints=fingerprints, forecast=forecast, train_rung=train, probe=probe)
