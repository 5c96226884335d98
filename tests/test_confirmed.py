"""Where every rate is confirmed, what is said and handed out of an arm is of the rate that search chose for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic import quickstart, write_study

from sweep import publishing
from sweep.adapters import domains
from sweep.console import validation_loss
from sweep.report.forgetting import match
from sweep.report.statistics import find
from sweep.study.arms import Arm
from sweep.study.home import Home
from sweep.study.records import CONFIRM, Saved
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord


def forgets(arm: Arm, seed: int, step: int) -> float:
    return (0.1 + 0.002 * arm.r + 0.01 * seed) * step / 40


@pytest.fixture
def study() -> Study:
    return quickstart("forgetting={source: source.txt}")


@pytest.fixture
def chosen(study: Study, tmp_path: Path) -> StudyRecord:
    return write_study(tmp_path, study, forgets=forgets, ends={})


@pytest.fixture
def record(chosen: StudyRecord) -> StudyRecord:
    """Every confirm trial a second time, at twice its rate, with a lower validation loss and more forgotten."""
    confirmed = [t for t in chosen.trials if t.spec.phase == CONFIRM]
    others = [_at_twice_the_rate(t, len(chosen.trials) + i) for i, t in enumerate(confirmed)]
    pairs = [*chosen.finalists, *((name, 2 * rate) for name, rate in chosen.finalists)]
    return replace(chosen, trials=(*chosen.trials, *others), finalists=tuple(pairs))


def _at_twice_the_rate(trial: TrialRecord, number: int) -> TrialRecord:
    rungs = []
    for rung in trial.rungs:
        found = rung.measurement
        assert found.eval_loss is not None and found.forgetting_loss is not None
        better = replace(found, eval_loss=found.eval_loss - 0.1, forgetting_loss=found.forgetting_loss + 1)
        rungs.append(replace(rung, measurement=better))
    spec = replace(trial.spec, number=number, learning_rate=2 * trial.spec.learning_rate)
    return replace(trial, spec=spec, rungs=tuple(rungs))


def other_of(record: StudyRecord, arm: str) -> TrialRecord:
    return min((t for t in record.trials if t.spec.arm.name == arm and t.spec.phase == CONFIRM), key=validation_loss)


def test_an_arms_export_is_of_the_chosen_rate_though_another_validates_better(
    study: Study, record: StudyRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "export", lambda *asked: asked)
    rate = dict(reversed(record.finalists))["r64-ratio2"]
    asked = study, record, "r64-ratio2", None, tmp_path, False, tmp_path, print
    trial, _ = publishing.export_chosen(*asked)
    assert trial.spec.learning_rate == rate
    assert validation_loss(trial) > validation_loss(other_of(record, "r64-ratio2")), "the test would be blind"


@pytest.mark.parametrize("recommended", [True, False])
def test_a_card_does_not_tell_another_rates_result(study: Study, record: StudyRecord, recommended: bool) -> None:
    findings = find(study, record)
    arm = findings.recommended if recommended else "r64-ratio2"
    assert arm is not None and (arm != "r64-ratio2") == recommended
    result = findings.result(arm)
    assert result is not None
    card = publishing.evidence_for(findings, other_of(record, arm))
    other = 2 * result.learning_rate
    opening = f"Search chose learning rate {result.learning_rate:.4g} for this arm; this trial has {other:.4g}"
    assert card.startswith(opening) and f"{result.loss_mean:.4f}" not in card


def test_only_the_chosen_rate_is_registered_as_recommended(
    study: Study, record: StudyRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "register", lambda *asked: "1")
    monkeypatch.setattr(publishing, "check_in_fresh_process", lambda *asked: None)
    monkeypatch.setattr(publishing, "remember_registered", lambda *asked: None)
    aliases: list[str] = []
    monkeypatch.setattr(publishing, "set_alias", lambda tracking, name, alias, version: aliases.append(alias))
    findings = find(study, record)
    arm, number = findings.recommended, findings.recommended_trial
    assert arm is not None and number is not None
    exported: Any = SimpleNamespace(path=tmp_path, check=SimpleNamespace(question={}))
    monkeypatch.setattr(publishing, "replace", lambda check, question: check)
    for trial in (record.trials[number], other_of(record, arm)):
        publishing.register_exported(study, record, trial, exported, "topics", Home(tmp_path))
    assert aliases == ["recommended", arm]


def test_forgetting_is_compared_at_the_chosen_rates(study: Study, chosen: StudyRecord, record: StudyRecord) -> None:
    assert match(study, record, "full") == match(study, chosen, "full")


def test_domains_are_compared_by_adapters_of_the_chosen_rate(
    chosen: StudyRecord, record: StudyRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrialRecord, "kept", Saved("checkpoints/1", ""))  # nothing lies on disk
    monkeypatch.setattr(domains, "read_kept", lambda trial: {})
    measured = [(m.arm, m.seed, m.learning_rate) for m in domains._confirmed("fr", record)]
    confirmed = [t.spec for t in chosen.trials if t.spec.phase == CONFIRM and not t.spec.arm.is_full]
    assert sorted(measured, key=str) == sorted(((s.arm.name, s.seed, s.learning_rate) for s in confirmed), key=str)
