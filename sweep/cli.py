"""The commands. Heavy libraries are imported inside them, so that `sweep --help` and wrong usage answer at once.

Exit codes: 0 done; 1 the study ended with failed trials, or the command failed; 2 wrong usage or a wrong study file, a
home that cannot be written among it; 130 interrupted, with the state saved.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sweep import __version__
from sweep.adapter_commands import commands as adapter_commands
from sweep.arguments import (
    ConfirmCode,
    HomeOption,
    StudyName,
    asked_as,
    confirm_code,
    is_file_name,
    list_studies,
    name_of,
    need_writable,
    ran,
)
from sweep.comparing import commands as comparing_commands
from sweep.dashboard import commands as dashboard_commands
from sweep.execution.choose import ExecutorName, open_executor
from sweep.exits import FAILED, INTERRUPTED, Refused, explain
from sweep.study.credentials import without_credentials
from sweep.study.errors import FieldError
from sweep.study.home import Home, StudyFolder, find_home

if TYPE_CHECKING:
    from sweep.study.file import StudyFile
    from sweep.study.records import StudyForecast
    from sweep.study.schema import Study

SECONDS_TO_TRACK_AFTER_INTERRUPT = 5.0

app = typer.Typer(
    help="Which LoRA rank and alpha for this model and this data, and what you give up against full fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(adapter_commands)
app.add_typer(comparing_commands)
app.add_typer(dashboard_commands)


def main() -> None:
    """The `sweep` command: errors become lines on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars would tear the live table
    # What a killed process had is tidied up by multiprocessing's tracker, which need not tell the user.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        lines, code = explain(error)
        if os.environ.get("SWEEP_DEBUG"):
            lines = traceback.format_exc().splitlines()
        _complain("\n".join(lines))
        sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(f"sweep {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    study: Annotated[
        str, typer.Argument(metavar="STUDY.yaml", help="A study file, or the name of a study that has run, to go on.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in train.steps=90. Can be repeated."),
    ] = None,
    home: HomeOption = None,
    executor: Annotated[ExecutorName, typer.Option(help="Where trials run.")] = ExecutorName.inline,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print arms, trials, parameters, predicted memory and time; train no trial."),
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="X", help="With --dry-run: what an hour costs, to price the study.")
    ] = None,
    trust_remote_code: ConfirmCode = False,
) -> None:
    """Run a study, or take it up where it stopped. Once it is complete this changes nothing."""
    from sweep import over_domains

    if price_per_hour is not None and not (dry_run and 0 < price_per_hour < float("inf")):
        raise Refused("--price-per-hour: give a price above 0" if dry_run else "--price-per-hour: only with --dry-run")
    place = find_home(home)
    source = _read(study, place, overrides or [])
    confirm_code(source.study, trust_remote_code)
    need_writable(place)
    try:
        if dry_run:
            _dry_run(source.study, place, price_per_hour)
        elif source.study.data.domains:
            over_domains.run(source.study, place, lambda part: _run(part, place, executor), _say)
        else:
            _run(source.study, place, executor)
    except FieldError as error:  # found out with model and data at hand; the file knows the lines
        raise source.error(*error.problems) from None


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Default: all studies of the home.")] = None,
    home: HomeOption = None,
) -> None:
    """Show how far studies are, also while they run."""
    from sweep import console
    from sweep.driver.progress import planned_trials
    from sweep.over_domains import parts_by_name
    from sweep.tracking.journal import read_study_record

    place, out = find_home(home), console.console()
    studies = parts_by_name([name_of(study, place)] if study else list_studies(place), place)
    if not studies:
        out.print(f"no studies in {place.root}")
        return
    records = {name: read_study_record(place.study(name)) for name in studies}
    planned = {name: planned_trials(studies[name], record) for name, record in records.items()}
    running = {name for name in studies if _is_running(place.study(name))}
    out.print(console.studies_table(records, planned, running))


@app.command()
def report(
    study: StudyName,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: reports/<study>.")] = None,
    home: HomeOption = None,
) -> None:
    """Write report.html, report.md, trials.csv and figures. An unfinished study gets a report of what is known."""
    from sweep import over_domains
    from sweep.report.report import write_report

    place = find_home(home)
    asked = asked_as(study, place)
    folder = to or _report_folder(asked)
    if asked.data.domains:
        _say(*over_domains.report(asked, place, folder))
        return
    asked, record = ran(study, place)
    findings = write_report(asked, record, folder)
    _say(*findings.sentences, f"report: {folder / 'report.html'}")


@app.command("rank-use")
def rank_use(study: StudyName, home: HomeOption = None, trust_remote_code: ConfirmCode = False) -> None:
    """Look at how much of their rank the confirmed arms used. `sweep report` then shows it with figures."""
    from sweep.adapters.rank_use import RankUseError
    from sweep.analyses import look_at_rank_use
    from sweep.report.rank_use import rank_use_sentences

    place = find_home(home)
    asked, record = ran(study, place)
    confirm_code(asked, trust_remote_code)
    if record.finished_at is None:
        raise Refused(f"study {asked.name} is not complete: `sweep run` it to its end first", code=FAILED)
    try:
        found = look_at_rank_use(asked, record, place.cache)
    except RankUseError as error:
        raise Refused(str(error), code=FAILED) from None
    _say(*rank_use_sentences(asked, record, found), f"`sweep report {asked.name}` writes it with figures and tables")


