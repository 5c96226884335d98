"""What does not fit on the device is a result: tried last where foreseen, and once for all of its cost; no failure."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from driving import Killed, Threads, journal_view, records_of, run, trials_of
from fakes import fake_work, forecast, make_study, prepare, probe, train_rung
from optuna.trial import TrialState

from sweep.execution.worker import Work
from sweep.report.report import write_report
from sweep.study.home import Home
from sweep.study.records import COMPLETE, CONFIRM, FAILED, INFEASIBLE, SEARCH, Measurement, StudyForecast, Unit
from sweep.study.schema import Study
from sweep.tracking.journal import read_study_record

Train = Callable[[Unit], tuple[Measurement, ...]]
OUT = [
    MemoryError("no room"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def without_room_for(r: int, error: Exception = OUT[0], seen: list[list[str]] | None = None) -> Train:
    """Trains all but arms of one rank (0: full fine-tuning)."""

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if seen is not None:
            seen.append([trial.arm.name for trial in unit.trials])
        if any(trial.arm.r == r for trial in unit.trials):
            raise error
        return train_rung(unit)

    return train


def ended(home: Home, study: Study) -> dict[int, str]:
    return {t.spec.number: t.reason for t in records_of(home, study).trials if t.state == INFEASIBLE}


@pytest.mark.parametrize("error", OUT, ids=lambda error: type(error).__name__)
def test_want_of_memory_alone_is_a_result_and_no_failure(home: Home, error: Exception) -> None:
    study = make_study()
    heard = run(home, study, fake_work(without_room_for(0, error)))
    reasons = ended(home, study)
    assert len(reasons) == 3 and heard[-1].infeasible == 3 and heard[-1].failed == 0
    assert heard[-1].done == heard[-1].total and heard[-1].steps_done == heard[-1].steps_total
    record = records_of(home, study)
    assert record.finished_at and not any(t.state == FAILED for t in record.trials)
    assert [arm for arm, _ in record.finalists] == ["r2-ratio2", "r8-ratio2"]
    assert record.warnings == ("full fine-tuning has no finalist: it does not fit on this device",)
    first = reasons[min(reasons)]
    assert first.startswith("does not fit on this device (") and str(error).split(":")[0][:10] in first


@pytest.mark.parametrize("slots", [1, 3])
def test_what_does_not_fit_is_tried_once_and_its_like_are_not_run(home: Home, slots: int) -> None:
    """Both ratios of rank 8 cost the same. Beside others each is tried, and lacks what they took: one tells for all."""
    study, seen = make_study(), []
    with Threads(slots) as executor:
        run(home, study, fake_work(without_room_for(8, seen=seen)), executor)
    reasons = ended(home, study)
    first = min(reasons, key=lambda number: "as trial" in reasons[number])
    alone = [names for names in seen if len(names) == 1 and names[0].startswith("r8")]
    assert len(reasons) == 6
    assert len(alone) == 1 if slots == 1 else len(alone) <= 6 + 1
    not_run = [reason for reason in reasons.values() if "as trial" in reason]
    assert not_run == 5 * [f"does not fit on this device, as trial {first} found; not run"]
    assert set(records_of(home, study).costs) == {"r2-lora-all-linear", "full"}, "no probe of what did not fit"


def test_an_arm_of_which_a_trial_has_run_goes_on_being_tried(home: Home) -> None:
    """Somebody else took the memory for a while, or only some batches are too long."""

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if any((t.arm.r, t.learning_rate, t.arm.alpha_ratio) == (8, 1e-1, 2.0) for t in unit.trials):
            raise MemoryError("no room")
        return train_rung(unit)

    study = make_study()
    run(home, study, fake_work(train))
    assert len(ended(home, study)) == 1
    assert "r8-ratio2" in [arm for arm, _ in records_of(home, study).finalists]


def limited(train: Train, limit: int) -> Work:
    return replace(fake_work(train), forecast=partial(forecast, limit=limit))


def test_what_is_forecast_not_to_fit_is_tried_last_and_alone(home: Home) -> None:
    study, seen = make_study(), []
    run(home, study, limited(without_room_for(8, seen=seen), limit=8 - 1))  # full fine-tuning needs 9
    searched = seen[: next(i for i, names in enumerate(seen) if names[0].startswith("r8"))]
    assert all(name.startswith("r2") for names in searched for name in names)
    assert sum(map(len, searched)) == 6 + 3 + 2, "the other rank has been pruned to its end before"
    assert [names for names in seen if "r8-ratio1" in names or "r8-ratio2" in names] == [["r8-ratio1"]]
    assert ["full"] in seen, "it is tried, whatever was forecast"
    assert "full" in [arm for arm, _ in records_of(home, study).finalists]


def doubting(train: Train, key: str) -> Work:
    """A forecast in which the arms of one cost do not fit."""

    def foretell(setup: Any, prepared: Any, arms: Any) -> StudyForecast:
        made = forecast(setup, prepared, arms)
        return replace(made, arms=tuple(replace(arm, fits=arm.cost_key != key) for arm in made.arms))

    return replace(fake_work(train), forecast=foretell)


@pytest.mark.parametrize("kill_at", [1, 4, 8, 12])
def test_the_order_of_trials_does_not_depend_on_interruptions(tmp_path: Path, kill_at: int) -> None:
    """Rank 2, which a grid would try first, is tried last, and not what a forecast at the resumption would say."""
    study, whole, broken = make_study(), Home(tmp_path / "whole"), Home(tmp_path / "broken")
    run(whole, study, doubting(without_room_for(2), "r2-lora-all-linear"))
    assert [t.spec.arm.r for t in records_of(whole, study).trials[:15]] == [8] * 6 + [0] * 3 + [2] * 6
    trained = 0

    def train(unit: Unit) -> tuple[Measurement, ...]:
        nonlocal trained
        trained += 1
        if trained == kill_at:
            raise Killed
        return without_room_for(2)(unit)

    with pytest.raises(Killed):
        run(broken, study, doubting(train, "r2-lora-all-linear"))
    run(broken, study, doubting(without_room_for(2), "full"))
    assert journal_view(records_of(broken, study)) == journal_view(records_of(whole, study))
    assert records_of(broken, study).forecast == records_of(whole, study).forecast


STUDY_WITHOUT_MEMORY = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import fakes
from driving import run
from sweep.execution.worker import Work
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.training import prepare
from sweep.training.memory import status_bytes
from sweep.training.rung import train_rung

def train(unit):
    if unit.trials[0].arm.is_full:  # MiniLM's weights, gradients and moments take 360 MB
        resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + 100 * 2**20, resource.RLIM_INFINITY))
    return train_rung(unit)

prepare.calibrate = lambda setup, prepared, arms: replace(prepared, pack_size=1)
changes = ["name=small", "data.max_length=8", "train.batch_size=2", "train.steps=2", "search.rungs=[2]"]
changes += ["arms.rank=[2]", "arms.alpha_ratio=[1]", "confirm.reference=2", "confirm.seeds=[1]"]
study = read_study(Path("studies/quickstart.yaml"), changes).study
run(Home(Path(sys.argv[1])), study, replace(Work(), train_rung=train, probe=fakes.probe, forecast=fakes.forecast))
"""


