"""Twenty random faults on a study that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import Soak
from test_kill import command, curves, environment, record_of
from test_kill import run as run_command
from test_soak import SEED, whole_soak

from sweep.study.home import Home


@pytest.mark.slow
@pytest.mark.fault(
    case="20 random faults, one after another, on a study that trains MiniLM in two worker processes",
    happens="each study is taken up until it is done; a seed repeats the kinds of faults and their delays, not what "
    "each hits",
    lost="nothing",
)
def test_a_real_study_has_the_same_losses_whatever_20_random_faults_break(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    undisturbed_run = run_command(calm, tmp_path)
    assert undisturbed_run.returncode == 0, undisturbed_run.stderr
    expected = curves(record_of(calm))
    came, seed = 0, SEED
    while came < 20:
        home = Home(tmp_path / str(seed))
        words = [*command(home.root), "--executor", "local", "--set", "resources.workers=2"]
        soak = Soak(words, home.study("quickstart"), environment(), tmp_path / f"{seed}.log", seed, cwd=tmp_path)
        record = whole_soak(soak, 20 - came, seed, results_between=1)  # a study of few results, and dear starts
        found = curves(record)
        assert found.keys() == expected.keys()
        for number, (*what, curve) in expected.items():
            assert list(found[number][:-1]) == what
            assert [loss for _, loss in found[number][-1]] == pytest.approx([loss for _, loss in curve], abs=1e-5)
        print(seed, dict(soak.came))
        came, seed = came + soak.came.total(), seed + 1
