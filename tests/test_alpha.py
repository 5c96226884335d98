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

from sweep.driver.plan import confirm_slots, pick_finalists, search_slots
from sweep.driver.pricing import confirm_work
from sweep.report.alpha import (
    AlphaFit,
    Cells,
    alpha_fits,
    alpha_sentences,
    best_windows,
    exponent_of,
    exponents_without,
    lowest_point,
)
from sweep.report.confirmed import confirm_trials
from sweep.report.intervals import Interval
from sweep.report.report import write_report
from sweep.report.statistics import find
from sweep.study.finalists import count_finalists
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


def cells_of(gamma: float, rates: list[float], noise: float = 0.0, seed: int = 0) -> Cells:
    rng = np.random.default_rng(seed)
    return {
        (ratio, rate): {s: loss_at(ratio, rate, gamma) + rng.normal(0, noise) for s in (1, 2, 3)}
        for ratio in RATIOS
        for rate in rates
    }


@pytest.mark.parametrize("gamma", [-0.3, 0.0, 0.4, 0.5, 0.8, 1.0])
def test_the_exponent_that_made_the_losses_is_found(gamma: float) -> None:
    cells = cells_of(gamma, WIDE, noise=1e-4)
    found = exponent_of(cells, best_windows(cells)[0])
    assert found and found.mean == pytest.approx(gamma, abs=0.05)


def test_the_best_rate_is_the_lowest_point_of_a_parabola_in_the_logs() -> None:
    losses = {rate: math.exp(0.3 * math.log(rate / 5e-3) ** 2 - 1) for rate in RATES[:3]}
    assert lowest_point(losses) == pytest.approx(5e-3)
    assert lowest_point({1e-3: 0.3, 2e-3: 0.4, 4e-3: 0.3}) is None  # it has a highest one


def test_ratios_whose_best_rate_is_on_the_edge_are_left_out_by_name_and_too_few_give_no_exponent() -> None:
    windows, on_edge = best_windows(cells_of(1.0, RATES))
    assert on_edge == (0.5,) and sorted(windows) == [1.0, 2.0, 4.0]
    cells = cells_of(2.0, RATES)
    windows, on_edge = best_windows(cells)
    assert len(windows) < 3 and exponent_of(cells, windows) is None


def test_the_window_lies_about_the_rate_that_is_best_on_average_not_about_the_luckiest_seed() -> None:
    cells = cells_of(0.4, WIDE)
    windows, _ = best_windows(cells)
    cells[1.0, windows[1.0][2]][2] = 0.01  # one seed alone, beside the best rate
    cells[1.0, windows[1.0][2]][3] = 1.00
    assert best_windows(cells)[0] == windows


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.2, 0.4, "fell with alpha"), (-0.4, -0.2, "rose with alpha"), (-0.1, 0.2, "is not shown to move")],
)
def test_the_sentence_says_no_more_than_the_interval(low: float, high: float, says: str) -> None:
    fit = AlphaFit("rank 8", {}, 5, Interval(3, (low + high) / 2, low, high), (), ())
    (sentence,) = alpha_sentences([fit])
    assert says in sentence and f"{2**-high:.2f} to {2**-low:.2f}" in sentence
    assert "3 of 5 seeds" in sentence
    assert ("does not exclude 0 (alpha does nothing)" in sentence) == (low <= 0 <= high)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_exponents_interval_covers_it_in_95_of_100_studies(gamma: float) -> None:
    """On the grid of studies/alpha-vs-lr.yaml, with noise that moves a seed's best rate by a cell."""
    covered = studies = 0
    for i in range(400):
        cells = cells_of(gamma, RATES, noise=0.01, seed=i)
        found = exponent_of(cells, best_windows(cells)[0])
        if found is not None and found.low is not None and found.high is not None:
            studies += 1
            covered += found.low <= gamma <= found.high
    assert studies > 200
    assert covered / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)


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


def test_the_section_and_the_lead_give_the_exponent_with_its_interval_over_seeds(tmp_path: Path) -> None:
    study, record = study_of(tmp_path, 1.0)
    (fit,) = alpha_fits(study, record)
    slopes = []
    for seed in (1, 2, 3):
        best = {}
        for ratio in (1.0, 2.0, 4.0):
            losses = {rate: fit.cells[ratio, rate][seed] for rate in RATES}
            at = RATES.index(min(RATES, key=lambda rate: np.mean(list(fit.cells[ratio, rate].values()))))
            around = RATES[at - 1 : at + 2]
            a, b, _ = np.polyfit(np.log(around), np.log([losses[rate] for rate in around]), 2)
            best[ratio] = -b / (2 * a)
        slopes.append(-stats.linregress(np.log(list(best)), list(best.values())).slope)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(slopes), scale=stats.sem(slopes))
    assert fit.exponent and (fit.exponent.low, fit.exponent.high) == pytest.approx((low, high))
    assert fit.on_edge == (0.5,)
    write_report(study, record, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("without ratio 0.5, best on the edge") == 2
    assert (tmp_path / "out" / "figures" / "alpha-and-rate.png").exists()


def test_seeds_lost_at_any_rate_are_told_and_counted_in_their_cell(tmp_path: Path) -> None:
    study, record = study_of(tmp_path, 0.4)
    lost = {(1.0, 3.2e-2, 2), (1.0, 3.2e-2, 3)}
    trials = [
        replace(t, state="diverged")
        if t.spec.phase == CONFIRM and (t.spec.arm.alpha_ratio, t.spec.learning_rate, t.spec.seed) in lost
        else t
        for t in record.trials
    ]
    record = replace(record, trials=tuple(trials))
    assert "r8-ratio1 at 0.032: seeds 2 and 3 diverged and are left out there." in find(study, record).warnings
    write_report(study, record, tmp_path / "out")
    assert "1 of 3 seeds" in (tmp_path / "out" / "report.md").read_text()


def test_studies_that_do_not_confirm_every_rate_have_no_such_section(tmp_path: Path) -> None:
    study = quickstart("confirm.finalists=arm")
    assert alpha_fits(study, write_study(tmp_path / "s", study)) == []


def test_what_hangs_on_one_ratio_is_said_apart_from_what_does_not() -> None:
    whole, others = Interval(3, 0.38, 0.35, 0.42), (Interval(3, 0.33, -0.05, 0.70), Interval(3, 0.46, 0.30, 0.62))
    (sentence,) = alpha_sentences([AlphaFit("rank 8", {}, 3, whole, others, ())])
    minus = "\N{MINUS SIGN}"
    assert f"excludes {minus}1 (alpha is a learning rate), whichever ratio is left out" in sentence
    assert f"it excludes 0 (alpha does nothing) and {minus}1/2 with all ratios alone, not with one left out" in sentence
    assert f"With one ratio left out it is {minus}0.46 to {minus}0.33." in sentence


def test_each_ratio_is_left_out_once() -> None:
    cells = cells_of(0.4, WIDE, noise=0.005)
    windows, _ = best_windows(cells)
    assert sorted(windows) == RATIOS
    found = exponents_without(cells, windows)
    assert len(found) == 4
    first = {ratio: rates for ratio, rates in windows.items() if ratio != 0.5}
    assert found[0] == exponent_of(cells, first)
    assert exponents_without(cells, first) == ()
