"""What was forgotten: the rise of the loss on source text, at the end and at a target loss that every arm reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sweep.report.confirmed import confirm_trials
from sweep.report.intervals import Interval, t_interval
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord


@dataclass(frozen=True)
class Point:
    """A trial after a rung; the first is before any step."""

    step: int
    target_loss: float  # validation loss of the study's data
    forgetting: float  # loss on the source text − the base's


@dataclass(frozen=True)
class Matched:
    """An arm's forgetting at the target loss that every arm reached, seed by seed."""

    arm: Arm
    seeds: tuple[int, ...]
    values: tuple[float, ...]  # by seed
    mean: Interval | None  # None where no seed completed
    to_baseline: Interval | None  # arm − baseline, paired by seed; None for the baseline itself, or without it
    never: tuple[int, ...]  # seeds on which the arm never reached it: its trial did not complete
    at_start: tuple[int, ...]  # seeds on which it was there before any step: the worst arm learned nothing


def course(record: StudyRecord, trial: TrialRecord) -> list[Point]:
    """From before the first step, where that was measured, to the last rung."""
    text = record.prepared.source_text if record.prepared else None
    if text is None:
        return []
    base, points = text.base_loss(trial.spec.arm), []
    for found in (rung.measurement for rung in trial.rungs):
        if found.eval_loss_at_start is not None:
            points.append(Point(0, found.eval_loss_at_start, 0.0))
        if found.eval_loss is not None and found.forgetting_loss is not None:
            points.append(Point(found.stop, found.eval_loss, found.forgetting_loss - base))
    return points


def at_the_end(record: StudyRecord, trials: Sequence[TrialRecord]) -> Interval | None:
    """Forgetting of the trials at their last step, over seeds; None where it was not measured."""
    values = [points[-1].forgetting for trial in trials if (points := course(record, trial))]
    return t_interval(values) if values else None


def forgetting_at(points: Sequence[Point], level: float) -> float | None:
    """Forgetting where the target loss first falls to `level`, linear in that loss between the two rungs around it.

    None where it never does; what the first point holds where that lies there already.
    """
    if points and points[0].target_loss <= level:
        return points[0].forgetting
    for before, after in pairwise(points):
        if before.target_loss > level >= after.target_loss:
            share = (before.target_loss - level) / (before.target_loss - after.target_loss)
            return before.forgetting + share * (after.forgetting - before.forgetting)
    return None


def match(study: Study, record: StudyRecord, baseline: str | None) -> list[Matched]:
    """Every confirmed arm at the highest of the arms' final validation losses, which is another one on each seed.

    baseline: the arm that the others are held against. The worst arm's final loss is one that all the others passed
    on their way, so that an arm that learned more is not blamed for having gone further.
    """
    courses: dict[str, dict[int, list[Point]]] = {}
    asked: dict[str, list[int]] = {}
    confirmed = [trial for arm in study.list_arms() for trial in confirm_trials(record, arm)]
    for trial in (t for t in confirmed if t.state is not None):
        name, seed = trial.spec.arm.name, trial.spec.seed
        asked.setdefault(name, []).append(seed)
        if trial.state == COMPLETE and (points := course(record, trial)):
            courses.setdefault(name, {})[seed] = points
    levels: dict[int, float] = {}
    for of_seed in courses.values():
        for seed, points in of_seed.items():
            levels[seed] = max(levels.get(seed, points[-1].target_loss), points[-1].target_loss)
    values: dict[str, dict[int, float]] = {}
    for name, of_seed in courses.items():
        at_level = {seed: forgetting_at(points, levels[seed]) for seed, points in sorted(of_seed.items())}
        values[name] = {seed: found for seed, found in at_level.items() if found is not None}
    against = values.get(baseline or "", {})
    matched = []
    for arm in (arm for arm in study.list_arms() if arm.name in asked):
        own = values.get(arm.name, {})
        pairs = [own[seed] - against[seed] for seed in own if seed in against] if arm.name != baseline else []
        matched.append(
            Matched(
                arm,
                tuple(own),
                tuple(own.values()),
                t_interval(list(own.values())) if own else None,
                t_interval(pairs) if pairs else None,
                tuple(sorted(set(asked[arm.name]) - set(own))),
                tuple(s for s in own if courses[arm.name][s][0].target_loss <= levels[s]),
            )
        )
    return matched
