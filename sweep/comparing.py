"""The command that compares studies. Heavy libraries are imported inside it, as in `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sweep.arguments import HomeOption, asked_as, ran
from sweep.exits import Refused
from sweep.study.home import Home, find_home

LONGEST_NAME = 200  # of a folder; file systems take 255 bytes

commands = typer.Typer()


@commands.command()
def compare(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY STUDY…", help="Study files, or names of studies that have run. One over domains: its parts."
        ),
    ],
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: reports/compare-<study>-<study>….")] = None,
    home: HomeOption = None,
) -> None:
    """Write one report on several studies: what each recommends, what differs, and whether they agree."""
    from sweep.report.compare import write_comparison

    place = find_home(home)
    names = _names(studies, place)
    folder = to or Path("reports", f"compare-{'-'.join(names)}")
    if to is None and len(folder.name) > LONGEST_NAME:
        raise Refused(f"--to: name a folder; {len(names)} studies make too long a name for one")
    lead = write_comparison([ran(name, place) for name in names], folder)
    print(*lead, f"report: {folder / 'report.html'}", sep="\n")


def _names(given: list[str], home: Home) -> list[str]:
    """The studies' names, with the parts of those over domains in place of the whole. Raises Refused where they are
    fewer than two, or one twice."""
    from sweep.study.domains import parts_of

    names = [part.name for study in given for part in parts_of(asked_as(study, home))]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise Refused(f"{again} is named twice: a study is not compared with itself")
    if len(names) < 2:
        raise Refused(f"{names[0]} alone: name two studies or more, or see `sweep report {names[0]}`")
    return names
