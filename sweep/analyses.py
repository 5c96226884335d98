"""The analyses that a study file asks for: made once the study is complete, before its report is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweep.study.home import StudyFolder
from sweep.study.schema import Study
from sweep.tracking.analyses import read_analysis, write_analysis
from sweep.tracking.journal import StudyRecord, read_study_record

RANK_USE = "rank-use"


def analyse(study: Study, folder: StudyFolder, cache: Path, say: Callable[[str], None]) -> None:
    """Make those that are asked for and not there yet. say: called with a line before each."""
    if study.rank_use is not None and read_analysis(folder, RANK_USE) is None:
        from sweep.adapters.rank_use import RankUseError

        say("looking at what rank the updates used")
        try:
            look_at_rank_use(study, read_study_record(folder), cache)
        except RankUseError as error:  # the report stands without it
            say(f"rank use: {error}")


def look_at_rank_use(study: Study, record: StudyRecord, cache: Path) -> dict[str, Any]:
    """Make the analysis of the updates' ranks anew. Raises RankUseError where there is nothing to look at."""
    from sweep.adapters.rank_use import measure_rank_use

    found = measure_rank_use(study, record, cache)
    write_analysis(record.folder, RANK_USE, found)
    return found
