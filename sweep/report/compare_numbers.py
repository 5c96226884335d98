"""Several studies side by side: their arms matched by rank, shares of full fine-tuning's cost, Welch's intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import stats

from sweep.report.compare_rules import Ran, loss_reason
from sweep.report.intervals import Interval, holm, t_interval
from sweep.report.results import ArmResult, Findings
from sweep.report.statistics import confirmed_of_ranks, find
from sweep.report.words import join
from sweep.study.arms import FULL, Arm
from sweep.study.records import Cost
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord


@dataclass(frozen=True)
class Compared:
    """One of the studies that a report compares."""

    study: Study
    record: StudyRecord
    findings: Findings
    of_ranks: dict[int, Arm]  # the confirmed arm of each rank, by search where there are several

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def ran(self) -> Ran:
        return self.study, self.record.prepared

    @property
    def pick(self) -> ArmResult | None:
        return self.findings.result(self.findings.recommended)

    @property
    def full_cost(self) -> Cost | None:
        return self.record.costs.get(FULL)


@dataclass(frozen=True)
class Matched:
    """What the studies confirmed of one rank, or of one arm where a study confirmed several of a rank."""

    title: str
    results: tuple[ArmResult | None, ...]  # one a study


@dataclass(frozen=True)
class Shares:
    """Of full fine-tuning's cost in the same study, each from solo probes; None where one of the two is unknown."""

    parameters: float | None
    memory: float | None
    step_time: float | None


@dataclass(frozen=True)
class Contrast:
    """(arm − reference) of study `other` less (arm − reference) of study `one`, in nats."""

    title: str
    one: str
    other: str
    first: Interval  # arm − reference in `one`
    second: Interval  # in `other`
    mean: float
    low: float  # Welch's two-sided 95 % interval, each for itself
    high: float
    p: float  # two-sided; adjusted by Holm over all contrasts of the report


def compare(studies: Sequence[tuple[Study, StudyRecord]]) -> tuple[Compared, ...]:
    return tuple(
        Compared(study, record, find(study, record), confirmed_of_ranks(study, record)) for study, record in studies
    )


def matched(compared: Sequence[Compared]) -> tuple[Matched, ...]:
    """Rows of arms that ended a confirm trial in any study: smallest rank first, full fine-tuning last.

    A row is a rank (or a prefix's length), whatever alpha ratio each search chose there; where a study confirmed
    several arms of it (`finalists: arm`), they are matched by their names instead.
    """
    groups = [Counter(r.arm.group for r in c.findings.arms) for c in compared]
    several = {group for counts in groups for group, n in counts.items() if n > 1}
    arms: dict[str, Arm] = {}
    by_title: list[dict[str, ArmResult]] = []
    for c in compared:
        own = {r.arm.name if r.arm.group in several else r.arm.group: r for r in c.findings.arms}
        by_title.append(own)
        arms |= {title: r.arm for title, r in own.items() if title not in arms}
    order = sorted(arms, key=lambda title: _place(arms[title]))
    return tuple(Matched(title, tuple(own.get(title) for own in by_title)) for title in order)


def shares(result: ArmResult, full: Cost | None) -> Shares:
    cost, parameters = result.cost, result.trainable_params
    if full is None:
        return Shares(None, None, None)
    return Shares(
        parameters / full.trainable_params if parameters and full.trainable_params else None,
        cost.peak_memory_bytes / full.peak_memory_bytes if cost and full.peak_memory_bytes else None,
        cost.step_time_s / full.step_time_s if cost and full.step_time_s else None,
    )


