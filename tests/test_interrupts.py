"""Ctrl-C falls between two writes: one inside a database library prints a traceback and may be swallowed."""

from __future__ import annotations

import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
from driving import journal_view, optuna_view, records_of, run, trials_of, undisturbed
from fakes import make_study

from sweep.driver import session
from sweep.driver.interrupts import uninterrupted
from sweep.study.home import Home


class Thing: ...


def interrupt_in_a_callback(number: int) -> None:
    """What SQLAlchemy's clean-up is to an interrupt: a callback of the interpreter, out of which nothing is raised."""
    thing = Thing()
    weakref.finalize(thing, signal.raise_signal, number)
    del thing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("write", ["create_trial", "report", "tell"])
def test_an_interrupt_inside_a_write_is_raised_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, number: int
) -> None:
    def raise_interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, raise_interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    real, home, study = getattr(session, write), Home(tmp_path / "home"), make_study()

    def interrupted(*args: Any) -> Any:
        interrupt_in_a_callback(number)
        return real(*args)

    try:
        for _ in range(3):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(session, write, interrupted)
                run(home, study)
        run(home, study)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    calm = undisturbed(tmp_path / "calm")
    assert journal_view(records_of(home, study)) == journal_view(records_of(calm, study))
    assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(calm, study))


def test_a_second_interrupt_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
