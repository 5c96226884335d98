"""What may be compared between studies, and the numbers against SciPy and written-out formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ran_studies import BY_RANK, GPU, OTHER_DATA, OTHER_MODEL, losses, made
from scipy import stats

from sweep.report.compare_numbers import compare, contrasts, matched, shares, welch
from sweep.report.compare_rules import Ran, differences, loss_reason, may_be_compared
from sweep.report.compare_sentences import agreement
from sweep.report.compare_tables import reference_table
from sweep.study.records import CONFIRM, DIVERGED
from sweep.tracking.journal import StudyRecord


def ran(*overrides: str, found: dict[str, Any] | None = None, root: Path) -> Ran:
    """What was asked and prepared, without any trial."""
    name = f"s{len(list(root.glob('studies/*')))}"
    study, record = made(root, name, *overrides, found=found, stop_after=0)
    return study, record.prepared


@pytest.mark.parametrize(
    ("overrides", "found", "causes", "may"),
    [
        ([], {}, (), "losses costs"),
        (["confirm.seeds=[7,8,9]"], {}, (), "losses costs"),
        (["confirm.epsilon=0.02", "confirm.reference=8", "arms.rank=[4,8]"], {}, (), "losses costs"),
        (["question=Again?", "storage=sqlite:///x.db", "latency={}"], {"pack_size": 3}, (), "losses costs"),
        (["published=[{source: a paper, says: Rank 4 is enough}]"], {}, (), "losses costs"),
        (["train.steps=200", "search.rungs=[50,100,200]"], {}, ("train.steps",), "losses costs"),
        (["search.rungs=[20,40]"], {}, ("the search",), "losses costs"),
        (["model=other"], OTHER_MODEL, ("the model",), "losses costs"),
        (["model=/moved/model", "data.source=/moved/*.csv"], {}, (), "losses costs"),
        (["data.source=other"], OTHER_DATA, ("the data",), "costs"),
        (["data.max_evaluation_rows=50"], {}, ("the data",), "costs"),
        ([], GPU, ("the machine",), "losses costs"),
        ([], {"precision": "bfloat16"}, ("the precision or the attention",), "losses costs"),
        (["train.precision=bfloat16"], GPU, ("the precision or the attention", "the machine"), "losses"),
        (["train.micro_batch_size=2"], GPU, ("train.micro_batch_size", "the machine"), "losses"),
        (["train.batch_size=4"], GPU, ("train.batch_size", "the machine"), "losses"),
        ([], {"versions": {"torch": "3.0"}}, ("the libraries",), "losses costs"),
        (["model=other", "train.schedule=cosine"], OTHER_MODEL, ("the model", "train.schedule"), "losses costs"),
    ],
)
def test_the_rules_of_what_may_be_compared(
    tmp_path: Path, overrides: list[str], found: dict[str, Any], causes: tuple[str, ...], may: str
) -> None:
    rules = may_be_compared([ran(root=tmp_path), ran(*overrides, found=found, root=tmp_path)])
    assert set(rules.causes) == set(causes)
    assert [not rules.losses, not rules.costs] == ["losses" in may, "costs" in may]
    assert ("cannot be put down to one" in rules.cause) == (len(causes) > 1)
    assert ("alone" in rules.cause) == (len(causes) == 1)
    assert ("is chance" in rules.cause) == (not causes)


def test_what_is_not_known_yet_is_no_difference(tmp_path: Path) -> None:
    one, (study, _) = ran(root=tmp_path), ran("train.steps=200", "search.rungs=[200]", root=tmp_path)
    rules = may_be_compared([one, (study, None)])
    assert rules.causes == ("train.steps",)
    assert rules.costs == f"the machine of {study.name} is not known yet"


def test_what_differs_is_told_by_dotted_keys_and_no_password_is(tmp_path: Path) -> None:
    one = ran("storage=postgresql://me:secret@host/db", root=tmp_path)
    other = ran("train.steps=200", "search.rungs=[200]", "forgetting={source: old.txt}", root=tmp_path)
    told = {d.key: d.values for d in differences([one, other, one])}
    steps = one[0].train.steps
    assert told["train.steps"] == (str(steps), "200", str(steps))
    assert told["forgetting.source"] == ("–", "old.txt", "–")
    assert set(told) == {"train.steps", "search.rungs"} | {
        f"forgetting.{key}" for key in ("source", "text", "split", "max_length", "max_rows")
    }
    assert differences([one, one]) == ()


def test_losses_a_token_are_of_one_kind_only_with_one_tokenizer_and_one_length(tmp_path: Path) -> None:
    text = ["task=causal-lm", "arms.target_modules=[all-linear]"]
    one = ran(*text, root=tmp_path)
    assert loss_reason(one, ran(*text, "train.steps=80", "search.rungs=[80]", root=tmp_path)) == ""
    assert "tokenizers" in loss_reason(one, ran(*text, found=OTHER_MODEL, root=tmp_path))
    assert "max_length" in loss_reason(one, ran(*text, "data.max_length=99", root=tmp_path))
    assert "tasks differ" in loss_reason(one, ran(root=tmp_path))
    assert "has not read its data" in loss_reason(one, (one[0], None))


def test_welchs_interval_is_that_of_the_formula() -> None:
    """Welch 1947: t with the degrees of freedom of Satterthwaite, written out."""
    a, b = np.array([0.031, 0.012, 0.025, 0.04]), np.array([0.002, -0.011, 0.03])
    of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    df = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    mean, error = b.mean() - a.mean(), math.sqrt(of_a + of_b)
    half = stats.t.ppf(0.975, df) * error
    expected = (mean, mean - half, mean + half, 2 * stats.t.sf(abs(mean) / error, df))
    assert welch(list(a), list(b)) == pytest.approx(expected, rel=1e-9)
    assert welch([0.1, 0.1], [0.1, 0.1]) == (0, 0, 0, 1)
    assert welch([0.0, 0.0], [0.5, 0.5]) == (0.5, 0.5, 0.5, 0)


def test_welchs_interval_covers_what_it_says() -> None:
    """95 % of 4,000 intervals cover the true difference, to two standard errors, with unequal spreads and sizes."""
    rng = np.random.default_rng(5)
    pairs = [(list(rng.normal(0, 1, 5)), list(rng.normal(0.7, 3, 4))) for _ in range(4000)]
    covered = np.mean([low <= 0.7 <= high for _, low, high, _ in (welch(a, b) for a, b in pairs)])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_differences_of_differences_are_those_of_the_seeds_with_holms_correction(tmp_path: Path) -> None:
    worse = {**BY_RANK, 2: 0.5, 8: 0.22}
    studies = [
        made(tmp_path, "one"),
        made(tmp_path, "two", "train.steps=200", "search.rungs=[200]", seed=1, final_loss=losses(1, worse)),
    ]
    found, left_out = contrasts(compare(studies))
    assert [c.title for c in found] == ["rank 2", "rank 4", "rank 8", "full fine-tuning"] and left_out == ()
    raw = []
    for c in found:
        arm = "full" if c.title.startswith("full") else f"r{c.title.split()[1]}-ratio1"
        a, b = (np.array(losses_of(record, arm)) - losses_of(record, "r64-ratio1") for _, record in studies)
        test = stats.ttest_ind(b, a, equal_var=False)
        raw.append(test.pvalue)
        assert (c.mean, c.low, c.high) == pytest.approx((b.mean() - a.mean(), *test.confidence_interval()))
        assert c.first.mean == pytest.approx(a.mean()) and c.second.mean == pytest.approx(b.mean())
    order = np.argsort(raw)
    stepwise = np.maximum.accumulate([raw[i] * (len(raw) - k) for k, i in enumerate(order)])
    assert [found[i].p for i in order] == pytest.approx(np.minimum(stepwise, 1))
    assert found[0].p < 0.001 < 0.05 < found[1].p


def losses_of(record: StudyRecord, arm: str) -> list[float]:
    """Test losses of an arm's confirm trials, by seed."""
    trials = sorted(
        (t for t in record.trials if t.spec.phase == CONFIRM and t.spec.arm.name == arm), key=lambda t: t.spec.seed
    )
    return [t.last.test_metrics["test_loss"] for t in trials if t.last]


