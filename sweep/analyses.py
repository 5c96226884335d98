"""The analyses that a study file asks for: made once the study is complete, before its report is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweep.study.home import StudyFolder
from sweep.study.schema import Study


def analyse(study: Study, folder: StudyFolder, cache: Path, say: Callable[[str], None]) -> None:
    """Make those that are asked for and not there yet. say: called with a line before each."""
