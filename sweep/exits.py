"""Exit codes, and which errors have which. Light: `sweep --help` loads this."""

from __future__ import annotations

from collections.abc import Sequence

from sweep.study.errors import Damaged, FieldError, first_line

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Refused(Exception):
    """What the user asked for cannot be done as it stands: lines to print, and the exit code."""

    def __init__(self, *lines: str, code: int = USAGE):
        self.lines, self.code = lines, code
        super().__init__("\n".join(lines))


def explain(error: Exception) -> tuple[Sequence[str], int]:
    """What to print for an error, and the exit code."""
    from sweep.study.file import StudyError
    from sweep.tracking.lines import JournalError
    from sweep.tracking.remote import PlaceError

    if isinstance(error, Refused):
        return error.lines, error.code
    if isinstance(error, StudyError):
        return error.lines(), USAGE
    if isinstance(error, FieldError):
        return [f"{field}: {message}" for field, message in error.problems], USAGE
    if isinstance(error, Damaged | JournalError | PlaceError):
        return [first_line(error)], FAILED
    if isinstance(error, OSError) and error.filename:  # a full disk, a home that became read-only
        return [f"{error.strerror}: {error.filename}: mend that, and run the same command again"], FAILED
    return [f"error: {first_line(error)}", "set SWEEP_DEBUG=1 for the trace-back"], FAILED
