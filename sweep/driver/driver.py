"""What to do next: ask, pack, submit, report, prune, tell; the search, the confirm phase, the cost of each arm."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweep.driver.beginning import begin
from sweep.driver.groups import Group, form_groups, group_steps, judge_group, steps_ahead
from sweep.driver.interrupts import heed, interruptible
from sweep.driver.packing import (
    Pack,
    Ready,
    at_most,
    before_doubtful,
    calibration_lines,
    disturbance,
    halves,
    plan_packs,
)
from sweep.driver.patience import PATIENCE_S, Patience, StorageError
from sweep.driver.plan import Finalists, Slot, confirm_slots, pick_finalists, search_slots
from sweep.driver.pricing import forecast_lines, priced
from sweep.driver.progress import Progress, snapshot, start_tally
from sweep.driver.question import Busy, QuestionChanged, hold_lock, name_holder, refuse_other_question
from sweep.driver.session import Session, ask, can_ask, end, settle, warn
from sweep.driver.takeup import refuse_other_inputs, take_up
from sweep.execution.executor import Executor
from sweep.execution.worker import Work
from sweep.report.truncation import truncation_lines
from sweep.study.errors import FieldError, in_one_line, is_out_of_memory, was_killed
from sweep.study.finalists import count_confirm_trials
from sweep.study.home import StudyFolder
from sweep.study.records import (
    CONFIRM,
    DIVERGED,
    FAILED,
    INFEASIBLE,
    PRUNED,
    Cost,
    Prepared,
    StudyForecast,
    Unit,
    to_json,
)
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, append, read_study_record

__all__ = ["Busy", "Progress", "QuestionChanged", "StorageError", "run_study"]


def run_study(
    study: Study,
    folder: StudyFolder,
    executor: Executor,
    storage_url: str,
    cache: Path,
    work: Work = Work(),
    listen: Callable[[Progress], None] = lambda progress: None,
    patience_s: float = PATIENCE_S,
) -> None:
    """Run a study, or take it up where it stopped; once it is finished, change nothing.

    patience_s: how long a call waits for a storage that does not answer.

    Failed trials do not end it: the journal tells of them. Raises Busy, QuestionChanged, StorageError, OSError where
    the home cannot be written, FieldError where model or data cannot be read or have changed, and what `work.prepare`
    raises about the study. It may be killed at any point, and goes on once the trouble is over.
    """
    with interruptible(), hold_lock(folder) as lock:
        known = read_study_record(folder)
        if known.prepared is not None:  # until then nothing has run, and the question may still be mended
            refuse_other_question(study, folder)
        if known.finished_at is not None:
            listen(_finished(study, known))
            return
        setup = study.setup(str(cache))
        if known.prepared is not None:
            refuse_other_inputs(executor, work, setup, known.prepared)
        name_holder(lock)
        session = begin(study, folder, executor, work, setup, known, Patience(storage_url, patience_s), listen)
        take_up(session)
        session.tally.steps_left = steps_ahead(study, session.records, known.finalists)
        prepared = known.prepared or _prepare(session)
        forecast = known.forecast if session.records or known.forecast else _forecast(session, prepared)
        slots = search_slots(study, forecast.doubtful if forecast else ())
        pack_size = _run_phase(session, prepared, slots, study.search.keep, prepared.pack_size)
        finalists = known.finalists or _choose(session, slots)
        _run_phase(session, prepared, confirm_slots(study, finalists), 1.0, pack_size)
        if session.trouble:
            raise session.trouble[0]
        _probe_costs(session, prepared, known.costs)
        append(folder.journal, "finished")
        session.tally.phase = "done"
        session.say("finished")


def _prepare(session: Session) -> Prepared:
    made = session.setup.pretrain is not None
    session.say("making the base model, reading the data" if made else "reading the model and the data")
    arms = session.study.list_arms()
    prepared: Prepared = session.executor.submit(session.work.prepare, session.setup, arms).result()
    append(session.folder.journal, "prepared", prepared=to_json(prepared))
    for line in disturbance(prepared):
        warn(session, line)
        session.say(line)
    for line in (*truncation_lines(prepared, session.study.task), *calibration_lines(prepared)):
        session.say(line)
    return prepared


def _forecast(session: Session, prepared: Prepared) -> StudyForecast | None:
    """What the arms will cost, before the first trial; None, and a warning, where that cannot be told."""
    session.say("forecasting what the arms cost: a few probe steps of some")
    arms = session.study.list_arms()
    try:
        found = session.executor.submit(session.work.forecast, session.setup, prepared, arms).result()
    except FieldError:
        raise
    except Exception as error:
        heed()
        warn(session, f"what the arms cost could not be forecast: {in_one_line(error)}")
        return None
    forecast = priced(session.study, prepared, found)
    append(session.folder.journal, "forecast", forecast=to_json(forecast))
    for line in forecast_lines(forecast):
        session.say(line)
    return forecast


def _run_phase(session: Session, prepared: Prepared, slots: tuple[Slot, ...], keep: float, pack_size: int) -> int:
    """Bring every slot's trial to its end, rung by rung, pack by pack. Returns the size of packs that found memory.

    Raises what is no trial's fault, once the packs in training have ended.
    """
    if not slots:
        return pack_size
    session.tally.phase = slots[0].phase
    groups = form_groups(slots, session.study.rungs, keep)
    group_of = {index: group for group in groups for index in group.slots}
    ready = [member for group in groups for member in _judge(session, group)]
    packs: deque[Pack] = deque()
    running: dict[Future[Any], Pack] = {}
    trouble: Exception | None = next(iter(session.trouble), None)
    while running or (trouble is None and (ready or packs)):
        while trouble is None and len(running) < session.executor.slots:
            if not packs:
                askable = {member.slot.index for member in ready if can_ask(session, member.slot)}
                turn = before_doubtful([m for m in ready if m.slot.index in askable], bool(running))
                packs.extend(plan_packs(turn, pack_size))
                taken = {member.slot.index for member in turn}
                ready = [member for member in ready if member.slot.index not in taken]
            if not packs:
                break
            pack, spared = _spare_unfit(session, prepared, packs.popleft())
            for slot in spared:
                ready += _leave_rung(session, slot, group_of[slot.index])
            if not pack.slots:
                continue
            try:
                running[_submit(session, prepared, pack)] = pack
            except StorageError as away:
                trouble = away
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        heed()  # before an error that an interrupt was turned into counts as a trial's
        for future in finished:
            pack = running.pop(future)
            session.tally.running -= len(pack.slots)
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error  # an interrupt that reached the worker
            if error is not None and _is_passing(error):
                trouble = error
                session.say(f"{_trials(pack)} cannot go on: {in_one_line(error)}")
                continue
            if error is not None and len(pack.slots) > 1:
                if is_out_of_memory(error):
                    pack_size = min(pack_size, max(1, len(pack.slots) // 2))
                    packs = deque(part for queued in packs for part in at_most(queued, pack_size))
                packs.extendleft(reversed(halves(pack)))
                session.say(f"{_trials(pack)} failed together and are tried in halves: {in_one_line(error)}")
                continue
            if error is not None and is_out_of_memory(error):
                end(session, pack.slots[0].name, INFEASIBLE, f"does not fit on this device ({in_one_line(error)})")
                message = f"{_trials(pack)} does not fit on this device: {in_one_line(error)}"
            elif error is not None:
                end(session, pack.slots[0].name, FAILED, in_one_line(error))
                message = f"{_trials(pack)} failed: {in_one_line(error)}"
            else:
                for slot, measurement in zip(pack.slots, future.result(), strict=True):
                    settle(session, slot.name, measurement)
                message = f"{_trials(pack)} reached step {pack.stop}"
            for slot in pack.slots:
                ready += _leave_rung(session, slot, group_of[slot.index])
            session.say(message)
        trouble = trouble or next(iter(session.trouble), None)
    if trouble is not None:
        raise trouble
    return pack_size


def _is_passing(error: Exception) -> bool:
    """Whether an error is no trial's fault and may be over when the command is run again: files, disks, networks."""
    return isinstance(error, FieldError) or (isinstance(error, OSError) and error.errno != errno.ENOMEM)


