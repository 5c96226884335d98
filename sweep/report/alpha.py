"""Is alpha a learning rate? How a change of alpha moves the best rate, from trials at every rate of every ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sweep.report.intervals import Interval, t_interval
from sweep.report.words import loss_decimals, number, plural, signed, span
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE, CONFIRM
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

ALIKE = 1.01  # products of ratio and rate that differ by less are one

Cells = dict[tuple[float, float], dict[int, float]]  # (alpha ratio, learning rate) -> test loss by seed


@dataclass(frozen=True)
class AlphaFit:
    """Arms that differ in alpha alone, confirmed at every rate. Losses are test losses of the confirm trials."""

    title: str
    arms: tuple[Arm, ...]
    cells: Cells
    exponent: Interval | None  # γ in best rate ∝ ratio^−γ, over seeds; 1: alpha is a learning rate, 0: it does nothing
    swap: Interval | None  # loss at twice the alpha and half the rate, less that at the rate itself; over seeds
    swapped: int  # pairs of cells behind that


def alpha_fits(study: Study, record: StudyRecord) -> list[AlphaFit]:
    """One for each set of arms that differ in alpha alone, of which two ratios have two confirmed rates or more."""
    by_kind: dict[str, list[Arm]] = {}
    for arm in study.list_arms():
        if arm.r and not arm.alpha_pattern:
            by_kind.setdefault(arm.cost_key, []).append(arm)
    fits = []
    for kind, arms in by_kind.items():
        cells = _cells(record, arms)
        several = [a for a in arms if len([rate for ratio, rate in cells if ratio == a.alpha_ratio]) > 1]
        if len(several) > 1:
            swap, swapped = _swap(cells)
            title = arms[0].group if len(by_kind) == len({a[0].group for a in by_kind.values()}) else kind
            fits.append(AlphaFit(title, tuple(arms), cells, _exponent(cells), swap, swapped))
    return fits


def alpha_sentences(study: Study, fits: Sequence[AlphaFit]) -> list[str]:
    """What each says, with its interval."""
    return [_sentence(study, fit, len(fits) > 1) for fit in fits]


def _cells(record: StudyRecord, arms: list[Arm]) -> Cells:
    names = {arm.name for arm in arms}
    cells: Cells = {}
    for trial in record.trials:
        spec, last = trial.spec, trial.last
        if spec.phase == CONFIRM and spec.arm.name in names and trial.state == COMPLETE and last is not None:
            cell = cells.setdefault((spec.arm.alpha_ratio, spec.learning_rate), {})
            cell[spec.seed] = last.test_metrics["test_loss"]
    return cells


def _exponent(cells: Cells) -> Interval | None:
    """γ over the seeds that give one; None under two of them."""
    seeds = sorted({seed for losses in cells.values() for seed in losses})
    found = [best_exponent({cell: losses[seed] for cell, losses in cells.items() if seed in losses}) for seed in seeds]
    inside = [gamma for gamma in found if gamma is not None]
    return t_interval(inside) if len(inside) > 1 else None


def best_exponent(losses: Mapping[tuple[float, float], float]) -> float | None:
    """γ in best rate ∝ ratio^−γ, from losses by (ratio, rate): the least-squares slope of the logs.

    A ratio whose best rate lies on the edge of what was tried is left out, since a better one may lie beyond; None
    where fewer than three ratios are left (of two ratios, both must be).
    """
    ratios = sorted({ratio for ratio, _ in losses})
    best = {ratio: best_rate({rate: loss for (own, rate), loss in losses.items() if own == ratio}) for ratio in ratios}
    inside = [(ratio, rate) for ratio, rate in best.items() if rate is not None]
    if len(inside) < max(2, min(3, len(ratios))):
        return None
    logs = np.log(inside)
    return -float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Where a parabola through the lowest loss and its two neighbours is lowest, both axes in logs; None on an edge."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1):
        return None
    around = rates[at - 1 : at + 2]
    a, b, _ = np.polyfit(np.log(around), np.log([losses[rate] for rate in around]), 2)
    return float(np.exp(-b / (2 * a)))


def _swap(cells: Cells) -> tuple[Interval | None, int]:
    """The mean over all pairs of cells with one product of ratio and rate, of ratios next to each other; by seed."""
    ratios = sorted({ratio for ratio, _ in cells})
    pairs = [
        (higher, lower)
        for lower in cells
        for higher in cells
        if ratios.index(higher[0]) == ratios.index(lower[0]) + 1
        and max(math.prod(higher) / math.prod(lower), math.prod(lower) / math.prod(higher)) < ALIKE
    ]
    seeds = set.intersection(*(set(cells[cell]) for pair in pairs for cell in pair)) if pairs else set()
    differences = [float(np.mean([cells[a][seed] - cells[b][seed] for a, b in pairs])) for seed in sorted(seeds)]
    return (t_interval(differences) if differences else None), len(pairs)


def _sentence(study: Study, fit: AlphaFit, named: bool) -> str:
    where = f"At {fit.title}: the" if named else "The"
    if fit.exponent is None:
        return (
            f"{where} exponent of the best learning rate in alpha cannot be given: on fewer than two seeds do the best "
            "rates of enough ratios lie within the grid."
        )
    gamma = fit.exponent
    assert gamma.low is not None and gamma.high is not None
    named_values = ((0.0, "0 (alpha does nothing)"), (0.5, "1/2"), (1.0, "1 (alpha is a learning rate)"))
    held = [words for value, words in named_values if gamma.low <= value <= gamma.high]
    fits = f"which does not exclude {' or '.join(held)}" if held else "which excludes 0, 1/2 and 1"
    ends = span(gamma.low, gamma.high, 2)
    text = (
        f"{where} best learning rate fell with alpha as (alpha / r) to the power of {signed(-gamma.mean, 2)} (exponent "
        f"{number(gamma.mean, 2)}, 95 % interval {ends}, {plural(gamma.n, 'seed')}; a ratio's best rate is the lowest "
        f"point of a parabola through its lowest loss and the two beside it, and one on the edge is left out), {fits}."
    )
    if fit.swap is None or fit.swap.low is None:
        return text
    decimals = loss_decimals(study.confirm.epsilon)
    side = "higher" if fit.swap.mean > 0 else "lower"
    return text + (
        f" More alpha and less rate at one product of the two, next ratios held against each other in {fit.swapped} "
        f"pairs of cells, made the test loss {number(abs(fit.swap.mean), decimals)} {side} on average "
        f"(95 % interval {span(fit.swap.low, fit.swap.high, decimals, plus=True)}, {fit.swap.n} seeds)."
    )
