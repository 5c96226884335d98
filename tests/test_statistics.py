"""What may be claimed: SciPy and numbers worked by hand are the references."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import quickstart, write_study
from verdict_studies import GOOD, SEEDS, find_in, verdicts

from sweep.report.intervals import holm, judge, p_above, p_below, t_interval
from sweep.report.sentences import recommendation
from sweep.report.statistics import find
from sweep.study.records import CONFIRM, DIVERGED, FAILED


def test_interval_is_students() -> None:
    values = [0.21, 0.25, 0.22, 0.27, 0.24]
    interval = t_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    # mean 0.238, sd 0.023875, t(0.95; 4) = 2.1318
    assert interval.upper == pytest.approx(0.238 + 2.1318 * 0.023875 / math.sqrt(5), abs=1e-5)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert t_interval([0.3]).low is None and t_interval([0.3]).upper is None
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_p_values_are_scipys() -> None:
    d = np.random.default_rng(0).normal(0.02, 0.03, (50, 5))
    np.testing.assert_allclose(p_below(d, 0.05), stats.ttest_1samp(d, 0.05, axis=1, alternative="less").pvalue)
    np.testing.assert_allclose(p_above(d, 0.05), stats.ttest_1samp(d, 0.05, axis=1, alternative="greater").pvalue)


def test_differences_without_spread_have_a_side() -> None:
    assert p_below([0.01] * 5, 0.05) == 0 and p_above([0.01] * 5, 0.05) == 1
    assert p_below([0.01], 0.05) == 1  # one pair shows nothing


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def test_sequence_stops_at_the_first_not_shown() -> None:
    close, far = [0.0, 0.001, -0.001], [0.2, -0.1, 0.1]
    assert judge([close, far, close], [], 0.05) == (["non-inferior", "inconclusive", "inconclusive"], [], 1)


def test_inferior_is_above_the_margin_not_above_zero() -> None:
    worse_within, worse_beyond = [0.030, 0.031, 0.029, 0.030], [0.080, 0.081, 0.079, 0.080]
    assert judge([worse_within], [], 0.05)[0] == ["non-inferior"]
    assert judge([worse_beyond], [], 0.05)[0] == ["inferior"]
    unsure = [0.02, 0.09, 0.05, 0.06]  # above 0 beyond doubt, on either side of the margin
    assert p_above(unsure, 0.0) < 0.05
    assert judge([unsure], [], 0.05)[0] == ["inconclusive"]


def test_identical_arms_are_hardly_ever_called_inferior() -> None:
    """In under 5 % of studies is any of three identical arms called inferior, at a margin far below the noise."""
    rng = np.random.default_rng(1)
    studies = 1000
    wrong = 0
    for _ in range(studies):
        losses = rng.normal(0, 1, (4, 5))
        wrong += "inferior" in judge(list(losses[1:] - losses[0]), [], epsilon=1e-6)[0]
    assert wrong / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


def test_sequence_keeps_its_error_rate_at_the_margin() -> None:
    """Arms that are worse by just ε: any claim of non-inferiority is false, and is made in 5 % of studies."""
    rng = np.random.default_rng(2)
    studies = 2000
    wrong = 0
    for _ in range(studies):
        losses = rng.normal(0, 1, (4, 5))
        wrong += "non-inferior" in judge(list(losses[1:] - losses[0] + 0.5), [], epsilon=0.5)[0]
    assert wrong / studies == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / studies))


def test_intervals_cover_what_they_say() -> None:
    d = np.random.default_rng(3).normal(0.4, 1, (2000, 5))
    intervals = [t_interval(list(row)) for row in d]
    covered = np.mean([i.low < 0.4 < i.high for i in intervals if i.low is not None and i.high is not None])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    findings = find_in(tmp_path, {**GOOD, 2: 0.22})
    small, full = findings.result("r2-ratio2"), findings.result("full")
    assert small and full and small.to_full
    paired = stats.ttest_rel(small.test_losses, full.test_losses).confidence_interval(0.95)
    assert (small.to_full.low, small.to_full.high) == pytest.approx((paired.low, paired.high))
    # the seeds' common part widens the loss's own interval, not that of the difference
    assert small.loss_high - small.loss_low > 3 * (small.to_full.high - small.to_full.low)  # type: ignore[operator]


def test_recommends_the_smallest_rank_shown_non_inferior(tmp_path: Path) -> None:
    findings = find_in(tmp_path, {**GOOD, 2: 0.40})
    assert verdicts(findings) == {2: "inferior", 4: "non-inferior", 8: "non-inferior", 64: "reference"}
    assert findings.recommended == "r4-ratio2"
    assert findings.sentences[0].startswith("Use rank 4, alpha ratio 2 (lora_alpha 8) and learning rate 0.009487")


def test_a_good_rank_below_a_bad_one_is_not_claimed(tmp_path: Path) -> None:
    findings = find_in(tmp_path, {**GOOD, 8: 0.40})
    assert verdicts(findings) == {2: "inconclusive", 4: "inconclusive", 8: "inferior", 64: "reference"}
    assert findings.recommended == "r64-ratio2"
    small = findings.result("r2-ratio2")
    assert small and "stopped at rank 8" in small.note
    assert "Stay with the reference" in findings.sentences[0]


def test_one_seed_shows_nothing_and_says_so(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, "confirm.seeds=[1]")
    assert set(verdicts(findings).values()) == {"inconclusive", "reference"}
    assert all(r.loss_low is None for r in findings.arms)
    assert "one confirm seed there is no interval" in findings.sentences[0]
    assert any("1 confirm seed: too few" in w for w in findings.warnings)


def test_trial_is_chosen_by_validation_loss(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path / "study", study)
    findings = find(study, record)
    of_arm = [t for t in record.trials if t.spec.phase == CONFIRM and t.spec.arm.name == findings.recommended]
    best = min(of_arm, key=lambda t: t.last.eval_loss)  # type: ignore[union-attr, arg-type, return-value]
    assert findings.recommended_trial == best.spec.number


def test_diverged_seeds_are_left_out_aloud(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, ends={(CONFIRM, "r4-ratio2", 3): DIVERGED})
    arm = findings.result("r4-ratio2")
    assert arm and arm.seeds == (1, 2, 4, 5) and arm.diverged_seeds == (3,)
    assert arm.to_reference and arm.to_reference.n == 4
    assert any(w.startswith("r4-ratio2: seed 3 diverged and is left out of its means.") for w in findings.warnings)


def test_an_arm_that_diverged_on_a_seed_is_not_claimed_on_the_others_and_ends_the_sequence(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, ends={(CONFIRM, "r4-ratio2", 3): DIVERGED})
    assert verdicts(findings) == {2: "inconclusive", 4: "inconclusive", 8: "non-inferior", 64: "reference"}
    assert findings.recommended == "r8-ratio2"
    arm, below = findings.result("r4-ratio2"), findings.result("r2-ratio2")
    assert arm and arm.note == "diverged on seed 3, so not shown non-inferior"
    assert below and below.note == "not tested: the sequence stopped at rank 4"
    assert any("diverged" in w and "not called non-inferior" in w for w in findings.warnings)


def test_an_arm_outside_the_sequence_that_diverged_is_not_claimed_either(tmp_path: Path) -> None:
    ends = {(CONFIRM, f"r64-ratio{a}", 3): DIVERGED for a in (1, 2)}
    findings = find_in(tmp_path, GOOD, "confirm.finalists=arm", ends=ends)
    assert [r.verdict for r in findings.arms if r.arm.r == 64] == ["reference", "inconclusive"]
    warnings = [w for w in findings.warnings if "seed 3 diverged" in w]
    assert ["not called non-inferior" in w for w in warnings] == [False, True]


def test_an_arm_with_a_failed_seed_is_judged_on_the_others(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, ends={(CONFIRM, "r2-ratio2", 3): FAILED})
    assert verdicts(findings)[2] == "non-inferior"
    assert "r2-ratio2: seed 3 failed and is left out of its means." in findings.warnings


def test_an_arm_shown_inferior_stays_so_when_it_also_diverged(tmp_path: Path) -> None:
    findings = find_in(tmp_path, {**GOOD, 2: 0.40}, ends={(CONFIRM, "r2-ratio2", 3): DIVERGED})
    assert verdicts(findings)[2] == "inferior"


def test_the_bound_that_is_quoted_is_that_of_the_arm_that_stopped_the_sequence(tmp_path: Path) -> None:
    findings = find_in(tmp_path, {**GOOD, 8: 0.40}, "confirm.finalists=arm")
    (stopped,) = [r for r in findings.arms if r.arm.r == 8 and r.in_sequence]
    (other,) = [r for r in findings.arms if r.arm.r == 8 and not r.in_sequence]
    assert stopped.to_reference and other.to_reference
    swapped = [
        replace(r, to_reference=replace(other.to_reference, upper=9.0)) if r is other else r for r in findings.arms
    ]
    study = quickstart("confirm.finalists=arm")
    for arms in (swapped, swapped[::-1]):
        first, *_ = recommendation(study, replace(findings, arms=tuple(arms)))
        assert f"may differ by up to +{stopped.to_reference.upper:.3f}" in first


def test_an_arm_that_always_diverged_is_not_claimed(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, ends={(CONFIRM, "r8-ratio2", s): DIVERGED for s in SEEDS})
    arm = findings.result("r8-ratio2")
    assert arm and math.isnan(arm.loss_mean) and arm.verdict == "inconclusive"
    assert findings.recommended == "r64-ratio2"  # the sequence stopped at rank 8


def test_without_full_finetuning_or_costs(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, "arms.full_finetuning=false", costs=False, prepared=False)
    assert findings.recommended == "r2-ratio2"
    assert "was not part of this study" in findings.sentences[1]
    assert all(r.to_full is None and r.cost is None and r.trainable_params is None for r in findings.arms)


def test_several_arms_a_rank_are_chosen_by_search_and_the_others_stand_aside(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, "confirm.finalists=arm")
    assert [r.verdict for r in findings.arms if r.arm.r == 64] == ["reference", "non-inferior"]
    aside = [r for r in findings.arms if "outside the sequence" in r.note]
    assert len(aside) == 4  # eight arms, one of each rank in the sequence


def test_search_alone_recommends_nothing(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, stop_after=27)
    assert findings.arms == () and findings.recommended is None and findings.recommended_trial is None
    assert "search scores choose but are not results" in findings.sentences[0]
    assert (findings.ended, findings.planned) == (27, 52)


def test_same_data_same_sentences(tmp_path: Path) -> None:
    study = quickstart()
    first, second = (find(study, write_study(tmp_path / name, study)) for name in ("a", "b"))
    assert first.sentences == second.sentences and first.warnings == second.warnings


def test_a_study_of_one_rank_has_nothing_to_stay_with(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD, "arms.rank=[64]", "confirm.finalists=arm")
    result = findings.result(findings.recommended)
    assert result and result.loss_low is not None and result.loss_high is not None
    assert "no smaller rank was part of this study" in findings.sentences[0]
    assert f"95 % interval {result.loss_low:.3f} to {result.loss_high:.3f}" in findings.sentences[0]


def test_arms_are_judged_against_full_finetuning_too_in_a_family_of_their_own(tmp_path: Path) -> None:
    findings = find_in(tmp_path, {0: 0.10, 2: 0.40, 4: 0.20, 8: 0.20, 64: 0.12})
    to_full = {r.arm.r: r.full_verdict for r in findings.arms if not r.arm.is_full}
    assert to_full == {2: "inferior", 4: "inferior", 8: "inferior", 64: "non-inferior"}
    assert findings.result("full") and findings.result("full").full_verdict is None  # type: ignore[union-attr]


def test_what_is_not_known_is_said_of_the_recommendation(tmp_path: Path) -> None:
    findings = find_in(tmp_path, GOOD)
    unknown = findings.sentences[-1]
    assert unknown.startswith("Not known: whether rank 2, alpha ratio 2 beats alpha ratio 1, since search chose")
    assert "above 0.03, the edge of its grid" in unknown and "beyond 40 steps" in unknown
    assert "of the time a step" in findings.sentences[1]
