"""Exit codes, and the error that carries one. Standard library only: `sweep --help` loads this."""

from __future__ import annotations

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Refused(Exception):
    """What the user asked for cannot be done as it stands: lines to print, and the exit code."""

    def __init__(self, *lines: str, code: int = USAGE):
        self.lines, self.code = lines, code
        super().__init__("\n".join(lines))
