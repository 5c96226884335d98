"""Ctrl-C falls between two writes: one inside a database library prints a traceback and may be swallowed."""

from __future__ import annotations

import signal
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import journal_view, optuna_view, records_of, run, trials_of, undisturbed
from fakes import fake_work, make_study, probe, train_rung

from sweep.driver import opening, session, takeup
from sweep.driver.interrupts import uninterrupted
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit


class Thing: ...


def raise_interrupt(number: int, frame: Any) -> None:
    """The command's own handler."""
    raise KeyboardInterrupt


def interrupt_in_a_callback(number: int) -> None:
    """What SQLAlchemy's clean-up is to an interrupt: a callback of the interpreter, out of which nothing is raised."""
    thing = Thing()
    weakref.finalize(thing, signal.raise_signal, number)
    del thing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "call"),
    [
        (session, "create_trial"),
        (session, "report"),
        (session, "tell"),
        (opening.optuna.storages, "get_storage"),
        (opening, "question_hash"),
        (takeup, "list_trials"),
        (takeup, "tidy_all"),
    ],
)
def test_an_interrupt_inside_a_write_is_raised_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str, number: int
) -> None:
    home, study = Home(tmp_path / "home"), make_study()
    before = {n: signal.signal(n, raise_interrupt) for n in (signal.SIGINT, signal.SIGTERM)}

    def run_interrupted(module: Any, call: str) -> None:
        real = getattr(module, call)

        def interrupted(*args: Any) -> Any:
            interrupt_in_a_callback(number)
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, call, interrupted)
            run(home, study)

    try:
        run_interrupted(session, "report")  # so that there is something to take up
        run_interrupted(module, call)
        run_interrupted(module, call)
        run(home, study)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    calm = undisturbed(tmp_path / "calm")
    assert journal_view(records_of(home, study)) == journal_view(records_of(calm, study))
    assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(calm, study))


class Bytes:
    """A sequence that is interrupted while torch reads it, as a checkpoint's bytes are when it is loaded."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0


def test_an_interrupt_that_torch_makes_an_error_of_fails_no_trial_and_no_probe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not determine the shape"):
        torch.tensor(Bytes())
    home, study, calls = Home(tmp_path / "home"), make_study(), Counter[str]()

    def interrupted(call: Callable[..., Any], nth: int) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            calls[call.__name__] += 1
            if calls[call.__name__] == nth:
                torch.tensor(Bytes())
            return call(*args)

        return called

    work = replace(fake_work(interrupted(train_rung, 2)), probe=interrupted(probe, 2))
    for name in ("train_rung", "probe"):
        with pytest.raises(KeyboardInterrupt):
            run(home, study, work)
        assert calls[name] == 2
    run(home, study, work)
    calm = undisturbed(tmp_path / "calm")
    assert journal_view(records_of(home, study)) == journal_view(records_of(calm, study))
    assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(calm, study))


def test_an_interrupt_that_a_callback_swallows_ends_the_study_after_the_rung(tmp_path: Path) -> None:
    home, study = Home(tmp_path / "home"), make_study()

    def interrupted(unit: Unit) -> tuple[Measurement, ...]:
        interrupt_in_a_callback(signal.SIGINT)
        return train_rung(unit)

    with pytest.raises(KeyboardInterrupt):
        run(home, study, fake_work(interrupted))
    assert sum(len(record.rungs) for record in records_of(home, study).trials) == 0
    run(home, study)
    assert journal_view(records_of(home, study)) == journal_view(records_of(undisturbed(tmp_path / "calm"), study))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_second_interrupt_does_not_wait(depth: int) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), ExitStack() as blocks:
        for _ in range(depth):
            blocks.enter_context(uninterrupted())
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
