"""What to do next: ask, pack, submit, report, prune, tell; the search, the confirm phase, the cost of each arm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweep.driver.beginning import begin
from sweep.driver.checkpoints import tidy_all
from sweep.driver.failures import call
from sweep.driver.groups import steps_ahead
from sweep.driver.interrupts import heed, interruptible
from sweep.driver.packing import calibration_lines, disturbance
from sweep.driver.patience import PATIENCE_S, Patience, StorageError
from sweep.driver.phase import run_phase, why_not
from sweep.driver.plan import Finalists, Slot, confirm_slots, pick_finalists, search_slots
from sweep.driver.pricing import SECONDS_TO_PROBE, forecast_lines, priced, seconds_aside
from sweep.driver.progress import Progress, is_complete, snapshot, start_tally, unmeasured
from sweep.driver.question import Busy, QuestionChanged, hold_lock, name_holder, refuse_other_question
from sweep.driver.session import Session, warn
from sweep.driver.takeup import refuse_changed_inputs, take_up
from sweep.execution.executor import Executor
from sweep.execution.worker import Work
from sweep.report.truncation import truncation_lines
from sweep.study.errors import FieldError, NoWorkers, in_one_line, is_out_of_memory
from sweep.study.finalists import count_confirm_trials
from sweep.study.home import StudyFolder
from sweep.study.records import Cost, Prepared, StudyForecast, to_json
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, append, append_twice, read_study_record

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
    checkpoints: str = "",
) -> None:
    """Run a study, or take it up where it stopped; once it is finished, change nothing.

    patience_s: how long a call waits for a storage that does not answer.
    checkpoints: folder or URL where they go; "" for where they have been, the home at first.

    Failed trials do not end it: the journal tells of them. Raises Busy, QuestionChanged, StorageError, OSError where
    the home cannot be written, FieldError where model or data cannot be read or have changed, and what `work.prepare`
    raises about the study. It may be killed at any point, and goes on once the trouble is over.
    """
    with interruptible(), hold_lock(folder) as lock:
        known = read_study_record(folder)
        if known.prepared is not None:  # until then nothing has run, and the question may still be mended
            refuse_other_question(study, folder)
        if is_complete(study, known):
            listen(_finished(study, known))
            return
        name_holder(lock)
        setup = study.setup(str(cache))
        if known.prepared is not None:
            refuse_changed_inputs(executor, work, setup, known.prepared, seconds_aside(study))
        patience = Patience(storage_url, patience_s)
        session = begin(study, folder, executor, work, setup, known, checkpoints, patience, listen)
        take_up(session)
        session.tally.steps_left = steps_ahead(study, session.records, known.finalists)
        prepared = known.prepared or _prepare(session)
        forecast = known.forecast if session.records or known.forecast else _forecast(session, prepared)
        slots = search_slots(study, forecast.doubtful if forecast else ())
        pack_size = run_phase(session, prepared, forecast, slots, study.search.keep, prepared.pack_size)
        finalists = known.finalists or _choose(session, slots)
        run_phase(session, prepared, forecast, confirm_slots(study, finalists), 1.0, pack_size)
        if session.trouble:
            raise session.trouble[0]
        _probe_costs(session, prepared, known.costs)
        tidy_all(session.records.values(), session.place)  # of workers who came too late
        append(folder.journal, "finished")
        session.tally.phase = "done"
        session.say("finished")


def _prepare(session: Session) -> Prepared:
    made = session.setup.pretrain is not None
    session.say("making the base model, reading the data" if made else "reading the model and the data")
    arms = session.study.list_arms()
    seconds, doing = seconds_aside(session.study), "reading the model and the data"
    prepared: Prepared = call(session.executor, doing, session.work.prepare, session.setup, arms, seconds=seconds)
    append_twice(session.folder, "prepared", prepared=to_json(prepared))
    for line in disturbance(prepared):
        line += " and give the study another name"  # this one keeps what was prepared
        warn(session, line)
        session.say(line)
    for line in (*truncation_lines(prepared, session.study.task), *calibration_lines(prepared)):
        session.say(line)
    return prepared


def _forecast(session: Session, prepared: Prepared) -> StudyForecast | None:
    """What the arms will cost, before the first trial; None, and a warning, where that cannot be told."""
    session.say("forecasting what the arms cost: a few probe steps of some")
    arms, seconds = session.study.list_arms(), seconds_aside(session.study)
    try:
        found = call(
            session.executor, "forecasting", session.work.forecast, session.setup, prepared, arms, seconds=seconds
        )
    except (FieldError, NoWorkers):
        raise
    except Exception as error:
        heed()
        unwatched = "" if seconds else "; without `seconds_per_rung` a pack that hangs is waited for"
        warn(session, f"what the arms cost could not be forecast: {in_one_line(error)}{unwatched}")
        return None
    forecast = priced(session.study, prepared, found)
    append(session.folder.journal, "forecast", forecast=to_json(forecast))
    for line in forecast_lines(forecast):
        session.say(line)
    return forecast


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
    seconds, probe = seconds_aside(session.study, SECONDS_TO_PROBE), session.work.probe
    arms = {arm.cost_key: arm for arm in reversed(session.study.list_arms()) if arm.cost_key not in known}
    for key, arm in reversed(arms.items()):
        if session.unfit_by(key) is not None:
            continue
        session.say(f"measuring the cost of {key}")
        try:
            cost: Cost = call(session.executor, "measuring", probe, session.setup, prepared, arm, seconds=seconds)
        except (FieldError, NoWorkers):  # data or model are gone; an OSError here may be for good (no /proc)
            raise
        except Exception as error:
            heed()
            why = "it does not fit on this device: " if is_out_of_memory(error) else ""
            warn(session, f"{unmeasured(key)}: {why}{why_not(error)}")
            continue
        append(session.folder.journal, "cost", cost=to_json(cost))


def _finished(study: Study, known: StudyRecord) -> Progress:
    tally = start_tally(study, known.trials, known.finalists)
    tally.phase, tally.total = "done", len(known.trials)
    return snapshot(tally, "the study is finished; nothing to do")
