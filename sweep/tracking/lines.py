"""Lines of a journal: JSON objects that carry a checksum, appended and synced.

A line without its end was never acknowledged: it is left out, and cut off by the next append. A line that was, and is
no longer what was written, is an error, even where it can still be read: a number may have changed.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sweep.tracking.clock import now

_LINE = re.compile(rb'(\{.*), "crc": "([0-9a-f]{8})"\}', re.DOTALL)
_EVENT = re.compile(rb'\{"event": "(\w+)"')
Mend = Callable[[Path, int, str], str]  # of a journal, the number of a damaged line and its event ("": unreadable)


class JournalError(ValueError):
    """A journal is damaged: one line that names file and line, and says what to do."""


def append(path: Path, event: str, **values: Any) -> float:
    """Write one event and wait until it is on the disk; returns its time.

    Raises OSError when it cannot be written (disk full, read-only).
    """
    at = now()
    _append(path, as_line({"event": event, "time": at, **values}))
    return at


def append_copy(path: Path, event: dict[str, Any]) -> None:
    """Write what another journal told, its time included."""
    _append(path, as_line(event))


def _append(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab+", buffering=0) as file:
            is_new = file.seek(0, os.SEEK_END) == 0
            _cut_torn_line(path, file)
            _write(file, line)
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    if is_new:
        for folder in (path.parent, path.parent.parent):
            _sync_folder(folder)


def as_line(event: dict[str, Any]) -> bytes:
    """One event as it stands in a journal."""
    told = json.dumps(event, allow_nan=False).encode()[:-1]
    return told + f', "crc": "{zlib.crc32(told):08x}"}}\n'.encode()


def read_events(
    path: Path, mend: Mend = lambda path, number, event: "restore it from a backup"
) -> list[dict[str, Any]]:
    """All acknowledged events; none where there is no journal.

    Raises JournalError where a line is not what was written. mend: says what to do then.
    """
    events = []
    for number, line in enumerate(_lines(path), start=1):
        event = _read(line)
        if event is None:
            kind = _EVENT.match(line)
            what_to_do = mend(path, number, kind[1].decode() if kind else "")
            raise JournalError(f"{path}: line {number} is damaged, not what was written: {what_to_do}")
        events.append(event)
    return events


def readable_events(path: Path) -> list[dict[str, Any]]:
    """Those of the lines that are what was written, whatever became of the others."""
    return [event for line in _lines(path) if (event := _read(line)) is not None]


def _lines(path: Path) -> list[bytes]:
    """All that were acknowledged, without their ends."""
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [*lines, torn] if _lost_its_end(torn) else lines


def _read(line: bytes) -> dict[str, Any] | None:
    """The event of a line without its end; None where it is not what was written."""
    found = _LINE.fullmatch(line)
    if found is None or zlib.crc32(found[1]) != int(found[2], 16):
        return None
    event: dict[str, Any] = json.loads(found[1] + b"}")
    return event


def _lost_its_end(torn: bytes) -> bool:
    """Whether what stands behind the last line's end is a whole line whose own end became another byte."""
    return _read(torn[:-1]) is not None


def _write(file: BinaryIO, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[file.write(rest) :]


def _cut_torn_line(path: Path, file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole = file.read()
    end = whole.rfind(b"\n") + 1
    if _lost_its_end(whole[end:]):
        raise JournalError(f"{path}: the end of its last line is damaged: nothing is written behind it")
    file.truncate(end)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
