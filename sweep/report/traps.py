"""Traps that a comparison of arms falls into, found in its records and told by name.

Each function returns sentences; none where the trap is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations

import numpy as np
from scipy import stats

from sweep.report.intervals import INFERIOR, LEVEL, NON_INFERIOR, t_interval
from sweep.report.power import Power
from sweep.report.results import ArmResult, Findings
from sweep.report.search import SearchRow
from sweep.report.words import join, loss_decimals, number, plural, rate
from sweep.study.records import COMPLETE, PRUNED, SEARCH
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord

SAME = 1.1  # two effective rates whose quotient is smaller are called the same
TAIL = 0.1  # of the steps: what this many more would still bring
MOST_TOLD = 3  # trials named in one sentence

Rows = Mapping[str, np.ndarray]  # of a trial's test set: "loss" (a sum) and "targets", one each a row


def same_effective_rate(rows: Sequence[SearchRow]) -> list[str]:
    """Arms that differ in alpha alone, and whose best rates in the search make up for it.

    Under AdamW another alpha is exactly another rate of B alone, so that alpha and rate moved together here.
    """
    told = []
    alike: dict[object, list[SearchRow]] = {}
    for row in rows:
        if row.arm.r and row.best_rate:
            alike.setdefault((row.arm.cost_key, row.arm.alpha_pattern), []).append(row)
    for a, b in (pair for members in alike.values() for pair in combinations(members, 2)):
        first, second = float(a.best_rate or 0), float(b.best_rate or 0)
        ours, theirs = a.arm.scaling * first, b.arm.scaling * second
        if max(ours, theirs) / min(ours, theirs) < SAME:
            told.append(
                f"{a.arm.name} at {rate(first)} and {b.arm.name} at {rate(second)}, their best rates, differ in alpha "
                f"alone and have the same scaling × learning rate ({rate(ours)}): their comparison cannot tell alpha "
                "from the learning rate."
            )
    return told


def few_seeds(study: Study, found: Power | None) -> list[str]:
    """A margin that so few seeds would rarely show, even of an arm that is truly as good."""
    epsilon = study.confirm.epsilon
    if found is None or found.epsilon <= epsilon:
        return []
    decimals = loss_decimals(epsilon)
    more = f"about {found.seeds_needed} seeds" if found.seeds_needed else "more seeds than one would run"
    return [
        f"{plural(found.seeds, 'confirm seed')}: with paired differences that spread as here (standard deviation "
        f"{number(found.sd, decimals)}) an ε of {number(found.epsilon, decimals)} could have been shown with a chance "
        f"of 80 % for an arm that is truly as good; the declared ε of {epsilon:g} wants {more}. "
        "That an arm is inconclusive says little."
    ]


def small_test_set(
    study: Study, results: Sequence[ArmResult], reference: ArmResult | None, rows: Mapping[str, Sequence[Rows]]
) -> list[str]:
    """Claims against the reference and against full fine-tuning that other test rows might overturn.

    rows: by arm name, one for each of its seeds.

    Seeds share the test rows, so that an interval over seeds does not hold this uncertainty. Of each row the
    difference to the reference is taken, as the mean over the seeds; the mean over rows is a ratio of sums, and its
    standard error that of a ratio estimator (Cochran, Sampling Techniques, eq. 6.13).
    """
    epsilon, decimals, told = study.confirm.epsilon, loss_decimals(study.confirm.epsilon), []
    full = next((r for r in results if r.arm.is_full), None)
    claims = [(r, reference, r.verdict) for r in results] + [(r, full, r.full_verdict) for r in results]
    for result, against, verdict in claims:
        if against is None or verdict not in (NON_INFERIOR, INFERIOR):
            continue
        theirs = dict(zip(against.seeds, rows.get(against.arm.name, ()), strict=False))
        ours = dict(zip(result.seeds, rows.get(result.arm.name, ()), strict=False))
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            continue
        targets_R = ours[seeds[0]]["targets"].astype(float)
        loss_R = np.mean([ours[s]["loss"].astype(float) - theirs[s]["loss"].astype(float) for s in seeds], axis=0)
        mean, error = ratio_of_sums(loss_R, targets_R)
        half = float(stats.t.ppf(1 - LEVEL, len(loss_R) - 1)) * error
        claim = verdict == NON_INFERIOR
        end = mean + half if claim else mean - half
        if (end < epsilon) == claim:
            continue
        needed = math.ceil(len(loss_R) * (half / (epsilon - mean)) ** 2)
        told.append(
            f"{result.arm.name}: that it is {verdict} to {against.arm.group} rests on "
            f"{plural(len(loss_R), 'test row')}, too few for the claim: over rows the difference may be as "
            f"{'large' if claim else 'small'} as {number(end, decimals)} (one-sided 95 % bound), on the other side of "
            f"ε = {epsilon:g}. About {needed:,} rows would do."
        )
    return told


def ratio_of_sums(loss_R: np.ndarray, targets_R: np.ndarray) -> tuple[float, float]:
    """Σ loss / Σ targets and its standard error over rows."""
    n, total = len(loss_R), float(targets_R.sum())
    mean = float(loss_R.sum()) / total
    if n < 2:
        return mean, math.inf
    rest_R = loss_R - mean * targets_R
    return mean, math.sqrt(n / (n - 1) * float((rest_R**2).sum())) / total


def still_falling(study: Study, results: Sequence[ArmResult], trials: Mapping[str, Sequence[TrialRecord]]) -> list[str]:
    """Arms whose validation loss still fell at the last step, by more than half of ε for a tenth of the steps more.

    From the last two rungs, paired by seed: a fall that a t-interval shows to be one.
    """
    epsilon, decimals, arms = study.confirm.epsilon, loss_decimals(study.confirm.epsilon), []
    pace = 0.0
    for result in results:
        falls = []
        for trial in trials.get(result.arm.name, ()):
            if trial.state == COMPLETE and len(trial.eval_curve) > 1:
                (before, was), (after, now) = trial.eval_curve[-2:]
                falls.append((was - now) / (after - before) * TAIL * study.train.steps)
        interval = t_interval(falls) if falls else None
        if interval is None or interval.mean < epsilon / 2 or (interval.low is not None and interval.low <= 0):
            continue
        arms.append(result.arm.name)
        pace = max(pace, interval.mean)
    if not arms:
        return []
    return [
        f"{join(arms)}: the validation loss was still falling over the last rung, at a pace of up to "
        f"{number(pace, decimals)} for each tenth of the {study.train.steps} steps (ε is {epsilon:g}): longer training "
        "may change the losses and their order."
    ]


def pruned_while_catching_up(study: Study, record: StudyRecord) -> list[str]:
    """Pruned trials that were catching up with one that went on, and would have met it before the last step.

    Search trials share their seed and so their batches: the gap between two training losses is paired by step. Its
    slope over the last rung before pruning is a least-squares line; it must fall (one-sided 5 %) and reach zero before
    the last step.
    """
    by_group: dict[str, list[TrialRecord]] = {}
    for trial in record.trials:
        if trial.spec.phase == SEARCH and trial.rungs:
            by_group.setdefault(trial.spec.arm.group, []).append(trial)
    meetings = []
    for members in by_group.values():
        pruned = [t for t in members if t.state == PRUNED]
        for start, stop in {(t.rungs[-1].measurement.start, t.step) for t in pruned}:
            ahead = [t for t in members if t.step > stop]
            losses_TW = np.array([_losses(t, start, stop) for t in ahead])
            for trial in pruned:
                if (trial.rungs[-1].measurement.start, trial.step) == (start, stop) and ahead:
                    at = _meetings(np.array(_losses(trial, start, stop)) - losses_TW, start, stop, study.train.steps)
                    if np.isfinite(at).any():
                        meetings.append((trial, ahead[int(np.argmin(at))], int(at.min())))
    told = [
        f"{trial.spec.arm.name} at {rate(trial.spec.learning_rate)} (step {trial.step}; level with "
        f"{other.spec.arm.name} at {rate(other.spec.learning_rate)} by step {step} at that pace)"
        for trial, other, step in sorted(meetings, key=lambda meeting: meeting[0].spec.number)
    ]
    if not told:
        return []
    more = f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return [
        f"Pruned while catching up: {'; '.join(told[:MOST_TOLD])}{more}. A later first rung, or a larger search.keep, "
        "would have let it be seen."
    ]


def _losses(trial: TrialRecord, start: int, stop: int) -> list[float]:
    """Training losses after `start` up to `stop`, NaN where there is none."""
    rungs = [r for r in trial.rungs if r.measurement.start < stop and r.measurement.stop > start]
    curve = dict(point for rung in rungs for point in rung.train_curve)
    return [curve.get(step, math.nan) for step in range(start + 1, stop + 1)]


def _meetings(gaps_TW: np.ndarray, start: int, stop: int, steps: int) -> np.ndarray:
    """The step at which each gap, a row a trial ahead, would be closed; infinite where it is not closing by `steps`."""
    none = np.full(len(gaps_TW), math.inf)
    n = stop - start
    if n < 4:
        return none
    x_W = np.arange(n) - (n - 1) / 2
    spread = float(x_W @ x_W)
    slope_T, mean_T = gaps_TW @ x_W / spread, gaps_TW.mean(axis=1)
    rest_T = ((gaps_TW - mean_T[:, None] - slope_T[:, None] * x_W) ** 2).sum(axis=1)
    gap_T = mean_T + slope_T * x_W[-1]  # at `stop`, on the line
    with np.errstate(divide="ignore", invalid="ignore"):  # a gap that does not move at all
        t_T = slope_T / np.sqrt(rest_T / (n - 2) / spread)
        at_T = np.ceil(stop - gap_T / slope_T)
    return np.where((t_T < _t_at_level(n - 2)) & (gap_T > 0) & (at_T <= steps), at_T, none)


@cache
def _t_at_level(freedom: int) -> float:
    return float(stats.t.ppf(LEVEL, freedom))


def power_line(study: Study, findings: Findings) -> str:
    """What so many seeds could show, for the notes under the table; empty where it is not known."""
    found = findings.power
    if found is None:
        return ""
    decimals, full = loss_decimals(study.confirm.epsilon), findings.power_to_full
    to_full = f", and {number(full.epsilon, decimals)} as full fine-tuning" if full is not None else ""
    return (
        f"With {plural(found.seeds, 'seed')} and this spread (standard deviation of the paired differences "
        f"{number(found.sd, decimals)}, pooled over the arms) an ε of {number(found.epsilon, decimals)} or more is "
        f"shown with a chance of 80 % for an arm that is truly as good as {findings.reference_title(study)}{to_full}."
    )
