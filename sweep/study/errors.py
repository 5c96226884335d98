"""Errors that more than one room tells apart: bad input that shows late, and want of memory."""

from __future__ import annotations

import errno

from sweep.study.credentials import without_credentials


class FieldError(ValueError):
    """Bad input that shows only after the study file was read: it names the field and what to do.

    One or more fields of the study cannot be used as they stand.

    problems: (dotted field as in the study file, message). Standard library only, so that the engine can raise it.
    """

    def __init__(self, *problems: tuple[str, str]):
        self.problems = problems
        super().__init__("; ".join(f"{field}: {message}" for field, message in problems))

    def __reduce__(self) -> tuple[type[FieldError], tuple[tuple[str, str], ...]]:
        return FieldError, self.problems  # it crosses process boundaries


class WorkerLost(RuntimeError):
    """The process that ran a unit ended without a result: killed, crashed, its machine gone. Retry the unit."""


class Told(RuntimeError):
    """What came of an error that could not cross a process boundary: its kind and message, in one line."""


class NoWorkers(RuntimeError):
    """No worker is left, and none came in time: no trial's fault, and the same command goes on once there are some."""


class Damaged(RuntimeError):
    """A file on disk is not what was written: truncated, changed or gone.

    trial: the number of the trial whose checkpoint it is. It crosses process boundaries.
    """

    def __init__(self, message: str, trial: int):
        self.trial = trial
        super().__init__(message)

    def __reduce__(self) -> tuple[type[Damaged], tuple[str, int]]:
        return Damaged, (str(self), self.trial)


def is_out_of_memory(error: BaseException) -> bool:
    """By name and text, since not every room knows torch: CUDA's own error, Python's, and the CPU allocator's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return getattr(error, "errno", None) == errno.ENOMEM or any(words in str(error) for words in told)


def broke_device(error: BaseException) -> bool:
    """Whether CUDA will serve the process no more that saw this error: whatever it does there fails like it."""
    if is_out_of_memory(error):
        return False
    return (
        type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error) or "device-side assert" in str(error)
    )


def was_killed(error: BaseException) -> bool:
    """Whether a process ended without a word (BrokenProcessPool), as the kernel ends one for want of memory."""
    return type(error).__name__ == "BrokenProcessPool"


def in_one_line(error: BaseException) -> str:
    """Its kind and message, at most 500 characters, without anybody's credentials."""
    told = without_credentials(" ".join(str(error).split()))
    kind = "" if isinstance(error, Told) else f"{type(error).__name__}: "
    return f"{kind}{told}"[:500].rstrip(": ")


def first_line(error: BaseException) -> str:
    """Of its message, without anybody's credentials; its kind where it has none."""
    lines = str(error).strip().splitlines()
    return without_credentials(lines[0]) if lines else type(error).__name__
