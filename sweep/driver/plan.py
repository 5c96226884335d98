"""What a study will ask: the slots of each phase, and which of the search's arms are confirmed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sweep.study.arms import Arm
from sweep.study.finalists import finalist_groups
from sweep.study.records import CONFIRM, DIVERGED, FAILED, INFEASIBLE, SEARCH
from sweep.study.schema import Range, Study, rate_values
from sweep.tracking.journal import TrialRecord

Finalists = tuple[tuple[str, float], ...]  # (arm name, learning rate)


@dataclass(frozen=True)
class Slot:
    """A cell of the plan, which becomes one trial. `name` finds that trial again when the study is taken up."""

    index: int  # place in the plan: slots are asked in this order
    name: str
    phase: str
    arm: Arm
    draw: int  # search: which of the arm's rates this is
    rate: float | None  # None: drawn by the sampler when the trial is asked
    seed: int
    doubtful: bool = False  # its arm is forecast not to fit on the device: tried last, and alone


def search_slots(study: Study, doubtful: Collection[str] = ()) -> tuple[Slot, ...]:
    """Every arm with each of its learning rates.

    A grid goes rank by rank, so that packs have few ranks, and trials with a prefix, which share no trunk, behind those
    without. A sampler learns from an arm's earlier rates: first rates of all arms first. Full fine-tuning comes last,
    and behind it what is forecast not to fit.
    doubtful: cost keys of these, by the forecast in the journal, so that the order is the same whenever it is asked.
    """
    grid = study.search.sampler == "grid"
    cells = []
    for place, arm in enumerate(study.list_arms()):
        for draw, rate in enumerate(rate_values(study.rates(arm))):
            order = (arm.is_full, arm.prefix_length, arm.r, draw, place) if grid else (arm.is_full, draw, place)
            cells.append(((arm.cost_key in doubtful, *order), arm, draw, rate if grid else None))
    return tuple(
        Slot(index, search_slot(arm, draw), SEARCH, arm, draw, rate, study.search.seed, arm.cost_key in doubtful)
        for index, (_, arm, draw, rate) in enumerate(sorted(cells, key=lambda cell: cell[0]))
    )


def confirm_slots(study: Study, finalists: Finalists) -> tuple[Slot, ...]:
    """Every finalist with each of the fresh seeds."""
    arms = {arm.name: arm for arm in study.list_arms()}
    cells = [(arms[name], rate, seed) for name, rate in finalists for seed in study.confirm.seeds]
    return tuple(
        Slot(index, confirm_slot(arm, rate, seed), CONFIRM, arm, 0, rate, seed)
        for index, (arm, rate, seed) in enumerate(cells)
    )


def search_slot(arm: Arm, draw: int) -> str:
    return f"{SEARCH}/{arm.name}/{draw}"


def confirm_slot(arm: Arm, rate: float, seed: int) -> str:
    return f"{CONFIRM}/{arm.name}/{rate!r}/{seed}"


def pick_finalists(
    study: Study, slots: Sequence[Slot], records: Mapping[str, TrialRecord]
) -> tuple[Finalists, list[str]]:
    """For each rank, or each arm, the arm and rate with the lowest loss at the last rung; and a warning where none is.

    With finalists "rate" all rates of every arm, the one with the lowest loss first: it stands for the arm. An arm all
    of whose trials were pruned is represented by its trial with the most steps, and of those the lowest loss. Trials
    that diverged, failed or do not fit are never finalists.
    """
    measured: dict[str, list[tuple[int, float, int, float]]] = {}
    for slot in slots:
        record = records[slot.name]
        if record.state in (DIVERGED, INFEASIBLE, FAILED) or record.last is None or record.last.eval_loss is None:
            continue
        entry = (-record.step, record.last.eval_loss, slot.index, record.spec.learning_rate)
        measured.setdefault(slot.arm.name, []).append(entry)
    finalists, warnings = [], []
    for name, arms in finalist_groups(study).items():
        entries = [(entry, arm.name) for arm in arms for entry in measured.get(arm.name, [])]
        if entries:
            chosen = sorted(entries) if study.confirm.finalists == "rate" else [min(entries)]
            finalists += [(arm_name, rate) for (_, _, _, rate), arm_name in chosen]
        else:
            names = {arm.name for arm in arms}
            states = {records[slot.name].state for slot in slots if slot.arm.name in names}
            why = "it does not fit on this device"
            if states != {INFEASIBLE}:
                why = f"every trial of its search diverged{', did not fit' * (INFEASIBLE in states)} or failed"
            warnings.append(f"{name} has no finalist: {why}")
    return tuple(finalists), warnings


def rate_bounds(study: Study) -> tuple[float, float]:
    """The lowest and highest learning rate that any arm may get."""
    every: list[float] = []
    for arm in study.list_arms():
        rates = study.rates(arm)
        every += rate_values(rates) + ([rates.low, rates.high] if isinstance(rates, Range) else [])
    return min(every), max(every)
