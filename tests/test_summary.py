"""What MLflow's page of a study says in short: the answer, and a row for each confirmed arm."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import journals

from sweep.report.statistics import find
from sweep.report.summary import escaped, summary
from sweep.study.home import Home
from sweep.study.records import CONFIRM
from sweep.tracking.journal import read_study_record


def test_it_has_the_answer_and_each_arms_mean_over_its_confirm_trials(tmp_path: Path) -> None:
    study = journals.sample_study(seeds=4)
    record = read_study_record(journals.whole_study(Home(tmp_path), study))
    findings = find(study, record)
    answer, table = summary(study, findings).split("\n\n")
    assert answer.startswith("**" + escaped(findings.sentences[0]) + "**")
    assert all(escaped(sentence) in answer for sentence in findings.sentences)
    rows = {
        cells[1].strip(): cells for line in table.splitlines()[2:] if (cells := line.replace("&emsp;", "").split("|"))
    }
    for arm, title in (("r2-ratio1", "rank 2, alpha ratio 1"), ("full", "full fine-tuning")):
        confirmed = [t.last for t in record.trials if (t.spec.arm.name, t.spec.phase) == (arm, CONFIRM)]
        assert float(rows[title][2]) == round(mean(last.test_metrics["test_loss"] for last in confirmed if last), 3)
    assert len(rows) == 5


def test_before_anything_is_confirmed_there_is_no_table(tmp_path: Path) -> None:
    study = journals.sample_study()
    folder = journals.start_journal(Home(tmp_path), study)
    journals.write_search(folder, study)
    said = summary(study, find(study, read_study_record(folder)))
    assert said.startswith("**No recommendation yet") and "|" not in said
