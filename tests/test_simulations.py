"""What the procedure does when it is repeated: thousands of studies whose truth is known.

The share of studies with a false claim must not be larger than was promised, but for Monte-Carlo error (three standard
errors). What is simulated is what the report does: the choice by search, the paired seeds, the sequence.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic import quickstart, write_study

from sweep.driver.plan import pick_finalists, search_slots
from sweep.report.intervals import INFERIOR, NON_INFERIOR, judge, t_interval
from sweep.report.search import search_rows
from sweep.report.statistics import find
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE, SEARCH, Measurement, TrialSpec
from sweep.tracking.journal import Rung, TrialRecord

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


def test_the_best_of_several_tries_looks_too_good_and_its_confirmed_loss_does_not() -> None:
    """Equal arms and rates: the search's best is below the truth by what is published; fresh seeds are not."""
    study = quickstart("arms.full_finetuning=false", "arms.rank=[64]")  # 2 ratios × 3 rates
    slots, rng = search_slots(study), np.random.default_rng(33)
    chosen, confirmed = [], []
    for _ in range(400):
        records = {
            slot.name: searched(slot.index, slot.arm, slot.rate or 0.0, rng.normal(0.3, 0.1), study.train.steps)
            for slot in slots
        }
        ((name, learning_rate),), _ = pick_finalists(study, slots, records)
        best = min(t.last.eval_loss for t in records.values())  # type: ignore[union-attr, type-var]
        assert (name, learning_rate) in {
            (t.spec.arm.name, t.spec.learning_rate)
            for t in records.values()
            if t.last is not None and t.last.eval_loss == best
        }
        chosen.append(best)
        confirmed.append(np.mean(rng.normal(0.3, 0.1, 5)))  # fresh seeds of the arm that was chosen
    # the expected smallest of six standard normal numbers is −1.267 (Tippett 1925)
    assert np.mean(chosen) == pytest.approx(0.3 - 1.267 * 0.1, abs=0.015)
    assert np.mean(confirmed) == pytest.approx(0.3, abs=3 * 0.1 / math.sqrt(5 * 400))


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


def searched(number: int, arm: Arm, rate: float, loss: float, steps: int) -> TrialRecord:
    spec = TrialSpec(number, arm, rate, 0, SEARCH, "")
    found = Measurement(
        number, 0, steps, (loss,), float(loss), {}, {}, "", None, pack_size=1, pack_seconds=1.0, tokens=1
    )
    return TrialRecord(spec, 0.0, (Rung(0.0, found),), COMPLETE)
