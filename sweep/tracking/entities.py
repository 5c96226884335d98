"""A study's records in MLflow's words: params, metrics, names, the data set. Pure functions of the journal."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.study.records import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED, Cost, Prepared, TrialSpec
from sweep.study.schema import Study
from sweep.tracking.connection import without_credentials
from sweep.tracking.journal import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

COSTS = ("trainable_params", "total_params", "peak_memory_bytes", "step_time_s", "tokens_per_second", "adapter_bytes")
PARAGRAPH = "\n\n"
# Without it MLflow's UI opens on its pages for chat traces, which are empty here.
WORKFLOW = "?workflowType=machine_learning"
# MLflow has no word for what does not fit: like what is pruned it was ended and did not fail; the tag has the state.
STATUS = {COMPLETE: "FINISHED", PRUNED: "KILLED", DIVERGED: "FAILED", INFEASIBLE: "KILLED", FAILED: "FAILED"}


def run_name(spec: TrialSpec) -> str:
    """`r8-ratio2 lr 3e-3 seed 1 confirm`."""
    mantissa, exponent = f"{spec.learning_rate:.3e}".split("e")
    return f"{spec.arm.name} lr {float(mantissa):g}e{int(exponent)} seed {spec.seed} {spec.phase}"


def headline(study: Study) -> str:
    return f"**{study.question or study.name}**"


def outcome_note(study: Study, recommendation: str, experiment_id: str, run_id: str, figures: Sequence[str]) -> str:
    """The parent run's description: the question, what to use, the figure that shows it, where the report is.

    figures: names of the report's, without `.png`.
    """
    folder = f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/report"
    parts = [headline(study), recommendation]
    # Relative: the server that shows the note serves the artifact, under whatever prefix it runs.
    parts += [f"![{name}](get-artifact?path=report%2Ffigures%2F{name}.png&run_uuid={run_id})" for name in figures]
    parts.append(
        f"[The whole report]({folder}/report.html{WORKFLOW}) and its figures are among the artifacts, in `report/`."
    )
    return PARAGRAPH.join(parts)


def experiment_note(study: Study, recommendation: str, experiment_id: str, run_id: str) -> str:
    """What stands over the runs: the question, what to use, and the way to the parent run, which has the rest."""
    parent = f"[Answer and report](#/experiments/{experiment_id}/runs/{run_id}{WORKFLOW})"
    return f"{headline(study)} {parent}\n\n{recommendation.split(PARAGRAPH)[0]}"


def trial_params(spec: TrialSpec) -> list[Param]:
    """The params that DESIGN.md promises, numbers in full."""
    from mlflow.entities import Param

    arm = spec.arm
    patterns = {"rank_pattern": arm.rank_pattern, "alpha_pattern": arm.alpha_pattern}
    words = {"arm": arm.name, "phase": spec.phase, "seed": str(spec.seed), "method": arm.method}
    words |= {name: json.dumps(dict(pattern)) for name, pattern in patterns.items() if pattern}
    numbers = {"r": arm.r, "lora_alpha": arm.lora_alpha, "alpha_ratio": arm.alpha_ratio, "scaling": arm.scaling}
    words["target_modules"] = ",".join(arm.target_modules) or ("all weights" if arm.is_full else "none")
    if arm.prefix_length:
        words["prefix_length"] = str(arm.prefix_length)
    params = {**words, **{key: _number(value) for key, value in numbers.items()}}
    return [Param(key, value) for key, value in {**params, "learning_rate": _number(spec.learning_rate)}.items()]


def trial_metrics(trial: TrialRecord) -> list[Metric]:
    """All points of a trial in the order of its journal, which only ever grows at the end."""
    from mlflow.entities import Metric

    points = []
    for rung in trial.rungs:
        found = rung.measurement
        for i, loss in enumerate(found.train_loss, start=1):
            # Spread over the rung's wall time, so that a chart over time reads; a pure function of the journal.
            at = rung.time - found.pack_seconds * (1 - i / len(found.train_loss))
            points.append(Metric("train_loss", loss, ms(at), found.start + i))
        ours = {} if found.eval_loss is None else {"eval_loss": found.eval_loss}
        if found.forgetting_loss is not None:
            ours["forgetting_loss"] = found.forgetting_loss
        for key, value in {**ours, **found.eval_metrics, **found.test_metrics}.items():
            points.append(Metric(key, value, ms(rung.time), found.stop))
    return points


def cost_metrics(cost: Cost, trial: TrialRecord) -> list[Metric]:
    """What the trial's arm costs on its own; at the trial's start, so that the same point is sent each time."""
    from mlflow.entities import Metric

    return [Metric(key, float(getattr(cost, key)), ms(trial.asked_at), 0) for key in COSTS]


def study_params(study: Study) -> list[Param]:
    """What the parent run says at a glance; all of it stands in the artifact study.yaml."""
    from mlflow.entities import Param

    params = {
        "model": study.model,
        "task": study.task,
        "data": study.data.source,
        "arms": len(study.list_arms()),
        "steps": study.train.steps,
        "batch_size": study.train.batch_size,
        "max_length": study.data.max_length,
        "rungs": ", ".join(map(str, study.rungs)),
        "search_seed": study.search.seed,
        "confirm_seeds": ", ".join(map(str, study.confirm.seeds)),
        "reference": study.confirm.reference,
        "epsilon": study.confirm.epsilon,
    }
    given = {key: value for key, value in params.items() if value is not None}  # images have no max_length
    return [Param(key, without_credentials(str(value))) for key, value in given.items()]


def count_trials(record: StudyRecord) -> str:
    """`12 complete, 3 pruned, 2 running`. The arms' results are the report's to tell, with their intervals."""
    states = [trial.state or "running" for trial in record.trials]
    return ", ".join(f"{states.count(state)} {state}" for state in (*STATUS, "running") if state in states)


def data_input(study: Study, prepared: Prepared) -> DatasetInput:
    """The data set, recognisable by its content."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = without_credentials(study.data.source)
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists()
    kind, where = ("hugging_face", {"path": source}) if on_hub else ("local", {"uri": source})
    rows = {f"{split}_rows": count for split, count in prepared.rows.items()}
    profile = {"num_rows": sum(prepared.rows.values()), **rows, "duplicates_removed": prepared.duplicates_removed}
    name = source.removeprefix("package:")
    digest = prepared.data_fingerprint[:36]  # MLflow's limit
    dataset = Dataset(name, digest, kind, json.dumps(where), profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "train, validation, test")])


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def ms(seconds: float) -> int:
    """MLflow's times."""
    return round(seconds * 1000)
