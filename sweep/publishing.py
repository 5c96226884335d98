"""What follows a complete study, once: analyses, report, recommended adapter, all in MLflow; export on demand."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from sweep.adapters.export import Exported, ExportError, check_in_fresh_process, export
from sweep.adapters.folders import check_target
from sweep.adapters.peft_format import is_damaged
from sweep.analyses import analyse, one_writer
from sweep.console import validation_loss
from sweep.exits import FAILED, Refused
from sweep.report.confirmed import confirm_trials
from sweep.report.report import write_report
from sweep.report.results import ArmResult, Findings
from sweep.report.statistics import find
from sweep.report.summary import summary
from sweep.report.words import rate
from sweep.study.errors import FieldError, first_line
from sweep.study.files import read_json, write_json
from sweep.study.home import Home, StudyFolder, find_home
from sweep.study.records import COMPLETE, CONFIRM, TrialSpec
from sweep.study.schema import Study
from sweep.tracking.connection import without_credentials
from sweep.tracking.journal import StudyRecord, TrialRecord, read_study_record
from sweep.tracking.mlflow import Projector, find_tracking, register, set_alias
from sweep.tracking.models import alias_of
from sweep.tracking.registered import remember_registered

SECONDS_TO_TRACK = 120.0  # that MLflow may take nothing at the end before it is given up


@dataclass(frozen=True)
class Places:
    """Where a study's results lie."""

    sentences: tuple[str, ...]
    report: str
    adapter: str | None
    no_adapter: str = ""  # why there is none
    warnings: tuple[str, ...] = ()
    whole: bool = True  # nothing went wrong: another run of the command has nothing left to do
    summary: str = ""  # Markdown, for MLflow
    finished_at: float | None = None  # the study of which they tell


def publish(study: Study, folder: StudyFolder, projector: Projector, cache: Path, say: Callable[[str], None]) -> Places:
    """Make the analyses, write report and adapter, each where it does not lie there yet; bring MLflow up to date."""
    with one_writer(study, folder, say):
        analyse(study, folder, cache, say)
        record = read_study_record(folder)
        places = _published(folder, record.finished_at)
        if places is None:
            places = _write(study, record, cache, say)
            if places.whole:
                _remember(places, folder)
    # Each time: MLflow's database may be lost or another one by now, and where nothing is new this is cheap.
    say("bringing MLflow up to date")
    adapter = Path(places.adapter) if places.adapter else None
    warning = projector.finish(SECONDS_TO_TRACK, Path(places.report), adapter, places.summary)
    told = [warning] if warning else projector.lost_models()
    return replace(places, warnings=(*places.warnings, *told))


def _write(study: Study, record: StudyRecord, cache: Path, say: Callable[[str], None]) -> Places:
    to = Path("reports") / study.name
    say("writing the report")
    findings = write_report(study, record, to)
    places = Places(
        tuple(findings.sentences),
        str(to.absolute()),
        None,
        summary=summary(study, findings),
        finished_at=record.finished_at,
    )
    return _with_adapter(places, study, record, findings, cache, say)


def _published(folder: StudyFolder, finished_at: float | None) -> Places | None:
    """What an earlier run wrote of the study as it was finished then, while it still lies there undamaged."""
    values = read_json(_memory(folder))
    if values is None:
        return None
    places = Places(**{**values, "sentences": tuple(values["sentences"]), "warnings": tuple(values["warnings"])})
    there = [Path(places.report, "report.html"), *([Path(places.adapter)] if places.adapter else [])]
    if places.finished_at != finished_at or not all(path.exists() for path in there):
        return None
    return None if places.adapter and is_damaged(Path(places.adapter)) else places


def lines(places: Places, name: str, home: Home) -> list[str]:
    """What `sweep run` says at its end."""
    option = "" if home == find_home(None) else f" --home {_short(str(home.root))}"
    return [
        *(f"warning: {warning}" for warning in places.warnings),
        *places.sentences,
        f"report:    {_short(places.report)}/report.html",
        f"dashboard: {_command()} dashboard {name}{option}",
        f"adapter:   {_short(places.adapter) if places.adapter else places.no_adapter}",
    ]


def export_chosen(
    study: Study,
    record: StudyRecord,
    arm: str | None,
    number: int | None,
    to: Path,
    merge: bool,
    cache: Path,
    say: Callable[[str], None],
) -> tuple[TrialRecord, Exported]:
    """Export the trial named by number or arm, or the recommended one; returns it, and what was written.

    say: told what is done, before that takes its time.
    """
    findings = find(study, record)
    chosen = _choose_trial(record, findings, arm, number)
    try:
        exported = export(study, record, chosen, to, merge, evidence_for(findings, chosen), cache, say)
    except ExportError as error:
        raise Refused(str(error), code=FAILED) from None
    return chosen, exported


