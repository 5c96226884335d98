"""Figures of how trials trained: learning curves, and the memory that each arm needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sweep.report.confirmed import confirm_trials
from sweep.report.drawing import Drawn, Numbers
from sweep.report.marks import colour_of, short_name
from sweep.report.results import Findings
from sweep.report.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SKY,
    SOFT,
    WHITE,
    grid_of,
    hide_empty,
    legend_above,
    loss_axis,
    new_figure,
    panel_title,
)
from sweep.report.words import cost_title, size, some
from sweep.study.arms import Arm
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

MOST_CURVES = 12  # panels of learning curves that still can be read
MOST_STEPS = 150  # of a curve that can be told apart in a panel
KINDS = (("weights", BLUE), ("gradients", ORANGE), ("optimizer", GREEN), ("activations", SKY))


def learning_curves(study: Study, record: StudyRecord, findings: Findings) -> tuple[Figure, Drawn] | None:
    results = [r for r in findings.arms if any(t.rungs for t in confirm_trials(record, r.arm))]
    if not results:
        return None
    shown = results
    if len(results) > MOST_CURVES:
        first = [r for r in results if r.arm.name in (findings.recommended, findings.reference) or r.arm.is_full]
        shown = [*[r for r in results if r not in first][: MOST_CURVES - len(first)], *first]
    rows, columns = grid_of(len(shown))
    figure = new_figure(0.5 + 2.05 * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel())
    numbers: list[tuple[str, str, int, float, float, float]] = []
    every = -(-study.train.steps // MOST_STEPS)
    for axes, result in zip(panels, shown, strict=False):
        trials = confirm_trials(record, result.arm)
        colour = colour_of(result, findings)
        steps, mean, low, high = _thinned(*_mean_curve([t.train_curve for t in trials]), every)
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, lw=0)
        axes.plot(steps, mean, color=colour, lw=1.1, alpha=0.75)
        at, seen, least, most = _mean_curve([t.eval_curve for t in trials])
        axes.plot(at, seen, "o-", color=INK, ms=4, lw=1.2, mec=WHITE, mew=0.6)
        panel_title(axes, short_name(result.arm))
        for what, points in (("training", (steps, mean, low, high)), ("validation", (at, seen, least, most))):
            numbers += [(short_name(result.arm), what, *point) for point in zip(*points, strict=True)]
    hide_empty(panels, len(shown), columns)
    loss_axis(panels[0], [mean for _, _, _, mean, _, _ in numbers])
    panels[0].plot([], [], color=SOFT, lw=1.2, label="training")
    panels[0].plot([], [], "o-", color=INK, ms=4, lw=1.2, label="validation")
    panels[0].legend(loc="upper right", fontsize=8.5, handlelength=1.6)
    figure.supxlabel("optimizer step", fontsize=9.5, color=SOFT)
    figure.supylabel("loss (nats)", fontsize=9.5, color=SOFT)
    left_out = (
        f" {len(results) - len(shown)} more finalists are left out to keep it readable." if shown != results else ""
    )
    return figure, Drawn(
        "learning-curves",
        "Learning curves",
        "Loss of the confirm trials while they train: training loss as the mean over the seeds with their range, "
        "validation loss as the mean at each rung."
        + (f" Each point of the training loss stands for {every} steps in a row." if every > 1 else "")
        + left_out,
        "Training and validation loss against the optimizer step, one panel for each finalist: "
        + ", ".join(short_name(r.arm) for r in shown)
        + ".",
        Numbers(
            ("arm", "loss", "step", "mean (nats)", "lowest seed (nats)", "highest seed (nats)"),
            numbers,
        ),
    )


def memory(study: Study, record: StudyRecord) -> tuple[Figure, Drawn] | None:
    costs = [(arm, record.costs[arm.cost_key]) for arm in _probed(study, record)]
    if not costs:
        return None
    figure = new_figure(0.95 + 0.36 * len(costs))
    axes = figure.subplots()
    unit, name = (2**30, "GiB") if max(c.peak_memory_bytes for _, c in costs) >= 2**30 else (2**20, "MiB")
    arms, labels = [arm for arm, _ in costs], []
    for row, (arm, cost) in enumerate(reversed(costs)):
        left = 0.0
        for kind, colour in KINDS:
            width = cost.memory.get(kind, 0) / unit
            axes.barh(row, width, left=left, color=colour, height=0.66, lw=0)
            left += width
        peak = cost.peak_memory_bytes / unit
        axes.plot([peak, peak], [row - 0.42, row + 0.42], color=INK, lw=1.8, solid_capstyle="butt")
        axes.annotate(
            size(cost.peak_memory_bytes), (max(peak, left), row), (6, 0), textcoords="offset points", va="center"
        )
        labels.append(cost_title(arm, arms))
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.17 * max(max(c.peak_memory_bytes, sum(c.memory.values())) for _, c in costs) / unit)
    axes.set_xlabel(f"memory in {name}")
    kinds = [axes.barh([0], [0], color=colour, label=kind) for kind, colour in KINDS]
    peaks = axes.plot([], [], "|", color=INK, ms=11, mew=1.8, label="measured peak")
    legend_above(figure, [*kinds, *peaks], 5, handlelength=1)
    values = some([f"{cost_title(a, arms)} {size(c.peak_memory_bytes)}" for a, c in costs], "; ")
    return figure, Drawn(
        "memory",
        "Memory by kind",
        "Memory of each arm trained alone, from the solo probes, by kind, and the peak that was measured; arms that "
        "differ only in alpha cost the same.",
        f"Stacked bars of memory: weights, gradients, optimizer state, activations. Peaks: {values}.",
        Numbers(
            ("arm", *(f"{kind} (bytes)" for kind, _ in KINDS), "measured peak (bytes)"),
            [
                (cost_title(arm, arms), *(cost.memory.get(kind, 0) for kind, _ in KINDS), cost.peak_memory_bytes)
                for arm, cost in costs
            ],
        ),
    )


def _probed(study: Study, record: StudyRecord) -> list[Arm]:
    """One arm for each cost that was measured."""
    first: dict[str, Arm] = {}
    for arm in study.list_arms():
        if arm.cost_key in record.costs:
            first.setdefault(arm.cost_key, arm)
    return list(first.values())


def _mean_curve(
    curves: Sequence[Sequence[tuple[int, float]]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, mean, lowest, highest) over the curves that reached each step."""
    at: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, loss in curve:
            if np.isfinite(loss):
                at[step].append(loss)
    steps = sorted(at)
    return steps, [float(np.mean(at[s])) for s in steps], [min(at[s]) for s in steps], [max(at[s]) for s in steps]


def _thinned(
    steps: list[int], mean: list[float], low: list[float], high: list[float], every: int
) -> tuple[list[int], list[float], list[float], list[float]]:
    """One point for each so many steps in a row, at the last of them: the mean, the lowest and the highest of all."""
    runs = [slice(i, i + every) for i in range(0, len(steps), every)]
    return (
        [steps[run][-1] for run in runs],
        [float(np.mean(mean[run])) for run in runs],
        [min(low[run]) for run in runs],
        [max(high[run]) for run in runs],
    )