@app.command()
def doctor(home: HomeOption = None) -> None:
    """Check versions, devices, room, hub and tracking server, each with what to do."""
    from sweep import console
    from sweep.doctor import examine

    checks = examine(find_home(home))
    console.console().print(console.checks_table(checks))
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(FAILED)


def _run(study: Study, home: Home, executor: ExecutorName) -> None:
    from sweep import console, publishing
    from sweep.driver.driver import Busy, QuestionChanged, StorageError, run_study
    from sweep.driver.progress import is_complete
    from sweep.execution.executor import Executor, InlineExecutor
    from sweep.study.errors import NoWorkers, WorkerLost
    from sweep.tracking.journal import read_study_record
    from sweep.tracking.mlflow import Projector, find_tracking

    folder = home.study(study.name)
    was_complete = is_complete(study, read_study_record(folder))
    workers: Executor = InlineExecutor()  # a complete study needs no other
    storage = os.environ.get("SWEEP_STORAGE") or study.storage or home.optuna_url
    checkpoints = os.environ.get("SWEEP_CHECKPOINTS") or study.checkpoints or ""
    projector = Projector(study, folder, find_tracking(home))
    try:
        projector.start()
        if not was_complete:
            workers, there = open_executor(executor, study)
            _say(there)
        with console.watching(console.console()) as listen:
            silent = (lambda progress: None) if was_complete else listen
            run_study(study, folder, workers, storage, home.cache, listen=silent, checkpoints=checkpoints)
        projector.hasten()  # beside what follows
        workers.shutdown()  # analyses and publishing may need their memory
        if was_complete:
            _say(f"study {study.name} is complete: nothing to train")
        places = publishing.publish(study, folder, projector, home.cache, _say)
    except QuestionChanged as error:
        raise Refused(str(error), *error.diff) from None
    except (Busy, StorageError, NoWorkers, WorkerLost) as error:
        raise Refused(str(error), code=FAILED) from None
    except KeyboardInterrupt:
        _complain("stopping")
        workers.shutdown()  # at once: nobody waits for what they do
        projector.stop(SECONDS_TO_TRACK_AFTER_INTERRUPT)
        _complain("interrupted; the state is saved, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        workers.shutdown()
    _say(*publishing.lines(places, study.name, home))
    failed = sum(trial.state == "failed" for trial in read_study_record(folder).trials)
    if failed:
        _complain(f"{failed} {'trial' if failed == 1 else 'trials'} failed; the reasons are in the report's trials.csv")
    if failed or not places.whole:
        raise typer.Exit(FAILED)


def _dry_run(study: Study, home: Home, an_hour: float | None) -> None:
    from sweep import console
    from sweep.study.domains import parts_of

    forecasts = []
    for part in parts_of(study):
        if part != study:
            _say(f"study {part.name}")
        forecasts.append(_forecast(part, home, an_hour))
    if study.data.domains:
        _say(*console.plan_of_all(forecasts, an_hour))


def _forecast(study: Study, home: Home, an_hour: float | None) -> StudyForecast:
    """Show what one study, or part of one, will take; returns it."""
    from sweep import console
    from sweep.driver.packing import disturbance
    from sweep.driver.pricing import priced
    from sweep.execution.worker import forecast, prepare

    _say("reading the model and the data; calibrating packs with a few steps (a minute or more, the first time)")
    arms, setup = study.list_arms(), study.setup(str(home.cache))
    prepared = prepare(setup, arms)
    for line in disturbance(prepared):
        _complain(f"warning: {line}")
    full = " and full fine-tuning" if study.arms.full_finetuning else ""
    _say(f"probing the smallest and the largest arm{full}, each alone for a few steps")
    found = priced(study, prepared, forecast(setup, prepared, arms))
    lines, table, below = console.plan(study, prepared, found, an_hour)
    _say(*lines)
    console.console().print(table)
    _say(*below)
    return found


def _read(study: str, home: Home, overrides: Sequence[str] = ()) -> StudyFile:
    from sweep.study.asked import read_kept_study
    from sweep.study.file import read_study

    path = Path(study)
    if is_file_name(study):
        return read_study(path, overrides)
    return read_kept_study(home.study(name_of(study, home)).study_file, overrides)


def _report_folder(study: Study) -> Path:
    return Path("reports") / study.name


def _is_running(folder: StudyFolder) -> bool:
    """Whether a driver holds the study's lock. The lock is tried only where the process it names is alive, so that a
    driver which starts at this moment does not find it taken by us."""
    import fcntl

    try:
        with open(folder.lock, encoding="ascii") as lock:
            os.kill(int(lock.read()), 0)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (OSError, ValueError):  # no lock, no number in it, no such process
        return False
    return False


def _say(*lines: str) -> None:
    print(without_credentials("\n".join(lines)), flush=True)


def _complain(text: str) -> None:
    print(without_credentials(text), file=sys.stderr, flush=True)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
