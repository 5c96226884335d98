"""The tables of `scale`, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .scale_records import Driven, Reported, Scale, Tracked
from .tables import source, table

GOAL_OVERHEAD_MS, GOAL_REPORT_S = 5.0, 30.0


def scale_markdown(found: Scale) -> str:
    """Medians over repetitions, every repetition beside them, and whether the goals are met."""
    tables = {"driver": _driver(found.driven), "mlflow": _mlflow(found.tracked), "report": _report(found.reported)}
    lines = []
    for part, told in tables.items():
        made_by = ["", source(found.provenance[part])] if part in found.provenance else []
        lines += [*told, *made_by, ""]
    return "\n".join(lines)


def _driver(driven: Sequence[Driven]) -> list[str]:
    if not driven:
        return ["**The driver has not been measured.**"]
    first = driven[0]
    lines = [
        f"The driver: a search of {first.trials:,} trials in packs of {first.pack} over {first.workers} worker "
        "processes that sleep. Overhead is what the search takes longer than it would if the driver took no time.",
        "",
    ]
    rows = []
    for seconds in dict.fromkeys(one.pack_s for one in driven):
        same = [one for one in driven if one.pack_s == seconds]
        overheads = [one.overhead_ms for one in same]
        fifths = zip(*(one.driver_cpu_ms for one in same), strict=True)
        rows.append(
            [
                f"{seconds:g} s",
                _each((one.search_s for one in same), ".1f"),
                f"{same[0].ideal_s:.0f}",
                f"{_each(overheads, '.1f')}{_goal(statistics.median(overheads), GOAL_OVERHEAD_MS)}",
                ", ".join(f"{statistics.median(fifth):.1f}" for fifth in fifths),
            ]
        )
    head = ["a pack trains", "search, s", "with a driver of no time, s", "overhead a trial, ms (goal: below 5)"]
    return [*lines, *table([*head, "the driver's own CPU time a trial, ms, by fifths of the search"], rows)]


def _mlflow(tracked: Sequence[Tracked]) -> list[str]:
    without = [one.training_s for one in tracked if not one.tracked]
    beside = [one for one in tracked if one.tracked]
    if not beside or not without:
        return ["**MLflow has not been measured.**"]
    ratios = [a.training_s / b for a, b in zip(beside, without, strict=True)]
    return [
        f"MLflow: {beside[0].points:,} training losses on their way to its SQLite database, from the process that "
        "works on every core. The ratio is that of one repetition, with over without; which comes first alternates.",
        "",
        *table(
            ["", "seconds"],
            [
                ["the study without MLflow", _each(without, ".1f")],
                ["the study with MLflow beside it", _each((one.training_s for one in beside), ".1f")],
                ["ratio", _each(ratios, ".3f")],
                ["then, until MLflow has everything", _each((one.after_s for one in beside), ".1f")],
            ],
        ),
    ]


def _report(reported: Sequence[Reported]) -> list[str]:
    if not reported:
        return ["**The report has not been measured.**"]
    whole = [one.read_s + one.write_s for one in reported]
    return [
        f"The report on {reported[0].trials:,} trials, a page of {reported[0].page_bytes / 2**20:.1f} MiB:",
        "",
        *table(
            ["", "seconds"],
            [
                ["reading the journals", _each((one.read_s for one in reported), ".1f")],
                ["statistics, figures, page", _each((one.write_s for one in reported), ".1f")],
                ["together (goal: below 30)", _each(whole, ".1f") + _goal(statistics.median(whole), GOAL_REPORT_S)],
            ],
        ),
    ]


def _each(values: Iterable[float], form: str) -> str:
    """The median, and every value."""
    found = list(values)
    return f"{statistics.median(found):{form}} ({', '.join(f'{value:{form}}' for value in found)})"


def _goal(value: float, goal: float) -> str:
    return ": met" if value < goal else ": **missed**"
