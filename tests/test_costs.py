"""The report on cost and the price of a dry run, against sums done by hand."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fakes import forecast, make_study, prepare
from synthetic import QUICKSTART, quickstart, write_study

from sweep import cli
from sweep.driver.pricing import price_arms, priced
from sweep.execution import worker
from sweep.report.costs import costs_section, price_list, times_table
from sweep.report.statistics import find
from sweep.study.arms import Arm
from sweep.study.home import StudyFolder
from sweep.study.records import CONFIRM, SEARCH, Forecast, Measurement, Prepared, Setup, StudyForecast, to_json
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, append, read_study_record


def cells(record: StudyRecord, study: Study, table: int) -> dict[str, list[str]]:
    section = costs_section(study, record)
    assert section is not None
    return {
        row.cells[0].text: [f"{c.text} {c.below} {c.note}" for c in row.cells] for row in section.tables[table][1].rows
    }


def foretold(study: Study, memory: float = 1.0, time: float = 1.0) -> StudyForecast:
    """As the synthetic probes measure, by these factors; the smallest rank and full fine-tuning probed."""
    arms = []
    for arm in {arm.cost_key: arm for arm in study.list_arms()}.values():
        step = 0.31 if arm.is_full else 0.18 + arm.r / 2000
        mib = 2**20
        trainable = 22_713_216 if arm.is_full else 9216 * arm.r + 1925
        held = 87 * mib + (0 if arm.is_full else 4 * trainable) + 12 * trainable + (118 if arm.is_full else 92) * mib
        peak = round(int(1.04 * held) * memory)
        arms.append(Forecast(arm.cost_key, trainable, peak, step * time, True, arm.r in (0, 2)))
    return StudyForecast(tuple(arms), 2**34, 0.5, 1.5, packed_s=100.0, alone_s=200.0)


def with_forecast(folder: Path, study: Study, made: StudyForecast) -> StudyRecord:
    append(StudyFolder(folder).journal, "forecast", forecast=to_json(made))
    return read_study_record(StudyFolder(folder))


def test_the_errors_of_the_forecast_are_those_of_its_numbers(tmp_path: Path) -> None:
    study = quickstart()
    write_study(tmp_path, study)
    made = foretold(study)
    off = tuple(
        replace(arm, peak_memory_bytes=round(arm.peak_memory_bytes * by), step_time_s=(arm.step_time_s or 0) * (2 - by))
        for arm, by in zip(made.arms, (1.0, 1.02, 0.7, 1.04, 1.1), strict=True)  # ranks 2, 4, 8, 64 and full
    )
    record = with_forecast(tmp_path, study, replace(made, arms=off))
    errors = [row.memory_error for row in price_list(study, record)]
    assert errors == pytest.approx([0, 0.02, -0.3, 0.04, 0.1], abs=1e-6)
    assert [row.time_error for row in price_list(study, record)] == pytest.approx([0, -0.02, 0.3, -0.04, -0.1])
    section = costs_section(study, record)
    assert section is not None
    said = section.paragraphs[0]
    assert "rank 2 and full fine-tuning from a few probe steps" in said
    assert "peak memory was off by 4 % in the median, at worst by −30 % (rank 8)" in said
    assert "step time was off by 4 % in the median, at worst by +30 % (rank 8)" in said
    assert "−30 %" in cells(record, study, 0)["rank 8"][6] and "+30 %" in cells(record, study, 0)["rank 8"][7]


def test_the_study_as_forecast_is_held_against_its_packed_time(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path, study)
    rungs = sum(len(trial.rungs) for trial in record.trials)  # of 8 s, in packs of 4
    record = with_forecast(tmp_path, study, foretold(study))
    section = costs_section(study, record)
    assert section is not None
    said = " ".join(section.paragraphs)
    assert "forecast to take 100 s; all rungs of all packs took" in said and "at most" not in said
    assert "leaves out loading and checkpoints" in said and "as large as calibrated" in said
    assert "source text" not in said and "in neither" not in said
    assert f"error {100 * (100 / (2 * rungs) - 1):+.0f} %".replace("-", "−") in said


def test_arms_that_were_not_forecast_are_in_neither_side_though_they_ran(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path, study)
    made = foretold(study)
    doubtful = replace(made, arms=tuple(replace(arm, fits=arm.cost_key != "full") for arm in made.arms))
    record = with_forecast(tmp_path, study, doubtful)
    rungs = sum(len(trial.rungs) for trial in record.trials if not trial.spec.arm.is_full)  # of 8 s, in packs of 4
    section = costs_section(study, record)
    assert section is not None
    said = " ".join(section.paragraphs)
    assert f"error {100 * (100 / (2 * rungs) - 1):+.0f} %".replace("-", "−") in said
    assert "Arms that were not expected to fit are in neither, though they ran." in said


def timed(record: StudyRecord, seconds: float | None) -> StudyRecord:
    """Every rung with training steps that took so long."""

    def told(measurement: Measurement) -> Measurement:
        return replace(measurement, pack_train_seconds=seconds)

    trials = [
        replace(t, rungs=tuple(replace(r, measurement=told(r.measurement)) for r in t.rungs)) for t in record.trials
    ]
    return replace(record, trials=tuple(trials))


def test_each_time_is_under_its_own_name(tmp_path: Path) -> None:
    study = quickstart()
    record = timed(write_study(tmp_path, study), 4.0)
    rungs = sum(len(trial.rungs) for trial in record.trials)
    solo = {2: 0.181, 4: 0.182, 8: 0.184, 64: 0.212, 0: 0.31}
    ran = [t for t in record.trials if t.rungs]
    one_by_one = sum(solo[t.spec.arm.r] * t.step for t in ran)
    unpruned = sum(solo[t.spec.arm.r] * (40 if t.spec.phase == SEARCH else t.step) for t in ran)
    assert any(t.step < 40 and t.spec.phase == SEARCH for t in ran) and any(t.spec.phase == CONFIRM for t in ran)
    found = {row.cells[0].text: row.cells[1].text for row in times_table(study, record).rows}
    minutes = {name: float(text.split()[0]) * (60 if "min" in text else 1) for name, text in found.items()}
    assert list(found)[:4] == ["Packed wall time", "Packed training time", "One by one", "One by one without pruning"]
    expected = (2 * rungs, rungs, one_by_one, unpruned)
    assert list(minutes.values())[:4] == pytest.approx(expected, rel=0.01)
    section = costs_section(study, record)
    assert section is not None
    assert f"{one_by_one / rungs:.2f} times as long; evaluation is left out of both" in " ".join(section.paragraphs)
    assert "different" not in found and "after it" in " ".join(section.paragraphs)


def test_no_ratio_is_claimed_where_training_was_not_timed_apart_or_an_arm_not_probed(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path, study)
    unprobed = replace(timed(record, 4.0), costs={key: c for key, c in record.costs.items() if key != "full"})
    for lacking in (timed(record, None), unprobed):
        section = costs_section(study, lacking)
        assert section is not None and "times as long" not in " ".join(section.paragraphs)
    assert "One by one" not in {row.cells[0].text for row in times_table(study, unprobed).rows}


@pytest.mark.parametrize("disturbed", ["r2-lora-query+value", "full"])
def test_the_recommendation_claims_no_share_of_time_where_a_probe_was_uneven(tmp_path: Path, disturbed: str) -> None:
    study = quickstart()
    record = write_study(tmp_path, study, lambda arm, seed: 0.2 + 0.001 * seed, ends={})
    said = find(study, record).sentences[1]
    assert "of the time a step" in said and "of the peak memory" in said
    cost = record.costs[disturbed]
    shortest = cost.step_time_s / 1.51
    uneven = replace(cost, step_times_s=(shortest, *cost.step_times_s[1:]))
    said = find(study, replace(record, costs={**record.costs, disturbed: uneven})).sentences[1]
    against_full = said.partition("against full fine-tuning")[2]
    assert "of the peak memory" in against_full and "of the time a step" not in against_full


def test_no_ratio_is_claimed_where_the_probes_were_uneven(tmp_path: Path) -> None:
    study = quickstart()
    record = timed(write_study(tmp_path, study), 4.0)
    cost = record.costs["full"]
    disturbed = replace(cost, step_times_s=(0.2, *cost.step_times_s))  # the median is 0.31
    section = costs_section(study, replace(record, costs={**record.costs, "full": disturbed}))
    assert section is not None
    said = " ".join(section.paragraphs)
    assert "times as long" not in said and "The probe steps of full fine-tuning differed much" in said


@pytest.mark.parametrize(
    ("rank", "times", "told"),
    [(2, 0.4, False), (2, 2.9, False), (2, 3.1, True), (2, 1 / 3.1, True), (4, 3.1, False)],  # rank 4 was not probed
)
def test_a_probed_step_that_was_forecast_three_times_off_is_something_to_be_careful_about(
    tmp_path: Path, rank: int, times: float, told: bool
) -> None:
    study = quickstart()
    write_study(tmp_path, study)
    record, key = with_forecast(tmp_path, study, foretold(study)), f"r{rank}-lora-query+value"
    assert record.forecast is not None
    known = record.forecast.of(key)
    assert known is not None and known.step_time_s is not None
    took = known.step_time_s * times
    cost = replace(record.costs[key], step_time_s=took, step_times_s=(took,))
    warnings = find(study, replace(record, costs={**record.costs, key: cost})).warnings
    why = "at one of the two times the machine was busy or another one, or the forecast was wrong."
    busy = [line for line in warnings if line.endswith(why)]
    assert (len(busy) == 1 and "rank 2" in busy[0]) if told else not busy


def test_uneven_probes_are_something_to_be_careful_about(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path, study)
    cost = record.costs["full"]
    uneven = replace(cost, step_times_s=(cost.step_time_s / 1.6, *cost.step_times_s))
    assert not any("probe steps" in line for line in find(study, record).warnings)
    warnings = find(study, replace(record, costs={**record.costs, "full": uneven})).warnings
    assert [line for line in warnings if line.startswith("the probe steps of full fine-tuning differed much")]


def test_nothing_is_said_of_cost_before_anything_has_run(tmp_path: Path) -> None:
    study = quickstart()
    assert costs_section(study, write_study(tmp_path, study, stop_after=0)) is None


def test_a_dry_run_counts_the_steps_that_pruning_leaves() -> None:
    """2 ranks × 2 ratios × 3 rates: of a rank's 6 trials 3 and then 2 go on; of full fine-tuning's 3, 2 and then 1."""
    study = make_study()
    arms = study.list_arms()
    made = forecast(study.setup(""), prepare(study.setup(""), arms), arms)  # 0.1 s a step, of whatever arm
    prices = {price.arm.name: price for price in price_arms(study, made)}
    rank, full = 6 * 1 + 3 * 1 + 2 * 2, 3 * 1 + 2 * 1 + 1 * 2
    assert prices["r2-ratio1"].trial_s == pytest.approx(0.4)
    assert prices["r2-ratio1"].search_s == pytest.approx(0.1 * rank / 2)  # a half each of two arms
    assert prices["full"].search_s == pytest.approx(0.1 * full)
    assert prices["full"].confirm_s == pytest.approx(2 * 0.4)
    evaluations = 2 * (6 + 3 + 2) + (3 + 2 + 1) + 3 * 2 * 3  # of search and of 3 finalists on 2 seeds at 3 rungs
    held_out = 0.01 * evaluations + 0.02 * 3 * 2
    whole = priced(study, prepare(study.setup(""), arms), made)
    assert whole.alone_s == pytest.approx(0.1 * (2 * rank + full + 3 * 2 * 4) + held_out)
    figure = {"precision": "float32", "attention": "eager", "pack_size": 5, "ms_per_trial_step": 10.0}
    other = {**figure, "pack_size": 4, "ms_per_trial_step": 1.0}
    packs = replace(prepare(study.setup(""), arms), calibration=(other, figure))
    in_packs = 0.01 * (2 * rank + 2 * 2 * 4) + 0.1 * (full + 2 * 4) + held_out
    assert priced(study, packs, made).packed_s == pytest.approx(in_packs)


def test_arms_that_may_not_fit_are_not_in_the_price() -> None:
    study = make_study()
    arms = study.list_arms()
    prepared = prepare(study.setup(""), arms)
    whole, without = (priced(study, prepared, forecast(study.setup(""), prepared, arms, limit)) for limit in (10, 8))
    full = 0.1 * (3 + 2 + 2 + 2 * 4) + 0.01 * (3 + 2 + 1 + 2 * 3) + 0.02 * 2
    assert without.doubtful == {"full"}
    assert (whole.alone_s or 0) - (without.alone_s or 0) == pytest.approx(full)


def test_a_dry_run_over_domains_ends_with_the_hours_and_the_money_of_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds_a_step = iter((0.1, 0.2, 0.4))

    def foretell(setup: Setup, prepared: Prepared, arms: tuple[Arm, ...]) -> StudyForecast:
        made, step = forecast(setup, prepared, arms, limit=1000), next(seconds_a_step)
        return replace(made, arms=tuple(replace(arm, step_time_s=step) for arm in made.arms))

    monkeypatch.setattr(worker, "prepare", prepare)
    monkeypatch.setattr(worker, "forecast", foretell)
    languages = Path(__file__).parents[1] / "studies" / "languages.yaml"
    command = ["sweep", "run", str(languages), "--set", "data.domains=[en,fr,de]", "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*command, "--price-per-hour", "3600", "--home", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = " ".join(capsys.readouterr().out.split())
    for how in ("in packs, as it will run", "one trial after the other"):
        price = rf"{how}: at most ([\d.]+) hours \([^)]*\), ([\d,.]+) at 3600 an hour"
        *parts, whole = [[float(n.replace(",", "")) for n in found] for found in re.findall(price, told)]
        assert len(parts) == 3 and parts[0][1] < parts[1][1] < parts[2][1]
        assert whole[1] == pytest.approx(sum(money for _, money in parts), abs=0.03)
        assert whole[0] == pytest.approx(whole[1] / 3600, abs=0.006)
    assert told.index("in all, 3 studies in packs") > told.index("study languages-de")


def test_a_dry_run_whose_calibration_was_disturbed_asks_for_no_other_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = {"precision": "float32", "attention": "sdpa", "pack_size": 4, "ms_per_trial_step": 40.0}

    def disturbed(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
        return replace(prepare(setup, arms), calibration=({**figure, "slowest_ms": 90.0}, figure))

    monkeypatch.setattr(worker, "prepare", disturbed)
    monkeypatch.setattr(worker, "forecast", partial(forecast, limit=1000))
    monkeypatch.setattr(sys, "argv", ["sweep", "run", str(QUICKSTART), "--dry-run", "--home", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("to calibrate anew, remove calibration-*.json in the home's cache")
