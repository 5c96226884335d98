"""Which margin could have been shown, with so many seeds and so much spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from sweep.report.intervals import LEVEL

POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Power:
    """Of the one-sided paired t test that a difference lies below ε, for an arm that is truly as good."""

    seeds: int
    sd: float  # of the paired differences, pooled over the arms
    epsilon: float  # the smallest that is shown with a chance of 80 %
    seeds_needed: int | None  # for the declared ε; None where more than MOST_SEEDS


def showable_margin(sd: float, n: int) -> float:
    """The ε that n ≥ 2 pairs with this standard deviation show with a chance of 80 % where the true difference is 0.

    The test statistic is noncentral t with n − 1 degrees of freedom and noncentrality −ε·√n / sd (Chow, Shao and Wang,
    Sample Size Calculations in Clinical Research, §3.1).
    """
    df, critical = n - 1, float(stats.t.ppf(LEVEL, n - 1))

    def lacking(shift: float) -> float:
        return float(stats.nct.cdf(critical, df, -shift)) - POWER

    return float(optimize.brentq(lacking, 0.0, 60.0)) * sd / math.sqrt(n)


def seeds_needed(sd: float, epsilon: float) -> int | None:
    """The fewest seeds with which `epsilon` is shown with a chance of 80 %; None where that takes over MOST_SEEDS."""
    if showable_margin(sd, MOST_SEEDS) > epsilon:
        return None
    low, high = 1, MOST_SEEDS  # of the margins the one is too wide, the other not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if showable_margin(sd, middle) <= epsilon else (middle, high)
    return high


def power(differences: Sequence[Sequence[float]], epsilon: float) -> Power | None:
    """From the paired differences of each arm; None where no arm has two pairs, or none of them spreads.

    An arm that lost seeds is left out: it must not stand for the others.
    """
    n = max((len(d) for d in differences), default=0)
    several = [np.asarray(d) for d in differences if len(d) == n]
    if n < 2:
        return None
    freedom = sum(len(d) - 1 for d in several)
    sd = math.sqrt(sum(float(((d - d.mean()) ** 2).sum()) for d in several) / freedom)
    if sd == 0:
        return None
    return Power(n, sd, showable_margin(sd, n), seeds_needed(sd, epsilon))
