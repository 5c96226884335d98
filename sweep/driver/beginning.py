"""How a run of the command begins: what it runs on is written down, Optuna's storage opened, the trials matched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sweep.driver.opening import open_ledger, open_storage
from sweep.driver.patience import Patience
from sweep.driver.place import settle_place
from sweep.driver.progress import Progress, snapshot, start_tally
from sweep.driver.provenance import changed_versions, describe_session
from sweep.driver.question import write_question
from sweep.driver.session import Session, warn
from sweep.driver.takeup import match_trials
from sweep.execution.executor import Executor
from sweep.execution.worker import Work
from sweep.study.home import StudyFolder
from sweep.study.records import Setup
from sweep.study.schema import Study
from sweep.tracking.clock import begin_session
from sweep.tracking.journal import StudyRecord, append, complete_second


def begin(
    study: Study,
    folder: StudyFolder,
    executor: Executor,
    work: Work,
    setup: Setup,
    known: StudyRecord,
    checkpoints: str,
    patience: Patience,
    listen: Callable[[Progress], None],
) -> Session:
    """checkpoints: where the user wants them, see `settle_place`.

    Raises QuestionChanged, StorageError, OSError, and FieldError or PlaceError about `checkpoints`.
    """
    tally = start_tally(study, known.trials, known.finalists)
    patience = replace(patience, say=lambda message: listen(snapshot(tally, message)))
    begin_session(max((last for _, last in known.sessions), default=0.0))
    told = describe_session()
    began = append(folder.journal, "started", **told)
    complete_second(folder)
    known = settle_place(checkpoints, study, known)
    ledger = open_ledger(study, open_storage(patience), known.started_at or began, patience)
    write_question(study, folder)
    records = match_trials(ledger, study, known.trials)
    session = Session(
        study=study,
        folder=folder,
        executor=executor,
        work=work,
        setup=setup,
        ledger=ledger,
        listen=listen,
        tally=tally,
        records=records,
        warnings=set(known.warnings),
        place=known.place,
    )
    changed = changed_versions(known.provenance[0]["versions"], told["versions"]) if known.provenance else None
    if changed:
        warn(session, changed)
        session.say(f"warning: {changed}")
    return session
