"""Which arms may be confirmed, and how many trials a study plans."""

from __future__ import annotations

from sweep.study.arms import Arm
from sweep.study.schema import Study, rate_values


def finalist_groups(study: Study) -> dict[str, list[Arm]]:
    """The arms of which one each goes to the confirm phase, by the name a message gives the group."""
    groups: dict[str, list[Arm]] = {}
    for arm in study.list_arms():
        if study.confirm.finalists != "rank":
            groups[f"arm {arm.name}"] = [arm]
        else:
            groups.setdefault(arm.group, []).append(arm)
    return groups


def count_finalists(study: Study) -> int:
    """How many finalists there are at most, before the search has chosen them."""
    return sum(rates_confirmed(study, arms[0]) for arms in finalist_groups(study).values())


def rates_confirmed(study: Study, arm: Arm) -> int:
    """With how many learning rates an arm goes to the confirm phase, should it be a finalist."""
    return len(rate_values(study.rates(arm))) if study.confirm.finalists == "rate" else 1


def count_search_trials(study: Study) -> int:
    """One for each learning rate of each arm."""
    return sum(len(rate_values(study.rates(arm))) for arm in study.list_arms())


def count_confirm_trials(study: Study, finalists: int = 0) -> int:
    """One for each finalist and seed; 0: as many finalists as there may be, before the search has chosen them."""
    return (finalists or count_finalists(study)) * len(study.confirm.seeds)
