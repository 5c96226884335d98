"""The study in Optuna's storage. Nothing here takes longer the more trials there are, but for `list_trials`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from sweep.driver.patience import Patience, StorageError, patiently
from sweep.driver.plan import rate_bounds
from sweep.driver.sampling import RATE
from sweep.study.arms import Arm, pattern_text
from sweep.study.records import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED
from sweep.study.schema import Study

STATES = {
    COMPLETE: TrialState.COMPLETE,
    PRUNED: TrialState.PRUNED,
    DIVERGED: TrialState.FAIL,
    INFEASIBLE: TrialState.COMPLETE,  # with a constraint that it violates: Optuna has no state for it
    FAILED: TrialState.FAIL,
}
CONSTRAINTS = "constraints"  # Optuna's and its dashboard's system attribute: above 0 is infeasible


@dataclass(frozen=True)
class Ledger:
    """A study in Optuna's storage."""

    study: optuna.Study
    storage: BaseStorage
    study_id: int
    distributions: dict[str, BaseDistribution]
    numbers: Iterator[int]  # that the next trials get, while nobody else creates any
    patience: Patience


def list_trials(ledger: Ledger) -> list[FrozenTrial]:
    """Every trial, by number. Reads them all: once, when the study is taken up. Raises StorageError."""
    return patiently(ledger.patience, lambda again: ledger.study.get_trials(deepcopy=False), reads=True)


def create_trial(ledger: Ledger, arm: Arm, rate: float, phase: str, seed: int, slot: str) -> int:
    """Create a trial and return its number.

    It appears whole and RUNNING, in one transaction, so that no kill leaves half a trial; where only the server's
    answer was lost, none is created a second time. `Study.ask` would read every unfinished trial of the study each
    time, and thousands wait at a rung. Raises StorageError, also where somebody else creates trials.
    """
    params = _params(arm, rate)
    template = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params={name: params[name] for name in ledger.distributions},
        distributions=ledger.distributions,
        user_attrs={"arm": arm.name, "phase": phase, "seed": seed, "slot": slot},
    )
    number = next(ledger.numbers)

    def create(again: bool) -> int:
        created = _find_trial(ledger, number) if again else None
        if created is not None and created.user_attrs.get("slot") == slot:
            return created._trial_id
        return ledger.storage.create_new_trial(ledger.study_id, template_trial=template)

    trial_id = patiently(ledger.patience, create)
    if _trial_id(ledger, number) != trial_id:
        patiently(ledger.patience, lambda again: _withdraw(ledger, trial_id))
        raise StorageError(
            f"somebody else creates trials in Optuna's study {ledger.study.study_name!r}: "
            "let only one home run it, and run the command again"
        )
    return number


def report(ledger: Ledger, number: int, step: int, loss: float) -> None:
    """Report an intermediate value; once the trial has ended in Optuna, nothing. Raises StorageError."""
    trial_id = _trial_id(ledger, number)
    with suppress(UpdateFinishedTrialError):  # somebody ended it by hand; the journal is the truth
        patiently(ledger.patience, lambda again: ledger.storage.set_trial_intermediate_value(trial_id, step, loss))


def tell(ledger: Ledger, number: int, state: str, loss: float | None, reason: str) -> None:
    """End a trial in Optuna as its journal ended; once it has ended there, nothing. Raises StorageError.

    Optuna's dashboard calls infeasible what is complete and violates a constraint, and complete wants a value: there,
    and nowhere else, it is infinite, which importances leave out. A loss of an early rung they would take as final.
    """
    trial_id, storage = _trial_id(ledger, number), ledger.storage
    values = [loss] if state in (COMPLETE, PRUNED) and loss is not None else None

    def end(again: bool) -> None:
        if reason:
            storage.set_trial_user_attr(trial_id, "reason", reason)
        if state == INFEASIBLE:
            storage.set_trial_system_attr(trial_id, CONSTRAINTS, [1.0])
        storage.set_trial_state_values(trial_id, STATES[state], [math.inf] if state == INFEASIBLE else values)

    with suppress(UpdateFinishedTrialError):
        patiently(ledger.patience, end)


def _withdraw(ledger: Ledger, trial_id: int) -> None:
    """End a trial that should not have been created; without a slot it is nobody's."""
    with suppress(UpdateFinishedTrialError):
        ledger.storage.set_trial_user_attr(trial_id, "slot", None)
        ledger.storage.set_trial_user_attr(trial_id, "reason", "created while another driver ran the study")
        ledger.storage.set_trial_state_values(trial_id, TrialState.FAIL)


def _find_trial(ledger: Ledger, number: int) -> FrozenTrial | None:
    try:
        trial_id = ledger.storage.get_trial_id_from_study_id_trial_number(ledger.study_id, number)
    except KeyError:
        return None
    return ledger.storage.get_trial(trial_id)


def _trial_id(ledger: Ledger, number: int) -> int:
    return patiently(
        ledger.patience,
        lambda again: ledger.storage.get_trial_id_from_study_id_trial_number(ledger.study_id, number),
    )


def _params(arm: Arm, rate: float) -> dict[str, int | float | str]:
    """Full fine-tuning and prefixes alone have rank and ratio 0, so that the columns stay numbers."""
    return {
        "rank": arm.r,
        "alpha_ratio": arm.alpha_ratio,
        RATE: rate,
        "method": arm.method,
        "target_modules": _modules(arm),
        "prefix_length": arm.prefix_length,
        "rank_pattern": pattern_text(arm.rank_pattern),
        "alpha_pattern": pattern_text(arm.alpha_pattern),
    }


def _modules(arm: Arm) -> str:
    return "+".join(arm.target_modules) or arm.method


def distributions(study: Study) -> dict[str, BaseDistribution]:
    """What Optuna and its dashboard take for the search space: methods, modules and patterns where they vary."""
    arms = study.list_arms()
    ranks, ratios = [arm.r for arm in arms], [arm.alpha_ratio for arm in arms]
    low, high = rate_bounds(study)
    space: dict[str, BaseDistribution] = {
        "rank": IntDistribution(min(ranks), max(ranks)),
        "alpha_ratio": FloatDistribution(min(ratios), max(ratios)),
        RATE: FloatDistribution(low, high, log=True),
    }
    if len(study.arms.method) > 1:
        space["method"] = CategoricalDistribution(list(dict.fromkeys(arm.method for arm in arms)))
    if len(study.arms.target_modules) > 1:
        space["target_modules"] = CategoricalDistribution(list(dict.fromkeys(_modules(arm) for arm in arms)))
    if study.arms.prefix_length:
        space["prefix_length"] = IntDistribution(0, max(study.arms.prefix_length))
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = list(dict.fromkeys(pattern_text(getattr(arm, name)) for arm in arms if arm.r))
        if len(patterns) > 1:
            space[name] = CategoricalDistribution(list(dict.fromkeys(["", *patterns])))
    return space
