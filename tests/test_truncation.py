"""What max_length took, in the log, in the report and after the journal was read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import quickstart, write_study

from sweep import console
from sweep.report.statistics import find
from sweep.report.tables import measured
from sweep.report.truncation import truncation_lines, truncation_warnings
from sweep.study.records import Forecast, Prepared, StudyForecast, Truncation, prepared_from_json, to_json

NOTHING = Truncation(rows=80, whole=4000)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    found = write_study(tmp_path, quickstart()).prepared
    assert found is not None
    return found


def test_each_split_that_lost_something_has_its_line(prepared: Prepared) -> None:
    taken = {"train": Truncation(200, 30, 10_000, 250, 4, 1), "validation": NOTHING, "test": Truncation(40, dropped=2)}
    assert truncation_lines(replace(prepared, truncation=taken), "causal-lm") == [
        "train: 30 of 200 rows cut at data.max_length (15 %), 2.5 % of all tokens lost, "
        "in 4 rows an answer lost a part, 1 row without an answer to learn dropped",
        "test: 2 rows without an answer to learn dropped",
    ]
    assert truncation_lines(replace(prepared, truncation={"train": NOTHING}), "causal-lm") == []


@pytest.mark.parametrize(
    ("task", "cut", "warns"),
    [
        ("causal-lm", 20, False),
        ("causal-lm", 21, True),
        ("sequence-classification", 100, False),
        ("sequence-classification", 101, True),
    ],
)
def test_many_rows_cut_are_a_warning(task: str, cut: int, warns: bool, prepared: Prepared) -> None:
    """Over a tenth of the rows of a split, or over half of the texts to be classified; of 200."""
    cut_short = replace(prepared, truncation={"train": Truncation(200, cut, 9000, 900), "test": NOTHING})
    warnings = truncation_warnings(cut_short, task, 64)
    assert len(warnings) == warns
    if warns:
        assert f"{cut / 2:.0f} % of train is longer than data.max_length (64 tokens)" in warnings[0]


def test_many_rows_without_an_answer_are_a_warning(prepared: Prepared) -> None:
    taken = {"train": Truncation(200, dropped=30)}
    [warning] = truncation_warnings(replace(prepared, truncation=taken), "causal-lm", 64)
    assert warning == "15 % of train had no answer to learn and was dropped."


def test_it_stands_among_the_reports_facts_and_warnings_and_in_the_dry_run(tmp_path: Path, prepared: Prepared) -> None:
    study = quickstart()
    record = write_study(tmp_path / "again", study)
    record = replace(record, prepared=replace(prepared, truncation={"train": Truncation(200, 150, 9000, 4500)}))
    findings = find(study, record)
    forecasts = tuple(Forecast(key, 1, 1, 0.1, True, True) for key in {arm.cost_key for arm in study.list_arms()})
    costs = StudyForecast(forecasts, 1, 0.0, 0.0, packed_s=0.0, alone_s=0.0)
    line = "train: 150 of 200 rows cut at data.max_length (75 %), 50 % of all characters lost"
    assert dict(measured(study, record, findings))["Cut short"] == line
    assert any("beginnings of these texts" in warning for warning in findings.warnings)
    assert record.prepared is not None and line in console.plan(study, record.prepared, costs, None)[0]


def test_journal_keeps_it_and_older_journals_have_none(prepared: Prepared) -> None:
    told = to_json(replace(prepared, truncation={"train": Truncation(200, 30, 9000, 250, 4, 1)}))
    assert prepared_from_json(told).truncation == {"train": Truncation(200, 30, 9000, 250, 4, 1)}
    del told["truncation"]
    assert prepared_from_json(told).truncation == {}
