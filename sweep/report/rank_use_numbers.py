"""What the analysis `rank-use` found, brought together over layers and seeds; and its numbers as CSV.

The unit is the seed: values are means over the layers of one trial, intervals are over the trials.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sweep.report.confirmed import confirm_trials
from sweep.report.intervals import Interval, t_interval
from sweep.study.arms import Arm
from sweep.study.records import COMPLETE
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

Found = Mapping[str, Any]
Value = Callable[[Mapping[str, Any]], float | None]
LAYER_COLUMNS = [
    "arm",
    "seed",
    "layer",
    "kind",
    "block",
    "shape",
    "norm",
    "base_norm",
    "effective_rank",
    "kept_rank",
    "directions",
    "in_update",
    "in_base",
    "in_random",
    "amplification",
    "steps",
    "singular_values",
]


@dataclass(frozen=True)
class Truncated:
    """The largest rank's adapters cut to `rank`, against adapters trained at it; differences are paired by seed."""

    rank: int
    lost: float  # share of ‖ΔW‖² that the cut drops, mean over layers and seeds
    loss: Interval
    trained: Interval | None  # None without a trial of that rank
    to_trained: Interval | None  # truncated − trained
    to_whole: Interval  # truncated − the trial as it was trained


def arms_of(study: Study, found: Found) -> list[Arm]:
    """The arms whose updates were looked at, smallest rank first, full fine-tuning last."""
    seen = {row["arm"] for row in found["layers"]}
    return [arm for arm in study.list_arms() if arm.name in seen]


def chosen_of(study: Study, found: Found) -> list[Arm]:
    """The arm that stands for each rank, smallest first."""
    arms = {arm.name: arm for arm in study.list_arms()}
    return [arms[name] for _, name in sorted(found["chosen"].items(), key=lambda item: int(item[0]))]


def called(study: Study, found: Found, arm: Arm) -> str:
    """ "rank 8" for the arm that stands for its rank, else its name."""
    if arm.is_full:
        return "full fine-tuning"
    return f"rank {arm.r}" if arm.name in found["chosen"].values() else arm.name


def rows_of(found: Found, arm: Arm) -> list[Mapping[str, Any]]:
    return [row for row in found["layers"] if row["arm"] == arm.name]


def over_seeds(rows: Iterable[Mapping[str, Any]], value: Value) -> Interval:
    """The mean over the layers of each seed, and their t-interval; layers where there is no value are left out."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        number = value(row)
        if number is not None:
            by_seed[row["seed"]].append(number)
    means = [float(np.mean(values)) for values in by_seed.values()]
    return t_interval(means) if means else Interval(0, math.nan)


def factor_over_seeds(rows: Iterable[Mapping[str, Any]], value: Value) -> Interval:
    """The same for a factor: geometric means over the layers, and the interval on the log scale."""

    def log(row: Mapping[str, Any]) -> float | None:
        number = value(row)
        return math.log(number) if number else None

    logs = over_seeds(rows, log)
    ends = (None if end is None else math.exp(end) for end in (logs.low, logs.high, logs.upper))
    return Interval(logs.n, math.exp(logs.mean), *ends)


def column(name: str) -> Value:
    """A row's number of that name."""
    return lambda row: row[name]


def ratio(one: str, other: str) -> Value:
    """A row's first number over its second; None where that is nothing."""
    return lambda row: row[one] / row[other] if row[other] else None


def kinds_of(found: Found) -> list[str]:
    """The kinds of layers, in the model's order."""
    return list(dict.fromkeys(row["kind"] for row in found["layers"]))


def similarity_of(found: Found, of: str, one: Arm, other: Arm, same_seed: bool = False) -> Mapping[str, Any] | None:
    """The comparison of these two arms over other seeds, or (same_seed) over pairs of one seed."""
    for entry in found["similarity"]:
        same = all(a == b for a, b in entry["pairs"])
        if (entry["of"], entry["one"], entry["other"], same) == (of, one.name, other.name, same_seed):
            return dict(entry)
    return None


def truncated_rows(study: Study, record: StudyRecord, found: Found) -> list[Truncated]:
    """Smallest rank first."""
    chosen = {arm.r: arm for arm in chosen_of(study, found)}
    whole = trained_losses(record, chosen[max(chosen)])
    rows = []
    for rank in sorted({entry["rank"] for entry in found["truncated"]}):
        here = [entry for entry in found["truncated"] if entry["rank"] == rank]
        cut = {entry["seed"]: entry["test_loss"] for entry in here}
        trained = trained_losses(record, chosen[rank]) if rank in chosen else {}
        rows.append(
            Truncated(
                rank,
                float(np.mean([entry["lost"] for entry in here])),
                t_interval(list(cut.values())),
                t_interval(list(trained.values())) if trained else None,
                _paired(cut, trained),
                _paired(cut, whole) or Interval(0, math.nan),
            )
        )
    return rows


def trained_losses(record: StudyRecord, arm: Arm) -> dict[int, float]:
    """The test loss of each seed's confirm trial."""
    return {
        t.spec.seed: t.last.test_metrics["test_loss"]
        for t in confirm_trials(record, arm)
        if t.state == COMPLETE and t.last is not None and "test_loss" in t.last.test_metrics
    }


def write_numbers(study: Study, record: StudyRecord, found: Found, to: Path) -> None:
    """rank-use.csv: a row a layer of a trial; rank-use-losses.csv: truncated and trained, a row a rank and seed;
    rank-use-subspaces.csv: φ(i, j). Raises OSError where it cannot write.
    """
    layers = [{name: _text(row[name]) for name in LAYER_COLUMNS} for row in found["layers"]]
    _write(to / "rank-use.csv", LAYER_COLUMNS, layers)
    chosen = {arm.r: trained_losses(record, arm) for arm in chosen_of(study, found)}
    losses = [
        {**entry, "trained_test_loss": chosen.get(entry["rank"], {}).get(entry["seed"])} for entry in found["truncated"]
    ]
    _write(to / "rank-use-losses.csv", list(losses[0]) if losses else ["rank", "seed"], losses)
    grids = [
        {"of": e["of"], "one": e["one"], "other": e["other"], "pairs": _pairs(e), "i": i, "j": j, "phi": phi}
        for e in found["similarity"]
        for i, row in zip(e["i"], e["grid"], strict=True)
        for j, phi in zip(e["j"], row, strict=True)
    ]
    _write(to / "rank-use-subspaces.csv", ["of", "one", "other", "pairs", "i", "j", "phi"], grids)


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    differences = [loss - theirs[seed] for seed, loss in ours.items() if seed in theirs]
    return t_interval(differences) if differences else None


def _pairs(entry: Mapping[str, Any]) -> str:
    return " ".join(f"{one}:{other}" for one, other in entry["pairs"])


def _text(value: Any) -> Any:
    return " ".join(f"{x:g}" for x in value) if isinstance(value, list) else value


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
