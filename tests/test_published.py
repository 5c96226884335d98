"""Published figures stand beside ours, with their source, and are never mistaken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import quickstart, write_study

from sweep.report.published_section import published_section
from sweep.report.statistics import find
from sweep.study.file import StudyError
from sweep.study.schema import Study

TABLE = "published=[{source: 'Paper, table 1', rank: {1: 1.23, 4: 1.18, 64: 1.16}}]"
HIGHER = "published=[{source: 'Paper, table 2', rank: {4: 91.3, 64: 91.6}, better: higher}]"
RATE = "published=[{source: Paper, best_rate_over_full: 9.8}]"


def section_of(tmp_path: Path, *overrides: str):  # type: ignore[no-untyped-def]
    study = quickstart(*overrides)
    record = write_study(tmp_path / "s", study, ends={})
    return study, find(study, record), published_section(study, find(study, record))


def test_a_rank_of_either_side_is_a_row_and_what_one_lacks_is_left_open(tmp_path: Path) -> None:
    _, findings, section = section_of(tmp_path, TABLE)
    ((caption, table),) = section.tables
    assert caption == "Paper, table 1, beside this study"
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert list(rows) == ["rank 1", "rank 2", "rank 4", "rank 8", "rank 64"]
    assert rows["rank 1"] == ["1.23", "+0.07", "–", "–"]
    assert rows["rank 2"][:2] == ["–", "–"]
    ours = findings.result("r4-ratio2")
    assert rows["rank 4"][:3] == ["1.18", "+0.02", f"{ours.loss_mean:.3f}"]
    assert rows["rank 64"][1] == rows["rank 64"][3] == "reference"


def test_worse_is_above_zero_where_higher_values_are_better_too(tmp_path: Path) -> None:
    _, _, section = section_of(tmp_path, HIGHER)
    ((_, table),) = section.tables
    assert next(row for row in table.rows if row.cells[0].text == "rank 4").cells[2].text == "+0.3"


def test_the_best_rates_multiple_is_that_of_the_confirmed_arms(tmp_path: Path) -> None:
    _, findings, section = section_of(tmp_path, RATE)
    full = findings.result("full").learning_rate
    shares = sorted({r.learning_rate / full for r in findings.arms if r.arm.r})
    assert f"here it was {shares[0]:.3g} to {shares[-1]:.3g} times" in section.paragraphs[1]
    assert "9.8 times that of full fine-tuning" in section.paragraphs[1]


def test_studies_without_them_have_no_such_section(tmp_path: Path) -> None:
    assert section_of(tmp_path)[2] is None


def test_an_entry_that_says_nothing_is_refused_with_what_to_give() -> None:
    with pytest.raises(StudyError, match=r"published.*says nothing: give rank"):
        quickstart("published=[{source: Paper}]")


def test_published_figures_may_be_added_to_a_study_that_has_run() -> None:
    from sweep.study.file import dump_study, what_changed

    assert what_changed(dump_study(quickstart()), dump_study(quickstart(TABLE))) == []


def test_every_published_figure_of_the_studies_is_named_with_its_source() -> None:
    from sweep.study.file import read_study

    found: list[Study] = [read_study(p).study for p in sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))]
    assert sum(bool(study.published) for study in found) >= 2
