"""What the driver does about workers that are lost, or hang. The trainer is fake."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import worker_units as units
from driving import Threads, journal_view, records_of, run, undisturbed
from fakes import fake_work, fingerprints, forecast, make_study, prepare, probe, train_rung
from test_packing import slot
from worker_units import packs_seen, wait_for, with_fault, workers

from sweep.driver.failures import LOSSES, decide
from sweep.driver.packing import Pack
from sweep.driver.pricing import allowed_seconds
from sweep.study.errors import NoWorkers, WorkerLost
from sweep.study.home import Home
from sweep.study.records import FAILED, Measurement, Unit
from sweep.study.schema import Study


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


def found(home: Home, study: Study) -> dict[Any, Any]:
    """Of each trial all but its number, which depends on who is asked first, and with whom it was packed."""
    record = records_of(home, study)
    views = [((v.arm.name, v.learning_rate, v.seed, v.phase), *rest) for v, *rest in journal_view(record)[0]]
    return {
        cell: ([replace(m, number=0, checkpoint="") for m in measured], state, reason)
        for cell, measured, state, reason in views
    }


@pytest.mark.parametrize("how", ["killed", "exits"])
@pytest.mark.parametrize("arm", ["r2-ratio1", "full"])
def test_a_lost_worker_does_not_fail_its_trial(tmp_path: Path, home: Home, done: Home, how: str, arm: str) -> None:
    study = make_study()
    with workers(2) as executor:
        heard = run(home, study, with_fault(tmp_path / "marks", how, arm, times=1), executor)
    assert found(home, study) == found(done, study)
    assert sum(bad for bad, *_ in packs_seen(tmp_path / "marks")) == 1
    assert sum("was lost, and another tries again: " in progress.message for progress in heard) == 1
    assert heard[-1].done == heard[-1].total and heard[-1].steps_done == heard[-1].steps_total
    assert records_of(home, study).finished_at


@pytest.mark.parametrize("n", [1, 3])
def test_undisturbed_workers_find_what_one_process_finds(home: Home, done: Home, n: int) -> None:
    study = make_study()
    with workers(n) as executor:
        run(home, study, fake_work(), executor)
    assert found(home, study) == found(done, study)
    if n == 1:
        assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


def test_a_worker_that_dies_every_time_fails_its_trial_alone(tmp_path: Path, home: Home, done: Home) -> None:
    study = make_study()
    with workers(2) as executor:
        run(home, study, with_fault(tmp_path / "marks", "killed", "r8-ratio1"), executor)
    expected, there = found(done, study), found(home, study)
    assert {cell for cell, (_, state, _) in there.items() if state == FAILED} == {
        cell for cell in there if cell[0] == "r8-ratio1"
    }
    reasons = {reason for _, state, reason in there.values() if state == FAILED}
    assert reasons == {"its worker was lost 3 times: killed by signal 9, perhaps for want of memory"}
    siblings = {cell: entry for cell, entry in expected.items() if cell[0] in ("full", "r2-ratio1", "r2-ratio2")}
    assert {cell: there[cell] for cell in siblings} == siblings
    assert all(state != FAILED for cell, (_, state, _) in there.items() if cell[0] == "r8-ratio2")
    assert records_of(home, study).finished_at


def test_a_pack_is_tried_whole_again_then_in_halves_and_a_trial_three_times_in_all() -> None:
    pack, lost = Pack(tuple(slot(i, 2) for i in range(5)), 0, 15), WorkerLost("gone")

    def tries(pack: Pack) -> list[list[int]]:
        """Every pack that is tried where trial 3 takes its worker with it each time."""
        indices = [s.index for s in pack.slots]
        if 3 not in indices:
            return [indices]
        decision = decide(pack, lost, shared=True)
        assert bool(decision.again) != bool(decision.state)
        return [indices, *(one for again in decision.again for one in tries(again))]

    assert tries(pack) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4], [3], [3], [4]]
    single = replace(pack, slots=(slot(3, 2),))
    assert tries(single) == [[3]] * LOSSES
    last = decide(replace(single, losses=LOSSES - 1), lost, shared=True)
    assert (last.state, last.reason) == (FAILED, "its worker was lost 3 times: gone")


def test_the_last_try_of_a_lost_trial_has_the_machine_to_itself() -> None:
    pack = Pack((slot(3, 2),), 0, 15, losses=LOSSES - 2)
    (last,) = decide(pack, WorkerLost("killed by signal 9"), shared=True).again
    assert last.exclusive and not decide(replace(pack, losses=0), WorkerLost("x"), shared=True).again[0].exclusive


def test_a_hung_trial_is_ended_when_its_time_is_over_and_tried_again(tmp_path: Path, home: Home, done: Home) -> None:
    study = make_study(resources={"workers": 2, "seconds_per_rung": 3})
    began = time.monotonic()
    with workers(2) as executor:
        heard = run(home, study, with_fault(tmp_path / "marks", "stopped", "full", times=1), executor)
    assert 3 <= time.monotonic() - began < 60
    assert found(home, study) == found(done, study)
    assert any("tries again: did nothing for 3 s" in progress.message for progress in heard)


@pytest.mark.slow  # as test_hangs has it with the real command
def test_a_trial_that_hangs_every_time_fails_and_its_siblings_finish(tmp_path: Path, home: Home, done: Home) -> None:
    study = make_study(resources={"workers": 2, "seconds_per_rung": 5})
    with workers(2) as executor:
        run(home, study, with_fault(tmp_path / "marks", "stopped", "full"), executor)
    there, expected = found(home, study), found(done, study)
    assert {cell[0] for cell, (_, state, _) in there.items() if state == FAILED} == {"full"}
    assert {reason for _, state, reason in there.values() if state == FAILED} == {
        "its worker was lost 3 times: did nothing for 5 s"
    }
    assert {c: e for c, e in there.items() if c[0] != "full"} == {c: e for c, e in expected.items() if c[0] != "full"}


def test_without_a_limit_of_its_own_a_pack_may_take_far_longer_than_forecast() -> None:
    study = make_study()
    arms = study.list_arms()
    told = forecast(study.setup(""), None, arms)  # type: ignore[arg-type]
    assert allowed_seconds(told, arms[:2], steps=30, test=False) == pytest.approx(600 + 20 * (30 * 0.2 + 2 * 0.01))
    assert allowed_seconds(told, arms[:2], steps=30, test=True) == pytest.approx(600 + 20 * (30 * 0.2 + 2 * 0.03))
    unknown = replace(told, arms=tuple(replace(arm, step_time_s=None) for arm in told.arms))
    assert allowed_seconds(unknown, arms[:1], 30, False) is None
    assert allowed_seconds(None, arms[:1], 30, False) is None


def test_a_limit_does_not_touch_a_study_that_keeps_within_it(home: Home, done: Home) -> None:
    study = make_study(resources={"seconds_per_rung": 0.2})
    ended: list[str] = []

    class Slow(Threads):
        def end(self, future: Future[Any], reason: str) -> None:
            ended.append(reason)

    def train(unit: Unit) -> tuple[Measurement, ...]:
        time.sleep(0.01)
        return train_rung(unit)

    with Slow(2) as executor:
        run(home, study, fake_work(train), executor)
    assert ended == [] and found(home, study) == found(done, study)


SLOW_STUDY = """
import sys
from functools import partial
from pathlib import Path
import worker_units as units
from driving import run
from fakes import fake_work, make_study
from sweep.study.home import Home

