"""What the search phase says: the best learning rate of each arm, and whether it lies on the edge of its grid.

Search scores are the best of several tries and so too good; they choose, and are never results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sweep.report.words import rate
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE, DIVERGED, FAILED, PRUNED, SEARCH
from sweep.study.schema import Study, rate_values
from sweep.tracking.journal import StudyRecord, TrialRecord


@dataclass(frozen=True)
class SearchRow:
    """One arm's search trials."""

    arm: Arm
    rates: tuple[float, ...]  # tried, rising
    best_rate: float | None  # of the trials that reached the last rung
    best_loss: float | None  # its validation loss there
    complete: int
    pruned: int
    diverged: int
    failed: int

    @property
    def trials(self) -> int:
        return self.complete + self.pruned + self.diverged + self.failed


@dataclass(frozen=True)
class Edge:
    """The best learning rate of an arm is the lowest or highest that was tried: a better one may lie beyond."""

    arm: str
    learning_rate: float
    side: str  # "lower" or "upper"
    next_grid: tuple[float, ...]  # as many values, moved by the grid's ratio


def search_rows(study: Study, record: StudyRecord) -> tuple[SearchRow, ...]:
    return tuple(_row(arm, search_trials(record, arm.name)) for arm in study.list_arms())


def search_trials(record: StudyRecord, arm: str) -> list[TrialRecord]:
    return [t for t in record.trials if t.spec.phase == SEARCH and t.spec.arm.name == arm]


def find_edges(study: Study, rows: Sequence[SearchRow]) -> tuple[Edge, ...]:
    """Edges of the arms whose learning rates have all been tried."""
    edges = []
    for row in rows:
        if row.best_rate is None or len(row.rates) < max(2, len(rate_values(study.rates(row.arm)))):
            continue
        if row.best_rate == row.rates[-1]:
            side, ratio = "upper", row.rates[-1] / row.rates[-2]
        elif row.best_rate == row.rates[0]:
            side, ratio = "lower", row.rates[0] / row.rates[1]
        else:
            continue
        edges.append(Edge(row.arm.name, row.best_rate, side, tuple(float(f"{x * ratio:.3g}") for x in row.rates)))
    return tuple(edges)


def edge_warnings(edges: Sequence[Edge]) -> list[str]:
    """One sentence for the arms that share a rate, an edge and the grid to try next."""
    groups: dict[tuple[float, str, tuple[float, ...]], list[str]] = {}
    for edge in edges:
        groups.setdefault((edge.learning_rate, edge.side, edge.next_grid), []).append(edge.arm)
    return [
        f"{', '.join(arms)}: the best learning rate, {rate(value)}, is on the {side} edge of its grid, so a better one "
        f"may lie beyond. Try {', '.join(rate(x) for x in grid)} next."
        for (value, side, grid), arms in groups.items()
    ]


def _row(arm: Arm, trials: Sequence[TrialRecord]) -> SearchRow:
    states = Counter(t.state for t in trials)
    scored = [
        (t.last.eval_loss, t.spec.learning_rate)
        for t in trials
        if t.state == COMPLETE and t.last is not None and t.last.eval_loss is not None
    ]
    loss, learning_rate = min(scored) if scored else (None, None)
    rates = tuple(sorted({t.spec.learning_rate for t in trials}))
    return SearchRow(
        arm, rates, learning_rate, loss, states[COMPLETE], states[PRUNED], states[DIVERGED], states[FAILED]
    )
