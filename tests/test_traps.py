"""Traps that a comparison falls into are told by name, with their numbers; the published tables are the references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats
from synthetic import quickstart, write_study

from sweep.report.power import power, seeds_needed, showable_margin
from sweep.report.search import SearchRow
from sweep.report.statistics import Findings, find
from sweep.report.traps import pruned_while_catching_up, ratio_of_sums, same_effective_rate
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE, CONFIRM, PRUNED, SEARCH, Measurement, TrialSpec
from sweep.study.schema import Study
from sweep.tracking.journal import Rung, StudyRecord, TrialRecord
from sweep.tracking.store import TEST_ROWS, save

GOOD = {0: 0.18, 2: 0.20, 4: 0.20, 8: 0.20, 64: 0.20}


@pytest.mark.parametrize(("seeds", "margin"), [(3, 2.3), (5, 1.4), (10, 0.86)])
def test_the_margin_that_seeds_can_show_is_the_published_one(seeds: int, margin: float) -> None:
    assert showable_margin(1.0, seeds) == pytest.approx(margin, rel=0.03)
    assert showable_margin(0.02, seeds) == pytest.approx(0.02 * showable_margin(1.0, seeds))


def test_an_equal_arm_is_shown_at_that_margin_in_four_studies_of_five() -> None:
    d = np.random.default_rng(4).normal(0, 1, (4000, 5))
    shown = stats.ttest_1samp(d, showable_margin(1.0, 5), axis=1, alternative="less").pvalue < 0.05
    assert np.mean(shown) == pytest.approx(0.8, abs=3 * (0.8 * 0.2 / 4000) ** 0.5)


def test_the_seeds_that_are_asked_for_are_the_fewest_that_do() -> None:
    for epsilon in (0.3, 0.8, 2.0):
        n = seeds_needed(1.0, epsilon)
        assert n and showable_margin(1.0, n) <= epsilon and (n == 2 or showable_margin(1.0, n - 1) > epsilon)
    assert seeds_needed(1.0, 1e-4) is None


def test_spread_is_pooled_over_arms_about_the_mean_of_each() -> None:
    found = power([[0.0, 0.2, 0.1], [5.0, 5.2, 5.4]], 0.05)
    assert found and found.sd == pytest.approx((0.1 / 4) ** 0.5)  # squares 0.02 + 0.08 over 2 + 2 degrees of freedom
    assert found.seeds == 3
    assert power([[0.0, 0.2, 0.1], [5.0, 5.2, 5.4], [0.0, 9.0]], 0.05) == found  # an arm that lost a seed
    assert power([[0.1, 0.1]], 0.05) is None and power([], 0.05) is None


def noisy(tmp_path: Path, wobble: float, *overrides: str) -> Findings:
    study = quickstart(*overrides)
    rng = np.random.default_rng(5)
    return find(study, write_study(tmp_path / "s", study, lambda arm, s: GOOD[arm.r] + rng.normal(0, wobble), ends={}))


def test_a_margin_that_the_seeds_cannot_show_is_told_with_the_one_they_can(tmp_path: Path) -> None:
    findings = noisy(tmp_path, 0.05)
    assert findings.power and findings.power.epsilon > 0.05
    (told,) = [w for w in findings.warnings if w.startswith("5 confirm seeds:")]
    assert f"an ε of {findings.power.epsilon:.3f} could have been shown" in told
    assert f"the declared ε of 0.05 wants about {findings.power.seeds_needed} seeds" in told


def test_a_margin_that_the_seeds_can_show_is_no_trap(tmp_path: Path) -> None:
    findings = noisy(tmp_path, 0.005)
    assert findings.power and findings.power.epsilon < 0.05
    assert not any("could have been shown" in w for w in findings.warnings)


def row(arm: Arm, rate: float | None) -> SearchRow:
    return SearchRow(arm, (1e-3, 2e-3), rate, 0.3, complete=2, pruned=0, diverged=0, failed=0)


def test_arms_whose_rates_make_up_for_their_alpha_are_told() -> None:
    one, two = (a for a in quickstart().list_arms() if a.r == 4)
    (told,) = same_effective_rate([row(one, 4e-3), row(two, 2e-3)])
    assert "r4-ratio1 at 0.004 and r4-ratio2 at 0.002" in told and "(0.004)" in told


def test_arms_of_other_ranks_or_other_effective_rates_are_not() -> None:
    arms = {a.name: a for a in quickstart().list_arms()}
    assert same_effective_rate([row(arms["r4-ratio1"], 2e-3), row(arms["r4-ratio2"], 2e-3)]) == []
    assert same_effective_rate([row(arms["r4-ratio1"], 2e-3), row(arms["r8-ratio2"], 1e-3)]) == []
    assert same_effective_rate([row(arms["r4-ratio1"], 2e-3), row(arms["r4-ratio2"], None)]) == []


def test_a_ratio_of_sums_over_equal_rows_is_a_mean_with_its_standard_error() -> None:
    loss = np.random.default_rng(6).normal(0.1, 1, 50)
    mean, error = ratio_of_sums(loss, np.ones(50))
    assert (mean, error) == pytest.approx((loss.mean(), stats.sem(loss)))
    assert ratio_of_sums(3 * loss, np.full(50, 3.0)) == pytest.approx((mean, error))


def test_the_error_of_a_ratio_of_sums_is_that_of_resampled_rows() -> None:
    rng = np.random.default_rng(7)
    targets = rng.integers(5, 60, 400).astype(float)
    loss = targets * rng.normal(0.1, 0.4, 400)
    picks = rng.integers(0, 400, (4000, 400))
    resampled = loss[picks].sum(1) / targets[picks].sum(1)
    assert ratio_of_sums(loss, targets)[1] == pytest.approx(resampled.std(), rel=0.05)


def with_rows(
    tmp_path: Path,
    spread: float,
    rows: int = 200,
    *overrides: str,
    spoil: Callable[[Path, TrialSpec], None] = lambda path, spec: None,
) -> Findings:
    """A study whose arms lose the same over seeds, and whose rows differ by `spread` between rank 4 and rank 64."""
    study = quickstart(*overrides)
    record = write_study(tmp_path / "s", study, lambda arm, seed: GOOD[arm.r] + 0.001 * ((arm.r + seed) % 3), ends={})
    noise = np.random.default_rng(8).normal(0, spread, rows)
    trials = []
    for trial in record.trials:
        if trial.spec.phase == CONFIRM and trial.last is not None:
            loss = 0.2 + (noise - noise.mean() if trial.spec.arm.r == 4 else 0 * noise)
            kept = {"loss": loss.astype(np.float32), "targets": np.ones(rows, np.float32)}
            saved = save(trial.spec, trial.last.stop, {}, lambda folder, kept=kept: save_file(kept, folder / TEST_ROWS))
            last = replace(
                trial.last,
                checkpoint=saved.name,
                checkpoint_sha256=saved.sha256,
                test_rows=f"{saved.name}/{TEST_ROWS}",
            )
            spoil(Path(trial.spec.folder, last.test_rows), trial.spec)
            trial = replace(trial, rungs=(*trial.rungs[:-1], replace(trial.rungs[-1], measurement=last)))
        trials.append(trial)
    return find(study, replace(record, trials=tuple(trials)))


def test_damaged_losses_of_test_rows_are_a_warning_and_no_end_of_the_report(tmp_path: Path) -> None:
    def spoil(path: Path, spec: TrialSpec) -> None:
        if spec.arm.r == 4 and spec.seed == 2:
            path.write_bytes(path.read_bytes()[:-1])

    findings = with_rows(tmp_path, spread=0.8, spoil=spoil)
    told = [warning for warning in findings.warnings if "test-rows" in warning]
    assert len(told) == 1 and told[0].startswith("r4-ratio2: whether the test set is large enough cannot be told: the ")
    assert "is damaged: " in told[0] and str(tmp_path) not in told[0]


def test_a_test_set_too_small_for_a_claim_is_told_with_the_rows_it_wants(tmp_path: Path) -> None:
    findings = with_rows(tmp_path, spread=0.8)
    result = findings.result("r4-ratio2")
    assert result and result.verdict == "non-inferior"
    told, to_full = [w for w in findings.warnings if "test rows" in w]
    assert to_full.startswith("r4-ratio2: that it is non-inferior to full fine-tuning rests on 200 test rows")
    assert told.startswith(
        "r4-ratio2: that it is non-inferior to rank 64 rests on 200 test rows, too few for the claim"
    )
    # bound = 0 + t(0.95; 199) · sd / √200; rows wanted: 200 · (bound / 0.05)²
    sd = np.random.default_rng(8).normal(0, 0.8, 200).std(ddof=1)
    bound = stats.t.ppf(0.95, 199) * sd / 200**0.5
    assert f"as large as {bound:.3f}" in told
    assert f"About {int(np.ceil(200 * (bound / 0.05) ** 2)):,} rows would do" in told


def test_a_test_set_large_enough_is_no_trap(tmp_path: Path) -> None:
    findings = with_rows(tmp_path, spread=0.2)
    assert not any("test row" in w for w in findings.warnings)


def test_losses_that_still_fall_at_the_end_are_told(tmp_path: Path) -> None:
    study = quickstart("train.steps=60", "search.rungs=[15, 30, 60]")

    def findings(folder: str, fall: float) -> Findings:
        record = write_study(tmp_path / folder, study, lambda arm, seed: 0.2 + 0.001 * seed, ends={})
        trials = [
            replace(t, rungs=(*t.rungs[:-2], _at(t.rungs[-2], 0.21 + 0.001 * t.spec.seed + fall), t.rungs[-1]))
            if t.spec.phase == CONFIRM and t.spec.arm.r == 8
            else replace(t, rungs=t.rungs[-1:])
            for t in record.trials
        ]
        return find(study, replace(record, trials=tuple(trials)))

    # 0.15 over the 30 steps of the last rung: 0.03 in a tenth of 60, more than half of ε = 0.05
    (told,) = [w for w in findings("a", 0.15).warnings if "still falling" in w]
    assert told.startswith("r8-ratio2: ") and "up to 0.030 for each tenth of the 60 steps" in told
    assert not any("still falling" in w for w in findings("b", 0.10).warnings)


def _at(rung: Rung, eval_loss: float) -> Rung:
    return replace(rung, measurement=replace(rung.measurement, eval_loss=eval_loss))


def searched(study: Study, number: int, rate: float, losses: list[float], state: str) -> TrialRecord:
    spec = TrialSpec(number, study.list_arms()[0], rate, 0, SEARCH, "")
    found = Measurement(
        number, 0, len(losses), tuple(losses), losses[-1], {}, {}, "", None, pack_size=1, pack_seconds=1, tokens=1
    )
    return TrialRecord(spec, 0.0, (Rung(0.0, found),), state)


def test_a_pruned_trial_that_was_catching_up_is_told_with_where_they_would_have_met(tmp_path: Path) -> None:
    study = quickstart("train.steps=40", "search.rungs=[10, 40]")
    noise = list(np.random.default_rng(9).normal(0, 0.2, 40))  # of the batches, which both see
    ahead = searched(study, 0, 0.01, [1.0 + n for n in noise], COMPLETE)

    def told(slope: float) -> list[str]:
        # behind by 0.5 at first, by `slope` less each step, with a little noise of its own
        behind = [1.5 - slope * i + noise[i] + 0.01 * (-1) ** i for i in range(10)]
        pruned = searched(study, 1, 0.003, behind, PRUNED)
        return pruned_while_catching_up(study, StudyRecord(None, (ahead, pruned)))  # type: ignore[arg-type]

    (warning,) = told(0.02)
    gaps = [0.5 - 0.02 * i + 0.01 * (-1) ** i for i in range(10)]
    line = stats.linregress(range(1, 11), gaps)
    meets = int(np.ceil(-line.intercept / line.slope))
    assert f"r2-ratio1 at 0.003 (step 10; level with r2-ratio1 at 0.01 by step {meets} at that pace)" in warning
    assert told(0.0) == [] and told(0.012) == []  # not at all, or only after the last step


def meeting_of(pruned: TrialRecord, other: TrialRecord, steps: int) -> int | None:
    """The reference: one pair at a time, by scipy's own regression."""
    last, theirs = pruned.rungs[-1].measurement, dict(other.train_curve)
    gaps = [(step, loss - theirs[step]) for step, loss in pruned.train_curve if step > last.start]
    line = stats.linregress(*zip(*gaps, strict=True), alternative="less")
    gap = line.intercept + line.slope * last.stop
    if line.pvalue >= 0.05 or gap <= 0 or last.stop - gap / line.slope > steps:
        return None
    return int(np.ceil(last.stop - gap / line.slope))


def test_hundreds_of_pairs_at_once_meet_where_each_pair_alone_does() -> None:
    study, rng = quickstart("train.steps=60", "search.rungs=[12, 60]"), np.random.default_rng(10)
    trials = []
    for number in range(60):
        level, slope, length = rng.uniform(0.2, 2.0), rng.uniform(0.0, 0.03), 12 if number % 2 else 60
        curve = [level - slope * step + rng.normal(0, 0.03) for step in range(length)]
        trials.append(searched(study, number, 0.001 * (number + 1), curve, PRUNED if number % 2 else COMPLETE))
    caught = 0
    for pruned in trials[1::2]:
        found = {o.spec.number: m for o in trials[::2] if (m := meeting_of(pruned, o, 60)) is not None}
        told = pruned_while_catching_up(study, StudyRecord(None, (*trials[::2], pruned)))  # type: ignore[arg-type]
        assert len(told) == bool(found)
        if found:
            step, first = min((step, number) for number, step in found.items())
            assert f"level with r2-ratio1 at {0.001 * (first + 1):.4g} by step {step} at" in told[0]
            caught += 1
    assert 5 < caught < 25  # of 30: neither none nor all
