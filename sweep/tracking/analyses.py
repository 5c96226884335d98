"""What was found out about a study's adapters once it ended: a JSON file an analysis, in its folder's `analyses/`."""

from __future__ import annotations

from typing import Any

from sweep.study.files import read_json, write_json
from sweep.study.home import StudyFolder


def write_analysis(folder: StudyFolder, name: str, found: dict[str, Any]) -> None:
    """Write an analysis whole or not at all; an earlier one of that name is replaced. Raises OSError."""
    write_json(folder.analysis(name), found)


def read_analysis(folder: StudyFolder, name: str) -> dict[str, Any] | None:
    """What the analysis found, or None where it was not made, or its file is damaged: then it is made anew."""
    found: dict[str, Any] | None = read_json(folder.analysis(name))
    return found
