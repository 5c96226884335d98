"""The limit: the machine's own matrix-product rate in each dtype, measured between the contenders' repetitions."""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch
from torch import nn
from torch.nn.functional import linear

from .peft_loop import DTYPES
from .records import Rate
from .work import matrix_layers

SQUARE = 2048
ENOUGH_S = 0.05  # of each product: long enough for the clock, short beside a step


def sizes_of(model: nn.Module) -> Counter[tuple[int, int]]:
    """(in, out) of the layers through which every token goes, and how many there are."""
    return Counter((layer.in_features, layer.out_features) for layer in matrix_layers(model).values())


def measure_rates(shape: str, sizes: Counter[tuple[int, int]], rows: list[int], repetition: int) -> list[Rate]:
    """FLOP/s of `linear` at a large square, and of the model's own layers, one after another, at M = each of rows."""
    found = []
    for dtype in DTYPES:
        seconds = time_linear(SQUARE, SQUARE, SQUARE, dtype)
        found.append(Rate(shape, dtype, f"{SQUARE}³", repetition, 2 * SQUARE**3 / seconds))
        for m in rows:
            flops = sum(2 * m * i * o * count for (i, o), count in sizes.items())
            seconds = sum(time_linear(m, i, o, dtype) * count for (i, o), count in sizes.items())
            found.append(Rate(shape, dtype, f"the model's layers at M = {m}", repetition, flops / seconds))
    return found


@torch.no_grad()
def time_linear(m: int, i: int, o: int, dtype: str) -> float:
    """Median seconds of one product of (m, i) with a layer's weight (o, i)."""
    x, weight = torch.randn(m, i).to(DTYPES[dtype]), torch.randn(o, i).to(DTYPES[dtype])
    linear(x, weight)
    seconds: list[float] = []
    while sum(seconds) < ENOUGH_S or len(seconds) < 3:
        began = time.perf_counter()
        linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
