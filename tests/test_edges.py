"""A best learning rate on the edge of what was tried is told, with what to try next."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import quickstart
from verdict_studies import GOOD, find_in

from sweep.report.search import SearchRow, edge_warnings, find_edges
from sweep.study.records import DIVERGED, SEARCH


def test_edge_names_arm_rate_side_and_next_grid(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD)
    assert [(e.arm, e.side) for e in findings.edges] == [("r2-ratio1", "upper"), ("r2-ratio2", "upper")]
    assert findings.edges[0].next_grid == pytest.approx((0.00949, 0.03, 0.0949), rel=1e-3)
    assert "r2-ratio1, r2-ratio2: the best learning rate, 0.03, is on the upper edge" in findings.warnings[0]


def test_a_rate_that_diverged_is_still_an_end_of_the_grid(tmp_path: Path) -> None:
    ends = {(SEARCH, f"r2-ratio{a}", 0.03): DIVERGED for a in (1, 2)}
    assert find_in(tmp_path, GOOD, ends=ends).edges == ()


DRAWN = ["search.sampler=random", "tune.learning_rate={low: 1.0e-4, high: 1.0e-2, values: 3}"]


@pytest.mark.parametrize(
    ("best", "side", "moved"),
    [
        (9.0e-3, "upper", (1e-3, 1e-1)),
        (1.5e-4, "lower", (1e-5, 1e-3)),
        (5.0e-3, None, None),  # the highest that was drawn, but not near the end of the range
    ],
)
def test_a_drawn_rate_near_an_end_of_its_range_is_told_with_the_range_to_try(
    best: float, side: str | None, moved: tuple[float, float] | None
) -> None:
    study = quickstart(*DRAWN)
    arm = study.list_arms()[0]
    row = SearchRow(arm, (5e-4, 1e-3, best), best, 0.3, complete=1, pruned=2, diverged=0, failed=0)
    edges = find_edges(study, [row])
    assert [(e.side, e.next_range) for e in edges] == ([(side, pytest.approx(moved))] if side else [])
    if moved:
        (warning,) = edge_warnings(edges)
        assert f"r2-ratio1 ({best:g})" in warning and f"low: {moved[0]:g}, high: {moved[1]:g}" in warning


def test_drawn_rates_are_not_judged_before_all_were_tried() -> None:
    study = quickstart(*DRAWN)
    row = SearchRow(study.list_arms()[0], (9e-3,), 9e-3, 0.3, complete=1, pruned=1, diverged=0, failed=0)
    assert find_edges(study, [row]) == ()
