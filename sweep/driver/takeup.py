"""Taking a study up where it stopped: the journals are the truth about measurements; Optuna is brought up to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from sweep.driver.checkpoints import tidy_all
from sweep.driver.failures import call
from sweep.driver.interrupts import uninterrupted
from sweep.driver.patience import StorageError
from sweep.driver.plan import Slot, confirm_slot, search_slot, search_slots
from sweep.driver.sampling import RATE
from sweep.driver.session import Session, end_if_over, start_record, warn
from sweep.driver.storage import Ledger, create_trial, list_trials, report, tell
from sweep.execution.executor import Executor
from sweep.execution.worker import Work
from sweep.study.errors import FieldError
from sweep.study.records import SEARCH, Prepared, Setup, TrialSpec
from sweep.study.schema import Study
from sweep.tracking.journal import TrialRecord


def refuse_changed_inputs(
    executor: Executor, work: Work, setup: Setup, prepared: Prepared, seconds: float | None = None
) -> None:
    """Raise FieldError where data or model are not those that the study began with, or cannot be read any more."""
    data, model, text = call(executor, "reading model and data", work.fingerprints, setup, seconds=seconds)
    compared = [
        ("data.source", setup.data.source, prepared.data_fingerprint, data),
        ("model", setup.model, prepared.model_fingerprint, model),
    ]
    if setup.forgetting and prepared.source_text:
        compared.append(("forgetting.source", setup.forgetting.source, prepared.source_text.fingerprint, text))
    problems = [
        (
            field,
            f"{name} has changed since the study began (was {was}, now {now}): "
            "restore it, or give the study another name",
        )
        for field, name, was, now in compared
        if was != now
    ]
    if problems:
        raise FieldError(*problems)


@uninterrupted()
def match_trials(ledger: Ledger, study: Study, journals: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """The journals' trials by slot, each with its trial in Optuna; those that Optuna lost are created again.

    Raises StorageError where the two tell of different trials.
    """
    trials = {trial.number: trial for trial in list_trials(ledger)}
    derived, cells = _derive_slots(journals), {slot.name: slot for slot in search_slots(study)}
    created = len(trials)
    records: dict[str, TrialRecord] = {}
    for record in journals:
        spec = record.spec
        if spec.number in trials:
            attrs = trials[spec.number].user_attrs
            slot = attrs.get("slot", "")
            same = (attrs.get("arm"), attrs.get("phase"), attrs.get("seed")) == (spec.arm.name, spec.phase, spec.seed)
            same = same and slot not in records and _fits(spec, slot, cells)
        else:
            slot = derived[spec.number]
            same = spec.number == created  # a new trial gets the next number
            created += 1
        if not same:
            raise StorageError(
                f"{spec.folder} and trial {spec.number} in Optuna's storage tell of different trials: "
                "restore the one or the other, or remove the study from the storage (optuna delete-study): the "
                "journals make it anew"
            )
        if spec.number not in trials:
            create_trial(ledger, spec.arm, spec.learning_rate, spec.phase, spec.seed, slot)
        records[slot] = record
    return records


@uninterrupted()
def take_up(session: Session) -> None:
    """Bring the two sides to one state: nothing is lost, doubled or left running. Idempotent."""
    journals = {record.spec.number for record in session.records.values()}
    trials = list_trials(session.ledger)
    arms = {arm.name: arm for arm in session.study.list_arms()}
    for trial in trials:
        slot = trial.user_attrs.get("slot")
        if trial.number in journals or slot is None:
            continue
        if trial.state.is_finished():
            warn(session, f"trial {trial.number} has no journal any more: {slot} is trained again as a new trial")
        elif slot not in session.records:  # killed between the trial and its journal
            attrs = trial.user_attrs
            arm, rate, seed, phase = arms[attrs["arm"]], trial.params[RATE], attrs["seed"], attrs["phase"]
            start_record(session, slot, trial.number, arm, rate, seed, phase)
    by_number = {trial.number: trial for trial in trials}
    for slot in list(session.records):
        _take_up_trial(session, slot, by_number)
    tidy_all(session.records.values(), session.place)


def _take_up_trial(session: Session, slot: str, trials: Mapping[int, FrozenTrial]) -> None:
    record = session.records[slot]
    trial = trials[record.spec.number]
    if not trial.state.is_finished():
        for rung in record.rungs:
            step, loss = rung.measurement.stop, rung.measurement.eval_loss
            if loss is not None and step not in trial.intermediate_values:
                report(session.ledger, trial.number, step, loss)
        if record.state is not None:
            loss = record.last.eval_loss if record.last else None
            tell(session.ledger, trial.number, record.state, loss, record.reason)
    end_if_over(session, slot)


def _fits(spec: TrialSpec, slot: str, cells: Mapping[str, Slot]) -> bool:
    """Whether a trial can be that of the slot which Optuna holds of it."""
    if spec.phase != SEARCH:
        return slot == confirm_slot(spec.arm, spec.learning_rate, spec.seed)
    cell = cells.get(slot)
    return cell is not None and cell.arm == spec.arm and cell.rate in (None, spec.learning_rate)


def _derive_slots(journals: Sequence[TrialRecord]) -> dict[int, str]:
    """Slots by number. An arm's rates are asked in order, so that its n-th search trial has its n-th rate."""
    draws: Counter[str] = Counter()
    slots = {}
    for record in journals:
        spec = record.spec
        if spec.phase == SEARCH:
            slots[spec.number] = search_slot(spec.arm, draws[spec.arm.name])
            draws[spec.arm.name] += 1
        else:
            slots[spec.number] = confirm_slot(spec.arm, spec.learning_rate, spec.seed)
    return slots
