"""What a worker does: the only functions that cross a process boundary. Heavy imports happen in the worker."""

from __future__ import annotations

import gc
import pickle  # noqa: TID251 - our own processes send each other pickles, over pipes of their own
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from traceback import clear_frames

from sweep.study.arms import Arm
from sweep.study.errors import Told, WorkerLost, broke_device, in_one_line
from sweep.study.records import Cost, Measurement, Prepared, Setup, StudyForecast, Unit


def prepare(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
    """Load model and data, check the arms, choose precision, attention and pack size. Raises FieldError."""
    from sweep.training.prepare import prepare

    return prepare(setup, arms)


def fingerprints(setup: Setup) -> tuple[str, str, str]:
    """Of data, model and text of the source domain ("" without) as they are now.

    Raises FieldError where they cannot be read.
    """
    from sweep.training.prepare import fingerprints

    return fingerprints(setup)


def forecast(setup: Setup, prepared: Prepared, arms: tuple[Arm, ...]) -> StudyForecast:
    """What every arm will cost alone, from a few probe steps of some. Raises FieldError."""
    from sweep.training.forecast import forecast

    return forecast(setup, prepared, arms)


def train_rung(unit: Unit) -> tuple[Measurement, ...]:
    """Train one pack for one rung, from its trials' last checkpoints to new ones; one measurement a trial, in order.

    Raises FieldError where model or data cannot be read (any more), OSError where the disk is full or gone.
    """
    from sweep.training.rung import train_rung

    return train_rung(unit)


def probe(setup: Setup, prepared: Prepared, arm: Arm) -> Cost:
    """What the arm costs alone, measured in a fresh process."""
    from sweep.training.probe import probe

    return probe(setup, prepared, arm)


def answer(request: bytes) -> bytes:
    """Run a pickled (function, arguments) in a worker; returns (its value, None) or (None, what it raised), pickled.

    WorkerLost stands for an error after which this process can use its GPU no more: it must get no other unit.
    """
    try:
        fn, args = pickle.loads(request)  # noqa: S301 - our own driver wrote it
        reply = pickle.dumps((fn(*args), None))
    except BaseException as error:  # a worker lives on, whatever a unit does
        error.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
        let_go(error)
        sent = WorkerLost(f"its GPU failed ({in_one_line(error)})") if broke_device(error) else as_sent(error)
        reply = pickle.dumps((None, sent))
    free_cache()  # another worker, or a probe's process, may share the device
    return reply


def as_sent(error: BaseException) -> Exception:
    """An error as it crosses a process boundary: itself, or what is told of it where it cannot.

    torch's own count as such, since the other side may not have torch, and need not load it.
    """
    if isinstance(error, Exception) and type(error).__module__.split(".")[0] != "torch":
        with suppress(Exception):  # whatever its own pickling does
            if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301 - our own, of a moment before
                return error
    return Told(in_one_line(error))


def let_go(error: BaseException) -> None:
    """Free what an error's trace-back keeps alive, a failed pack's memory above all; its lines can still be printed."""
    errors: list[BaseException] = [error]
    for found in errors:
        clear_frames(found.__traceback__)
        errors += [e for e in (found.__cause__, found.__context__) if e is not None and e not in errors]
    gc.collect()  # frames and tensors refer to each other
    free_cache()


def free_cache() -> None:
    """Give memory of the device that the allocator keeps for later back to others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # the device may be what failed
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Work:
    """The worker's functions as the driver calls them; tests put a fake trainer here."""

    prepare: Callable[[Setup, tuple[Arm, ...]], Prepared] = prepare
    fingerprints: Callable[[Setup], tuple[str, str, str]] = fingerprints
    forecast: Callable[[Setup, Prepared, tuple[Arm, ...]], StudyForecast] = forecast
    train_rung: Callable[[Unit], tuple[Measurement, ...]] = train_rung
    probe: Callable[[Setup, Prepared, Arm], Cost] = probe
