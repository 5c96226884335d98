"""What speaks against a recommendation: arms that learned nothing, better finalists, a reference that looks bad."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from synthetic import quickstart, write_study

from sweep.report.intervals import REFERENCE
from sweep.report.statistics import Findings, find
from sweep.report.tables import confirmed_table
from sweep.study.arms import Arm
from sweep.study.records import CONFIRM
from sweep.study.schema import Study
from sweep.tracking.journal import TrialRecord


def given(folder: Path, losses: dict[int, list[float]], chance: float, *overrides: str) -> Findings:
    """Findings of test losses by rank and seed."""
    study = quickstart(*overrides)
    rest = [0.40, 0.41, 0.42, 0.41, 0.41]
    record = write_study(
        folder, study, lambda arm, seed: losses.get(arm.r, rest)[seed - 1], ends={}, chance=(chance, 0.2)
    )
    return find(study, record)


def notes_of(study: Study, findings: Findings) -> list[str]:
    """Of the table of what was confirmed."""
    return [cell.note for row in confirmed_table(study, findings).rows for cell in row.cells if cell.note]


# mean 0.670, sd 0.0070711, t(0.95; 4) = 2.1318: its one-sided bound is 0.670 + 2.1318 * 0.0070711 / √5 = 0.67674
IDLE = [0.66, 0.67, 0.67, 0.67, 0.68]


def test_nothing_is_recommended_against_a_reference_that_learned_nothing(tmp_path: Path) -> None:
    findings = given(tmp_path / "a", {64: IDLE}, 0.673)
    assert (findings.recommended, findings.recommended_trial, findings.unlearned) == (None, None, "r64-ratio2")
    assert findings.sentences[0] == (
        "Nothing can be concluded: rank 64 was not shown to have learned anything, its test loss 0.670 against 0.673 "
        "for always answering by the labels' frequencies; train longer or at other learning rates."
    )
    void = "says nothing: the reference was not shown to have learned"
    assert notes_of(quickstart(), findings).count(void) == 4  # ranks 2, 4 and 8, and full
    assert given(tmp_path / "b", {64: IDLE}, 0.6767).recommended is None
    assert given(tmp_path / "c", {64: IDLE}, 0.6768).recommended == "r2-ratio2"


def test_a_void_verdict_keeps_the_note_of_its_arm(tmp_path: Path) -> None:
    every = "confirm.finalists=arm"
    notes = notes_of(quickstart(every), given(tmp_path, {64: IDLE}, 0.673, every))
    own = "outside the sequence; Holm's correction"
    assert f"says nothing: the reference was not shown to have learned; {own}" in notes


def test_an_arm_that_learned_nothing_is_not_recommended(tmp_path: Path) -> None:
    findings = given(tmp_path, {2: IDLE}, 0.673, "confirm.epsilon=0.5")
    assert (findings.recommended, findings.unlearned) == (None, "r2-ratio2")
    assert findings.sentences[0].startswith("Nothing can be concluded: rank 2 was not shown")
    assert "ε = 0.5 is wide" in findings.sentences[1]


@pytest.mark.parametrize(("chance", "recommended"), [(0.66, None), (0.67, "r64-ratio2")])
def test_one_seed_has_no_bound_and_must_be_below_chance_itself(
    tmp_path: Path, chance: float, recommended: str | None
) -> None:
    assert given(tmp_path, {64: IDLE}, chance, "confirm.seeds=[1]").recommended == recommended


def test_finalists_that_are_better_by_more_than_epsilon_are_told(tmp_path: Path) -> None:
    # full − rank 2 by seed: −0.10, −0.11, −0.12, −0.11, −0.09: mean −0.106, sd 0.011402, t(0.975; 4) = 2.7764,
    # so ± 2.7764 * 0.011402 / √5 = 0.01416. Rank 8 is 0.04 lower: less than ε.
    full, rank8 = [0.30, 0.30, 0.30, 0.30, 0.32], [0.36, 0.37, 0.38, 0.37, 0.37]
    findings = given(tmp_path, {0: full, 8: rank8, 64: [0.39, 0.40, 0.41, 0.40, 0.40]}, 1.6)
    assert findings.recommended == "r2-ratio2"
    assert [w for w in findings.warnings if "recommended arm" in w] == [
        "full fine-tuning's test loss is 0.106 lower than that of the recommended arm (95 % interval −0.120 to "
        "−0.092, 5 paired seeds), more than ε = 0.05."
    ]
    assert not any("highest loss" in w for w in findings.warnings)


def test_a_bad_reference_is_told_though_another_arm_of_its_rank_is_worse(tmp_path: Path) -> None:
    study = quickstart("confirm.finalists=arm")

    def loss(arm: Arm, seed: int) -> float:
        return 0.4 if arm.r != 64 else IDLE[seed - 1] + (0.2 if arm.alpha_ratio == 2 else 0)

    record = write_study(tmp_path, study, loss, ends={}, chance=(1.6, 0.2))
    findings = find(study, record)
    worst = max(findings.arms, key=lambda result: result.loss_mean)
    assert worst.arm.name == "r64-ratio2" and worst.verdict != REFERENCE
    assert any("the reference, rank 64, has the highest loss of all ranks (0.670" in w for w in findings.warnings)


def test_a_reference_with_the_highest_loss_is_told(tmp_path: Path) -> None:
    # 0.670 ± 2.7764 * 0.0070711 / √5 = 0.00878
    findings = given(tmp_path, {64: IDLE, 0: [0.9] * 5}, 1.6)
    assert findings.warnings[0] == (
        "the reference, rank 64, has the highest loss of all ranks (0.670, 95 % interval 0.661 to 0.679): it may be "
        "badly tuned, and being non-inferior to it says little."
    )


def test_loss_and_accuracy_that_disagree_are_told_with_the_interval(tmp_path: Path) -> None:
    """Rank 2 has a lower loss than full fine-tuning, and answers right less often, by a paired interval."""
    study = quickstart()
    record = write_study(tmp_path, study, lambda arm, seed: 0.30 if arm.is_full else 0.25 + 0.001 * seed, ends={})

    def with_accuracy(trial: TrialRecord) -> TrialRecord:
        if trial.spec.phase != CONFIRM or trial.last is None:
            return trial
        hits = 0.90 + 0.001 * trial.spec.seed if trial.spec.arm.is_full else 0.88 + 0.002 * trial.spec.seed
        measured = replace(trial.last, test_metrics={**trial.last.test_metrics, "test_accuracy": hits})
        return replace(trial, rungs=(*trial.rungs[:-1], replace(trial.rungs[-1], measurement=measured)))

    findings = find(study, replace(record, trials=tuple(with_accuracy(t) for t in record.trials)))
    # full − rank 2 in points: 1.9, 1.8, 1.7, 1.6, 1.5
    interval = stats.t.interval(0.95, 4, loc=1.7, scale=stats.sem([1.9, 1.8, 1.7, 1.6, 1.5]))
    low, high = (f"\N{MINUS SIGN}{value:.1f}" for value in interval[::-1])
    (told,) = [w for w in findings.warnings if "disagree" in w]
    assert "against full fine-tuning the recommended arm's loss is lower, and its accuracy lower by 1.7 points" in told
    assert f"(95 % interval {low} to {high}, 5 paired seeds)" in told


def test_a_sequence_that_stopped_is_among_what_is_not_known(tmp_path: Path) -> None:
    noise = {1: 0.2, 2: -0.2, 3: 0.1, 4: -0.1, 5: 0.0}
    study = quickstart()
    record = write_study(
        tmp_path, study, lambda arm, s: 0.3 + (noise[s] if arm.r == 4 else 0.001 * ((arm.r + s) % 3)), ends={}
    )
    findings = find(study, record)
    stopped = findings.result("r4-ratio2")
    assert findings.recommended == "r8-ratio2" and stopped and stopped.to_reference and stopped.to_reference.upper
    assert (
        f"whether a smaller rank would do: the sequence stopped at rank 4, whose one-sided bound is "
        f"+{stopped.to_reference.upper:.4f}, so that rank 2 was not tested" in findings.sentences[-1]
    )