def _submit(session: Session, prepared: Prepared, pack: Pack) -> Future[Any]:
    """Ask those of the pack's trials that are new, and start its rung."""
    trials = tuple(ask(session, slot).spec for slot in pack.slots)
    test = pack.slots[0].phase == CONFIRM and pack.stop == session.study.train.steps
    tally = session.tally
    tally.session_start = tally.session_start or time.monotonic()
    tally.running += len(trials)
    session.say(f"training {_trials(pack)} from step {pack.start} to {pack.stop}")
    return session.executor.submit(
        session.work.train_rung, Unit(session.setup, prepared, trials, pack.start, pack.stop, test)
    )


def _spare_unfit(session: Session, prepared: Prepared, pack: Pack) -> tuple[Pack, list[Slot]]:
    """End those of the pack that are known not to fit, without training them. Returns the rest, and them."""
    spared = []
    for slot in pack.slots:
        reason = _no_room(session, prepared, slot)
        if reason is not None:
            ask(session, slot)
            end(session, slot.name, INFEASIBLE, reason)
            spared.append(slot)
    return replace(pack, slots=tuple(slot for slot in pack.slots if slot not in spared)), spared


def _no_room(session: Session, prepared: Prepared, slot: Slot) -> str | None:
    """Why a trial is known not to fit: another of its cost did not, or a solo probe of it does not.

    What is forecast not to fit is probed first where memory is the machine's own: there the kernel ends the process
    that takes too much, and that must not be this one.
    """
    key = slot.arm.cost_key
    found_by = session.unfit_by(key)
    if found_by is not None:
        return f"does not fit on this device, as trial {found_by} found; not run"
    if not slot.doubtful or key in session.ran or not prepared.device.startswith("cpu"):
        return None
    session.say(f"{key} is not expected to fit and is probed in a process of its own")
    error = session.executor.submit(session.work.probe, session.setup, prepared, slot.arm).exception()
    heed()
    if error is None or not (is_out_of_memory(error) or was_killed(error)):
        return None
    return f"does not fit on this device ({_why_not(error)})"