@pytest.mark.slow
def test_a_real_model_without_memory_ends_as_infeasible(home: Home) -> None:
    """Full fine-tuning under a limit of the address space, in a process of its own."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", STUDY_WITHOUT_MEMORY, str(home.root)],
        cwd=tests.parent,
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    record = read_study_record(home.study("small"))
    ends = {(t.spec.arm.name, t.spec.phase): t.state for t in record.trials}
    assert ends == {
        ("r2-ratio1", "search"): COMPLETE,
        ("full", "search"): INFEASIBLE,
        ("r2-ratio1", "confirm"): COMPLETE,
    }
    reasons = {t.reason for t in record.trials if t.spec.arm.is_full}
    assert len(reasons) == 2 and any("allocate memory" in reason for reason in reasons)


def test_optuna_holds_it_as_infeasible(home: Home) -> None:
    study = make_study()
    run(home, study, fake_work(without_room_for(0)))
    numbers = set(ended(home, study))
    for trial in trials_of(home, study):
        assert trial.state in (
            (TrialState.COMPLETE,) if trial.number in numbers else (TrialState.COMPLETE, TrialState.PRUNED)
        )
        assert (trial.number in numbers) == (trial.values == [math.inf])
        assert (trial.number in numbers) == any(value > 0 for value in trial.constraints.values())
        assert trial.number not in numbers or trial.user_attrs["reason"].startswith("does not fit on this device")
    best = optuna.load_study(study_name=study.name, storage=home.optuna_url).best_trial
    assert best.number not in numbers


def without_room_later(phase: str, kind: str, value: float, start: int) -> Train:
    """Trains all but rank 8 of the phase at one rate or seed from one step on."""

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if unit.start >= start and any(
            t.phase == phase and t.arm.r == 8 and getattr(t, kind) == value for t in unit.trials
        ):
            raise MemoryError("no room")
        return train_rung(unit)

    return train


def test_optuna_takes_no_loss_of_an_early_rung_for_that_of_a_trial_that_found_no_memory_later(home: Home) -> None:
    study = make_study()
    run(home, study, fake_work(without_room_later(SEARCH, "learning_rate", 1e-2, study.rungs[0])))
    numbers = set(ended(home, study))
    trials = [trial for trial in trials_of(home, study) if trial.number in numbers]
    assert trials and all(trial.values == [math.inf] for trial in trials)
    assert all(trial.intermediate_values for trial in trials), "each has passed a rung: the test would be blind"


def test_a_confirm_trial_without_memory_is_left_out_and_not_told_as_a_failure(home: Home, tmp_path: Path) -> None:
    study = make_study()
    run(home, study, fake_work(without_room_later(CONFIRM, "seed", 2, 0)))
    findings = write_report(study, records_of(home, study), tmp_path / "out")
    result = next(r for r in findings.arms if r.arm.r == 8)
    assert (result.infeasible_seeds, result.failed_seeds) == ((2,), ()) and 2 not in result.seeds
    assert f"{result.arm.name}: seed 2 found no memory and is left out of its means." in findings.warnings
    assert not any("failed" in warning for warning in findings.warnings)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1 without memory" in text and "1 failed" not in text


def test_a_probe_without_memory_says_that_the_arm_does_not_fit(home: Home) -> None:
    def without(setup: Any, prepared: Any, arm: Any) -> Any:
        if arm.is_full:
            raise MemoryError("no room")
        return probe(setup, prepared, arm)

    study = make_study()
    run(home, study, replace(fake_work(), probe=without))
    (warning,) = records_of(home, study).warnings
    assert "the cost of full" in warning and "does not fit on this device" in warning and "no room" in warning


def killed(*args: Any) -> Any:
    with ProcessPoolExecutor(1) as one:
        return one.submit(os._exit, 9).result()


def test_what_may_not_fit_is_probed_before_it_can_end_the_driver(home: Home) -> None:
    study, seen = make_study(), []

    def kill_large(setup: Any, prepared: Any, arm: Any) -> Any:
        return killed() if arm.is_full else probe(setup, prepared, arm)

    run(home, study, replace(limited(without_room_for(-1, seen=seen), limit=8), probe=kill_large))
    assert ["full"] not in seen
    reasons = ended(home, study)
    assert len(reasons) == 3
    assert "killed, perhaps for want of memory" in reasons[min(reasons)]
    assert records_of(home, study).finished_at


def test_a_probe_whose_process_was_killed_may_have_wanted_memory(home: Home) -> None:
    study = make_study(arms={"rank": [8], "alpha_ratio": [1.0], "full_finetuning": False})
    run(home, study, replace(fake_work(), probe=killed))
    (warning,) = records_of(home, study).warnings
    assert "BrokenProcessPool" in warning and "perhaps for want of memory" in warning


@pytest.mark.parametrize(
    ("resources", "unwatched"),
    [(None, "; without `seconds_per_rung` a pack that hangs is waited for"), ({"seconds_per_rung": 900.0}, "")],
)
def test_a_forecast_that_fails_stops_no_study(home: Home, resources: dict[str, float] | None, unwatched: str) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no /proc here")

    study = make_study(resources=resources)
    run(home, study, replace(fake_work(), forecast=fail))
    record = records_of(home, study)
    assert record.finished_at and record.forecast is None
    assert record.warnings == (f"what the arms cost could not be forecast: RuntimeError: no /proc here{unwatched}",)


def test_a_study_that_was_begun_without_a_forecast_gets_none_later(home: Home) -> None:
    study = make_study()

    def die(unit: Unit) -> tuple[Measurement, ...]:
        raise Killed

    def fail(*args: Any) -> Any:
        raise RuntimeError("not now")

    with pytest.raises(Killed):
        run(home, study, replace(fake_work(die), forecast=fail))
    run(home, study)
    assert records_of(home, study).forecast is None


def test_a_disturbed_calibration_is_told(home: Home) -> None:
    figure = {"precision": "float32", "attention": "sdpa", "pack_size": 4, "ms_per_trial_step": 40.0}

    def disturbed(setup: Any, arms: Any) -> Any:
        return replace(prepare(setup, arms), calibration=({**figure, "slowest_ms": 90.0}, figure))

    study = make_study()
    heard = run(home, study, replace(fake_work(), prepare=disturbed))
    (warning,) = records_of(home, study).warnings
    assert warning.startswith("calibration was disturbed: float32 sdpa ×4 took 40 and 90 ms")
    assert warning.endswith("remove calibration-*.json in the home's cache and give the study another name")
    assert any(progress.message == warning for progress in heard)


def test_the_report_tells_it_once_for_all_arms_of_one_cost(home: Home, tmp_path: Path) -> None:
    study = make_study()
    run(home, study, fake_work(without_room_for(2)))
    findings = write_report(study, records_of(home, study), tmp_path / "out")
    told = [warning for warning in findings.warnings if "fit" in warning]
    assert "rank 2: does not fit on this device (MemoryError: no room); nothing is known of it." in told
    assert sum("nothing is known" in warning for warning in findings.warnings) == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Does not fit |" in text and "| rank 2 |" in text
    rows = {row.arm.name: row for row in findings.search}
    assert rows["r2-ratio1"].infeasible == 3 and rows["r8-ratio1"].infeasible == 0
    assert (tmp_path / "out" / "trials.csv").read_text().count(",infeasible,") == 6
