"""Forgetting in the report: arms at one target loss, by hand, and what is said of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import quickstart, write_study

from sweep.report.forgetting import Point, forgetting_at, match
from sweep.report.report import write_report
from sweep.study.arms import Arm
from sweep.study.records import (
    CONFIRM,
    DIVERGED,
    measurement_from_json,
    prepared_from_json,
    to_json,
)
from sweep.tracking.entities import trial_metrics
from sweep.tracking.journal import read_study_record


@pytest.mark.parametrize("level", [1.5, 1.0, 0.8, 0.55, 0.3])
def test_forgetting_at_a_target_loss_is_linear_between_rungs(level: float) -> None:
    losses, forgotten = [1.6, 1.0, 0.5, 0.3], [0.0, 0.1, 0.4, 0.9]
    points = [Point(step, x, y) for step, (x, y) in enumerate(zip(losses, forgotten, strict=True))]
    expected = np.interp(level, losses[::-1], forgotten[::-1])
    assert forgetting_at(points, level) == pytest.approx(expected, abs=1e-12)


def test_forgetting_is_that_of_the_first_time_and_none_where_the_loss_is_never_reached() -> None:
    points = [Point(0, 1.0, 0.0), Point(1, 0.4, 0.2), Point(2, 0.6, 0.5), Point(3, 0.5, 0.8)]
    assert forgetting_at(points, 0.5) == pytest.approx(0.2 * 0.5 / 0.6)
    assert forgetting_at(points, 0.39) is None
    assert forgetting_at(points, 1.2) == 0.0, "it was there before any step"


def forgets(arm: Arm, seed: int, step: int) -> float:
    """Full fine-tuning forgets most, and more with every step; noise of the seed."""
    return (0.6 if arm.is_full else 0.05 + 0.002 * arm.r) * step / 40 + 0.004 * seed * (step / 40) ** 2


def final_loss(arm: Arm, seed: int) -> float:
    return {2: 0.30, 4: 0.26, 8: 0.24, 64: 0.22, 0: 0.20}[arm.r] + 0.002 * seed


def test_arms_are_compared_at_the_worst_arms_final_loss_seed_by_seed(tmp_path: Path) -> None:
    study = quickstart("forgetting={source: source.txt}")
    record = write_study(tmp_path, study, final_loss, forgets=forgets, ends={(CONFIRM, "r8-ratio2", 4): DIVERGED})
    values: dict[str, dict[int, float]] = {}
    worst = {seed: 0.30 + 0.002 * seed + 0.01 for seed in study.confirm.seeds}  # of rank 2; validation is 0.01 higher
    for trial in record.trials:
        if trial.spec.phase == CONFIRM and trial.state == "complete":
            measured = [rung.measurement for rung in trial.rungs]
            x = [1.61, *(m.eval_loss for m in measured)]
            y = [0.0, *(m.forgetting_loss - 3.0 for m in measured)]  # type: ignore[operator]
            at = np.interp(worst[trial.spec.seed], x[::-1], y[::-1])
            values.setdefault(trial.spec.arm.name, {})[trial.spec.seed] = float(at)
    found = {m.arm.name: m for m in match(study, record, "full")}
    assert set(found) == set(values)
    for name, m in found.items():
        assert dict(zip(m.seeds, m.values, strict=True)) == pytest.approx(values[name], abs=1e-9)
        assert m.never == ((4,) if name == "r8-ratio2" else ()) and m.at_start == ()
        if name == "full":
            assert m.to_baseline is None
            continue
        pairs = [values[name][seed] - values["full"][seed] for seed in values[name]]
        low, high = stats.t.interval(0.95, len(pairs) - 1, np.mean(pairs), stats.sem(pairs))
        assert m.to_baseline is not None
        assert (m.to_baseline.low, m.to_baseline.high) == pytest.approx((low, high), abs=1e-9)


def test_report_shows_forgetting_and_says_whether_it_agrees_with_the_literature(tmp_path: Path) -> None:
    study = quickstart("forgetting={source: source.txt}")
    for name, how, says in (
        ("less", forgets, "LoRA forgets less is shown here too, at the same target loss and of every arm"),
        ("more", lambda arm, seed, step: -forgets(arm, seed, step), "Here the contrary is shown of rank 2"),
    ):
        record = write_study(tmp_path / name, study, final_loss, forgets=how, ends={})
        findings = write_report(study, record, tmp_path / "out")
        text = (tmp_path / "out" / "report.md").read_text()
        assert ("Here no arm forgot" in text) == (name == "more")
        assert says in text and "arXiv 2405.09673" in text and "| Forgetting |" in text
        assert (tmp_path / "out" / "figures" / "learning-forgetting.png").exists()
        full = findings.result("full")
        ends = [how(full.arm, seed, 40) for seed in study.confirm.seeds]  # type: ignore[union-attr]
        assert full is not None and full.forgetting is not None
        assert full.forgetting.mean == pytest.approx(np.mean(ends))
    with open(tmp_path / "out" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(bool(row["forgetting_loss"]) == (row["phase"] == CONFIRM) for row in rows)
    (one,) = (t for t in record.trials if (t.spec.phase, t.spec.arm.name, t.spec.seed) == (CONFIRM, "full", 1))
    tracked = [(m.step, m.value) for m in trial_metrics(one) if m.key == "forgetting_loss"]
    assert tracked == [(step, pytest.approx(3.0 - forgets(one.spec.arm, 1, step))) for step in study.rungs]


def test_without_forgetting_the_report_has_no_trace_of_it(tmp_path: Path) -> None:
    study = quickstart()
    write_report(study, write_study(tmp_path / "home", study), tmp_path / "out")
    assert "orgetting" not in (tmp_path / "out" / "report.md").read_text().split("<details>")[0]


def test_journals_from_before_forgetting_load(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path, study)
    assert record.prepared is not None
    prepared = to_json(record.prepared)
    measurement = to_json(record.trials[0].rungs[0].measurement)
    for key in ("forgetting_loss", "eval_loss_at_start"):
        del measurement[key]
    del prepared["source_text"]
    assert measurement_from_json(json.loads(json.dumps(measurement))).forgetting_loss is None
    assert prepared_from_json(json.loads(json.dumps(prepared))) == record.prepared
    asked = write_study(tmp_path / "asked", study, forgets=forgets)
    assert asked.prepared is not None and asked.prepared.source_text is not None
    assert read_study_record(asked.folder).prepared == asked.prepared