@pytest.mark.parametrize(
    ("overrides", "values", "reason"),
    [
        ([], {"found": OTHER_DATA}, "one and two: their data differ"),
        (["confirm.reference=8"], {}, "their references are different arms, r64-ratio1 and r8-ratio1"),
        ([], {"stop_after": 17}, "two has no confirmed loss of its reference, rank 64"),
        ([], {"prepared": False}, "two has not read its data yet"),
        ([], {"chance": (0.1, 0.9)}, "the reference of two is not shown to have learned anything"),
        (["arms.rank=[4,16,64]"], {}, "rank 2 (confirmed in one alone), rank 8 (confirmed in one alone) and rank 16"),
        ([], {"ends": {(CONFIRM, "r4-ratio1", 2): DIVERGED}}, "rank 4 (it diverged on a seed in two)"),
        ([], {"ends": {(CONFIRM, "r64-ratio1", 2): DIVERGED}}, "rank 4 (the reference diverged on a seed in two)"),
        (["confirm.seeds=[1]"], {}, "rank 8 (fewer than two paired seeds in two)"),
    ],
)
def test_what_cannot_be_held_against_one_another_is_left_out_with_the_reason(
    tmp_path: Path, overrides: list[str], values: dict[str, Any], reason: str
) -> None:
    found, left_out = contrasts(compare([made(tmp_path, "one"), made(tmp_path, "two", *overrides, **values)]))
    assert reason in " ".join(left_out)
    assert not any(f"{c.title} (" in " ".join(left_out) for c in found)