study = make_study(resources={"workers": 1, "seconds_per_rung": 3}, train={"steps": 1, "batch_size": 1},
    search={"rungs": [1]}, confirm={"seeds": [1], "reference": 8, "epsilon": 0.05})
with units.workers(1) as executor:
    heard = run(Home(Path(sys.argv[1])), study, fake_work(partial(units.train_slowly, 1.0)), executor)
print("\\n".join(progress.message for progress in heard))
"""


def test_a_command_that_is_stopped_for_a_while_takes_no_pack_for_hung(tmp_path: Path, home: Home) -> None:
    """Ctrl-Z, or a machine that sleeps: workers go on, or sleep too; nobody has waited for them."""
    tests = Path(__file__).parent
    driver = subprocess.Popen(
        [sys.executable, "-c", SLOW_STUDY, str(home.root)],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: any(home.root.glob("studies/fake/trials/*/journal.jsonl")), "the first trial")
        driver.send_signal(signal.SIGSTOP)
        time.sleep(5)
        driver.send_signal(signal.SIGCONT)
        told, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 0 and "finished" in told
    assert "lost" not in told


def fail_first(marks: Path, times: int, fn: Callable[..., Any], *args: Any) -> Any:
    """fn, but the first calls lose their worker."""
    marks.mkdir(exist_ok=True)
    number = len(list(marks.iterdir()))
    (marks / str(number)).touch()
    if number < times:
        units.die(signal.SIGKILL)
    return fn(*args)


@pytest.mark.parametrize("part", ["prepare", "forecast", "probe", "fingerprints"])
def test_work_that_is_no_trial_is_tried_again_when_its_worker_is_lost(
    tmp_path: Path, home: Home, done: Home, part: str
) -> None:
    study, real = make_study(), {"prepare": prepare, "forecast": forecast, "probe": probe, "fingerprints": fingerprints}
    if part == "fingerprints":  # asked where a study is taken up
        with workers(1) as executor, pytest.raises(OSError):
            run(home, study, with_fault(tmp_path / "disk", "no disk", "r2-ratio1"), executor)
    work = replace(fake_work(), **{part: partial(fail_first, tmp_path / "marks", 2, real[part])})
    with workers(1) as executor:
        run(home, study, work, executor)
    assert len(list((tmp_path / "marks").iterdir())) >= 3
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


def test_a_preparation_that_loses_every_worker_ends_the_command_with_a_line(tmp_path: Path, home: Home) -> None:
    work = replace(fake_work(), prepare=partial(fail_first, tmp_path / "marks", 99, prepare))
    with workers(2) as executor, pytest.raises(WorkerLost) as caught:
        run(home, make_study(), work, executor)
    assert str(caught.value) == (
        "the worker was lost 3 times while reading the model and the data: "
        "killed by signal 9, perhaps for want of memory"
    )
    assert len(list((tmp_path / "marks").iterdir())) == 3


def test_a_probe_that_loses_every_worker_is_a_warning(tmp_path: Path, home: Home) -> None:
    study = make_study(arms={"rank": [8], "alpha_ratio": [1.0], "full_finetuning": False})
    with workers(1) as executor:
        run(home, study, replace(fake_work(), probe=partial(fail_first, tmp_path / "marks", 99, probe)), executor)
    (warning,) = records_of(home, study).warnings
    assert re.match(r"the cost of r8-\S+ could not be measured: WorkerLost: the worker was lost 3 times", warning)
    assert records_of(home, study).finished_at


@pytest.mark.parametrize("part", ["train_rung", "forecast", "probe"])
def test_without_any_worker_the_study_stops_and_the_same_command_completes_it(
    home: Home, done: Home, part: str
) -> None:
    study, gone = make_study(), NoWorkers("no worker is left, and none came within 60 s")

    def nobody(*args: Any) -> Any:
        raise gone

    with Threads(2) as executor, pytest.raises(NoWorkers) as caught:
        run(home, study, replace(fake_work(), **{part: nobody}), executor)
    assert caught.value is gone
    assert not any(trial.state for trial in records_of(home, study).trials) or part == "probe"
    run(home, study)
    assert found(home, study) == found(done, study)
    assert records_of(home, study).warnings == records_of(done, study).warnings


def test_what_a_lost_worker_left_half_written_is_gone(tmp_path: Path, home: Home) -> None:
    study = make_study()
    with workers(1) as executor:
        run(home, study, fake_work(partial(leave_half, tmp_path / "mark")), executor)
    assert (tmp_path / "mark").exists()
    assert not list(home.root.rglob(".tmp-*"))


def leave_half(mark: Path, unit: Unit) -> tuple[Measurement, ...]:
    if not mark.exists():
        mark.touch()
        (Path(unit.trials[0].folder) / "checkpoints" / ".tmp-1-77").mkdir(parents=True)
        units.die(signal.SIGKILL)
    return train_rung(unit)
