"""The study file as it ran, kept in the study's folder: with a digest, since verdicts rest on the numbers in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sweep.study.file import Problem, StudyError, StudyFile, dump_study, read_study
from sweep.study.files import write_whole
from sweep.study.schema import Study

_DIGEST = b"# sha256 of what stands above: "


def keep_study(path: Path, study: Study) -> None:
    """Put it there, whole or not at all. Raises OSError."""
    dump = dump_study(study).encode()
    write_whole(path, dump + _DIGEST + _digest(dump) + b"\n")


def read_kept_study(path: Path, overrides: Sequence[str] = ()) -> StudyFile:
    """What `keep_study` put there. Raises StudyError where it is missing, or not that any more."""
    if path.exists() and kept_dump(path) is None:
        mend = "is damaged, not what was written: `sweep run` the study's own file, which puts it here again"
        raise StudyError([Problem("", mend)], path)
    return read_study(path, overrides)


def kept_dump(path: Path) -> str | None:
    """Its text; None where it is missing or damaged."""
    try:
        dump, _, digest = path.read_bytes().rpartition(_DIGEST)
    except OSError:
        return None
    return dump.decode() if digest == _digest(dump) + b"\n" else None


def _digest(dump: bytes) -> bytes:
    return hashlib.sha256(dump).hexdigest().encode()
