"""Is alpha a learning rate? How a change of alpha moves the best rate, from trials at every rate of every ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sweep.report.intervals import Interval, t_interval
from sweep.report.words import join, plural, signed, span
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE, CONFIRM
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

MEANT = {0.0: "0 (alpha does nothing)", 0.5: "\N{MINUS SIGN}1/2", 1.0: "\N{MINUS SIGN}1 (alpha is a learning rate)"}

Cells = dict[tuple[float, float], dict[int, float]]  # (alpha ratio, learning rate) -> test loss by seed


@dataclass(frozen=True)
class AlphaFit:
    """Arms that differ in alpha alone, confirmed at every rate. Losses are test losses of the confirm trials."""

    title: str
    cells: Cells
    seeds: int  # of the confirm phase
    exponent: Interval | None  # γ in best rate ∝ ratio^−γ, over seeds; 1: alpha is a learning rate, 0: it does nothing
    without: tuple[Interval, ...]  # the same with each of the ratios left out, where three are left
    on_edge: tuple[float, ...]  # ratios that are left out, since their best rate lies on the edge of what was tried


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
            windows, on_edge = best_windows(cells)
            title = arms[0].group if len(by_kind) == len({a[0].group for a in by_kind.values()}) else kind
            exponent, without = exponent_of(cells, windows), exponents_without(cells, windows)
            fits.append(AlphaFit(title, cells, len(study.confirm.seeds), exponent, without, on_edge))
    return fits


def alpha_sentences(fits: Sequence[AlphaFit]) -> list[str]:
    """What each says, with its interval."""
    return [_sentence(fit, len(fits) > 1) for fit in fits]


def _cells(record: StudyRecord, arms: list[Arm]) -> Cells:
    cells: Cells = {}
    for arm in arms:
        for trial in record.trials_of(CONFIRM, arm.name):
            if trial.state == COMPLETE and trial.last is not None:
                cell = cells.setdefault((arm.alpha_ratio, trial.spec.learning_rate), {})
                cell[trial.spec.seed] = trial.last.test_metrics["test_loss"]
    return cells


def best_windows(cells: Cells) -> tuple[dict[float, list[float]], tuple[float, ...]]:
    """The best rate of each ratio with the two beside it, by the mean over seeds; and the ratios whose best rate is on
    the edge of what was tried.

    Decided once for all seeds: were each seed to choose, noise would decide which of them count.
    """
    windows, on_edge = {}, []
    for ratio in sorted({ratio for ratio, _ in cells}):
        rates = sorted(rate for own, rate in cells if own == ratio)
        at = min(range(len(rates)), key=lambda i: np.mean(list(cells[ratio, rates[i]].values())))
        if at in (0, len(rates) - 1):
            on_edge.append(ratio)
        else:
            windows[ratio] = rates[at - 1 : at + 2]
    return windows, tuple(on_edge)


def exponent_of(cells: Cells, windows: Mapping[float, Sequence[float]]) -> Interval | None:
    """γ over the seeds that completed the windows' cells; None under two of them, or three ratios (of two, two)."""
    if len(windows) < max(2, min(3, len({ratio for ratio, _ in cells}))):
        return None
    wanted = [(ratio, rate) for ratio, rates in windows.items() for rate in rates]
    seeds = sorted(set.intersection(*(set(cells[cell]) for cell in wanted)))
    found = []
    for seed in seeds:
        best = [lowest_point({rate: cells[ratio, rate][seed] for rate in rates}) for ratio, rates in windows.items()]
        if all(rate is not None for rate in best):
            found.append(-float(np.polyfit(np.log(list(windows)), np.log(np.array(best, dtype=float)), 1)[0]))
    return t_interval(found) if len(found) > 1 else None


def exponents_without(cells: Cells, windows: Mapping[float, Sequence[float]]) -> tuple[Interval, ...]:
    """γ with one ratio left out at a time: how much hangs on each. Empty where fewer than three would be left."""
    if len(windows) < 4:
        return ()
    found = [exponent_of(cells, {r: rates for r, rates in windows.items() if r != left_out}) for left_out in windows]
    return tuple(interval for interval in found if interval is not None)


def lowest_point(losses: Mapping[float, float]) -> float | None:
    """Where the parabola through three losses by rate is lowest, in logs; None where it has no lowest point."""
    a, b, _ = np.polyfit(np.log(list(losses)), np.log(list(losses.values())), 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else None


def _sentence(fit: AlphaFit, named: bool) -> str:
    where = f"At {fit.title} the" if named else "The"
    if fit.exponent is None:
        return (
            f"{where} exponent of the best learning rate in alpha cannot be given: too few ratios have their best rate "
            "within the grid, or fewer than two seeds completed the trials around it."
        )
    gamma = fit.exponent
    assert gamma.low is not None and gamma.high is not None
    moved = (
        "fell with alpha"
        if gamma.low > 0
        else "rose with alpha"
        if gamma.high < 0
        else "is not shown to move with alpha"
    )
    left_out = f"; without ratio {join([f'{r:g}' for r in fit.on_edge])}, best on the edge" if fit.on_edge else ""
    seeds = f"{gamma.n} of {plural(fit.seeds, 'seed')}{left_out}"
    ends = f"95 % interval over seeds {2**-gamma.high:.2f} to {2**-gamma.low:.2f}, {seeds}"
    exponents = f"{signed(-gamma.mean, 2)} ({span(-gamma.high, -gamma.low, 2, plus=True)})"
    return (
        f"{where} best learning rate {moved}: for twice the alpha it is {2**-gamma.mean:.2f} times as high ({ends}), "
        f"an exponent of {exponents}. {_excluded(gamma, fit.without)}"
    )


def _excluded(gamma: Interval, without: Sequence[Interval]) -> str:
    """Which exponents the interval excludes: with any one ratio left out, with all of them alone, or not."""
    always, once, held = [], [], []
    for value, words in MEANT.items():
        if _holds(gamma, value):
            held.append(words)
        elif any(_holds(other, value) for other in without):
            once.append(words)
        else:
            always.append(words)
    parts = [f"excludes {join(always)}" + (", whichever ratio is left out" if without else "")] if always else []
    parts += [f"excludes {join(once)} with all ratios alone, not with one left out"] if once else []
    parts += [f"does not exclude {join(held)}"] if held else []
    means = [other.mean for other in without]
    moves = f" With one ratio left out it is {span(-max(means), -min(means), 2, plus=True)}." if means else ""
    return f"The interval {'; it '.join(parts)}.{moves}"


def _holds(interval: Interval, value: float) -> bool:
    return interval.low is not None and interval.high is not None and interval.low <= value <= interval.high
