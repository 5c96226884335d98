"""What a worker does: the only functions that cross a process boundary. Heavy imports happen in the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sweep.study.arms import Arm
from sweep.study.records import Cost, Measurement, Prepared, Setup, Unit


def prepare(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
    """Load model and data, check the arms, choose precision, attention and pack size. Raises FieldError."""
    from sweep.training.prepare import prepare

    return prepare(setup, arms)


def train_rung(unit: Unit) -> tuple[Measurement, ...]:
    """Train one pack for one rung, from its trials' last checkpoints to new ones; one measurement a trial, in order."""
    from sweep.training.rung import train_rung

    return train_rung(unit)


def probe(setup: Setup, prepared: Prepared, arm: Arm) -> Cost:
    """What the arm costs alone, measured in a fresh process."""
    from sweep.training.probe import probe

    return probe(setup, prepared, arm)


@dataclass(frozen=True)
class Work:
    """The worker's functions as the driver calls them; tests put a fake trainer here."""

    prepare: Callable[[Setup, tuple[Arm, ...]], Prepared] = prepare
    train_rung: Callable[[Unit], tuple[Measurement, ...]] = train_rung
    probe: Callable[[Setup, Prepared, Arm], Cost] = probe
