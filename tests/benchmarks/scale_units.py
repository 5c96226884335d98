"""Trainers of `scale`: in a module of their own, so that worker processes import it and not the benchmark."""

from __future__ import annotations

import time

from fakes import train_rung

from sweep.study.records import Measurement, Unit

SIZE = 1024


def train_asleep(seconds: float, unit: Unit) -> tuple[Measurement, ...]:
    """Takes so long, leaves checkpoints, and needs no core meanwhile: as many workers as one likes fit on a machine."""
    time.sleep(seconds)
    return train_rung(unit)


def train_busy(products: int, unit: Unit) -> tuple[Measurement, ...]:
    """As much work each time, on every core, in the driver's own process, as `sweep run` trains without workers."""
    multiply(products)
    return train_rung(unit)


def multiply(times: int) -> None:
    import torch

    a = torch.ones(SIZE, SIZE)
    for _ in range(times):
        a @ a
