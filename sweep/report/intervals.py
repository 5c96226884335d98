"""Intervals and verdicts over seeds: Student's t, paired differences, the fixed sequence.

Why t and not a bootstrap: over 3, 5 and 10 seeds a percentile bootstrap's 95 % interval covers 76, 83 and 90 %,
Student's about 95 %.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit  # of the t distribution, without the cost of scipy.stats

CONFIDENCE = 0.95
LEVEL = 0.05  # of the one-sided tests
NON_INFERIOR, INFERIOR, INCONCLUSIVE, REFERENCE = "non-inferior", "inferior", "inconclusive", "reference"


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds, its two-sided 95 % t-interval and its one-sided 95 % upper bound; None with one seed."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    upper: float | None = None


def t_interval(values: Sequence[float]) -> Interval:
    """Mean ± t(n−1) · sd / √n (Student's t: `scipy.special.stdtrit`). Raises ValueError without values."""
    if not values:
        raise ValueError("no values: a mean of nothing is no number")
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Interval(n, mean)
    error = float(np.std(values, ddof=1)) / n**0.5
    half = error * float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2))
    return Interval(n, mean, mean - half, mean + half, mean + error * float(stdtrit(n - 1, CONFIDENCE)))


def p_below(differences: ArrayLike, margin: float) -> NDArray[np.float64]:
    """p of the one-sided t test that the mean difference lies below `margin`, over the last axis; 1 under two pairs."""
    return _p(differences, margin, "less")


def p_above(differences: ArrayLike, margin: float) -> NDArray[np.float64]:
    """p of the one-sided t test that the mean difference lies above `margin`, over the last axis; 1 under two pairs."""
    return _p(differences, margin, "greater")


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for hypotheses tested side by side (Holm 1979): the k-th smallest of m times m − k + 1."""
    adjusted, worst = [1.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(p) - k)))
        adjusted[i] = worst
    return adjusted


def judge(
    sequence: Sequence[ArrayLike], aside: Sequence[ArrayLike], epsilon: float, diverged: Collection[int] = ()
) -> tuple[list[str], list[str], int | None]:
    """Verdicts from the paired differences (arm − reference) of each arm; and where the sequence stopped, if it did.

    *Non-inferior*: the mean difference is shown to lie below ε, one-sided at 5 %. `sequence` holds one arm a rank,
    the largest first, in an order that stood before the confirm phase: each is tested at the full 5 % until the first
    that is not shown, and none after it, which keeps the chance of any false claim at 5 % (Maurer et al. 1995).
    `aside` holds arms with no place in that order; they are tested side by side with Holm's correction, a family of
    their own: the chance of a false claim among them is 5 % more.

    *Inferior*: the mean difference is shown to lie above ε, one-sided at 5 %, with Holm's correction over all arms.
    It is the mirror of non-inferior about the margin that was declared. A difference shown to be above 0 but not above
    ε stays *inconclusive*, as in CONSORT's guide to non-inferiority (Piaggio et al., JAMA 2012, figure 1): the loss
    may still be small enough to accept, and the interval beside the verdict says that it is not nil. With identical
    arms a false *inferior* is therefore rarer than 5 %: the difference must look larger than ε, not than 0.

    `diverged` holds the arms, by their place in sequence + aside, that diverged on a seed. They are never shown
    non-inferior: the pairs that are left were chosen by their outcome, and speak too well of the arm.
    """
    arms = [*sequence, *aside]
    better = [1.0 if i in diverged else float(p_below(d, epsilon)) for i, d in enumerate(arms)]
    worse = holm([float(p_above(d, epsilon)) for d in arms])
    verdicts = [INFERIOR if p < LEVEL else INCONCLUSIVE for p in worse]
    stopped = None
    for i in range(len(sequence)):
        if better[i] >= LEVEL:
            stopped = i
            break
        verdicts[i] = NON_INFERIOR
    for i, p in enumerate(holm(better[len(sequence) :]), start=len(sequence)):
        if p < LEVEL:
            verdicts[i] = NON_INFERIOR
    return verdicts[: len(sequence)], verdicts[len(sequence) :], stopped


def _p(differences: ArrayLike, margin: float, alternative: str) -> NDArray[np.float64]:
    d = np.asarray(differences, dtype=float)
    if d.shape[-1] < 2:
        return np.ones(d.shape[:-1])
    sign = 1.0 if alternative == "less" else -1.0
    flat = np.ptp(d, axis=-1) == 0  # no spread: the t statistic has no value, but the side is plain
    with np.errstate(all="ignore"):
        t = sign * (d.mean(axis=-1) - margin) / (d.std(axis=-1, ddof=1) / d.shape[-1] ** 0.5)
    certain = np.where(sign * (d.mean(axis=-1) - margin) < 0, 0.0, 1.0)
    return np.where(flat, certain, stdtr(d.shape[-1] - 1, np.where(flat, 0.0, t)))
