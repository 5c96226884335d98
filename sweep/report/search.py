"""What the search phase says: the best learning rate of each arm, and whether it lies on the edge of what was tried.

Search scores are the best of several tries and so too good; they choose, and are never results.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sweep.report.words import rate, some
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED, SEARCH
from sweep.study.schema import Range, Study, rate_values
from sweep.tracking.journal import StudyRecord, TrialRecord

OUTERMOST = 0.1  # of a range, on the log scale


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
    infeasible: int = 0

    @property
    def trials(self) -> int:
        return self.complete + self.pruned + self.diverged + self.failed + self.infeasible


@dataclass(frozen=True)
class Edge:
    """The best learning rate of an arm is at the low or high end of what was tried: a better one may lie beyond."""

    arm: str
    learning_rate: float
    side: str  # "lower" or "upper"
    next_grid: tuple[float, ...] = ()  # as many values, moved by the grid's ratio; empty where rates are drawn
    range: tuple[float, float] | None = None  # where rates are drawn: low, high
    next_range: tuple[float, float] | None = None  # half of it further on the log scale: this end in the middle


def search_rows(study: Study, record: StudyRecord) -> tuple[SearchRow, ...]:
    return tuple(_row(arm, search_trials(record, arm.name)) for arm in study.list_arms())


def search_trials(record: StudyRecord, arm: str) -> list[TrialRecord]:
    return list(record.trials_of(SEARCH, arm))


def find_edges(study: Study, rows: Sequence[SearchRow]) -> tuple[Edge, ...]:
    """Edges of the arms whose learning rates have all been tried."""
    edges = []
    for row in rows:
        rates = study.rates(row.arm)
        if study.search.sampler != "grid" and isinstance(rates, Range):
            edge = _edge_of_range(row, rates)
            edges += [edge] if edge else []
            continue
        if row.best_rate is None or len(row.rates) < max(2, len(rate_values(rates))):
            continue
        if row.best_rate == row.rates[-1]:
            side, ratio = "upper", row.rates[-1] / row.rates[-2]
        elif row.best_rate == row.rates[0]:
            side, ratio = "lower", row.rates[0] / row.rates[1]
        else:
            continue
        edges.append(Edge(row.arm.name, row.best_rate, side, tuple(_short(x * ratio) for x in row.rates)))
    return tuple(edges)


def _edge_of_range(row: SearchRow, rates: Range) -> Edge | None:
    """Drawn rates hardly ever hit an end: the outermost tenth counts, on the log scale."""
    if row.best_rate is None or row.trials < rates.values or rates.low == rates.high:
        return None
    ratio = rates.high / rates.low
    place = math.log(row.best_rate / rates.low) / math.log(ratio)
    if OUTERMOST < place < 1 - OUTERMOST:
        return None
    side, move = ("lower", ratio**-0.5) if place <= OUTERMOST else ("upper", ratio**0.5)
    moved = (_short(rates.low * move), _short(rates.high * move))
    return Edge(row.arm.name, row.best_rate, side, range=(rates.low, rates.high), next_range=moved)


def edge_warnings(edges: Sequence[Edge]) -> list[str]:
    """One sentence for the arms that share an edge and what to try next."""
    groups: dict[tuple[float, str, tuple[float, ...]], list[str]] = {}
    ranges: dict[tuple[str, tuple[float, float], tuple[float, float]], list[str]] = {}
    for edge in edges:
        if edge.range and edge.next_range:
            ranges.setdefault((edge.side, edge.range, edge.next_range), []).append(
                f"{edge.arm} ({rate(edge.learning_rate)})"
            )
        else:
            groups.setdefault((edge.learning_rate, edge.side, edge.next_grid), []).append(edge.arm)
    of_grids = [
        f"{some(arms)}: the best learning rate, {rate(value)}, is on the {side} edge of its grid, so a better one "
        f"may lie beyond. Try {some([rate(x) for x in grid])} next."
        for (value, side, grid), arms in groups.items()
    ]
    of_ranges = [
        f"{some(arms)}: the best learning rate is in the {side} tenth of its range, {rate(low)} to {rate(high)}, "
        f"so a better one may lie beyond. Try low: {rate(new_low)}, high: {rate(new_high)} next."
        for (side, (low, high), (new_low, new_high)), arms in ranges.items()
    ]
    return of_grids + of_ranges


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _row(arm: Arm, trials: Sequence[TrialRecord]) -> SearchRow:
    states = Counter(t.state for t in trials)
    scored = [
        (t.last.eval_loss, t.spec.learning_rate)
        for t in trials
        if t.state == COMPLETE and t.last is not None and t.last.eval_loss is not None
    ]
    loss, learning_rate = min(scored) if scored else (None, None)
    rates = tuple(sorted({t.spec.learning_rate for t in trials}))
    ends = [states[state] for state in (COMPLETE, PRUNED, DIVERGED, FAILED, INFEASIBLE)]
    return SearchRow(arm, rates, learning_rate, loss, *ends)
