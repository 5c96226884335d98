"""Figures of what was confirmed: loss against rank, and against trainable parameters."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sweep.report.drawing import Drawn, Numbers
from sweep.report.labels import PointLabel, height_of, label_lines, label_points
from sweep.report.marks import colour_of, highest, lowest, mark_mean, mark_means, mark_seeds, short_name
from sweep.report.results import ArmResult, Findings
from sweep.report.style import (
    BAND,
    BLUE,
    FAINT,
    INK,
    PURPLE,
    SERIES,
    SOFT,
    VERMILION,
    is_narrow,
    legend_above,
    new_figure,
    rank_axis,
    readable_log,
)
from sweep.report.words import apart, some
from sweep.study.schema import Study

MOST_NAMES = 8  # points that still can all be named
OTHERS = tuple(c for c in SERIES if c not in (VERMILION, PURPLE))  # which are the recommended arm's and prefixes'
NEAR = 0.25  # of the range: a line no further outside it is still drawn
LOSS = "test loss (nats)"
INTERVAL = ("95 % interval, low (nats)", "95 % interval, high (nats)")


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
    named: list[Line2D] = []  # arms without a rank
    limits: list[Line2D] = []
    if full is not None:
        if full.loss_low is not None and full.loss_high is not None:
            axes.axhspan(full.loss_low, full.loss_high, color=BAND, lw=0)
        named.append(axes.axhline(full.loss_mean, color=SOFT, lw=1.2, label="full fine-tuning"))
    for result in prefixes:
        how: dict[str, Any] = {"color": PURPLE, "lw": 1.2, "ls": (0, (6, 2, 1, 2))}
        named.append(axes.axhline(result.loss_mean, label=result.arm.group, **how))
    reference = findings.result(findings.reference)
    if reference is not None:
        limit, name = reference.loss_mean + study.confirm.epsilon, f"rank {reference.arm.r} + ε"
        how = {"color": INK, "lw": 0.9, "ls": (0, (5, 3))}
        limits.append(axes.axhline(limit, label=f"{name} ({study.confirm.epsilon:g})", **how))
    marks: list[tuple[float, float, float]] = []  # x, low, high
    labels: list[PointLabel] = []
    lines = sorted({apart(r.arm, arms) for r in results})
    crowded = len(results) > len(ranks)  # several arms a rank: colours and a legend instead of labels
    for rank in ranks:
        here = [r for r in results if r.arm.r == rank]
        for i, result in enumerate(here):
            colour = colour_of(result, findings)
            if crowded and result.arm.name != findings.recommended:
                colour = OTHERS[lines.index(apart(result.arm, arms)) % len(OTHERS)]
            aside = 1.55 ** ((i - (len(here) - 1) / 2) / len(here))
            if not crowded:
                mark_seeds(axes, rank * 0.94, result.test_losses, colour)
            mark_mean(axes, rank * aside, result.loss_mean, result.loss_low, result.loss_high, colour)
            marks.append((rank * aside, lowest(result), highest(result)))
            marks += [] if crowded else [(rank * 0.94, loss, loss) for loss in result.test_losses]
            recommended = ["recommended"] if result.arm.name == findings.recommended else []
            words = [*([] if crowded else apart(result.arm, arms).split(", ")), *recommended]
            words = [word.removeprefix("alpha ") for word in words] if is_narrow() else words
            if words:
                labels.append(PointLabel(*marks[-1 if crowded else -1 - len(result.seeds)], "\n".join(words), colour))
    bottom = min([lowest(r) for r in results] + ([lowest(full)] if full else []) + [r.loss_mean for r in prefixes])
    top = max([highest(r) for r in results] + list(map(height_of, named + limits)))
    chance, beyond = findings.chance_loss, ""
    if chance is not None:
        if bottom - NEAR * (top - bottom) <= chance <= top + NEAR * (top - bottom):
            how = {"color": SOFT, "lw": 0.9, "ls": (0, (1, 2))}
            limits.append(axes.axhline(chance, label="label frequencies", **how))
            bottom, top = min(bottom, chance), max(top, chance)
            beyond = " The dotted line is the loss of always answering by the labels' frequencies."
        else:
            beyond = f" Always answering by the labels' frequencies has a loss of {chance:.3f}, outside the figure."
    axes.set_ylim(bottom - 0.12 * (top - bottom), top + 0.17 * (top - bottom))
    named += limits
    handles = [
        axes.plot([], [], "o-", lw=2, color=OTHERS[i % len(OTHERS)], label=line)[0]
        for i, line in enumerate(lines if crowded else [])
    ]
    handles += named if is_narrow() else []
    if handles:
        legend_above(figure, handles, 3, handlelength=2.2)
    if not is_narrow():
        label_lines(axes, named)
    axes.set_xlabel("rank (log scale)")
    axes.set_ylabel("test loss at the last step (nats)")
    label_points(axes, labels, marks, list(map(height_of, named)))
    values = some([f"{r.arm.name} {r.loss_mean:.3f}" for r in findings.arms if r.seeds], "; ")
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
        Numbers(
            ("arm", "rank", "what", LOSS, *INTERVAL),
            [
                *(row for r in findings.arms if r.seeds for row in _loss_rows(r)),
                *((line.get_label(), None, "line", height_of(line), None, None) for line in limits),
            ],
        ),
    )


def _loss_rows(result: ArmResult) -> list[tuple[object, ...]]:
    """The mean with its interval, and each seed."""
    arm = (short_name(result.arm), result.arm.r or None)
    seeds = zip(result.seeds, result.test_losses, strict=True)
    return [
        (*arm, "mean", result.loss_mean, result.loss_low, result.loss_high),
        *((*arm, f"seed {seed}", loss, None, None) for seed, loss in seeds),
    ]


def pareto(study: Study, findings: Findings) -> tuple[Figure, Drawn] | None:
    results = sorted(
        (r for r in findings.arms if r.seeds and r.trainable_params), key=lambda r: (r.trainable_params, r.loss_mean)
    )
    if len({r.trainable_params for r in results}) < 2:
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
    named = [r for r in results if len(results) <= MOST_NAMES or r in front or r.arm.name == findings.recommended]
    others = [r for r in results if r not in named and not r.arm.is_full]
    mark_means(axes, [float(r.trainable_params or 0) for r in others], others, BLUE)
    apart_drawn = [r for r in results if r not in others]
    for result in sorted(apart_drawn, key=lambda r: r.arm.name == findings.recommended):  # the recommended one on top
        mark_mean(
            axes,
            float(result.trainable_params or 0),
            result.loss_mean,
            result.loss_low,
            result.loss_high,
            colour_of(result, findings),
        )
    low, high = min(map(lowest, results)), max(map(highest, results))
    axes.set_ylim(low - 0.1 * (high - low or 0.1), high + 0.1 * (high - low or 0.1))
    axes.set_xlabel("trainable parameters (log scale)")
    axes.set_ylabel("test loss at the last step (nats)")
    ends = {r.arm.name: (float(r.trainable_params or 0), lowest(r), highest(r)) for r in results}
    labels = [PointLabel(*ends[r.arm.name], short_name(r.arm), colour_of(r, findings)) for r in named]
    label_points(axes, labels, list(ends.values()), [])
    names = some([r.arm.name for r in front])
    return figure, Drawn(
        "pareto",
        "What more parameters buy",
        "Confirmed test loss (mean and 95 % interval) against trainable parameters; the line joins the arms that no "
        "smaller arm matches, the Pareto front of the means.",
        f"Test loss against trainable parameters on a log scale. On the Pareto front: {names}.",
        Numbers(
            ("arm", "trainable parameters", LOSS, *INTERVAL, "on the front"),
            [
                (
                    short_name(r.arm),
                    r.trainable_params,
                    r.loss_mean,
                    r.loss_low,
                    r.loss_high,
                    "yes" if r in front else "no",
                )
                for r in results
            ],
        ),
    )
