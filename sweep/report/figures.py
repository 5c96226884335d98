"""Figures of what was confirmed: loss against rank, the Pareto front, learning curves, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sweep.report.labels import PointLabel, label_lines, label_points
from sweep.report.results import ArmResult, Findings
from sweep.report.statistics import confirm_trials
from sweep.report.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    SOFT,
    STYLE,
    VERMILION,
    grid_of,
    hide_empty,
    legend_columns,
    loss_axis,
    new_figure,
    rank_axis,
    readable_log,
    save,
    spread,
)
from sweep.report.words import apart, cost_title, size
from sweep.study.arms import Arm
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

MOST_CURVES = 12  # panels of learning curves that still can be read
MOST_NAMES = 8  # points that still can all be named
OTHERS = tuple(c for c in SERIES if c not in (VERMILION, PURPLE))  # which are the recommended arm's and prefixes'
NEAR = 0.25  # of the range: a line no further outside it is still drawn
KINDS = (("weights", BLUE), ("gradients", ORANGE), ("optimizer", GREEN), ("activations", SKY))


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. `name` is its file without .png; `alt` is for those who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str


def draw(figure: Callable[..., tuple[Figure, Drawn] | None], to: Path, *args: object) -> Drawn | None:
    """Draw and save one figure; None where there is nothing to show."""
    with rc_context(STYLE):
        made = figure(*args)
        if made is None:
            return None
        canvas, drawn = made
        save(canvas, to / f"{drawn.name}.png")
        return drawn


def loss_by_rank(study: Study, findings: Findings) -> tuple[Figure, Drawn] | None:
    results = [r for r in findings.arms if r.seeds and r.arm.r]
    prefixes = [r for r in findings.arms if r.seeds and not r.arm.r and not r.arm.is_full]
    if not results:
        return None
    figure = new_figure(3.7)
    axes = figure.subplots()
    arms = study.list_arms()
    ranks = sorted({r.arm.r for r in results})
    rank_axis(axes, ranks)
    full = next((r for r in findings.arms if r.arm.is_full and r.seeds), None)
    named: list[tuple[float, str, str]] = []  # horizontal lines: height, name, colour
    if full is not None:
        if full.loss_low is not None and full.loss_high is not None:
            axes.axhspan(full.loss_low, full.loss_high, color="#e4e4e4", lw=0)
        axes.axhline(full.loss_mean, color=SOFT, lw=1.2)
        named.append((full.loss_mean, "full fine-tuning", SOFT))
    for result in prefixes:
        axes.axhline(result.loss_mean, color=PURPLE, lw=1.2, ls=(0, (6, 2, 1, 2)))
        named.append((result.loss_mean, result.arm.group, PURPLE))
    reference = findings.result(findings.reference)
    if reference is not None:
        limit = reference.loss_mean + study.confirm.epsilon
        axes.axhline(limit, color=INK, lw=0.9, ls=(0, (5, 3)))
        named.append((limit, f"rank {reference.arm.r} + ε ({study.confirm.epsilon:g})", INK))
    marks: list[tuple[float, float, float]] = []  # x, low, high
    labels: list[PointLabel] = []
    lines = sorted({apart(r.arm, arms) for r in results})
    crowded = len(results) > len(ranks)  # several arms a rank: colours and a legend instead of labels
    for rank in ranks:
        here = [r for r in results if r.arm.r == rank]
        for i, result in enumerate(here):
            colour = _colour(result, findings)
            if crowded and result.arm.name != findings.recommended:
                colour = OTHERS[lines.index(apart(result.arm, arms)) % len(OTHERS)]
            aside = 1.55 ** ((i - (len(here) - 1) / 2) / len(here))
            _with_interval(axes, rank * aside, result, colour, seeds_at=None if crowded else rank * 0.94)
            marks.append((rank * aside, _low(result), _high(result)))
            marks += [] if crowded else [(rank * 0.94, loss, loss) for loss in result.test_losses]
            recommended = ["recommended"] if result.arm.name == findings.recommended else []
            words = [*([] if crowded else apart(result.arm, arms).split(", ")), *recommended]
            if words:
                labels.append(PointLabel(*marks[-1 if crowded else -1 - len(result.seeds)], "\n".join(words), colour))
    if crowded:
        for i, line in enumerate(lines):
            axes.plot([], [], "o-", lw=2, color=OTHERS[i % len(OTHERS)], label=line)
        figure.legend(loc="outside upper left", ncols=legend_columns(lines, 3), fontsize=8.5, handlelength=1.6)
    lowest = min([_low(r) for r in results] + ([_low(full)] if full else []) + [r.loss_mean for r in prefixes])
    highest = max([_high(r) for r in results] + [y for y, _, _ in named])
    chance, beyond = findings.chance_loss, ""
    if chance is not None:
        if lowest - NEAR * (highest - lowest) <= chance <= highest + NEAR * (highest - lowest):
            axes.axhline(chance, color=SOFT, lw=0.9, ls=(0, (1, 2)))
            named.append((chance, "label frequencies", SOFT))
            lowest, highest = min(lowest, chance), max(highest, chance)
            beyond = " The dotted line is the loss of always answering by the labels' frequencies."
        else:
            beyond = f" Always answering by the labels' frequencies has a loss of {chance:.3f}, outside the figure."
    axes.set_ylim(lowest - 0.12 * (highest - lowest), highest + 0.17 * (highest - lowest))
    label_lines(axes, named)
    label_points(axes, labels, marks, [y for y, _, _ in named])
    axes.set_xlabel("rank (log scale)")
    axes.set_ylabel("test loss at the last step")
    values = "; ".join(f"{r.arm.name} {r.loss_mean:.3f}" for r in findings.arms if r.seeds)
    seeds = max(len(r.seeds) for r in results)
    return figure, Drawn(
        "loss-by-rank",
        "Confirmed loss against rank",
        f"Test loss of each finalist: the mean over {seeds} confirm {'seeds' if seeds > 1 else 'seed'} with its 95 % "
        "t-interval"
        + (", and each seed as a faint dot" if not crowded else "")
        + ("; the grey line and band are full fine-tuning's mean and interval" if full else "")
        + ("; the lines of dashes and dots are means of prefixes alone, which have no rank" if prefixes else "")
        + (", the dashed line the loss that ε allows." if reference else ".")
        + beyond,
        f"Test loss against rank on a log scale, with 95 % intervals. Means: {values}.",
    )


def pareto(study: Study, findings: Findings) -> tuple[Figure, Drawn] | None:
    results = sorted(
        (r for r in findings.arms if r.seeds and r.trainable_params), key=lambda r: (r.trainable_params, r.loss_mean)
    )
    if len(results) < 2:
        return None
    figure = new_figure(3.7)
    axes = figure.subplots()
    axes.set_xscale("log")
    params = [float(r.trainable_params or 0) for r in results]
    wide = (params[-1] / params[0]) ** 0.04
    axes.set_xlim(params[0] / wide**1.2, params[-1] * wide**5)
    readable_log(axes.xaxis, *axes.get_xlim())
    front: list[ArmResult] = []
    for result in results:
        if not front or result.loss_mean < front[-1].loss_mean:
            front.append(result)
    axes.step(
        [float(r.trainable_params or 0) for r in front], [r.loss_mean for r in front], where="post", color=FAINT, lw=2
    )
    for result in sorted(results, key=lambda r: r.arm.name == findings.recommended):  # the recommended one on top
        _with_interval(axes, float(result.trainable_params or 0), result, _colour(result, findings))
    low, high = min(map(_low, results)), max(map(_high, results))
    axes.set_ylim(low - 0.1 * (high - low or 0.1), high + 0.1 * (high - low or 0.1))
    named = [r for r in results if len(results) <= MOST_NAMES or r in front or r.arm.name == findings.recommended]
    points = [(float(r.trainable_params or 0), r.loss_mean, r) for r in named]
    _label_points(axes, points, [_short(r.arm) for r in named], findings, up=8)  # off the line of the front
    axes.set_xlabel("trainable parameters (log scale)")
    axes.set_ylabel("test loss at the last step")
    names = ", ".join(r.arm.name for r in front)
    return figure, Drawn(
        "pareto",
        "What more parameters buy",
        "Confirmed test loss (mean and 95 % interval) against trainable parameters; the line joins the arms that no "
        "smaller arm matches, the Pareto front of the means.",
        f"Test loss against trainable parameters on a log scale. On the Pareto front: {names}.",
    )


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
    everything: list[float] = []
    for axes, result in zip(panels, shown, strict=False):
        trials = confirm_trials(record, result.arm)
        colour = _colour(result, findings)
        steps, mean, low, high = _mean_curve([t.train_curve for t in trials])
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, lw=0)
        axes.plot(steps, mean, color=colour, lw=1.1, alpha=0.75)
        at, seen, _, _ = _mean_curve([t.eval_curve for t in trials])
        axes.plot(at, seen, "o-", color=INK, ms=4, lw=1.2, mec="white", mew=0.6)
        axes.set_title(_short(result.arm))
        everything += [*mean, *seen]
    hide_empty(panels, len(shown), columns)
    loss_axis(panels[0], everything)
    panels[0].plot([], [], color=SOFT, lw=1.2, label="training")
    panels[0].plot([], [], "o-", color=INK, ms=4, lw=1.2, label="validation")
    panels[0].legend(loc="upper right", fontsize=8.5, handlelength=1.6)
    figure.supxlabel("optimizer step", fontsize=9.5, color=SOFT)
    figure.supylabel("loss", fontsize=9.5, color=SOFT)
    left_out = (
        f" {len(results) - len(shown)} more finalists are left out to keep it readable." if shown != results else ""
    )
    return figure, Drawn(
        "learning-curves",
        "Learning curves",
        "Loss of the confirm trials while they train: training loss as the mean over the seeds with their range, "
        "validation loss as the mean at each rung." + left_out,
        "Training and validation loss against the optimizer step, one panel for each finalist: "
        + ", ".join(_short(r.arm) for r in shown)
        + ".",
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
    figure.legend(
        handles=[*kinds, *peaks], loc="outside upper left", ncols=5, handlelength=1, columnspacing=1.3, fontsize=9
    )
    values = "; ".join(f"{cost_title(a, arms)} {size(c.peak_memory_bytes)}" for a, c in costs)
    return figure, Drawn(
        "memory",
        "Memory by kind",
        "Memory of each arm trained alone, from the solo probes, by kind, and the peak that was measured; arms that "
        "differ only in alpha cost the same.",
        f"Stacked bars of memory: weights, gradients, optimizer state, activations. Peaks: {values}.",
    )


def _probed(study: Study, record: StudyRecord) -> list[Arm]:
    """One arm for each cost that was measured."""
    first: dict[str, Arm] = {}
    for arm in study.list_arms():
        if arm.cost_key in record.costs:
            first.setdefault(arm.cost_key, arm)
    return list(first.values())


def _short(arm: Arm) -> str:
    return "full fine-tuning" if arm.is_full else arm.name


def _colour(result: ArmResult, findings: Findings) -> str:
    """The recommended arm stands out; full fine-tuning stays in the background."""
    if result.arm.name == findings.recommended:
        return VERMILION
    return SOFT if result.arm.is_full else BLUE


def _low(result: ArmResult) -> float:
    return min(result.test_losses) if result.loss_low is None else min(result.loss_low, *result.test_losses)


def _high(result: ArmResult) -> float:
    return max(result.test_losses) if result.loss_high is None else max(result.loss_high, *result.test_losses)


def _with_interval(axes: Axes, x: float, result: ArmResult, colour: str, seeds_at: float | None = None) -> None:
    if seeds_at is not None:
        axes.plot([seeds_at] * len(result.seeds), result.test_losses, "o", color=colour, alpha=0.3, ms=4.5, mew=0)
    if result.loss_low is not None and result.loss_high is not None:
        axes.plot([x, x], [result.loss_low, result.loss_high], color=colour, lw=2, solid_capstyle="round")
    axes.plot([x], [result.loss_mean], "o", color=colour, ms=7.5, mec="white", mew=1)


def _label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, ArmResult]],
    words: Sequence[str],
    findings: Findings,
    up: float = 0,
) -> None:
    """A label to the right of each point; labels of points above one another are spread."""
    low, high = axes.get_ylim()
    columns: dict[float, list[int]] = defaultdict(list)
    span = np.log(axes.get_xlim()[1] / axes.get_xlim()[0])
    for i in sorted(range(len(points)), key=lambda i: points[i][0]):
        near = next((c for c in columns if abs(np.log(points[i][0] / c)) < 0.14 * span), points[i][0])
        columns[near].append(i)
    for column in columns.values():
        places = spread([points[i][1] for i in column], 0.055 * (high - low))
        right = max(points[i][0] for i in column)
        for i, place in zip(column, places, strict=True):
            colour = _colour(points[i][2], findings)
            label = axes.annotate(
                words[i], (right, place), (8, up), textcoords="offset points", va="center", color=colour, fontsize=8.5
            )
            label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


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