def test_whether_studies_agree_is_said_first(tmp_path: Path) -> None:
    one, same = made(tmp_path, "one"), made(tmp_path, "same", seed=3)
    flat = made(tmp_path, "flat", final_loss=losses(0, dict.fromkeys(BY_RANK, 0.2)))
    strict = made(tmp_path, "strict", "confirm.epsilon=0.0001")
    begun = made(tmp_path, "begun", stop_after=3)
    unlearned = made(tmp_path, "unlearned", chance=(0.1, 0.9))
    assert agreement(compare([one, same])) == "Rank 4 is recommended in both studies, with alpha ratio 1."
    assert "in all 3 studies" in agreement(compare([one, same, made(tmp_path, "third", seed=4)]))
    apart = agreement(compare([one, flat, strict]))
    assert apart.startswith("The studies disagree: one recommends rank 4, flat recommends rank 2 and strict, which")
    assert "no smaller rank non-inferior to its reference, recommends rank 64" in apart
    assert "That alone shows no difference" in apart
    assert agreement(compare([strict, made(tmp_path, "stricter", "confirm.epsilon=0.0001")])).endswith(
        "both studies, with alpha ratio 1: it is the reference, and no smaller rank was shown non-inferior to it."
    )
    assert agreement(compare([one, begun])).endswith("This is not final: begun has ended 3 of 40 trials.")
    assert "Rank 4 is recommended in one, with alpha ratio 1; begun recommends none" in agreement(compare([one, begun]))
    assert agreement(compare([begun, unlearned])).startswith(
        "No study recommends an arm: begun recommends none, as its"
    )
    assert "unlearned recommends none, as r64-ratio1 is not shown to have learned" in agreement(
        compare([one, unlearned])
    )


def test_one_rank_with_other_alphas_is_one_row_and_says_which(tmp_path: Path) -> None:
    """Where a study confirmed one arm of each rank; else arms are matched by their names."""
    studies = [made(tmp_path, "one"), made(tmp_path, "two", "arms.alpha_ratio=[2]")]
    assert "(one: alpha ratio 1; two: alpha ratio 2)" in agreement(compare(studies))
    rows = matched(compare(studies))
    assert [row.title for row in rows] == ["rank 2", "rank 4", "rank 8", "rank 64", "full fine-tuning"]
    assert [r.arm.name for r in rows[1].results if r] == ["r4-ratio1", "r4-ratio2"]
    both = made(tmp_path, "both", "arms.alpha_ratio=[1,2]", "confirm.finalists=arm")
    by_name = {row.title: row.results for row in matched(compare([studies[0], both]))}
    assert list(by_name)[:3] == ["r2-ratio1", "r2-ratio2", "r4-ratio1"]
    assert by_name["r2-ratio2"][0] is None and None not in by_name["r2-ratio1"]


def test_an_arm_that_only_one_study_has_is_a_dash_in_the_others(tmp_path: Path) -> None:
    studies = compare([made(tmp_path, "one"), made(tmp_path, "two", "arms.rank=[2,16,64]")])
    cells = {
        row.cells[0].text: [c.text for c in row.cells[1:]] for row in reference_table(studies, matched(studies)).rows
    }
    assert cells["rank 16"][0] == "–" and cells["rank 8"][1] == "–" and "–" not in cells["rank 2"]
    assert cells["rank 64"] == ["the reference", "the reference"]


def test_shares_are_of_full_fine_tuning_in_the_same_study(tmp_path: Path) -> None:
    (c,) = compare([made(tmp_path, "one")])
    cost, full = c.record.costs["r4-lora-query+value"], c.record.costs["full"]
    result = c.findings.result("r4-ratio1")
    assert result is not None
    part = shares(result, c.full_cost)
    assert part.memory == cost.peak_memory_bytes / full.peak_memory_bytes
    assert part.step_time == cost.step_time_s / full.step_time_s
    assert part.parameters == cost.trainable_params / full.trainable_params
    assert shares(result, None).memory is None
