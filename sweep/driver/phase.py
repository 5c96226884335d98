"""One phase of a study: every trial brought to its end, rung by rung, pack by pack, on as many workers as there are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from sweep.driver.checkpoints import refuse_absent
from sweep.driver.failures import Decision, call, decide, is_passing
from sweep.driver.groups import Group, form_groups, group_steps, judge_group
from sweep.driver.interrupts import heed
from sweep.driver.packing import Pack, Ready, at_most, name_trials, plan_packs
from sweep.driver.patience import StorageError
from sweep.driver.plan import Slot
from sweep.driver.pricing import SECONDS_TO_PROBE, allowed_seconds, seconds_aside
from sweep.driver.rebuild import set_apart, take_rebuilt
from sweep.driver.session import Session, ask, can_ask, end, settle
from sweep.study.errors import Damaged, in_one_line, is_out_of_memory, was_killed
from sweep.study.records import CONFIRM, DIVERGED, FAILED, INFEASIBLE, PRUNED, Prepared, StudyForecast, Unit
from sweep.tracking.remote import PlaceError

LOOK_EVERY = 5.0  # seconds, where a pack may hang, or waits for a worker that may come


@dataclass
class Running:
    """A pack in training, when it is taken for hung, and whether another ever was in training beside it."""

    pack: Pack
    allowed: float | None  # seconds; None: as long as it takes, or it has been ended
    due: float | None = None  # by Phase.waited; None until it has a worker
    shared: bool = False


@dataclass
class Phase:
    session: Session
    prepared: Prepared
    forecast: StudyForecast | None
    group_of: dict[int, Group]  # by the index of a slot
    pack_size: int  # less where packs found no memory
    ready: list[Ready]
    packs: deque[Pack] = field(default_factory=deque)
    exclusive: deque[Pack] = field(default_factory=deque)  # each waits until nothing else is left or in training
    running: dict[Future[Any], Running] = field(default_factory=dict)
    trouble: Exception | None = None  # that stops the study
    waited: float = 0.0  # seconds; a command that was stopped for an hour has not waited for an hour

    @property
    def slots(self) -> int:
        return max(1, self.session.executor.slots)


def run_phase(
    session: Session,
    prepared: Prepared,
    forecast: StudyForecast | None,
    slots: tuple[Slot, ...],
    keep: float,
    pack_size: int,
) -> int:
    """Bring every slot's trial to its end. Returns the size of packs that found memory.

    Raises what is no trial's fault, once the packs in training have ended.
    """
    if not slots:
        return pack_size
    session.tally.phase = slots[0].phase
    groups = form_groups(slots, session.study.rungs, keep)
    group_of = {index: group for group in groups for index in group.slots}
    ready = [member for group in groups for member in _judge(session, group)]
    phase = Phase(session, prepared, forecast, group_of, pack_size, ready)
    phase.trouble = next(iter(session.trouble), None)
    while phase.running or (phase.trouble is None and (phase.ready or phase.packs or phase.exclusive)):
        _start_packs(phase)
        _ask_ahead(phase)
        for future in _wait(phase):
            _take_up(phase, phase.running.pop(future), future)
        phase.trouble = phase.trouble or next(iter(session.trouble), None)
    if phase.trouble is not None:
        raise phase.trouble
    return phase.pack_size


def _start_packs(phase: Phase) -> None:
    """Give work to every idle worker, as far as there is some."""
    while phase.trouble is None and len(phase.running) < phase.slots:
        pack = _next_pack(phase)
        if pack is None:
            return
        try:
            pack, spared = _spare_unfit(phase, pack)
            for slot in spared:
                _leave_rung(phase, slot)
            if pack.slots:
                _begin(phase, pack)
        except StorageError as away:
            phase.trouble = away


def _ask_ahead(phase: Phase) -> None:
    """Ask the trials of the packs that come next while every worker is at work, so that none waits for it."""
    for slot in [slot for pack in islice(phase.packs, phase.slots) for slot in pack.slots]:
        if phase.trouble is not None or any(future.done() for future in phase.running):
            return
        try:
            ask(phase.session, slot)
        except StorageError as away:
            phase.trouble = away


def _begin(phase: Phase, pack: Pack) -> None:
    allowed = _allowed_seconds(phase, pack)
    phase.running[_submit(phase, pack)] = Running(pack, allowed)
    if len(phase.running) > 1:  # remembered: when a pack finds no memory, the others may have ended, or their workers
        for running in phase.running.values():
            running.shared = True


def _next_pack(phase: Phase) -> Pack | None:
    if any(running.pack.exclusive for running in phase.running.values()):
        return None
    if not phase.packs:
        turn = [member for member in phase.ready if can_ask(phase.session, member.slot)]
        taken = {member.slot.index for member in turn}
        phase.ready = [member for member in phase.ready if member.slot.index not in taken]
        _enqueue(phase, plan_packs(turn, phase.pack_size, phase.slots))
    if phase.packs:
        return phase.packs.popleft()
    return phase.exclusive.popleft() if phase.exclusive and not phase.running else None


def _enqueue(phase: Phase, packs: list[Pack] | tuple[Pack, ...]) -> None:
    """Before those that wait, so that trials which were begun come first."""
    phase.packs.extendleft(reversed([pack for pack in packs if not pack.exclusive]))
    phase.exclusive.extend(pack for pack in packs if pack.exclusive)


def _submit(phase: Phase, pack: Pack) -> Future[Any]:
    """Ask those of the pack's trials that are new, and start its rung."""
    session = phase.session
    records = [ask(session, slot) for slot in pack.slots]
    trials, last = tuple(record.spec for record in records), [record.last for record in records]
    saved = tuple(rung.saved for rung in last if rung is not None and rung.saved is not None) if pack.start else ()
    tally = session.tally
    tally.session_start = tally.session_start or time.monotonic()
    tally.running += len(trials)
    session.say(f"training {name_trials(pack)} from step {pack.start} to {pack.stop}")
    tested = _is_tested(session, pack)
    unit = Unit(session.setup, phase.prepared, trials, pack.start, pack.stop, tested, saved)
    return session.executor.submit(session.work.train_rung, unit)


