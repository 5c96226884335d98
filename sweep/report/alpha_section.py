"""The report's part on alpha: whether it does what the learning rate does."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from sweep.report.alpha import AlphaFit, alpha_fits, alpha_sentences
from sweep.report.drawing import Drawn, Numbers, draw
from sweep.report.intervals import t_interval
from sweep.report.sections import Section
from sweep.report.style import SERIES, legend_above, loss_axis, new_figure, readable_log
from sweep.report.tables import Cell, Row, Table
from sweep.report.words import loss_decimals, number, plural, rate, span
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

MARKERS = "osD^vP"
MEANING = (
    "A ratio's best rate is the lowest point of a parabola, in logs, through the losses of a seed at the rate that is "
    "best on average and at the two beside it; the interval is over seeds, and does not hold what the choice of "
    "ratios, rates and of the parabola does. If alpha were a learning rate, the best rate would fall as 1 / alpha, an "
    "exponent of −1, and the curves would lie on one another once the rate is multiplied by alpha / r; 0 were alpha to "
    "do nothing. AdamW's steps do not depend on the size of a gradient, so that twice the alpha is exactly twice the "
    "rate of B alone (A keeps its own): −1 while A has hardly moved, and −1/2 where A's own steps matter as much, "
    "since the rate then counts twice and alpha once."
)
HEAD = " The classifier's head is trained at the learning rate too, and alpha does not reach it."


def alpha_section(study: Study, record: StudyRecord, figures: Path) -> Section | None:
    """None where no arms that differ in alpha alone were confirmed at several rates (`confirm.finalists: rate`)."""
    fits = alpha_fits(study, record)
    if not fits:
        return None
    names = ["alpha-and-rate" + (f"-{i}" if len(fits) > 1 else "") for i in range(1, len(fits) + 1)]
    drawn = [draw(loss_by_effective_rate, figures, fit, name) for fit, name in zip(fits, names, strict=True)]
    meaning = MEANING + (HEAD if study.task != "causal-lm" else "")
    return Section(
        "Is alpha a learning rate?",
        (*alpha_sentences(fits), meaning),
        tuple(
            (f"Test loss by alpha ratio and learning rate, {fit.title}: means with 95 % intervals", _table(study, fit))
            for fit in fits
        ),
        tuple(d for d in drawn if d is not None),
    )


def loss_by_effective_rate(fit: AlphaFit, name: str) -> tuple[Figure, Drawn] | None:
    figure = new_figure(3.5)
    panels = figure.subplots(1, 2, sharey=True)
    ratios = sorted({ratio for ratio, _ in fit.cells})
    losses = []
    for axes, effective in zip(panels, (False, True), strict=True):
        places = []
        for i, ratio in enumerate(ratios):
            rates = sorted(at for own, at in fit.cells if own == ratio)
            x = [at * ratio if effective else at for at in rates]
            found = [t_interval(list(fit.cells[ratio, at].values())) for at in rates]
            colour = SERIES[i % len(SERIES)]
            for place, interval in zip(x, found, strict=True):
                if interval.low is not None:
                    axes.plot([place, place], [interval.low, interval.high], color=colour, lw=1.0, alpha=0.7)
            axes.plot(
                x,
                [f.mean for f in found],
                marker=MARKERS[i % len(MARKERS)],
                ms=5,
                lw=1.4,
                color=colour,
                label=f"alpha ratio {ratio:g}" if not effective else None,
            )
            places += x
            losses += [value for f in found for value in (f.mean, f.low, f.high) if value is not None and value > 0]
        axes.set_xscale("log")
        readable_log(axes.xaxis, min(places), max(places))
        axes.set_xlabel("alpha ratio × learning rate" if effective else "learning rate")
    panels[0].set_title("against the rate")
    panels[1].set_title("against ratio × rate")
    panels[0].set_ylabel("test loss (nats)")
    loss_axis(panels[0], losses)
    legend_above(figure, panels[0].get_legend_handles_labels()[0], 4)
    values = "; ".join(
        f"ratio {ratio:g} at {rate(at)} {t_interval(list(losses_of.values())).mean:.3f}"
        for (ratio, at), losses_of in sorted(fit.cells.items())
    )
    return figure, Drawn(
        name,
        f"Alpha ratio and learning rate, {fit.title}",
        "Test loss of the confirm trials at every learning rate (log scale): means over the seeds with 95 % "
        "t-intervals, a line for each alpha ratio. On the right the rate is multiplied by the ratio: were alpha a "
        "learning rate, the lines would lie on one another.",
        f"Two panels of test loss, against learning rate and against alpha ratio times learning rate. Means: {values}.",
        _numbers(fit),
    )


def _numbers(fit: AlphaFit) -> Numbers:
    heads = (
        "alpha ratio",
        "learning rate",
        "ratio × rate",
        "mean test loss (nats)",
        "95 % interval, low (nats)",
        "95 % interval, high (nats)",
        "seeds",
    )
    rows = []
    for (ratio, at), losses in sorted(fit.cells.items()):
        found = t_interval(list(losses.values()))
        rows.append((ratio, at, ratio * at, found.mean, found.low, found.high, found.n))
    return Numbers(heads, rows)


def _table(study: Study, fit: AlphaFit) -> Table:
    decimals = loss_decimals(study.confirm.epsilon)
    rates = sorted({at for _, at in fit.cells})
    rows = []
    for ratio in sorted({ratio for ratio, _ in fit.cells}):
        cells = []
        for at in rates:
            losses = list(fit.cells.get((ratio, at), {}).values())
            interval = t_interval(losses) if losses else None
            cells.append(
                Cell("–")
                if interval is None
                else Cell(
                    number(interval.mean, decimals),
                    span(interval.low, interval.high, decimals),
                    "" if interval.n == fit.seeds else f"{interval.n} of {plural(fit.seeds, 'seed')}",
                    interval.mean,
                )
            )
        rows.append(Row((Cell(f"alpha ratio {ratio:g}", value=ratio), *cells)))
    return Table(("Alpha ratio", *(f"rate {rate(at)}" for at in rates)), tuple(rows))
