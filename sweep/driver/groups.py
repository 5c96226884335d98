"""Slots that are judged together: in the search those of one rank; where nothing is pruned, each its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sweep.driver.plan import Finalists, Slot, confirm_slots, search_slots
from sweep.driver.pruning import Standing, Verdict, judge, steps_left
from sweep.study.finalists import count_confirm_trials
from sweep.study.schema import Study
from sweep.tracking.journal import TrialRecord


@dataclass
class Group:
    """Its slots, and how many of their trials are still in it."""

    slots: dict[int, Slot]  # by index
    rungs: tuple[int, ...]
    keep: float
    rung: int = 0  # the rung that its trials are on their way to
    on_their_way: int = 0
    alive: int = 0  # with those that wait at the rung


def form_groups(slots: Iterable[Slot], rungs: tuple[int, ...], keep: float) -> list[Group]:
    """Slots by their arm's group, its rank above all; without pruning nobody waits for anybody."""
    members: dict[int | str, dict[int, Slot]] = {}
    for slot in slots:
        members.setdefault(slot.index if keep == 1.0 else slot.arm.group, {})[slot.index] = slot
    return [Group(found, rungs, keep) for found in members.values()]


def judge_group(group: Group, records: Mapping[str, TrialRecord]) -> Verdict:
    """Judge a group none of whose trials is in training, and count it anew."""
    standings = [_standing(slot, records.get(slot.name)) for slot in group.slots.values()]
    verdict = judge(standings, group.rungs, group.keep)
    group.rung, group.on_their_way = verdict.rung, len(verdict.go_on)
    group.alive = len(verdict.go_on) + len(verdict.waiting)
    return verdict


def group_steps(group: Group) -> int:
    """Trial-steps that the group has still before it."""
    return steps_left(group.on_their_way, group.alive, group.rung, group.rungs, group.keep)


def steps_ahead(study: Study, records: Mapping[str, TrialRecord], finalists: Finalists) -> int:
    """Trial-steps that a study in which nothing is in training has still before it."""
    groups = form_groups(search_slots(study), study.rungs, study.search.keep)
    groups += form_groups(confirm_slots(study, finalists), study.rungs, keep=1.0)
    total = 0
    for group in groups:
        judge_group(group, records)
        total += group_steps(group)
    return total if finalists else total + count_confirm_trials(study) * study.train.steps


def _standing(slot: Slot, record: TrialRecord | None) -> Standing:
    if record is None:
        return Standing(slot.index, {}, ended=False)
    measurements = [rung.measurement for rung in record.rungs]
    losses = {m.stop: m.eval_loss for m in measurements if m.eval_loss is not None}
    return Standing(slot.index, losses, ended=record.state is not None)