def register_exported(
    study: Study, record: StudyRecord, trial: TrialRecord, exported: Exported, name: str, home: Home
) -> str:
    """Put an exported adapter into MLflow's registry and load it back; returns the line that says where it is.

    The alias is set once a fresh process, with MLflow alone, has got the engine's own logits from that version.
    """
    findings, tracking, spec = find(study, record), find_tracking(home), trial.spec
    held = _result_of(findings, spec)
    alias = "recommended" if held is not None and held.arm.name == findings.recommended else alias_of(spec.arm.name)
    base = "The base model is not in MLflow; it is found by its name, " + without_credentials(study.model)
    if study.pretrain is not None:
        base = "The base model, which the study itself made, is with it"
    description = f"{evidence_for(findings, trial)}\n\n{base}."
    run = None if spec.number == findings.recommended_trial else spec.number
    try:
        version = register(study, record.folder, tracking, exported.path, run, name, description)
        question = {**exported.check.question, "registered": f"models:/{name}/{version}"}
        check_in_fresh_process(
            replace(exported.check, question=question), f"version {version}", {"MLFLOW_TRACKING_URI": tracking.uri}
        )
        set_alias(tracking, name, alias, version)
    except ExportError as error:
        raise Refused(f"{error}; it has no alias", code=FAILED) from None
    except Exception as error:  # MLflow's own, and those of whatever carries it
        reason = without_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]
        raise Refused(f"MLflow at {without_credentials(tracking.uri)}: not registered: {reason}", code=FAILED) from None
    remember_registered(record.folder, tracking, exported.path, spec.number, name)
    load = f'mlflow.pyfunc.load_model("models:/{name}@{alias}")'
    return f"registered: {name}, version {version}: {load} with MLFLOW_TRACKING_URI={without_credentials(tracking.uri)}"


def evidence_for(findings: Findings, trial: TrialRecord) -> str:
    """What the study knows of the trial's arm at its learning rate, for its model card."""
    spec, result = trial.spec, _result_of(findings, trial.spec)
    if result is not None and result.arm.name == findings.recommended:
        return " ".join(findings.sentences)
    chosen = findings.result(spec.arm.name)
    if spec.phase == CONFIRM and chosen is not None and result is None:
        known = (
            f"Search chose learning rate {rate(chosen.learning_rate)} for this arm; this trial has "
            f"{rate(spec.learning_rate)}, and the arm's confirmed test loss says nothing of it."
        )
    elif result is None or result.loss_low is None:
        known = "This trial is not confirmed on fresh seeds: a search score chose it, and search scores are no results."
    else:
        known = (
            f"This arm's confirmed test loss is {result.loss_mean:.4f} (95 % interval {result.loss_low:.4f} to "
            f"{result.loss_high:.4f}, {len(result.seeds)} seeds)."
        )
    return f"{known} What the study recommends: {findings.sentences[0]}"


def _result_of(findings: Findings, spec: TrialSpec) -> ArmResult | None:
    """The result that the trial is part of; None in search, and at a rate that search did not choose."""
    result = findings.result(spec.arm.name)
    held = result is not None and spec.phase == CONFIRM and spec.learning_rate == result.learning_rate
    return result if held else None


def _choose_trial(record: StudyRecord, findings: Findings, arm: str | None, number: int | None) -> TrialRecord:
    """The trial named, or the arm's with the lowest validation loss, of those that its result rests on if any did."""
    if number is None and arm is None:
        number = findings.recommended_trial
        if number is None:
            raise Refused(f"no arm is recommended: {findings.sentences[0]} Name one with --arm or --trial.")
    if number is not None:
        chosen = next((trial for trial in record.trials if trial.spec.number == number), None)
        if chosen is None:
            raise Refused(f"no trial {number}; the study has trials 0 to {len(record.trials) - 1}")
        return chosen
    names = list(dict.fromkeys(trial.spec.arm.name for trial in record.trials))
    if arm not in names:
        raise Refused(f"no arm {arm!r}; the study has {', '.join(names)}")
    ended = [trial for trial in record.trials if trial.spec.arm.name == arm and trial.state == COMPLETE]
    if not ended:
        raise Refused(f"no trial of arm {arm!r} has completed", code=FAILED)
    confirmed = [trial for trial in confirm_trials(record, ended[0].spec.arm) if trial.state == COMPLETE]
    return min(confirmed or ended, key=validation_loss)


def _with_adapter(
    places: Places, study: Study, record: StudyRecord, findings: Findings, cache: Path, say: Callable[[str], None]
) -> Places:
    trial = next((t for t in record.trials if t.spec.number == findings.recommended_trial), None)
    if trial is None:
        return replace(places, no_adapter="none, because no arm is recommended")
    if trial.spec.arm.is_full:
        return replace(places, no_adapter="none, because full fine-tuning is recommended")
    to = record.folder.path / "adapter"
    try:
        _set_aside(to, study)
        export(study, record, trial, to, False, " ".join(findings.sentences), cache, say)
    except Exception as error:  # the report stands all the same; the next run tries again
        return replace(places, no_adapter=f"not written: {first_line(error)}", whole=False)
    return replace(places, adapter=str(to))


def _set_aside(adapter: Path, study: Study) -> None:
    """Make room where a damaged adapter no longer tells which files are ours: what lies there may be the user's."""
    if is_damaged(adapter):
        try:
            check_target(adapter, study.name)
        except FieldError:
            adapter.rename(adapter.with_name(f"adapter-damaged-{uuid4().hex[:8]}"))


def _memory(folder: StudyFolder) -> Path:
    return folder.path / "published.json"


def _remember(places: Places, folder: StudyFolder) -> None:
    write_json(_memory(folder), asdict(places))


def _command() -> str:
    """`sweep` as this shell finds it: by its path where it is not on the user's."""
    return "sweep" if shutil.which("sweep") else _short(str(Path(sys.argv[0]).absolute()))


def _short(path: str) -> str:
    """Relative to the working folder where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
