"""The figure that the verdicts can be read off: paired differences to the reference and to full fine-tuning, and ε."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sweep.report.drawing import Drawn, Numbers
from sweep.report.intervals import INCONCLUSIVE, INFERIOR, NON_INFERIOR, Interval
from sweep.report.marks import short_name
from sweep.report.results import ArmResult, Findings
from sweep.report.style import BLUE, FAINT, INK, SOFT, VERMILION, WHITE, is_narrow, legend_above, new_figure, shortened
from sweep.report.words import signed
from sweep.study.schema import Study

MOST_ROWS = 40  # arms that a figure still can show
LOOKS = {NON_INFERIOR: (BLUE, "o", BLUE), INCONCLUSIVE: (SOFT, "o", WHITE), INFERIOR: (VERMILION, "X", VERMILION)}
Pick = Callable[[ArmResult], tuple[Interval | None, str | None]]


def verdicts(study: Study, findings: Findings) -> tuple[Figure, Drawn] | None:
    """None where there is no difference with an interval."""
    families: list[tuple[str, Pick]] = [
        (f"against {findings.reference_title(study)}", lambda r: (r.to_reference, r.verdict)),
        ("against full fine-tuning", lambda r: (r.to_full, r.full_verdict)),
    ]
    compared = [r for r in findings.arms if not r.arm.is_full]
    arms = compared if len(compared) <= MOST_ROWS else [r for r in compared if r.in_sequence]
    shown = [
        (title, pick, rows)
        for title, pick in families
        if (rows := [r for r in arms if pick(r)[1] in LOOKS and _has_interval(pick(r)[0])])
    ]
    if not shown:
        return None
    names = [r.arm.name for r in arms if any(r in rows for _, _, rows in shown)][::-1]  # smallest rank on top
    rows_of_panels = len(shown) if is_narrow() else 1
    figure = new_figure(0.9 + rows_of_panels * (0.55 + 0.27 * len(names)))
    columns = 1 if is_narrow() else len(shown)
    panels = figure.subplots(rows_of_panels, columns, sharey=True, sharex=True, squeeze=False).ravel()
    for axes, (title, pick, rows) in zip(panels, shown, strict=True):
        _panel(axes, title, [(names.index(r.arm.name), *pick(r)) for r in rows], study.confirm.epsilon)
        axes.set_yticks(range(len(names)), [_called(name, arms) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
    panels[-1].set_xlabel("difference of test loss (nats)")
    if columns > 1:
        panels[0].set_xlabel("difference of test loss (nats)")
    met = [verdict for verdict in LOOKS if any(pick(r)[1] == verdict for _, pick, rows in shown for r in rows)]
    legend_above(figure, [_key(verdict) for verdict in met], 3)
    told = "; ".join(
        f"{title}: "
        + ", ".join(f"{r.arm.name} {signed(d.mean, 3)} {v}" for r in rows if (d := pick(r)[0]) for v in [pick(r)[1]])
        for title, pick, rows in shown
    )
    aside = "; arms that search did not choose for their rank are tested with Holm's correction" * any(
        not r.in_sequence for r in arms
    )
    left_out = ""
    if len(arms) < len(compared):
        n = len(compared) - len(arms)
        left_out = f" Only the arms that search chose for their ranks are drawn; the other {n} stand in the table."
    whose = " and of ".join(title.removeprefix("against ") for title, *_ in shown)
    return figure, Drawn(
        "verdicts",
        "Differences, and what they show",
        f"Test loss of each arm less that of {whose}, paired by seed: means with two-sided 95 % t-intervals. "
        "Right of 0 is worse. An arm is non-inferior where its one-sided 95 % bound, the small tick, lies left of the "
        "dashed ε and so do those of all larger ranks" + aside + "." + left_out,
        f"Differences of test loss with intervals. {told}.",
        Numbers(
            (
                "against",
                "arm",
                "mean difference (nats)",
                "95 % interval, low (nats)",
                "95 % interval, high (nats)",
                "one-sided 95 % bound (nats)",
                "pairs",
                "verdict",
            ),
            [
                (title.removeprefix("against "), r.arm.name, d.mean, d.low, d.high, d.upper, d.n, pick(r)[1])
                for title, pick, rows in shown
                for r in rows
                if (d := pick(r)[0]) is not None
            ],
        ),
    )


def _has_interval(found: Interval | None) -> bool:
    return found is not None and found.low is not None


def _panel(axes: Axes, title: str, rows: Sequence[tuple[int, Interval | None, str | None]], epsilon: float) -> None:
    axes.axvline(0, color=FAINT, lw=1.4)
    axes.axvline(epsilon, color=INK, lw=0.9, ls=(0, (5, 3)))
    axes.annotate(
        f"ε = {epsilon:g}",
        (epsilon, 1),
        (2, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=8,
        color=INK,
    )
    for y, found, verdict in rows:
        assert found is not None and found.low is not None and found.high is not None and found.upper is not None
        colour, marker, fill = LOOKS[str(verdict)]
        axes.plot([found.low, found.high], [y, y], color=colour, lw=2, solid_capstyle="round")
        if verdict != INFERIOR:  # which the other bound shows
            axes.plot([found.upper] * 2, [y - 0.17, y + 0.17], color=colour, lw=1.4)
        axes.plot([found.mean], [y], marker, color=colour, ms=7, mfc=fill, mew=1.3)
    axes.set_title(title)
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4 if is_narrow() else 5))


def _key(verdict: str) -> Line2D:
    colour, marker, fill = LOOKS[verdict]
    return Line2D([], [], color=colour, marker=marker, mfc=fill, ms=6.5, mew=1.3, lw=2, label=verdict)


def _called(name: str, arms: Sequence[ArmResult]) -> str:
    return shortened(short_name(next(r.arm for r in arms if r.arm.name == name)))
