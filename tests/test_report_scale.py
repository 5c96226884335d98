"""A report of thousands of trials, or of hundreds of arms, stays a page that can be opened and read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic import quickstart, write_study

from sweep.report.report import write_report
from sweep.report.words import MOST_NAMED, join
from sweep.tracking import journal
from sweep.tracking.journal import read_study_record

LITTLE = ("train.steps=20", "search.rungs=[10, 20]")
ARMS, SEEDS, RATES = 9, 5, 50  # enough rates that a figure is crowded


def report_of(folder: Path, *overrides: str) -> Path:
    study = quickstart(*LITTLE, *overrides)
    write_report(study, write_study(folder / "study", study, ends={}), folder / "out")
    return folder / "out"


def rates(values: int) -> list[str]:
    grid = f"{{low: 3.0e-4, high: 3.0e-2, values: {values}}}"
    return [f"tune.learning_rate={grid}", f"tune.full_finetuning.learning_rate={grid}"]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_of(tmp_path_factory.mktemp("crowded"), *rates(RATES))


def test_more_trials_are_no_more_parts_of_the_page(crowded: Path, tmp_path: Path) -> None:
    more = (report_of(tmp_path, *rates(3 * RATES)) / "report.html").read_text()
    page = (crowded / "report.html").read_text()
    added = ARMS * 2 * RATES
    assert more.count("<") - page.count("<") < added  # the scales' ticks; two figures of marks would be 2 · added
    assert "150 from 0.0003 to 0.03" in more  # of an arm's rates, of which 150 would fill a table's cell
    assert len(re.findall(r"<tr", more)) == len(re.findall(r"<tr", page))


def test_no_trial_is_left_out_of_the_numbers(crowded: Path) -> None:
    assert len((crowded / "figures" / "loss-by-learning-rate.csv").read_text().splitlines()) == 1 + ARMS * RATES
    assert len((crowded / "trials.csv").read_text().splitlines()) == 1 + ARMS * RATES + 5 * SEEDS


def test_every_trial_is_a_dot_of_the_crowded_figure(crowded: Path) -> None:
    """As many places in its shapes as there are trials."""
    found = re.findall(r"<figure>.*?</figure>", (crowded / "report.html").read_text(), re.DOTALL)
    (figure,) = [text for text in found if "<h3>Learning rates in the search" in text]
    dots = re.findall(r'<path d="([^"]*)"[^>]*stroke-width: (?:2.5|4); stroke-linecap: round', figure)
    assert sum(shape.count("M") for shape in dots) == 2 * ARMS * RATES  # on a screen and on a phone


def test_verdicts_of_many_arms_show_one_for_each_rank(tmp_path: Path) -> None:
    ratios = [0.25 * i for i in range(1, 15)]
    out = report_of(tmp_path, f"arms.alpha_ratio={ratios}", "confirm.finalists=arm", "confirm.seeds=[1, 2]")
    told = "Only the arms that search chose for their ranks are drawn; the other 52 stand in the table"
    assert told in (out / "report.md").read_text()
    drawn = re.findall(r",(r\d+)-ratio", (out / "figures" / "verdicts.csv").read_text())
    assert sorted(set(drawn)) == ["r2", "r4", "r64", "r8"] and len(drawn) == 3 + 4  # to the reference, and to full


def test_each_journal_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = quickstart(*LITTLE)
    record = write_study(tmp_path / "study", study)
    read, seen = journal.read_events, []
    monkeypatch.setattr(journal, "read_events", lambda path, mend: seen.append(path) or read(path, mend))
    write_report(study, read_study_record(record.folder), tmp_path / "out")
    assert len(seen) == len(set(seen)) == 2 + len(record.trials)  # a study has two


def test_a_sentence_names_the_first_of_many_and_counts_the_rest() -> None:
    names = [f"r{i}" for i in range(1, MOST_NAMED + 4)]
    assert join(names) == ", ".join(names[:MOST_NAMED]) + " and 3 more"
    assert join(names[:3]) == "r1, r2 and r3" and join(names[:1]) == "r1"
