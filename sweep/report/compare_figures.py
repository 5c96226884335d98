"""Figures of a comparison of studies: differences to each study's reference, and shares of full fine-tuning's cost."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sweep.report.compare_numbers import Compared, shares
from sweep.report.drawing import Drawn, Numbers
from sweep.report.labels import label_lines
from sweep.report.results import ArmResult
from sweep.report.style import FAINT, INK, SERIES, SOFT, WHITE, grid_of, hide_empty, new_figure, rank_axis

MARKERS = "osD^vPX"  # told apart without colour
ASIDE = 1.09  # from one study's marks to the next's, on the axis of ranks


def to_reference_by_rank(compared: Sequence[Compared], one_scale: bool) -> tuple[Figure, Drawn] | None:
    """one_scale: whether the losses are of one kind, so that panels may share their axis."""
    shown = [c for c in compared if any(r.to_reference is not None for r in _of_ranks(c))]
    if not shown:
        return None
    ranks = sorted({r.arm.r for c in shown for r in _of_ranks(c)})
    rows, columns = grid_of(len(shown))
    figure = new_figure(0.7 + 2.5 * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=one_scale, squeeze=False).ravel())
    for axes, c in zip(panels, shown, strict=False):
        colour, marker = _style(compared, c)
        epsilon = c.study.confirm.epsilon
        rank_axis(axes, ranks)
        axes.axhline(0, color=FAINT, lw=1.4)
        axes.axhline(epsilon, color=INK, lw=0.9, ls=(0, (5, 3)))
        full = next((r for r in c.findings.arms if r.arm.is_full), None)
        if full is not None and full.to_reference is not None:
            axes.axhline(full.to_reference.mean, color=SOFT, lw=1.2, ls=(0, (1, 2)))
        for result in _of_ranks(c):
            at = result.to_reference
            if at is None:  # the reference: 0 by what it is
                axes.plot([result.arm.r], [0], marker, color=colour, ms=7, mfc=WHITE, mew=1.4)
                continue
            if at.low is not None and at.high is not None:
                axes.plot([result.arm.r] * 2, [at.low, at.high], color=colour, lw=2, solid_capstyle="round")
            axes.plot([result.arm.r], [at.mean], marker, color=colour, ms=7, mec=WHITE, mew=0.8)
        axes.set_title(c.name)
        axes.margins(y=0.12)
        axes.annotate(
            f"ε = {epsilon:g}",
            (1, epsilon),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color=INK,
        )
    hide_empty(panels, len(shown), columns)
    figure.supxlabel("rank (log scale)", fontsize=9.5, color=SOFT)
    figure.supylabel("test loss − that of the reference (nats)", fontsize=9.5, color=SOFT)
    scales = "one scale" if one_scale else "a scale for each, as their losses are not comparable"
    values = "; ".join(
        f"{c.name}: " + ", ".join(f"rank {r.arm.r} {r.to_reference.mean:+.3f}" for r in _of_ranks(c) if r.to_reference)
        for c in shown
    )
    return figure, Drawn(
        "difference-by-rank",
        "Difference to each study's own reference",
        "Test loss of each rank less that of the study's reference (the open mark), paired by seed, with 95 % "
        "intervals; where several arms of a rank were confirmed, the one that search chose. The dashed line is the "
        f"study's ε, the dotted one full fine-tuning's mean; {scales}.",
        f"Difference of test loss to the reference against rank, one panel a study. Means: {values}.",
        Numbers(
            (
                "study",
                "rank",
                "mean difference (nats)",
                "95 % interval, low (nats)",
                "95 % interval, high (nats)",
                "paired seeds",
                "epsilon (nats)",
            ),
            [
                (c.name, r.arm.r, d.mean, d.low, d.high, d.n, c.study.confirm.epsilon)
                for c in shown
                for r in _of_ranks(c)
                if (d := r.to_reference) is not None
            ],
        ),
    )


def cost_by_rank(compared: Sequence[Compared]) -> tuple[Figure, Drawn] | None:
    shown = [c for c in compared if any(shares(r, c.full_cost).memory for r in _of_ranks(c))]
    if not shown:
        return None
    ranks = sorted({r.arm.r for c in shown for r in _of_ranks(c)})
    figure = new_figure(5.2)
    top, bottom = figure.subplots(2, 1, sharex=True)
    told = []
    for axes, kind, title in ((top, "memory", "peak memory"), (bottom, "step_time", "step time")):
        rank_axis(axes, ranks)
        axes.set_title(title)
        named = [axes.axhline(100, color=SOFT, lw=1.2, ls=(0, (1, 2)), label="full fine-tuning")]
        highest = 100.0
        for i, c in enumerate(shown):
            colour, marker = _style(compared, c)
            of_full = [(r.arm.r, getattr(shares(r, c.full_cost), kind)) for r in _of_ranks(c)]
            points = [(rank, 100 * value) for rank, value in of_full if value is not None]
            if not points:
                continue
            told.append(f"{c.name}, {title}: " + ", ".join(f"rank {rank} {value:.0f} %" for rank, value in points))
            aside = ASIDE ** (i - (len(shown) - 1) / 2)  # equal shares would hide one another
            points = [(rank * aside, value) for rank, value in points]
            axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, ms=6.5, mec=WHITE, mew=0.8, lw=1.6)
            named.append(_lead_to_margin(axes, points[-1], colour, c.name))
            highest = max(highest, *(value for _, value in points))
        axes.set_ylim(0, 1.12 * highest)
        axes.set_ylabel("% of full fine-tuning")
        label_lines(axes, named)
    bottom.set_xlabel("rank (log scale)")
    return figure, Drawn(
        "cost-by-rank",
        "What a rank costs, as a share of full fine-tuning in the same study",
        "Peak memory and step time from solo probes, each divided by full fine-tuning's on the same machine. One "
        "measurement each, without an interval.",
        f"Shares of full fine-tuning's peak memory and step time against rank, one line a study. {'; '.join(told)}.",
        Numbers(
            ("study", "rank", "peak memory (share of full fine-tuning)", "step time (share of full fine-tuning)"),
            [
                (c.name, r.arm.r, share.memory, share.step_time)
                for c in shown
                for r in _of_ranks(c)
                if (share := shares(r, c.full_cost)).memory is not None
            ],
        ),
    )


def _of_ranks(c: Compared) -> list[ArmResult]:
    """The confirmed arm of each rank, smallest first."""
    chosen = {arm.name for arm in c.of_ranks.values() if arm.r}
    return sorted((r for r in c.findings.arms if r.arm.name in chosen and r.seeds), key=lambda r: r.arm.r)


def _style(compared: Sequence[Compared], c: Compared) -> tuple[str, str]:
    """A study's colour and marker, the same in all figures."""
    i = compared.index(c)
    return SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]


def _lead_to_margin(axes: Axes, last: tuple[float, float], colour: str, name: str) -> Line2D:
    """A thin line from the last point to where its name stands."""
    (line,) = axes.plot([last[0], axes.get_xlim()[1]], [last[1]] * 2, color=colour, lw=0.7, alpha=0.6, label=name)
    return line
