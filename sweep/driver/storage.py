"""The study in Optuna's storage. Nothing here takes longer the more trials there are, but for `list_trials`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from sweep.driver.interrupts import uninterrupted
from sweep.driver.plan import rate_bounds
from sweep.driver.question import QuestionChanged, question_hash
from sweep.driver.sampling import RATE
from sweep.study.arms import Arm, pattern_text
from sweep.study.credentials import CUT, without_credentials
from sweep.study.records import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED
from sweep.study.schema import Study

HASH = "question_sha256"
STATES = {
    COMPLETE: TrialState.COMPLETE,
    PRUNED: TrialState.PRUNED,
    DIVERGED: TrialState.FAIL,
    INFEASIBLE: TrialState.COMPLETE,  # with a constraint that it violates: Optuna has no state for it
    FAILED: TrialState.FAIL,
}
CONSTRAINTS = "constraints"  # Optuna's and its dashboard's system attribute: above 0 is infeasible


class StorageError(RuntimeError):
    """Optuna's storage cannot serve this study; the message is one line and holds no password."""


@dataclass(frozen=True)
class Ledger:
    """A study in Optuna's storage."""

    study: optuna.Study
    storage: BaseStorage
    study_id: int
    distributions: dict[str, BaseDistribution]
    numbers: Iterator[int]  # that the next trials get, while nobody else creates any


def shown_url(url: str) -> str:
    """The URL as messages may show it."""
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:
        return "(not a URL)"


@uninterrupted()
def open_storage(url: str) -> BaseStorage:
    """Open a storage by its Optuna URL. Raises StorageError."""
    if CUT in url:  # the URL of a study file as the home keeps it
        raise StorageError(
            f"the Optuna storage {shown_url(url)} wants its password, which the home does not keep: "
            "run the study by its file, or set SWEEP_STORAGE"
        )
    # A dashboard may be reading the file; a server may have restarted since the last trial.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
    try:
        return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=options))
    except Exception as error:
        raise StorageError(f"the Optuna storage {shown_url(url)} cannot be opened: {_cause(error, url)}") from None


@uninterrupted()
def open_ledger(study: Study, storage: BaseStorage, fresh: bool) -> Ledger:
    """Open the study in Optuna's storage, or make it.

    fresh: nothing of the study has run in this home, so that trials found in the storage are somebody else's.
    Raises QuestionChanged or StorageError where they are.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = optuna.create_study(
        study_name=study.name,
        storage=storage,
        direction="minimize",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),  # never asked: grid and draws come with every parameter fixed
        pruner=optuna.pruners.NopPruner(),  # never asked: it would compare ranks
    )
    study_id = storage.get_study_id_from_name(study.name)
    trials = storage.get_n_trials(study_id)
    theirs, ours = found.user_attrs.get(HASH), question_hash(study)
    if trials and theirs != ours:
        raise QuestionChanged(
            f"Optuna's storage holds a study {study.name!r} that asks another question: give this one another name",
            [f"-{HASH}: {theirs}", f"+{HASH}: {ours}"],
        )
    if trials and fresh:
        raise StorageError(
            f"Optuna's storage holds trials of study {study.name!r}, but this home has no journal of them: "
            "use the home where they ran, or give the study another name"
        )
    if theirs != ours:
        found.set_user_attr(HASH, ours)
        found.set_user_attr("question", study.question)
        # As Study.set_metric_names does, without its warning: dashboards name the values by it.
        storage.set_study_system_attr(study_id, "study:metric_names", ["eval_loss"])
    return Ledger(found, storage, study_id, _distributions(study), count(trials))


def list_trials(ledger: Ledger) -> list[FrozenTrial]:
    """Every trial, by number. Reads them all: once, when the study is taken up."""
    return ledger.study.get_trials(deepcopy=False)


def create_trial(ledger: Ledger, arm: Arm, rate: float, phase: str, seed: int, slot: str) -> int:
    """Create a trial and return its number.

    It appears whole and RUNNING, in one transaction, so that no kill leaves half a trial. `Study.ask` would read every
    unfinished trial of the study each time, and thousands wait at a rung. Raises StorageError where somebody else
    creates trials too.
    """
    params = _params(arm, rate)
    template = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params={name: params[name] for name in ledger.distributions},
        distributions=ledger.distributions,
        user_attrs={"arm": arm.name, "phase": phase, "seed": seed, "slot": slot},
    )
    trial_id = ledger.storage.create_new_trial(ledger.study_id, template_trial=template)
    number = next(ledger.numbers)
    if _trial_id(ledger, number) != trial_id:
        ledger.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        raise StorageError(
            f"somebody else creates trials in Optuna's study {ledger.study.study_name!r}: "
            "let only one home run it, and run the command again"
        )
    return number


def report(ledger: Ledger, number: int, step: int, loss: float) -> None:
    """Report an intermediate value; once the trial has ended in Optuna, nothing."""
    with suppress(UpdateFinishedTrialError):  # somebody ended it by hand; the journal is the truth
        ledger.storage.set_trial_intermediate_value(_trial_id(ledger, number), step, loss)


def tell(ledger: Ledger, number: int, state: str, loss: float | None, reason: str) -> None:
    """End a trial in Optuna as its journal ended; once it has ended there, nothing.

    Optuna's dashboard calls infeasible what is complete and violates a constraint, and complete wants a value: there,
    and nowhere else, it is infinite, which importances leave out. A loss of an early rung they would take as final.
    """
    trial_id = _trial_id(ledger, number)
    values = [loss] if state in (COMPLETE, PRUNED) and loss is not None else None
    with suppress(UpdateFinishedTrialError):
        if reason:
            ledger.storage.set_trial_user_attr(trial_id, "reason", reason)
        if state == INFEASIBLE:
            ledger.storage.set_trial_system_attr(trial_id, CONSTRAINTS, [1.0])
            values = [math.inf]
        ledger.storage.set_trial_state_values(trial_id, STATES[state], values)


def _trial_id(ledger: Ledger, number: int) -> int:
    return ledger.storage.get_trial_id_from_study_id_trial_number(ledger.study_id, number)


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


def _distributions(study: Study) -> dict[str, BaseDistribution]:
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


def _cause(error: Exception, url: str) -> str:
    """The error in one line, the password struck out."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        password = make_url(url).password
    except ArgumentError:
        return line.replace(url, "(not a URL)")
    return without_credentials(line.replace(str(password), "***") if password else line)
