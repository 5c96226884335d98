"""Trouble that is no trial's fault stops the study; the same command then completes it as if undisturbed."""

from __future__ import annotations

import errno
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import Killed, Threads, journal_view, records_of, run, undisturbed
from fakes import fake_work, fingerprints, make_study, train_rung

from sweep.execution.executor import InlineExecutor
from sweep.study.errors import FieldError
from sweep.study.home import Home
from sweep.study.records import FAILED, Measurement, Unit
from sweep.study.schema import Study


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


GONE = FieldError(("data.source", "rows.csv: there is no such file or folder"))
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("trouble", [GONE, FULL], ids=["data gone", "disk full"])
def test_passing_trouble_stops_the_study_and_the_same_command_loses_nothing(
    home: Home, done: Home, trouble: Exception, slots: int
) -> None:
    study, trained = make_study(), 0

    def train(unit: Unit) -> tuple[Measurement, ...]:
        nonlocal trained
        trained += 1
        if trained >= 6:
            raise trouble
        return train_rung(unit)

    with Threads(slots) as executor, pytest.raises(type(trouble)) as caught:
        run(home, study, fake_work(train), executor)
    assert caught.value is trouble
    assert not any(t.state == FAILED for t in records_of(home, study).trials)
    run(home, study)
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


def test_want_of_memory_is_not_passing_trouble_but_halves_the_pack(home: Home) -> None:
    sizes: list[int] = []

    def train(unit: Unit) -> tuple[Measurement, ...]:
        sizes.append(len(unit.trials))
        if len(unit.trials) > 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return train_rung(unit)

    study = make_study(arms={"rank": [2, 4, 8, 16], "alpha_ratio": [1.0, 2.0], "full_finetuning": True})
    run(home, study, fake_work(train))
    assert not any(t.state == FAILED for t in records_of(home, study).trials)
    assert [size for size in sizes if size > 2] == [4], "the first of five packs finds out, for those in the queue too"


def test_a_cost_is_not_given_up_because_the_data_are_gone(home: Home, done: Home) -> None:
    def probe(*args: Any) -> Any:
        raise GONE

    study = make_study()
    with pytest.raises(FieldError):
        run(home, study, replace(fake_work(), probe=probe))
    run(home, study)
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


class Tensor:
    """Something that only a frame holds."""


def test_what_a_failed_pack_held_is_gone_before_its_halves_train(home: Home) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def allocate() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise MemoryError("no room")

    def train(unit: Unit) -> tuple[Measurement, ...]:
        activations = Tensor()
        alive.extend(ref() is not None for ref in held)
        held.append(weakref.ref(activations))
        if len(unit.trials) > 1:
            try:
                allocate()
            except MemoryError as error:
                raise RuntimeError("out of memory") from error
        return train_rung(unit)

    run(home, make_study(), fake_work(train))
    assert alive and not any(alive)


def test_the_lines_of_a_failure_can_still_be_printed() -> None:
    def fails() -> None:
        raise MemoryError("no room")

    error = InlineExecutor().submit(fails).exception()
    assert error is not None and error.__traceback__ is not None
    assert error.__traceback__.tb_next is not None and error.__traceback__.tb_next.tb_frame.f_code.co_name == "fails"


@pytest.mark.parametrize(
    ("now", "fields"),
    [
        (("other", "m", "t"), ["data.source"]),
        (("d", "other", "t"), ["model"]),
        (("x", "y", "t"), ["data.source", "model"]),
        (("d", "m", "other"), ["forgetting.source"]),
    ],
)
def test_a_study_is_not_taken_up_with_other_data_or_another_model(
    home: Home, now: tuple[str, str, str], fields: list[str]
) -> None:
    study = make_study(forgetting={"source": "none"})

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if unit.start:
            raise Killed
        return train_rung(unit)

    with pytest.raises(Killed):
        run(home, study, fake_work(train))
    before = contents(home)
    with pytest.raises(FieldError, match="has changed since the study began") as caught:
        run(home, study, replace(fake_work(), fingerprints=lambda setup: now))
    assert [field for field, _ in caught.value.problems] == fields
    assert contents(home) == before
    run(home, study, replace(fake_work(), fingerprints=fingerprints))
    assert records_of(home, study).finished_at


def contents(home: Home) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(home.root.rglob("*")) if p.is_file()}


def learning_study(sampler: str) -> Study:
    return make_study(
        arms={"rank": [2, 8], "alpha_ratio": [1.0], "full_finetuning": False},
        tune={"learning_rate": {"low": 1e-3, "high": 1e-1, "values": 4}},
        train={"steps": 2, "batch_size": 1},
        search={"sampler": sampler, "rungs": [1, 2], "keep": 0.5, "seed": 3},
        confirm={"seeds": [1], "reference": 8, "epsilon": 0.05},
    )


def searched(home: Home, study: Study) -> dict[str, list[tuple[float, Any]]]:
    found: dict[str, list[tuple[float, Any]]] = {}
    for t in records_of(home, study).trials:
        found.setdefault(t.spec.arm.name, []).append((t.spec.learning_rate, t.eval_curve))
    return found


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_learning_sampler_draws_the_same_rates_in_every_pack_size_and_across_kills(
    tmp_path: Path, sampler: str
) -> None:
    study, views = learning_study(sampler), []
    for pack_size, kill_at in ((1, 0), (3, 0), (9, 0), (1, 4), (9, 2)):
        home, trained = Home(tmp_path / f"{pack_size}-{kill_at}"), 0

        def train(unit: Unit, kill_at: int = kill_at) -> tuple[Measurement, ...]:
            nonlocal trained
            trained += 1
            new = [t.arm.name for t in unit.trials if unit.start == 0 and t.phase == "search"]
            assert len(new) == len(set(new)), "two rates of one arm in a pack: the one could not learn from the other"
            if trained == kill_at:
                raise Killed
            return train_rung(unit)

        def prepare(setup: Any, arms: Any, pack_size: int = pack_size) -> Any:
            return replace(fake_work().prepare(setup, arms), pack_size=pack_size)

        work = replace(fake_work(train), prepare=prepare)
        if kill_at:
            with pytest.raises(Killed):
                run(home, study, work)
        run(home, study, work)
        views.append(searched(home, study))
    assert all(view == views[0] for view in views)
