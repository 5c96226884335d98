"""The analyses that a study file asks for: made once the study is complete, before its report is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweep.study.domains import domain_studies
from sweep.study.home import Home, StudyFolder
from sweep.study.schema import Latency, Study
from sweep.tracking.analyses import read_analysis, write_analysis
from sweep.tracking.connection import locked
from sweep.tracking.journal import StudyRecord, read_study_record

RANK_USE, LATENCY = "rank-use", "latency"
DOMAINS = "domains"


@contextmanager
def one_writer(study: Study, folder: StudyFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Keep others from analysing and reporting the study meanwhile: its own lock is free once it is complete.

    say: told where another is at it, and waited for.
    """
    another = f"another `sweep run` writes what study {study.name} found: this one waits for it"
    with locked(folder.path / "publish.lock", lambda: say(another)):
        yield


def analyse(study: Study, folder: StudyFolder, cache: Path, say: Callable[[str], None]) -> None:
    """Make those that are asked for and not there yet. say: called with a line before each."""
    if study.rank_use is not None and read_analysis(folder, RANK_USE) is None:
        from sweep.adapters.rank_use import RankUseError

        say("looking at what rank the updates used")
        try:
            look_at_rank_use(study, read_study_record(folder), cache)
        except RankUseError as error:  # the report stands without it
            say(f"rank use: {error}")
    if study.latency is not None and read_analysis(folder, LATENCY) is None:
        from sweep.adapters.latency import LatencyError

        say("measuring what adapters cost when they answer: leave the machine alone until this is done")
        try:
            time_answers(study, read_study_record(folder), cache, study.latency, say)
        except LatencyError as error:
            say(f"latency: {error}")


def look_at_rank_use(study: Study, record: StudyRecord, cache: Path) -> dict[str, Any]:
    """Make the analysis of the updates' ranks anew. Raises RankUseError where there is nothing to look at."""
    from sweep.adapters.rank_use import measure_rank_use

    found = measure_rank_use(study, record, cache)
    write_analysis(record.folder, RANK_USE, found)
    return found


def time_answers(
    study: Study, record: StudyRecord, cache: Path, asked: Latency, say: Callable[[str], None]
) -> dict[str, Any]:
    """Make the analysis of latency anew. Raises LatencyError where there is nothing to measure."""
    from sweep.adapters.latency import measure_latency

    found = measure_latency(study, record, cache, asked, say)
    write_analysis(record.folder, LATENCY, found)
    return found


def analyse_domains(study: Study, home: Home, say: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """The analysis across a study's domains, all of which are finished, and whether it was made now: where there is
    none yet, or a domain has run since."""
    from sweep.adapters.domains import compare_domains

    parts, folder = domain_studies(study), home.study(study.name)
    records = {domain: read_study_record(home.study(part.name)) for domain, part in parts.items()}
    made_from = {parts[domain].name: record.finished_at for domain, record in records.items()}
    found = read_analysis(folder, DOMAINS)
    if found is not None and found["made_from"] == made_from:
        return found, False
    found = {**compare_domains(parts, records, home.cache, say), "made_from": made_from}
    write_analysis(folder, DOMAINS, found)
    return found, True
