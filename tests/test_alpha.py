"""Is alpha a learning rate? Losses made from a known exponent give it back; real trials run at every rate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from driving import records_of, run
from fakes import make_study
from scipy import stats
from synthetic import quickstart, write_study

from sweep.driver.plan import confirm_slots, count_finalists, pick_finalists, search_slots
from sweep.driver.pricing import confirm_work
from sweep.report.alpha import alpha_fits, best_exponent, best_rate
from sweep.report.report import write_report
from sweep.report.statistics import confirm_trials, find
from sweep.study.home import Home
from sweep.study.records import CONFIRM, SEARCH
from sweep.study.schema import rate_values

RATES, RATIOS = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], [0.5, 1.0, 2.0, 4.0]
WIDE = [1e-3, *RATES, 6.4e-2]
EVERY_RATE = {"seeds": [1, 2, 3], "reference": 8, "epsilon": 0.05, "finalists": "rate"}


def loss_at(ratio: float, rate: float, gamma: float) -> float:
    """Lowest where rate · ratio^γ is 8e-3, steeper above, as real losses are."""
    away = math.log(rate * (ratio / 1.5) ** gamma / 8e-3)
    return 0.3 + 0.05 * away**2 + 0.01 * away**3


@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.5, 0.8, 1.0])
def test_the_exponent_that_made_the_losses_is_found(gamma: float) -> None:
    losses = {(ratio, rate): loss_at(ratio, rate, gamma) for ratio in RATIOS for rate in WIDE}
    assert best_exponent(losses) == pytest.approx(gamma, abs=0.05)


def test_the_best_rate_is_the_lowest_point_of_a_parabola_in_the_logs() -> None:
    losses = {rate: math.exp(0.3 * math.log(rate / 5e-3) ** 2 - 1) for rate in RATES}
    assert best_rate(losses) == pytest.approx(5e-3)


def test_a_best_rate_on_the_edge_gives_no_exponent() -> None:
    assert best_rate({1e-3: 0.3, 2e-3: 0.4, 4e-3: 0.5}) is None
    assert best_exponent({(ratio, rate): loss_at(ratio, rate, 2.0) for ratio in RATIOS for rate in RATES}) is None


def test_the_exponent_survives_noise() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(40):
        cells = {(ratio, rate): loss_at(ratio, rate, 0.7) + rng.normal(0, 0.005) for ratio in RATIOS for rate in WIDE}
        gamma = best_exponent(cells)
        assert gamma is not None
        found.append(gamma)
    assert np.mean(found) == pytest.approx(0.7, abs=0.1)


def test_every_arm_is_confirmed_at_every_rate_and_the_search_says_which_of_them_stands_for_it(tmp_path: Path) -> None:
    study, home = make_study(confirm=EVERY_RATE), Home(tmp_path)
    run(home, study)
    record = records_of(home, study)
    arms = study.list_arms()
    wanted = sum(len(rate_values(study.rates(arm))) for arm in arms)
    assert len(record.finalists) == wanted == count_finalists(study)
    confirmed = [t for t in record.trials if t.spec.phase == CONFIRM]
    assert (
        len({(t.spec.arm.name, t.spec.learning_rate, t.spec.seed) for t in confirmed}) == len(confirmed) == 3 * wanted
    )
    for arm in arms:
        best = 1e-4 if arm.is_full else 1e-2
        assert {t.spec.learning_rate for t in confirm_trials(record, arm)} == {best}
    assert find(study, record).planned == len(record.trials)
    assert [confirm_work(study, arm).steps for arm in arms] == [3 * 3 * study.train.steps] * len(arms)


def test_a_study_at_every_rate_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    study, home = make_study(confirm=EVERY_RATE), Home(tmp_path)
    run(home, study)
    before = records_of(home, study)
    run(home, study)
    assert records_of(home, study) == before
    slots = [slot.name for slot in confirm_slots(study, before.finalists)]
    assert len(set(slots)) == len(slots)


def test_finalists_of_every_rate_leave_out_those_that_diverged(tmp_path: Path) -> None:
    study, home = make_study(confirm=EVERY_RATE), Home(tmp_path)
    run(home, study)
    slots = search_slots(study)
    records = {s.name: t for s, t in zip(slots, records_of(home, study).trials, strict=False)}
    assert all(t.spec.phase == SEARCH for t in records.values())
    gone = slots[0]
    records[gone.name] = replace(records[gone.name], state="diverged")
    finalists, _ = pick_finalists(study, slots, records)
    assert (gone.arm.name, gone.rate) not in finalists and len(finalists) == len(slots) - 1


def study_of(tmp_path: Path, gamma: float, *overrides: str):  # type: ignore[no-untyped-def]
    """A study of four ratios at five rates whose confirm losses follow the exponent, with a wobble of each seed."""
    study = quickstart(
        "arms.rank=[8]",
        "arms.alpha_ratio=[0.5, 1, 2, 4]",
        "arms.full_finetuning=false",
        f"tune.learning_rate={RATES}",
        "tune.full_finetuning=null",
        "search.keep=1.0",
        "confirm.finalists=rate",
        "confirm.reference=8",
        "confirm.seeds=[1, 2, 3]",
        *overrides,
    )
    record = write_study(tmp_path / "s", study, ends={})
    rng = np.random.default_rng(2)
    template = next(t for t in record.trials if t.spec.phase == CONFIRM)
    confirmed = []
    for arm in study.list_arms():
        for rate in RATES:
            for seed in study.confirm.seeds:
                number = len(record.trials) + len(confirmed)
                spec = replace(template.spec, number=number, arm=arm, learning_rate=rate, seed=seed)
                loss = loss_at(arm.alpha_ratio, rate, gamma) + 0.02 * seed + rng.normal(0, 0.002)
                rung = template.rungs[-1]
                measured = replace(
                    rung.measurement, number=number, test_metrics={"test_loss": loss, "test_accuracy": 0.9}
                )
                confirmed.append(
                    replace(template, spec=spec, rungs=(*template.rungs[:-1], replace(rung, measurement=measured)))
                )
    finalists = tuple(
        (arm.name, rate) for arm in study.list_arms() for rate in [8e-3, *(r for r in RATES if r != 8e-3)]
    )
    searched = tuple(t for t in record.trials if t.spec.phase == SEARCH)
    return study, replace(record, trials=(*searched, *confirmed), finalists=finalists)


def test_the_section_gives_the_exponent_with_its_interval_over_seeds(tmp_path: Path) -> None:
    study, record = study_of(tmp_path, 1.0)
    (fit,) = alpha_fits(study, record)
    by_seed = [best_exponent({cell: losses[s] for cell, losses in fit.cells.items()}) for s in (1, 2, 3)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(by_seed), scale=stats.sem(by_seed))
    assert fit.exponent and (fit.exponent.low, fit.exponent.high) == pytest.approx((low, high))
    assert low < 1 < high and not low < 0.5 < high
    write_report(study, record, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "does not exclude 1 (alpha is a learning rate)" in text
    assert (tmp_path / "out" / "figures" / "alpha-and-rate.png").exists()


def test_more_alpha_at_less_rate_is_held_against_the_same_product(tmp_path: Path) -> None:
    """Where alpha is a learning rate the two are one; where it does nothing a pair differs by the curve itself."""
    study, record = study_of(tmp_path / "one", 1.0)
    (fit,) = alpha_fits(study, record)
    assert fit.swapped == 3 * 4  # four rates of each ratio have one of half the size in the next
    assert fit.swap and fit.swap.mean == pytest.approx(0, abs=0.002)
    study, record = study_of(tmp_path / "zero", 0.0)
    (fit,) = alpha_fits(study, record)
    expected = np.mean([loss_at(1, rate / 2, 0) - loss_at(1, rate, 0) for rate in RATES[1:]])
    assert fit.swap and fit.swap.mean == pytest.approx(expected, abs=0.003)


def test_studies_that_do_not_confirm_every_rate_have_no_such_section(tmp_path: Path) -> None:
    study = quickstart("confirm.finalists=arm")
    assert alpha_fits(study, write_study(tmp_path / "s", study)) == []
