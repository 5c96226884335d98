"""What the procedure does when it is repeated: thousands of studies whose truth is known.

The share of studies with a false claim must not be larger than was promised, but for Monte-Carlo error (three standard
errors). What is simulated is what the report does: the choice by search, the paired seeds, the sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import quickstart, write_study

from sweep.driver.plan import confirm_slots, pick_finalists, search_slots
from sweep.report.intervals import INFERIOR, NON_INFERIOR, judge, t_interval
from sweep.report.search import search_rows
from sweep.report.statistics import find
from sweep.study.home import StudyFolder
from sweep.study.records import COMPLETE, CONFIRM, SEARCH, Measurement, TrialSpec
from sweep.study.schema import Study
from sweep.tracking.journal import Rung, StudyRecord, TrialRecord

STUDIES = 4000


def at_most(share: float, promised: float, studies: int) -> bool:
    return share <= promised + 3 * math.sqrt(promised * (1 - promised) / studies)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("epsilon", [1e-9, 0.05, 0.5])
def test_identical_arms_are_called_inferior_in_at_most_one_study_of_twenty(seeds: int, epsilon: float) -> None:
    """Three arms in the sequence and three aside, all as good as the reference, which all are held against."""
    rng = np.random.default_rng(seeds)
    losses = rng.normal(0, 1, (STUDIES, 7, seeds)) + rng.normal(0, 3, (STUDIES, 1, seeds))  # the seed's own part
    wrong = 0
    for reference, *arms in losses:
        d = [arm - reference for arm in arms]
        first, second, _ = judge(d[:3], d[3:], epsilon)
        wrong += INFERIOR in (*first, *second)
    assert at_most(wrong / STUDIES, 0.05, STUDIES)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_paired_differences_cover_the_truth_in_95_of_100_studies(seeds: int) -> None:
    rng = np.random.default_rng(10 + seeds)
    covered = 0
    for d in rng.normal(0.3, 1, (STUDIES, seeds)):
        interval = t_interval(list(d))
        assert interval.low is not None and interval.high is not None
        covered += interval.low < 0.3 < interval.high
    assert covered / STUDIES == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / STUDIES))


@pytest.mark.parametrize("worse_from", [0, 1, 2])
def test_the_fixed_sequence_claims_a_worse_arm_in_at_most_one_study_of_twenty(worse_from: int) -> None:
    """The first arms are clearly as good, the rest worse by just ε: that is where a false claim is likeliest."""
    rng = np.random.default_rng(20 + worse_from)
    epsilon, wrong = 0.5, 0
    truth = np.array([[-5.0] if i < worse_from else [epsilon] for i in range(3)])
    for d in rng.normal(0, 1, (STUDIES, 3, 5)) + truth:
        verdicts, _, _ = judge(list(d), [], epsilon)
        wrong += NON_INFERIOR in verdicts[worse_from:]
    assert wrong / STUDIES == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / STUDIES))


def test_arms_tested_side_by_side_are_claimed_falsely_in_at_most_one_study_of_twenty() -> None:
    rng, epsilon, wrong = np.random.default_rng(30), 0.5, 0
    for d in rng.normal(epsilon, 1, (STUDIES, 6, 5)):
        _, verdicts, _ = judge([], list(d), epsilon)
        wrong += NON_INFERIOR in verdicts
    assert at_most(wrong / STUDIES, 0.05, STUDIES)


def test_an_arm_that_is_as_good_is_shown_so_once_the_margin_is_wide_enough() -> None:
    """The rules are not safe by never claiming anything: at three times the spread all three ranks are shown."""
    rng = np.random.default_rng(31)
    shown = sum(judge(list(d), [], 3.0)[0] == [NON_INFERIOR] * 3 for d in rng.normal(0, 1, (500, 3, 5)))
    assert shown / 500 > 0.95


@pytest.mark.slow
def test_a_whole_study_of_identical_arms_hardly_ever_calls_one_inferior(tmp_path: Path) -> None:
    """Through journals and `find`: against the reference and against full fine-tuning, each a family of its own."""
    study, studies = quickstart("confirm.epsilon=1.0e-6"), 150
    rng = np.random.default_rng(32)
    wrong = wrong_to_full = 0
    for i in range(studies):
        record = write_study(
            tmp_path / str(i), study, lambda arm, seed: rng.normal(0.3, 0.02), ends={}, chance=(None, None)
        )
        arms = find(study, record).arms
        wrong += any(r.verdict == INFERIOR for r in arms)
        wrong_to_full += any(r.full_verdict == INFERIOR for r in arms)
    assert at_most(wrong / studies, 0.05, studies) and at_most(wrong_to_full / studies, 0.05, studies)


def test_the_best_of_several_tries_looks_too_good_and_what_is_reported_does_not(tmp_path: Path) -> None:
    """Arms and rates are equal, so that search's best is luck: it lies below the truth by what is published. What is
    reported of the arm that it chose, by journal, `pick_finalists` and `find`, lies about the truth, and its interval
    holds it.
    """
    study = quickstart("arms.full_finetuning=false", "arms.rank=[64]", "search.keep=1.0")  # 2 ratios × 3 rates
    rng, truth, sd, studies = np.random.default_rng(33), 0.3, 0.1, 120
    chosen, reported, covered = [], [], 0
    for i in range(studies):
        folder = StudyFolder(tmp_path / str(i))
        slots, records = search_slots(study), {}
        for number, slot in enumerate(slots):
            spec = TrialSpec(number, slot.arm, slot.rate or 0.0, slot.seed, SEARCH, str(folder.trial(number)))
            records[slot.name] = searched(spec, rng.normal(truth, sd), study.train.steps)
        finalists, _ = pick_finalists(study, slots, records)
        confirmed = [
            ended_with(
                TrialSpec(len(slots) + k, s.arm, s.rate or 0.0, s.seed, CONFIRM, ""), rng.normal(truth, sd), study
            )
            for k, s in enumerate(confirm_slots(study, finalists))
        ]
        findings = find(
            study, StudyRecord(folder, (*records.values(), *confirmed), finalists=finalists, finished_at=1.0)
        )
        (result,) = findings.arms
        assert result.loss_low is not None and result.loss_high is not None
        chosen.append(min(row.best_loss for row in findings.search if row.best_loss is not None))
        reported.append(result.loss_mean)
        covered += result.loss_low < truth < result.loss_high
    # the expected smallest of six standard normal numbers is −1.267 (Tippett 1925)
    assert np.mean(chosen) == pytest.approx(truth - 1.267 * sd, abs=3 * 0.65 * sd / math.sqrt(studies))
    assert np.mean(reported) == pytest.approx(truth, abs=3 * sd / math.sqrt(5 * studies))
    assert covered / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)


def test_claims_in_and_outside_the_sequence_are_two_families_of_five_in_a_hundred() -> None:
    """Three arms in the sequence and three aside, all worse by just ε, held against one reference."""
    rng, epsilon = np.random.default_rng(34), 0.5
    inside = outside = either = 0
    for reference, *arms in rng.normal(0, 1, (STUDIES, 7, 5)):
        d = [arm - reference + epsilon for arm in arms]
        first, second, _ = judge(d[:3], d[3:], epsilon)
        inside += NON_INFERIOR in first
        outside += NON_INFERIOR in second
        either += NON_INFERIOR in (*first, *second)
    assert at_most(inside / STUDIES, 0.05, STUDIES) and at_most(outside / STUDIES, 0.05, STUDIES)
    assert at_most(either / STUDIES, 0.10, STUDIES)


def test_a_result_holds_no_search_score(tmp_path: Path) -> None:
    """Confirm losses are known to the digit; search scores are set far below them and must not show in any result."""
    study = quickstart()
    record = write_study(tmp_path / "s", study, lambda arm, seed: 0.5 + 0.001 * seed, ends={})
    findings = find(study, record)
    best = [row.best_loss for row in search_rows(study, record) if row.best_loss is not None]
    assert max(best) < 0.5
    for result in findings.arms:
        assert result.test_losses == pytest.approx([0.501, 0.502, 0.503, 0.504, 0.505])
        assert result.loss_mean == pytest.approx(0.503)
    assert not any(f"{loss:.3f}" in sentence for loss in best for sentence in findings.sentences)


def searched(spec: TrialSpec, loss: float, steps: int) -> TrialRecord:
    found = Measurement(
        spec.number, 0, steps, (loss,), float(loss), {}, {}, "", None, pack_size=1, pack_seconds=1.0, tokens=1
    )
    return TrialRecord(spec, 0.0, (Rung(0.0, found),), COMPLETE)


def ended_with(spec: TrialSpec, loss: float, study: Study) -> TrialRecord:
    trial = searched(spec, loss, study.train.steps)
    measured = replace(trial.rungs[0].measurement, test_metrics={"test_loss": float(loss), "test_accuracy": 0.5})
    return replace(trial, rungs=(Rung(0.0, measured),))
