"""What was found out about a study's adapters once it ended: a JSON file an analysis, in its folder's `analyses/`."""

from __future__ import annotations

import json
import os
from typing import Any

from sweep.study.home import StudyFolder


def write_analysis(folder: StudyFolder, name: str, found: dict[str, Any]) -> None:
    """Write an analysis whole or not at all; an earlier one of that name is replaced. Raises OSError."""
    path = folder.analysis(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}.tmp")
    half.write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(half, path)


def read_analysis(folder: StudyFolder, name: str) -> dict[str, Any] | None:
    """What the analysis found, or None where it was not made."""
    try:
        found: dict[str, Any] = json.loads(folder.analysis(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found
