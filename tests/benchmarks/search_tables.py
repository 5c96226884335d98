"""The tables of `search`, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .records import Provenance
from .tables import source, table

GOAL = 6.0


def search_markdown(results: Mapping[str, Any]) -> str:
    """From search.json: the three times, what each part gives, the decisions, and every trial's validation loss."""
    variants: Sequence[Mapping[str, Any]] = results["variants"]
    names = list(dict.fromkeys(variant["name"] for variant in variants))
    seconds = {name: [v["seconds"] for v in variants if v["name"] == name] for name in names}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = {name: next(v for v in variants if v["name"] == name) for name in names}
    incumbent, unpruned, pruned = names
    rows = [
        [
            name,
            f"{medians[name]:.1f}",
            ", ".join(f"{s:.1f}" for s in seconds[name]),
            _before(first[name]),
            str(_steps(first[name])),
            " / ".join(dict.fromkeys(v["setting"] for v in variants if v["name"] == name)),
        ]
        for name in names
    ]
    together = medians[incumbent] / medians[pruned]
    met = "met" if together >= GOAL else "**missed**"
    parts = [
        f"- Packing, precision and engine, without pruning: {medians[incumbent] / medians[unpruned]:.2f}×.",
        f"- Pruning alone: {medians[unpruned] / medians[pruned]:.2f}×.",
        f"- All together: {together:.2f}× of the goal of {GOAL:g}×: {met}.",
    ]
    lines = [
        f"The search phase of `{results['study']}`: wall seconds, reading data and loading models included. "
        "Decisions and losses are those of each variant's first run.",
        "",
        *table(
            [
                "variant",
                "seconds (median of the runs)",
                "every run",
                "of them before the first trial",
                "trial-steps",
                "setting",
            ],
            rows,
        ),
        "",
        *parts,
        "",
        *_decisions(first, names, results["epsilon"]),
        "",
        *_losses(first, names),
        "",
        source(Provenance(**results["provenance"])),
    ]
    return "### The whole search\n\n" + "\n".join(lines) + "\n"


def _before(variant: Mapping[str, Any]) -> str:
    return f"{variant['prepare_s']:.1f}" if variant["prepare_s"] else "–"


def _steps(variant: Mapping[str, Any]) -> int:
    return sum(trial["steps"] for trial in variant["trials"])


def _decisions(first: Mapping[str, Mapping[str, Any]], names: Sequence[str], epsilon: float) -> list[str]:
    """Who goes to the confirm phase, by variant, and what a different choice would cost by the incumbent's losses."""
    incumbent = first[names[0]]
    losses = {(t["arm"], t["learning_rate"]): t["eval_loss"] for t in incumbent["trials"]}
    rows, different = [], []
    for group, (arm, rate) in incumbent["decision"].items():
        row = [group, f"{arm} at {rate:.4g}"]
        for name in names[1:]:
            own_arm, own_rate = first[name]["decision"].get(group, ("none", 0.0))
            same = (own_arm, own_rate) == (arm, rate)
            row.append("the same" if same else f"{own_arm} at {own_rate:.4g}")
            there, here = losses.get((own_arm, own_rate)), losses[arm, rate]
            if not same and there is not None:
                size = "within" if there - here <= epsilon else "beyond"
                loss = f"{there - here:+.4f} validation loss in (b), {size} the study's margin of {epsilon:g}"
                different.append(f"- {group}, {name}: its choice has {loss}.")
            elif not same:
                different.append(f"- {group}, {name}: its choice has no validation loss in (b).")
        rows.append(row)
    verdict = "The decisions are the same." if not different else "**The decisions are not all the same:**"
    return [*table(["best arm and learning rate", *names], rows), "", verdict, *different]


def _losses(first: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Validation loss of every trial; a pruned trial's is that at the rung it reached."""
    found = {
        name: {(t["arm"], t["learning_rate"]): (t["eval_loss"], t["steps"]) for t in first[name]["trials"]}
        for name in names
    }
    rows = []
    for arm, rate in found[names[0]]:
        entries = []
        for name in names:
            loss, steps = found[name].get((arm, rate), (None, 0))
            entries.append("diverged" if loss is None else f"{loss:.4f} ({steps})")
        rows.append([f"{arm} at {rate:.4g}", *entries])
    return table(["validation loss (steps)", *names], rows)
