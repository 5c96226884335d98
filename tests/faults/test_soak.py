"""Hundreds of random faults: what a study finds does not depend on them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from driving import journal_view, optuna_view, records_of, trials_of, undisturbed
from fakes import make_study
from soak import FAULTS, Soak, soak_through

from sweep.study.home import Home
from sweep.tracking.journal import StudyRecord

SEED = int(os.environ.get("SWEEP_SOAK_SEED", "20261125"))
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("calm"))


def fake_soak(root: Path, seed: int) -> Soak:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SWEEP_", "MLFLOW_"))}
    return Soak(
        command=[sys.executable, str(TESTS / "faults" / "soak_driver.py"), str(root)],
        folder=Home(root).study(make_study().name),
        environment={**clean, "PYTHONPATH": path},
        log=root.with_suffix(".log"),
        seed=seed,
    )


def whole_soak(soak: Soak, at_most: int, seed: int, results_between: int = 3) -> StudyRecord:
    """The study's record at its end; an AssertionError tells how to repeat what broke it."""
    try:
        return soak_through(soak, FAULTS, at_most, results_between)
    except Exception as error:
        log = soak.log.read_text()[-2000:]
        raise AssertionError(f"{error!r}\nSWEEP_SOAK_SEED={seed}, after {dict(soak.came)}\n{log}") from error
    finally:
        soak.kill_survivors()


def search_view(home: Home) -> Any:
    return optuna_view(trials_of(home, make_study()))


@pytest.mark.slow
@pytest.mark.fault(
    case="200 random faults, one after another, with a trainer that trains nothing",
    happens="each study is taken up until it is done; a seed repeats the kinds of faults and their delays, not what "
    "each hits",
    lost="nothing",
)
def test_a_study_finds_the_same_whatever_200_random_faults_break(tmp_path: Path, calm: Home) -> None:
    came, seed = 0, SEED
    while came < 200:
        home = Home(tmp_path / str(seed))
        soak = fake_soak(home.root, seed)
        record = whole_soak(soak, 25, seed)
        assert journal_view(record)[:1] == journal_view(records_of(calm, make_study()))[:1]
        assert search_view(home) == search_view(calm)
        print(seed, dict(soak.came))
        came, seed = came + soak.came.total(), seed + 1
