"""Studies over domains, as commands see them: their parts by name, the question kept, the report across them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sweep.exits import FAILED, Refused
from sweep.study.domains import domain_studies, parts_of
from sweep.study.home import Home
from sweep.study.schema import Study

if TYPE_CHECKING:
    from sweep.tracking.journal import StudyRecord


def keep_question(study: Study, home: Home) -> None:
    """Put the study's file into its folder, where its parts can still be asked so.

    Raises Refused, with the lines that differ, where a part has run with another question.
    """
    from sweep.driver.question import QuestionChanged, refuse_other_question, write_question
    from sweep.tracking.journal import read_study_record

    for part in (study, *parts_of(study)):
        folder = home.study(part.name)
        if read_study_record(folder).prepared is not None:
            try:
                refuse_other_question(part, folder)
            except QuestionChanged as error:
                raise Refused(str(error), *error.diff) from None
    home.study(study.name).path.mkdir(parents=True, exist_ok=True)
    write_question(study, home.study(study.name))


def run(study: Study, home: Home, run_part: Callable[[Study], None], say: Callable[[str], None]) -> None:
    """Run each part like a study of its own, one after the other, then compare them.

    Raises typer.Exit where a part ended with failed trials, once all is done, or at once where it was interrupted.
    """
    keep_question(study, home)
    failed = False
    for part in parts_of(study):
        say(f"study {part.name}")
        try:
            run_part(part)
        except typer.Exit as ended:
            if ended.exit_code != FAILED:
                raise
            failed = True
    for line in publish(study, home, say):
        say(line)
    if failed:
        raise typer.Exit(FAILED)


def publish(study: Study, home: Home, say: Callable[[str], None]) -> list[str]:
    """Make the analysis across the parts, and its report where it does not lie there yet. Returns what to print."""
    from sweep.analyses import analyse_domains, one_writer
    from sweep.report.domains_report import lead_sentences, write_domains_report

    to = Path("reports") / study.name
    with one_writer(study, home.study(study.name), say):
        found, made = analyse_domains(study, home, say)
        if made or not (to / "report.html").exists():
            write_domains_report(study, found, _records(study, home), to)
    return [*lead_sentences(found), f"report:    {to / 'report.html'}"]


def report(study: Study, home: Home, to: Path) -> list[str]:
    """Write the report anew from the analysis. Returns what to print; raises Refused where it was not made yet."""
    from sweep.analyses import DOMAINS
    from sweep.report.domains_report import write_domains_report
    from sweep.tracking.analyses import read_analysis

    found = read_analysis(home.study(study.name), DOMAINS)
    if found is None:
        names = ", ".join(part.name for part in parts_of(study))
        raise Refused(
            f"{study.name} has not been compared across its domains yet: `sweep run` it to its end "
            f"(its parts have reports of their own: {names})",
            code=FAILED,
        )
    return [*write_domains_report(study, found, _records(study, home), to), f"report: {to / 'report.html'}"]


def _records(study: Study, home: Home) -> dict[str, StudyRecord]:
    from sweep.tracking.journal import read_study_record

    return {domain: read_study_record(home.study(part.name)) for domain, part in domain_studies(study).items()}


def refuse_whole(study: Study) -> None:
    """Raise Refused for a study over domains, where a command wants one of its parts."""
    if study.data.domains:
        names = ", ".join(part.name for part in parts_of(study))
        raise Refused(f"{study.name} is a study over domains: name one of {names}")


def parts_by_name(names: Iterable[str], home: Home) -> dict[str, Study]:
    """The studies as they ran, with the parts of a study over domains in its place; each once."""
    from sweep.study.asked import read_kept_study

    studies = [read_kept_study(home.study(name).study_file).study for name in names]
    return {part.name: part for study in studies for part in parts_of(study)}