def _is_tested(session: Session, pack: Pack) -> bool:
    return pack.slots[0].phase == CONFIRM and pack.stop == session.study.train.steps


def _allowed_seconds(phase: Phase, pack: Pack) -> float | None:
    """How long a pack may train before it is taken for hung; None where nothing tells."""
    study = phase.session.study
    if study.resources is not None and study.resources.seconds_per_rung is not None:
        return study.resources.seconds_per_rung
    arms = [slot.arm for slot in pack.slots]
    return allowed_seconds(phase.forecast, arms, pack.stop - pack.start, _is_tested(phase.session, pack))


def _wait(phase: Phase) -> Set[Future[Any]]:
    """The futures that have ended: none where a pack's time is over, and its worker is ended, or more may have come."""
    dues = [due for future, running in phase.running.items() if (due := _due(phase, running, future)) is not None]
    soonest = max(0.0, min(dues) - phase.waited) if dues else LOOK_EVERY
    timeout = min(soonest, LOOK_EVERY) if dues or phase.ready or phase.packs else None
    began = time.monotonic()
    finished, _ = wait(phase.running, timeout, FIRST_COMPLETED)
    phase.waited += min(time.monotonic() - began, 2 * LOOK_EVERY)
    heed()  # before an error that an interrupt was turned into counts as a trial's
    for future, running in phase.running.items():
        if future not in finished and running.due is not None and phase.waited >= running.due:
            phase.session.executor.end(future, f"did nothing for {running.allowed:.0f} s")
            running.allowed = running.due = None
    return finished


def _due(phase: Phase, running: Running, future: Future[Any]) -> float | None:
    """When to look after a pack: when its time is over. One that still waits for a worker does not hang."""
    if running.allowed is None:
        return None
    if running.due is None and not future.running():
        return phase.waited + min(running.allowed, LOOK_EVERY)
    running.due = running.due or phase.waited + running.allowed
    return running.due


