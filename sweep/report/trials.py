"""trials.csv: every trial of a study as a row, in full precision."""

from __future__ import annotations

import csv
from pathlib import Path

from sweep.report.words import without_paths
from sweep.study.arms import pattern_text
from sweep.tracking.journal import StudyRecord, TrialRecord

TRIAL_COLUMNS = [
    "number",
    "phase",
    "state",
    "arm",
    "method",
    "rank",
    "alpha_ratio",
    "lora_alpha",
    "scaling",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "prefix_length",
    "learning_rate",
    "seed",
    "steps",
    "train_loss",
    "eval_loss",
    "eval_accuracy",
    "eval_perplexity",
    "forgetting_loss",
    "test_loss",
    "test_accuracy",
    "test_perplexity",
    "tokens",
    "diverged_at",
    "reason",
]


def write_trials(record: StudyRecord, to: Path) -> None:
    """One row a trial: complete, pruned, diverged, failed and unfinished ones. Raises OSError where it cannot write."""
    with open(to, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TRIAL_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_trial(t) for t in record.trials)


def _trial(trial: TrialRecord) -> dict[str, object]:
    spec, last = trial.spec, trial.last
    lora, trained = spec.arm.r > 0, trial.train_curve
    row: dict[str, object] = {
        "number": spec.number,
        "phase": spec.phase,
        "state": trial.state or "unfinished",
        "arm": spec.arm.name,
        "method": spec.arm.method,
        "rank": spec.arm.r if lora else "",
        "alpha_ratio": spec.arm.alpha_ratio if lora else "",
        "lora_alpha": spec.arm.lora_alpha if lora else "",
        "scaling": spec.arm.scaling if lora else "",
        "target_modules": "+".join(spec.arm.target_modules),
        "rank_pattern": pattern_text(spec.arm.rank_pattern),
        "alpha_pattern": pattern_text(spec.arm.alpha_pattern),
        "prefix_length": spec.arm.prefix_length or "",
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "steps": trial.step,
        "train_loss": trained[-1][1] if trained else "",
        "tokens": sum(rung.measurement.tokens for rung in trial.rungs),
        "reason": without_paths(trial.reason),
    }
    if last is not None:
        found = {
            "eval_loss": last.eval_loss,
            "forgetting_loss": last.forgetting_loss,
            "diverged_at": last.diverged_at,
            **last.eval_metrics,
            **last.test_metrics,
        }
        row |= {k: v for k, v in found.items() if k in TRIAL_COLUMNS and v is not None}
    return row