def contrasts(compared: Sequence[Compared]) -> tuple[tuple[Contrast, ...], tuple[str, ...]]:
    """Differences between the studies' differences to the reference, and why the others are left out, a line a pair.

    Given only where both studies have the same reference arm and the same arm, on the same data, with the same kind of
    loss: elsewhere the two numbers are of different quantities. Two means of differences, each paired by seed within
    its study, are held against each other with Welch's t, which asks for no equal spread. They are not paired across
    studies, even with equal seeds and data: a seed draws other weights in another model and other batches at another
    batch size, so what would be paired is not known to go together. They are treated as independent, which two studies
    of equal seeds, model and data are not: where their differences correlate positively over the seeds, Welch's
    interval is too wide; where they correlated negatively, it would be too narrow.
    An arm that diverged on a seed is left out, as the seeds that are left were chosen by their outcome.
    """
    found: list[Contrast] = []
    reasons: list[str] = []
    for one, other in combinations(compared, 2):
        why = _why_not(one, other)
        if why:
            reasons.append(f"{one.name} and {other.name}: {why}.")
            continue
        left_out = []
        for row in matched([one, other]):
            a, b = row.results
            if one.findings.reference in {r.arm.name for r in (a, b) if r is not None}:
                continue
            why = _why_not_arm(one, other, a, b)
            if why:
                left_out.append(f"{row.title} ({why})")
            else:
                assert a is not None and b is not None
                found.append(_contrast(row.title, one, other, a, b))
        if left_out:
            reasons.append(f"{one.name} and {other.name}: without {join(left_out)}.")
    adjusted = holm([c.p for c in found])
    return tuple(replace(c, p=p) for c, p in zip(found, adjusted, strict=True)), tuple(reasons)


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean of b less mean of a, its two-sided 95 % interval, and p of the two-sided test that it is 0, by Welch's t
    (`scipy.stats.ttest_ind`). Without any spread the interval is the difference itself. Two values each at least."""
    mean = float(np.mean(b) - np.mean(a))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    test = stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high), float(test.pvalue)


def to_reference(c: Compared, result: ArmResult) -> list[float]:
    """Test loss of the arm − that of the study's reference, over the seeds that both completed."""
    reference = c.findings.result(c.findings.reference)
    theirs = dict(zip(reference.seeds, reference.test_losses, strict=True)) if reference else {}
    return [loss - theirs[s] for s, loss in zip(result.seeds, result.test_losses, strict=True) if s in theirs]


def _place(arm: Arm) -> tuple[bool, bool, int, int, float, str]:
    """Ranks, then prefixes, then full fine-tuning."""
    return arm.is_full, not arm.r, arm.r, arm.prefix_length, arm.alpha_ratio, arm.name


def _why_not(one: Compared, other: Compared) -> str:
    """Why no difference of the two may be held against the other's; empty where they may."""
    for c in (one, other):
        if c.findings.reference is None:
            return f"{c.name} has no confirmed loss of its reference, rank {c.study.confirm.reference}"
        if c.findings.unlearned == c.findings.reference:
            return f"the reference of {c.name} is not shown to have learned anything"
    if one.findings.reference != other.findings.reference:
        return f"their references are different arms, {one.findings.reference} and {other.findings.reference}"
    return loss_reason(one.ran, other.ran)


def _why_not_arm(one: Compared, other: Compared, a: ArmResult | None, b: ArmResult | None) -> str:
    if a is None or b is None:
        return f"confirmed in {one.name if b is None else other.name} alone"
    if a.arm.name != b.arm.name:
        return f"{a.arm.name} in {one.name}, {b.arm.name} in {other.name}"
    for c, result in ((one, a), (other, b)):
        reference = c.findings.result(c.findings.reference)
        if result.diverged_seeds or (reference and reference.diverged_seeds):
            return f"{'it' if result.diverged_seeds else 'the reference'} diverged on a seed in {c.name}"
        if len(to_reference(c, result)) < 2:
            return f"fewer than two paired seeds in {c.name}"
    return ""


def _contrast(title: str, one: Compared, other: Compared, a: ArmResult, b: ArmResult) -> Contrast:
    first, second = to_reference(one, a), to_reference(other, b)
    mean, low, high, p = welch(first, second)
    return Contrast(title, one.name, other.name, t_interval(first), t_interval(second), mean, low, high, p)