def _take_up(phase: Phase, running: Running, future: Future[Any]) -> None:
    """What a pack that left training found, or what its error asks for."""
    session, pack, error = phase.session, running.pack, future.exception()
    session.tally.running -= len(pack.slots)
    if error is not None and not isinstance(error, Exception):
        raise error  # an interrupt that reached the worker
    if error is None:
        try:
            specs = [session.records[slot.name].spec for slot in pack.slots]
            refuse_absent(zip(specs, future.result(), strict=True))
        except PlaceError as absent:
            error = absent
    if error is None and pack.rebuild is None:
        for slot, measurement in zip(pack.slots, future.result(), strict=True):
            settle(session, slot.name, measurement)
        message = f"{name_trials(pack)} reached step {pack.stop}"
    elif error is not None and is_passing(error):
        phase.trouble = error
        session.say(f"{name_trials(pack)} cannot go on: {in_one_line(error)}")
        return
    else:
        decision = _decide(phase, running, future)
        message = decision.message
        if decision.most is not None:
            phase.pack_size = min(phase.pack_size, decision.most)
            phase.packs = deque(part for queued in phase.packs for part in at_most(queued, phase.pack_size))
        if decision.again:
            _enqueue(phase, decision.again)
            session.say(message)
            return
        end(session, pack.slots[0].name, decision.state, decision.reason)
    for slot in pack.slots:
        _leave_rung(phase, slot)
    session.say(message)


def _decide(phase: Phase, running: Running, future: Future[Any]) -> Decision:
    session, pack, error = phase.session, running.pack, future.exception()
    if error is None:
        return take_rebuilt(session, phase.prepared, pack, future.result()[0])
    if isinstance(error, Damaged):
        return set_apart(pack, error, session.records)
    assert isinstance(error, Exception)
    return decide(pack, error, running.shared)


def _spare_unfit(phase: Phase, pack: Pack) -> tuple[Pack, list[Slot]]:
    """End those of the pack that are known not to fit, without training them. Returns the rest, and them."""
    session, spared = phase.session, []
    for slot in pack.slots:
        reason = _no_room(phase, slot)
        if reason is not None:
            ask(session, slot)
            end(session, slot.name, INFEASIBLE, reason)
            spared.append(slot)
    return replace(pack, slots=tuple(slot for slot in pack.slots if slot not in spared)), spared


def _no_room(phase: Phase, slot: Slot) -> str | None:
    """Why a trial is known not to fit: another of its cost did not, or a solo probe of it does not.

    What is forecast not to fit is probed first where memory is the machine's own: there the kernel ends the process
    that takes too much, and that must not be the one that trains. Its pack is exclusive: nothing else is in training.
    """
    session, key = phase.session, slot.arm.cost_key
    found_by = session.unfit_by(key)
    if found_by is not None:
        return f"does not fit on this device, as trial {found_by} found; not run"
    if not slot.doubtful or key in session.ran or not phase.prepared.device.startswith("cpu"):
        return None
    session.say(f"{key} is not expected to fit and is probed in a process of its own")
    try:
        seconds, probe = seconds_aside(session.study, SECONDS_TO_PROBE), session.work.probe
        call(session.executor, f"probing {key}", probe, session.setup, phase.prepared, slot.arm, seconds=seconds)
    except Exception as error:
        heed()
        if is_out_of_memory(error) or was_killed(error):
            return f"does not fit on this device ({why_not(error)})"
    return None


def why_not(error: BaseException) -> str:
    """Why a probe ended."""
    return in_one_line(error) + ("; its process was killed, perhaps for want of memory" if was_killed(error) else "")


def _leave_rung(phase: Phase, slot: Slot) -> None:
    """Count a trial whose rung is over; the last of its group lets the group be judged."""
    session, group = phase.session, phase.group_of[slot.index]
    before = group_steps(group)
    group.on_their_way -= 1
    if session.records[slot.name].state in (DIVERGED, INFEASIBLE, FAILED):
        group.alive -= 1
    session.tally.steps_left += group_steps(group) - before
    if not group.on_their_way:
        phase.ready += _judge(session, group)


def _judge(session: Session, group: Group) -> list[Ready]:
    """Prune a group none of whose trials is in training. Returns who may go on."""
    before = group_steps(group) if group.rung else None
    verdict = judge_group(group, session.records)
    if before is not None:
        session.tally.steps_left += group_steps(group) - before
    for index, rung in verdict.pruned:
        slot = group.slots[index]
        end(
            session, slot.name, PRUNED, f"pruned at rung {rung}: others of {slot.arm.group} had a lower validation loss"
        )
    start = max((rung for rung in group.rungs if rung < verdict.rung), default=0)
    return [Ready(group.slots[index], start, verdict.rung) for index in verdict.go_on]
