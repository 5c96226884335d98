"""Figures of the search: they show how settings were chosen, and are not results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sweep.report.drawing import Drawn, Numbers
from sweep.report.results import Findings
from sweep.report.search import SearchRow, search_trials
from sweep.report.style import (
    EMPTY,
    FAINT,
    SERIES,
    SOFT,
    VERMILION,
    WHITE,
    grid_of,
    hide_empty,
    legend_above,
    loss_axis,
    new_figure,
    panel_title,
    readable_log,
)
from sweep.report.words import apart, rate, some
from sweep.study.arms import Arm, pattern_text
from sweep.study.records import COMPLETE, DIVERGED, PRUNED
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord

MOST_MARKS = 80  # in a panel that still can be told apart
ROOM, LITTLE_ROOM = 1.2, 0.3  # inches of the figure for a cell, where "rate 0.009487" or any number fits into it
ON_LIGHT, ON_DARK = "#111111", "#fefefe"  # ink in cells, whose colours are the same on a dark page


def rank_by_ratio(study: Study, findings: Findings) -> tuple[Figure, Drawn] | None:
    rows = [row for row in findings.search if row.arm.r and row.trials]
    scores = [row.best_loss for row in rows if row.best_loss is not None]
    if not scores:
        return None
    groups = _groups(rows)
    ranks, ratios = sorted({r.arm.r for r in rows}), sorted({r.arm.alpha_ratio for r in rows})
    figure = new_figure(len(groups) * (0.75 + 0.55 * len(ratios)) + 0.3)
    panels = figure.subplots(len(groups), 1, squeeze=False).ravel()
    norm, cmap = Normalize(min(scores), max(scores)), colormaps["cividis_r"]
    room = figure.get_size_inches()[0] / len(ranks)
    for axes, (title, members) in zip(panels, groups.items(), strict=True):
        for row in members:
            x, y = ranks.index(row.arm.r), ratios.index(row.arm.alpha_ratio)
            _cell(axes, x, y, row, None if row.best_loss is None else cmap(norm(row.best_loss)), room)
        axes.set_xlim(-0.5, len(ranks) - 0.5)
        axes.set_ylim(-0.5, len(ratios) - 0.5)
        shown = ranks[:: math.ceil(LITTLE_ROOM / room)]
        axes.set_xticks(list(map(ranks.index, shown)), [f"rank {r}" if room > LITTLE_ROOM else str(r) for r in shown])
        axes.set_yticks(range(len(ratios)), [f"alpha ratio {a:g}" for a in ratios])
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(groups) > 1:
            panel_title(axes, title)
    if room <= LITTLE_ROOM:
        figure.colorbar(ScalarMappable(norm, cmap), ax=panels, label="validation loss (nats)", shrink=0.6)
    values = some([f"{r.arm.name} {'none' if r.best_loss is None else f'{r.best_loss:.3f}'}" for r in rows], "; ")
    return figure, Drawn(
        "rank-by-ratio",
        "Rank and alpha ratio in the search",
        "Best validation loss of each arm at the last rung, with the learning rate that reached it; darker is higher. "
        "These are search scores: they chose the finalists and are not results.",
        f"Heat map of search scores over rank and alpha ratio. Best validation losses: {values}.",
        Numbers(
            ("panel", "arm", "rank", "alpha ratio", "best validation loss (nats)", "learning rate"),
            [
                (title, row.arm.name, row.arm.r, row.arm.alpha_ratio, row.best_loss, row.best_rate)
                for title, members in groups.items()
                for row in members
            ],
        ),
    )


def loss_by_rate(study: Study, record: StudyRecord, findings: Findings) -> tuple[Figure, Drawn] | None:
    arms = [row.arm for row in findings.search if row.trials]
    losses = [
        t.last.eval_loss for a in arms for t in search_trials(record, a.name) if t.last and t.last.eval_loss is not None
    ]
    if not losses:
        return None
    panels_of: dict[str, list[Arm]] = {}
    for arm in sorted(arms, key=lambda a: (a.is_full, a.prefix_length, a.r)):
        panels_of.setdefault(arm.group, []).append(arm)
    lines = sorted({apart(a, arms) for a in arms if a.r}) or [""]
    colours = {a.name: SERIES[lines.index(apart(a, arms)) % len(SERIES)] if a.r else SOFT for a in arms}
    rows, columns = grid_of(len(panels_of))
    figure = new_figure(0.85 + 2.05 * rows)
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).ravel())
    edges = {edge.arm for edge in findings.edges}
    marks = {row.arm.name: row.trials for row in findings.search}
    crowded = any(sum(marks[arm.name] for arm in here) > MOST_MARKS for here in panels_of.values())
    for axes, (title, here) in zip(panels, panels_of.items(), strict=False):
        axes.set_xscale("log")
        tried = [x for row in findings.search if row.arm in here for x in row.rates]
        air = (max(tried) / min(tried)) ** 0.12 if max(tried) > min(tried) else 2.0
        axes.set_xlim(min(tried) / air, max(tried) * air)
        _rate_ticks(axes, sorted(set(tried)), columns)
        clouds: dict[str, list[TrialRecord]] = {}
        for i, arm in enumerate(here):
            aside = air ** (1.2 * (i - (len(here) - 1) / 2) / len(here))  # equal rates side by side, not on one another
            trials = search_trials(record, arm.name)
            if crowded:
                clouds.setdefault(colours[arm.name], []).extend(trials)
            else:
                _rates(axes, trials, colours[arm.name], arm.name in edges, max(losses), aside)
        for colour, trials in clouds.items():
            _cloud(axes, trials, colour, max(losses))
        panel_title(axes, title)
    hide_empty(panels, len(panels_of), columns)
    loss_axis(panels[0], losses)
    figure.supxlabel("learning rate (log scale)", fontsize=9.5, color=SOFT)
    figure.supylabel("validation loss (nats)", fontsize=9.5, color=SOFT)
    _legend(figure, panels[0], lines, crowded)
    last, earlier = ("a dot", "a small, faint one") if crowded else ("filled", "hollow")
    ring = "" if crowded else "; a ring marks a best rate on the edge of its range"
    on_edge = " No best rate is on an edge."
    if edges:
        on_edge = f" Best on the edge of its range: {some(sorted(edges))}."
    return figure, Drawn(
        "loss-by-learning-rate",
        "Learning rates in the search",
        f"Validation loss of every search trial where it ended: {last} at the last rung, {earlier} at an earlier rung "
        f"where it was pruned and so not comparable, a cross where it diverged{ring}.",
        f"Validation loss against learning rate, one panel for each of {some(list(panels_of))}.{on_edge}",
        Numbers(
            ("arm", "learning rate", "state", "last step", "validation loss (nats)", "best rate on the edge"),
            [
                (
                    arm.name,
                    t.spec.learning_rate,
                    t.state or "unfinished",
                    t.step,
                    None if t.state == DIVERGED or t.last is None else t.last.eval_loss,
                    "yes" if arm.name in edges else "no",
                )
                for here in panels_of.values()
                for arm in here
                for t in search_trials(record, arm.name)
            ],
        ),
    )


def _groups(rows: Sequence[SearchRow]) -> dict[str, list[SearchRow]]:
    """The arms that differ in rank and ratio only, by what they share."""
    groups: dict[str, list[SearchRow]] = {}
    for row in rows:
        shared = [row.arm.method, " + ".join(row.arm.target_modules)]
        patterns = (("rank_pattern", row.arm.rank_pattern), ("alpha_pattern", row.arm.alpha_pattern))
        shared += [f"{name} {pattern_text(pattern)}" for name, pattern in patterns if pattern]
        shared += [f"prefix {row.arm.prefix_length}"] if row.arm.prefix_length else []
        groups.setdefault(", ".join(shared), []).append(row)
    return groups


def _cell(axes: Axes, x: int, y: int, row: SearchRow, colour: tuple[float, ...] | None, room: float) -> None:
    """room: inches of the cell."""
    roomy, written = room > ROOM, room > LITTLE_ROOM
    if colour is None:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=EMPTY, ec=FAINT, hatch="////", lw=0))
        if not written:
            return
        text = ("all pruned" if row.pruned == row.trials else "none finished").replace(" ", " " if roomy else "\n")
        box = {"boxstyle": "round,pad=0.25", "fc": EMPTY, "ec": "none"}
        axes.text(x, y, text, ha="center", va="center", color=SOFT, fontsize=9, bbox=box)
    else:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=colour, ec=WHITE, lw=2 if written else 0.5))
        if not written:
            return
        ink = ON_LIGHT if np.dot(colour[:3], (0.299, 0.587, 0.114)) > 0.5 else ON_DARK
        axes.text(x, y + 0.1, f"{row.best_loss:.3f}", ha="center", va="center", color=ink, fontsize=10.5, weight="bold")
        text = f"rate {rate(row.best_rate or 0)}" if roomy else f"{row.best_rate or 0:.2g}"
        axes.text(x, y - 0.24, text, ha="center", va="center", color=ink, fontsize=8.5)


def _rates(axes: Axes, trials: Sequence[TrialRecord], colour: str, edge: bool, top: float, aside: float) -> None:
    points = sorted((x * aside, y, state) for x, y, state in _measured(trials))
    finished = [(x, y) for x, y, state in points if state == COMPLETE]
    axes.plot(*_columns(finished), color=colour, lw=1.2, alpha=0.6)
    for x, y, state in points:
        axes.plot([x], [y], "o", color=colour, ms=6, mfc=colour if state == COMPLETE else WHITE, mew=1.3)
    for trial in trials:
        if trial.state == DIVERGED:
            axes.plot([trial.spec.learning_rate * aside], [top], "x", color=colour, ms=7, mew=1.8)
    if edge and finished:
        x, y = min(finished, key=lambda point: point[1])
        axes.plot([x], [y], "o", ms=13, mfc="none", mec=VERMILION, mew=1.4)


def _cloud(axes: Axes, trials: Sequence[TrialRecord], colour: str, top: float) -> None:
    """More trials than can be told apart."""
    points = _measured(trials)
    _dots(axes, [(x, y) for x, y, state in points if state != COMPLETE], colour, ms=2.5, alpha=0.35)
    _dots(axes, [(x, y) for x, y, state in points if state == COMPLETE], colour, ms=4, alpha=0.8)
    gone = sorted({t.spec.learning_rate for t in trials if t.state == DIVERGED})
    axes.plot(gone, [top] * len(gone), "x", color=colour, ms=7, mew=1.8)


def _measured(trials: Sequence[TrialRecord]) -> list[tuple[float, float, str]]:
    """(learning rate, validation loss, state) where the loss is one of a trial that did not diverge."""
    return [
        (t.spec.learning_rate, t.last.eval_loss, t.state or "")
        for t in trials
        if t.last is not None and t.last.eval_loss is not None and t.state != DIVERGED
    ]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _dots(axes: Axes, points: Sequence[tuple[float, float]], colour: str, ms: float, alpha: float) -> None:
    """Thousands of dots as one shape: strokes too short to see, with round ends. As markers each is a part of the page
    of its own."""
    ends = [(x, y) for x, y in points for x in (x, x * 1.0001, math.nan)]
    axes.plot(*_columns(ends), color=colour, lw=ms, alpha=alpha, solid_capstyle="round", snap=False)


def _rate_ticks(axes: Axes, tried: Sequence[float], columns: int) -> None:
    """A tick at each rate that was tried, while there are few."""
    readable_log(axes.xaxis, tried[0], tried[-1] * (10 if columns > 2 else 1))  # fewer where a panel is narrow
    if len(tried) <= 4:
        axes.set_xticks(list(tried), [f"{x:.2g}" for x in tried])


def _legend(figure: Figure, axes: Axes, lines: Sequence[str], crowded: bool) -> None:
    """crowded: dots are small, and no edge is marked."""
    handles = [
        axes.plot([], [], "o-", color=SERIES[i % len(SERIES)], ms=5, label=line)[0]
        for i, line in enumerate(lines)
        if line
    ]
    pruned = {"ms": 2.5, "alpha": 0.6} if crowded else {"mfc": WHITE, "mew": 1.4}
    handles += axes.plot([], [], "o", color=SOFT, ls="", label=PRUNED, **pruned)
    handles += axes.plot([], [], "x", color=SOFT, mew=1.4, ls="", label=DIVERGED)
    if not crowded:
        handles += axes.plot([], [], "o", ms=11, mfc="none", mec=VERMILION, mew=1.4, ls="", label="on the edge")
    legend_above(figure, handles, 4 if len(handles) > 5 else 5)
