"""bfloat16 is what makes the engine fast on a CPU: close to float32 step by step, and the same answer in the end."""

from __future__ import annotations

import csv
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from peft_reference import arm, curve, peft_curve, train, trial

from sweep.study.file import read_study
from sweep.study.records import Prepared, Setup, Unit
from sweep.study.schema import rate_values
from sweep.training.prepare import prepare
from sweep.training.rung import train_rung

STEP_TOLERANCE = 0.03  # on the training loss (ln 5 = 1.61 at the start): bfloat16 has 8 bits, losses of a few units 2⁻⁷
SEEDS = (1, 2, 3)


@pytest.mark.slow
def test_bfloat16_trial_has_the_loss_curve_of_peft_in_float32_to_a_stated_tolerance(
    bbc: tuple[Setup, Prepared], tmp_path: Path
) -> None:
    setup, prepared = bbc
    trials = [trial(0, arm(64, 1), 3e-3, 1, tmp_path), trial(1, arm(2, 2), 1e-2, 2, tmp_path)]
    packed = train(setup, replace(prepared, precision="bfloat16"), trials, [12])
    for one in trials:
        expected, _ = peft_curve(setup, prepared, one, 12)
        np.testing.assert_allclose(curve(packed[one.number]), expected, atol=STEP_TOLERANCE, rtol=0)


@pytest.mark.slow
def test_bfloat16_trial_does_not_notice_its_neighbours_either(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    """Matrix products of other sizes round differently in the last bit: nothing more."""
    setup, prepared = bbc
    prepared = replace(prepared, precision="bfloat16")
    pack = [trial(0, arm(64, 1), 3e-3, 1, tmp_path), trial(1, arm(2, 2), 1e-2, 1, tmp_path)]
    together = train(setup, prepared, pack, [6])
    for one in pack:
        alone = train(setup, prepared, [replace(one, folder=str(tmp_path / f"alone-{one.number}"))], [6])
        np.testing.assert_allclose(curve(together[one.number]), curve(alone[one.number]), atol=0.01, rtol=0)


@pytest.mark.slow
def test_the_decision_is_the_same_in_bfloat16_and_float32(tmp_path: Path) -> None:
    """The quickstart's finalists at their rates, and one at the lowest that was tried, which is clearly worse: fresh
    seeds, to the full budget, in both precisions.

    Wherever float32 tells two arms apart beyond the seed noise (a paired t above 2), bfloat16 orders them alike; and
    a trial's test loss moves by less between the precisions than from seed to seed.
    """
    study = read_study(Path("studies/quickstart.yaml"), []).study
    arms = {one.name: one for one in study.list_arms()}
    with open("reports/quickstart/trials.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "confirm" and row["arm"] != "full"]
    rates = list({(row["arm"], float(row["learning_rate"])): None for row in rows})
    rates.append((rates[0][0], rate_values(study.tune.learning_rate)[0]))
    setup = study.setup(str(tmp_path / "cache"))
    prepared = replace(prepare(setup, tuple(arms[name] for name, _ in rates)), attention="eager")
    losses: dict[str, dict[tuple[str, float], list[float]]] = {}
    for precision in ("float32", "bfloat16"):
        found: dict[tuple[str, float], list[float]] = {entry: [] for entry in rates}
        for seed in SEEDS:
            trials = tuple(
                trial(i, arms[name], rate, seed, tmp_path / precision / str(seed))
                for i, (name, rate) in enumerate(rates)
            )
            unit = Unit(setup, replace(prepared, precision=precision), trials, 0, study.train.steps, test=True)
            for one, measurement in zip(trials, train_rung(unit), strict=True):
                found[one.arm.name, one.learning_rate].append(measurement.test_metrics["test_loss"])
        losses[precision] = found
    noise = statistics.fmean(statistics.stdev(seeds) for seeds in losses["float32"].values())
    moved = [
        abs(a - b) for entry in rates for a, b in zip(losses["float32"][entry], losses["bfloat16"][entry], strict=True)
    ]
    assert statistics.fmean(moved) < noise
    told_apart = 0
    for one, other in itertools.combinations(rates, 2):
        gaps = {p: np.subtract(losses[p][one], losses[p][other]) for p in losses}
        error = gaps["float32"].std(ddof=1) / np.sqrt(len(SEEDS))
        if abs(gaps["float32"].mean()) > 2 * error:
            told_apart += 1
            assert np.sign(gaps["float32"].mean()) == np.sign(gaps["bfloat16"].mean()), (one, other, losses)
    assert told_apart, "no two arms differ: the test would be blind"
