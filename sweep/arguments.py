"""What commands are given: studies by file or name, and where they live."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweep.exits import Refused
from sweep.study.home import Home

if TYPE_CHECKING:
    from sweep.study.schema import Study
    from sweep.tracking.journal import StudyRecord

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or the name of a study that has run.")]
HomeOption = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="Where studies live. Default: $SWEEP_HOME, or ./.sweep.")
]

ConfirmCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Confirm that code which the study's model brings may run."),
]


def confirm_code(study: Study, confirmed: bool) -> None:
    """Raise Refused unless study file and command agree on whether code that the model brings may run."""
    if study.trust_remote_code and not confirmed:
        raise Refused(
            f"trust_remote_code: study {study.name} wants to run the code that {study.model} brings, with all your "
            "rights: read that code, then confirm it with --trust-remote-code"
        )
    if confirmed and not study.trust_remote_code:
        raise Refused(f"--trust-remote-code: study {study.name} does not say trust_remote_code: true; leave it out")


def need_writable(home: Home) -> None:
    """Raise Refused where the home cannot be written."""
    from sweep.doctor import unwritable

    reason = "it is a file" if home.root.is_file() else unwritable(home.root)
    if reason:
        raise Refused(f"{home.root} cannot be written ({reason}): choose another home with --home or $SWEEP_HOME")


def is_file_name(study: str) -> bool:
    return Path(study).suffix in (".yaml", ".yml") or os.sep in study


def list_studies(home: Home) -> list[str]:
    return sorted(path.parent.name for path in (home.root / "studies").glob("*/study.yaml"))


def name_of(study: str, home: Home) -> str:
    """The study's name; refused with the names that exist where it has not run."""
    from sweep.study.file import read_study

    name = read_study(Path(study)).study.name if is_file_name(study) else study
    names = list_studies(home)
    if name not in names and Path(study).is_file() and not is_file_name(study):
        raise Refused(f"{study} is not a study file: the name of one ends in .yaml")
    if name not in names:
        known = f"those that have: {', '.join(names)}" if names else "no study has"
        raise Refused(f"no study {name!r} has run in {home.root}; {known}")
    return name


def asked_as(study: str, home: Home) -> Study:
    """The study as it ran, whatever its file says by now."""
    from sweep.study.asked import read_kept_study

    return read_kept_study(home.study(name_of(study, home)).study_file).study


def ran(study: str, home: Home) -> tuple[Study, StudyRecord]:
    """The study as it ran, and its records. One over domains has none of its own, and is refused with its parts."""
    from sweep.over_domains import refuse_whole
    from sweep.tracking.journal import read_study_record

    asked = asked_as(study, home)
    refuse_whole(asked)
    return asked, read_study_record(home.study(asked.name))
