"""The tables of `gpu`, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .records import Provenance
from .summary import Spread, ratio, spread
from .tables import factor, source, table

OURS, BARE, COMPILED = "(a) ours", "(c) PEFT in a bare loop", "(c) compiled"
GOAL_PACK = 32
GOALS = {("SmolLM2-135M", BARE): 10.0, ("SmolLM2-135M", COMPILED): 3.0, ("1.3B", BARE): 5.0}
GOAL_MEMORY = 1.10  # of base + K × (adapter + its optimizer + activations)

Runs = Sequence[Mapping[str, Any]]


def gpu_markdown(results: Mapping[str, Any]) -> str:
    """From gpu.json: throughput, goals, memory, and what did not run."""
    runs: Runs = results["runs"]
    shapes = list(dict.fromkeys(run["shape"] for run in runs))
    lines = []
    if results["tiny"]:
        lines += ["**These are not a GPU's figures: tiny shapes, to show that the command works.**", ""]
    lines += ["Tokens a second of all trials together; ratios within a repetition: above 1 ours is faster.", ""]
    lines += table(
        ["shape, pack", *(f"{name}, tokens/s" for name in (OURS, BARE, COMPILED)), "(a) / (c)", "(a) / (c) compiled"],
        [_throughput(runs, shape, pack) for shape in shapes for pack in _packs(runs, shape)],
    )
    lines += ["", *_losses(runs, shapes), "", *_goals(runs, shapes, results["tiny"]), "", *_memory(results, shapes)]
    compile_s = [run["first_steps_s"] for run in runs if run["contender"] == COMPILED and run["repetition"] == 0]
    if compile_s:
        lines += ["", f"(c) compiled is measured at rank 8; before its first timed step: {_seconds(compile_s)}."]
    lines += ["", *_missing(results["missing"]), "", source(Provenance(**results["provenance"]))]
    return "\n".join(lines) + "\n"


def _times(runs: Runs, shape: str, contender: str, pack: int) -> dict[int, float]:
    """Seconds a trial and step by repetition, the mean over ranks."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if (run["shape"], run["contender"], run["pack"]) == (shape, contender, pack):
            found.setdefault(run["repetition"], []).append(run["seconds"] / pack)
    return {repetition: statistics.fmean(values) for repetition, values in found.items()}


def _packs(runs: Runs, shape: str) -> list[int]:
    return sorted({run["pack"] for run in runs if run["shape"] == shape and run["contender"] == OURS})


def _ratio(runs: Runs, shape: str, rival: str, pack: int) -> Spread | None:
    return ratio(_times(runs, shape, rival, 1), _times(runs, shape, OURS, pack))


def _throughput(runs: Runs, shape: str, pack: int) -> list[str]:
    tokens = next(run["tokens"] for run in runs if run["shape"] == shape)
    entries = []
    for contender, at in ((OURS, pack), (BARE, 1), (COMPILED, 1)):
        seconds = spread(_times(runs, shape, contender, at))
        entries.append("not measured" if seconds is None else f"{tokens / seconds.median:,.0f}")
    ratios = [factor(_ratio(runs, shape, rival, pack)) for rival in (BARE, COMPILED)]
    return [f"{shape}, K = {pack}", *entries, *ratios]


def _losses(runs: Runs, shapes: Sequence[str]) -> list[str]:
    lines = []
    for shape in shapes:
        for pack in _packs(runs, shape):
            for rival in (BARE, COMPILED):
                figure = _ratio(runs, shape, rival, pack)
                if figure is not None and figure.median < 1.0:
                    lines.append(f"- {shape}, K = {pack}: we lose to {rival}, ratio {factor(figure)}.")
    return lines or ["We lose in no measured cell."]


def _goals(runs: Runs, shapes: Sequence[str], tiny: bool) -> list[str]:
    if tiny:
        return ["Goals are not held against tiny shapes."]
    lines = []
    for (shape, rival), goal in GOALS.items():
        packs = [pack for pack in _packs(runs, shape) if _ratio(runs, shape, rival, pack)] if shape in shapes else []
        if not packs:
            lines.append(f"- {shape} against {rival}: not measured.")
            continue
        pack = max(packs)
        figure = _ratio(runs, shape, rival, pack)
        assert figure is not None
        met = "met" if figure.median >= goal else "**missed**"
        asked = "" if pack == GOAL_PACK else f" (the goal speaks of K = {GOAL_PACK})"
        lines.append(f"- {shape}, K = {pack}{asked}: {factor(figure)} of {goal:g}× over {rival}: {met}.")
    return lines


def _memory(results: Mapping[str, Any], shapes: Sequence[str]) -> list[str]:
    """A pack's peak against the base and K times what a trial takes alone, by PEFT and by our own pack of one."""
    runs: Runs = [run for run in results["runs"] if run["peak_bytes"] is not None]
    if not runs:
        return ["Memory is measured on CUDA devices only."]
    rows = []
    for shape in shapes:
        base = results["base_bytes"][shape]
        for pack in _packs(runs, shape):
            # ours stands on a base that is there already, PEFT's loop on a copy of its own
            peak = base + _mean_peak(runs, shape, OURS, pack)
            by_peft = base + pack * (_mean_peak(runs, shape, BARE, 1) - base)
            by_ours = base + pack * _mean_peak(runs, shape, OURS, 1)
            verdicts = [
                "not measured" if math.isnan(expected) else f"{_gib(expected)} ({_verdict(peak / expected)})"
                for expected in (by_peft, by_ours)
            ]
            rows.append([f"{shape}, K = {pack}", _gib(base), _gib(peak), *verdicts])
    text = (
        "Peak of the allocator, GiB. Expected: base + K × what a trial takes beside the base when it is alone "
        f"(adapter, optimizer, activations), the mean over the ranks. The goal is at most {GOAL_MEMORY:.0%} of it."
    )
    head = ["shape, pack", "base", "the pack's peak", "expected, by PEFT alone", "expected, by our pack of one"]
    return [text, "", *table(head, rows)]


def _mean_peak(runs: Runs, shape: str, contender: str, pack: int) -> float:
    found = [r["peak_bytes"] for r in runs if (r["shape"], r["contender"], r["pack"]) == (shape, contender, pack)]
    return statistics.fmean(found) if found else math.nan


def _verdict(share: float) -> str:
    return f"{share:.0%} of it: {'met' if share <= GOAL_MEMORY else '**missed**'}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _seconds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f} s" for value in values)


def _missing(missing: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"- {m['shape']}, {m['contender']}, K = {m['pack']}: {m['status']}. {m['why']}" for m in missing] or [
        "Every cell ran."
    ]
