"""The error for bad input that shows only after the study file was read: it names the field and what to do."""

from __future__ import annotations


class FieldError(ValueError):
    """One or more fields of the study cannot be used as they stand.

    problems: (dotted field as in the study file, message). Standard library only, so that the engine can raise it.
    """

    def __init__(self, *problems: tuple[str, str]):
        self.problems = problems
        super().__init__("; ".join(f"{field}: {message}" for field, message in problems))

    def __reduce__(self) -> tuple[type[FieldError], tuple[tuple[str, str], ...]]:
        return FieldError, self.problems  # it crosses process boundaries
