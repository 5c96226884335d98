"""What workers do at once: packs shared out, what waits for the others, memory that they share. The trainer is fake."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from driving import Threads, journal_view, records_of, run
from fakes import fake_work, forecast, make_study, probe, train_rung
from hypothesis import given
from hypothesis import strategies as st
from test_lost_workers import done as done
from test_lost_workers import found
from test_lost_workers import home as home
from test_packing import ready_trials, slot
from worker_units import wait_for, with_fault, workers

from sweep.driver import phase
from sweep.driver.packing import Ready, plan_packs
from sweep.study.home import Home
from sweep.study.records import FAILED, INFEASIBLE, SEARCH, Measurement, Unit


@given(ready_trials(), st.integers(1, 12), st.integers(1, 6))
def test_no_worker_idles_while_another_has_a_large_pack(ready: list[Ready], pack_size: int, n: int) -> None:
    packs = plan_packs(ready, pack_size, n)
    assert sorted(s.index for pack in packs for s in pack.slots) == [r.slot.index for r in ready]
    most = max((len(pack.slots) for pack in packs), default=0)
    assert most <= pack_size and most <= -(-len(ready) // n)
    kinds, even = Counter((r.start, r.slot.arm.is_full) for r in ready), max(1, min(pack_size, -(-len(ready) // n)))
    assert len(packs) == sum(times if full else -(-times // even) for (_, full), times in kinds.items())


def test_two_workers_share_what_one_pack_would_hold() -> None:
    ready = [Ready(slot(i, 2), 0, 15) for i in range(6)]
    assert [len(pack.slots) for pack in plan_packs(ready, 8, 2)] == [3, 3]
    assert [len(pack.slots) for pack in plan_packs(ready, 8, 4)] == [2, 2, 2]
    assert [len(pack.slots) for pack in plan_packs(ready, 2, 2)] == [2, 2, 2]
    assert [len(pack.slots) for pack in plan_packs(ready, 8, 1)] == [6]


def test_the_next_trials_are_asked_while_every_worker_is_at_work(home: Home, done: Home) -> None:
    study, both_begun = make_study(), threading.Barrier(2)
    first_two: list[Unit] = []
    waited_for: list[int] = []

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if len(first_two) < 2:
            first_two.append(unit)
            both_begun.wait(timeout=60)
            following = max(trial.number for begun in first_two for trial in begun.trials) + 1
            wait_for((home.study(study.name).trial(following) / "journal.jsonl").exists, "the next trial")
            waited_for.append(following)
        return train_rung(unit)

    with Threads(2) as executor:
        run(home, study, fake_work(train), executor)
    assert len(waited_for) == 2
    # Packs differ with the slots, trials do not.
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


class Meter:
    """Counts what runs at the same time."""

    def __init__(self) -> None:
        self.lock, self.running, self.seen = threading.Lock(), Counter[str](), []

    def __call__(self, kind: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            with self.lock:
                self.running[kind] += 1
                self.seen.append((kind, +self.running))
            try:
                time.sleep(0.01)
                return fn(*args)
            finally:
                with self.lock:
                    self.running -= Counter({kind: 1})

        return measured


def test_probes_run_with_nothing_else_in_training(home: Home) -> None:
    """Those of what may not fit come in the middle of a phase."""
    meter, study = Meter(), make_study()
    work = replace(
        fake_work(meter("train", train_rung)),
        forecast=partial(forecast, limit=7),  # rank 8 and full fine-tuning need more
        probe=meter("probe", probe),
    )
    with Threads(3) as executor:
        run(home, study, work, executor)
    probes = [running for kind, running in meter.seen if kind == "probe"]
    assert len(probes) > len(records_of(home, study).costs), "some were made before the last trial"
    assert all(running == {"probe": 1} for running in probes)
    assert any(running["train"] == 3 for _, running in meter.seen), "else the test would be blind"


def test_what_may_not_fit_trains_with_nothing_else_in_training(home: Home) -> None:
    meter, study, alone = Meter(), make_study(), []

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if any(trial.phase == SEARCH and (trial.arm.is_full or trial.arm.r == 8) for trial in unit.trials):
            alone.append(meter.running.total())
        return train_rung(unit)

    with Threads(3) as executor:
        run(home, study, replace(fake_work(meter("train", train)), forecast=partial(forecast, limit=7)), executor)
    assert len(alone) >= 9 and set(alone) == {1}


def test_a_trial_without_memory_beside_others_is_tried_alone_before_it_is_said_not_to_fit(
    home: Home, done: Home
) -> None:
    meter, study = Meter(), make_study()
    short = []

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if any(trial.arm.is_full for trial in unit.trials) and meter.running.total() > 1:
            short.append(unit.start)
            raise MemoryError("no room beside others")
        return train_rung(unit)

    with Threads(3) as executor:
        run(home, study, fake_work(meter("train", train)), executor)
    assert short, "else nothing was tried"
    assert found(home, study) == found(done, study)


def test_out_of_memory_in_one_trial_of_a_pack_ends_that_trial_alone(tmp_path: Path, home: Home, done: Home) -> None:
    study = make_study()
    with workers(2) as executor:
        run(home, study, with_fault(tmp_path / "marks", "no memory", "r8-ratio1"), executor)
    there, expected = found(home, study), found(done, study)
    states = {cell[0]: set() for cell in there}
    for cell, (_, state, _) in there.items():
        states[cell[0]].add(state)
    assert states["r8-ratio1"] == {INFEASIBLE}
    assert not any(INFEASIBLE in states[arm] or FAILED in states[arm] for arm in ("r2-ratio1", "r2-ratio2", "full"))
    for cell in (cell for cell in expected if cell[0] in ("r2-ratio1", "r2-ratio2", "full")):
        assert there[cell] == expected[cell]


class Growing(Threads):
    """One worker, and another that joins a moment after the first has work."""

    def __init__(self) -> None:
        super().__init__(2)
        self.slots = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        if args and isinstance(args[0], Unit):
            threading.Timer(0.5, self.grow).start()
        return super().submit(fn, *args)

    def grow(self) -> None:
        self.slots = 2


def test_a_worker_that_joins_is_used_while_others_train(
    home: Home, done: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "LOOK_EVERY", 0.05)
    study, meeting = make_study(), threading.Barrier(2)
    first = iter([True, True])

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if next(first, False):
            meeting.wait(10)  # BrokenBarrierError where the first one trains alone
        return train_rung(unit)

    with Growing() as executor:
        run(home, study, fake_work(train), executor)
    assert not meeting.broken
    assert found(home, study) == found(done, study)
