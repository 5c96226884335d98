"""Tables of the rank that updates use, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import yaml

from sweep.report.intervals import Interval, t_interval
from sweep.report.rank_use_numbers import (
    Found,
    Truncated,
    arms_of,
    called,
    column,
    factor_over_seeds,
    kinds_of,
    over_seeds,
    ratio,
    rows_of,
)
from sweep.report.tables import Cell, Row, Table
from sweep.report.words import MINUS, NOTHING, join, loss_decimals, number, signed, span
from sweep.study.schema import Study

DIRECTIONS = {
    "A": "A, right",
    "input": "ΔW, right (input)",
    "output": "ΔW, left (output)",
    "random input": "chance, right",
    "random output": "chance, left",
}


def rank_table(study: Study, found: Found) -> Table:
    kinds = kinds_of(found)
    heads = (
        "Arm",
        "Effective rank",
        f"Values for {100 * found['keep']:g} %",
        "‖ΔW‖",
        "‖ΔW‖ / ‖W₀‖",
        *(f"Effective rank, {kind}" for kind in kinds if len(kinds) > 1),
    )
    rows = []
    for arm in arms_of(study, found):
        here = rows_of(found, arm)
        values = [
            over_seeds(here, column("effective_rank")),
            over_seeds(here, column("kept_rank")),
            over_seeds(here, column("norm")),
            over_seeds(here, ratio("norm", "base_norm")),
        ]
        by_kind = [
            over_seeds([row for row in here if row["kind"] == kind], column("effective_rank"))
            for kind in kinds
            if len(kinds) > 1
        ]
        rows.append(Row((Cell(called(study, found, arm)), *map(interval_cell, [*values, *by_kind]))))
    return Table(heads, tuple(rows))


def similarity_table(study: Study, found: Found) -> Table:
    arms = {arm.name: arm for arm in arms_of(study, found)}
    rows = []
    for entry in found["similarity"]:
        one, other = arms[entry["one"]], arms[entry["other"]]
        same = all(a == b for a, b in entry["pairs"])
        shown = f"{called(study, found, one)} and {called(study, found, other)}"
        rows.append(
            Row(
                (
                    Cell(shown, "one seed" if same else ""),
                    Cell(DIRECTIONS[entry["of"]]),
                    Cell(str(len(entry["pairs"])), value=len(entry["pairs"])),
                    interval_cell(similarity_interval(entry["top"])),
                    interval_cell(similarity_interval(entry["whole"])),
                )
            )
        )
    return Table(("Arms", "Singular vectors of", "Pairs of seeds", "φ(1, 1)", "φ(all, all)"), tuple(rows))


def amplification_table(study: Study, found: Found) -> Table:
    heads = ("Arm", "Directions", "‖ΔW‖", "‖UᵀW₀V‖, ΔW's", "W₀'s own", "random", "Amplification")
    rows = []
    for arm in arms_of(study, found):
        here = rows_of(found, arm)
        norms = [over_seeds(here, column(name)) for name in ("norm", "in_update", "in_base", "in_random")]
        factor = factor_over_seeds(here, column("amplification"))
        directions = max(row["directions"] for row in here)
        counted = Cell(str(directions), value=directions)
        rows.append(Row((Cell(called(study, found, arm)), counted, *map(interval_cell, [*norms, factor]))))
    return Table(heads, tuple(rows))


def truncation_table(study: Study, cut: Sequence[Truncated]) -> Table:
    decimals = loss_decimals(study.confirm.epsilon)
    heads = ("Rank", "Lost of ‖ΔW‖²", "Truncated", "Trained", "Truncated − trained", "Truncated − whole")

    def shown(interval: Interval | None, plus: bool = False) -> Cell:
        if interval is None or math.isnan(interval.mean):
            return Cell("–")
        write = signed if plus else number
        ends = span(interval.low, interval.high, decimals, plus=plus)
        return Cell(write(interval.mean, decimals), ends, value=interval.mean)

    rows = [
        Row(
            (
                Cell(f"rank {row.rank}"),
                Cell(percent(row.lost), value=row.lost),
                shown(row.loss),
                shown(row.trained),
                shown(row.to_trained, plus=True),
                shown(row.to_whole, plus=True),
            )
        )
        for row in cut
    ]
    return Table(heads, tuple(rows))


def pattern_table(found: Found) -> Table:
    """Ranks by kind (rows) and block, for each rule."""
    places = {row["layer"]: (row["kind"], row["block"]) for row in found["layers"]}
    blocks = sorted({block for _, block in places.values()}, key=lambda block: (block is None, block))
    rows = []
    for suggestion in found["suggestions"]:
        ranks = {layer: suggestion["rank_pattern"].get(layer, suggestion["rank"]) for layer in places}
        for kind in kinds_of(found):
            here = [[ranks[layer] for layer, place in places.items() if place == (kind, b)] for b in blocks]
            rows.append(Row((Cell(kind, rule(suggestion)), *map(_ranks_cell, here))))
    return Table(("Layer", *("no block" if block is None else f"block {block}" for block in blocks)), tuple(rows))


def _ranks_cell(ranks: Sequence[int]) -> Cell:
    return Cell(join([str(r) for r in ranks] or [NOTHING]), value=max(ranks, default=None))


def pattern_yaml(suggestion: Found) -> str:
    """The suggestion as the study file's `arms` take it, with PEFT's names.

    A layer of its own rank keeps the arm's lora_alpha, so alpha_pattern gives it the alpha ratio of all others.
    """
    rank, ratio, ranks = suggestion["rank"], suggestion["alpha_ratio"], dict(suggestion["rank_pattern"])
    patterns = {"rank_pattern": ranks, "alpha_pattern": {name: ratio * r for name, r in ranks.items()}}
    below = "".join(f"  {line}" for line in yaml.safe_dump(patterns, sort_keys=False).splitlines(keepends=True))
    return f"arms:\n  rank: [{rank}]\n  alpha_ratio: [{ratio:g}]\n{below}"


def rule(suggestion: Found) -> str:
    if suggestion["rule"] == "keep":
        return f"keeps {100 * suggestion['share']:g} % of ‖ΔW‖² in every seed"
    return f"spends the parameters of rank {suggestion['of_rank']} where ‖ΔW‖² is"


def interval_cell(interval: Interval) -> Cell:
    if math.isnan(interval.mean):
        return Cell(NOTHING)
    ends = "" if interval.low is None or interval.high is None else f"{few(interval.low)} to {few(interval.high)}"
    return Cell(few(interval.mean), ends, value=interval.mean)


def similarity_interval(values: Sequence[float]) -> Interval:
    """Over pairs of seeds; φ can lie nowhere but between 0 and 1."""
    found = t_interval(values)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def brackets(interval: Interval) -> str:
    """An interval behind its mean; nothing where there is none."""
    if interval.low is None or interval.high is None:
        return ""
    return f" ({few(interval.low)} to {few(interval.high)})"


def few(value: float) -> str:
    """Three significant digits."""
    if math.isnan(value):
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:.0f}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS) if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def two(value: float) -> str:
    return number(value, 2)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