def _leave_rung(session: Session, slot: Slot, group: Group) -> list[Ready]:
    """Count a trial whose rung is over; the last of its group lets the group be judged. Returns who may go on."""
    before = group_steps(group)
    group.on_their_way -= 1
    if session.records[slot.name].state in (DIVERGED, INFEASIBLE, FAILED):
        group.alive -= 1
    session.tally.steps_left += group_steps(group) - before
    return [] if group.on_their_way else _judge(session, group)


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


def _choose(session: Session, slots: tuple[Slot, ...]) -> Finalists:
    """Pick the finalists and write them down."""
    finalists, warnings = pick_finalists(session.study, slots, session.records)
    for message in warnings:
        warn(session, message)
    append(session.folder.journal, "finalists", finalists=[list(entry) for entry in finalists])
    tally = session.tally
    tally.total = len(slots) + (count_confirm_trials(session.study, len(finalists)) if finalists else 0)
    tally.steps_left = steps_ahead(session.study, session.records, finalists) if finalists else 0
    session.say("finalists: " + (", ".join(f"{arm} at {rate:g}" for arm, rate in finalists) or "none"))
    return finalists


def _probe_costs(session: Session, prepared: Prepared, known: dict[str, Cost]) -> None:
    """What each arm costs alone, one at a time with nothing else running."""
    session.tally.phase = "cost"
    arms = {arm.cost_key: arm for arm in reversed(session.study.list_arms()) if arm.cost_key not in known}
    for key, arm in reversed(arms.items()):
        if session.unfit_by(key) is not None:
            continue
        session.say(f"measuring the cost of {key}")
        try:
            cost: Cost = session.executor.submit(session.work.probe, session.setup, prepared, arm).result()
        except FieldError:  # data or model are gone; an OSError here may be for good (no /proc)
            raise
        except Exception as error:
            heed()
            why = "it does not fit on this device: " if is_out_of_memory(error) else ""
            warn(session, f"the cost of {key} could not be measured: {why}{_why_not(error)}")
            continue
        append(session.folder.journal, "cost", cost=to_json(cost))


def _finished(study: Study, known: StudyRecord) -> Progress:
    tally = start_tally(study, known.trials, known.finalists)
    tally.phase, tally.total = "done", len(known.trials)
    return snapshot(tally, "the study is finished; nothing to do")


def _trials(pack: Pack) -> str:
    names = list(dict.fromkeys(slot.arm.name for slot in pack.slots))
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(pack.slots)} trial{'s' if len(pack.slots) > 1 else ''} ({shown})"


def _why_not(error: BaseException) -> str:
    return in_one_line(error) + ("; its process was killed, perhaps for want of memory" if was_killed(error) else "")
