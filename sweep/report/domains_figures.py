"""Figures of an analysis across domains."""

from __future__ import annotations

from matplotlib.figure import Figure

from sweep.report.domains import (
    MIXED,
    Found,
    bits_per_byte,
    by_distance,
    changes,
    over_seeds,
    rank_gain_bits,
    ranks,
)
from sweep.report.drawing import Drawn, Numbers
from sweep.report.style import (
    FAINT,
    INK,
    SERIES,
    SOFT,
    WHITE,
    grid_of,
    hide_empty,
    legend_above,
    new_figure,
    rank_axis,
    text_colour,
    wrapped,
)


def domain_losses(found: Found) -> tuple[Figure, Drawn] | None:
    domains, tried = found["domains"], ranks(found)
    if not tried:
        return None
    colours = {a: INK if a == MIXED else SERIES[i % len(SERIES)] for i, a in enumerate([*domains, MIXED])}
    rows, columns = grid_of(len(domains))
    figure = new_figure(0.6 + 2.4 * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel())
    numbers: list[tuple[object, ...]] = []
    for axes, text in zip(panels, domains, strict=False):
        rank_axis(axes, tried)
        axes.axhline(0, color=FAINT, lw=1.4)
        axes.set_title(f"text: {text}")
        for adapter, colour in colours.items():
            points = [(rank, over_seeds(changes(found, adapter, rank, text))) for rank in tried]
            known = [(rank, at) for rank, at in points if at is not None]
            line = axes.plot([r for r, _ in known], [at.mean for _, at in known], "o-", color=colour, ms=5, lw=1.6)
            if adapter == MIXED:
                line[0].set_linestyle((0, (4, 2)))
            numbers += [(text, adapter, rank, at.mean, at.low, at.high, at.n) for rank, at in known]
            for rank, at in known:
                if at.low is not None and at.high is not None:
                    axes.plot([rank, rank], [at.low, at.high], color=colour, lw=1.6, alpha=0.6)
    hide_empty(panels, len(domains), columns)
    measured = [a for a in colours if any(row["adapter"] == a for row in found["losses"])]
    handles = [panels[0].plot([], [], "o-", color=colours[a], ms=5, label=f"adapter: {a}")[0] for a in measured]
    legend_above(figure, handles, 4)
    figure.supxlabel("rank", fontsize=9.5, color=SOFT)
    figure.supylabel("change of test loss (nats a token)", fontsize=9.5, color=SOFT)
    return figure, Drawn(
        "domain-losses",
        "Each adapter on each domain's text",
        "Test loss with an adapter on, less that of the base, against rank: means over the seeds with 95 % intervals. "
        "Below 0 the adapter helps; above 0 it costs.",
        f"Change of test loss against rank, one panel for the text of each of {', '.join(domains)}, one line for each "
        "domain's adapter and for the mixture.",
        Numbers(
            (
                "text",
                "adapter",
                "rank",
                "change of test loss, mean (nats a token)",
                "95 % interval, low (nats a token)",
                "95 % interval, high (nats a token)",
                "seeds",
            ),
            numbers,
        ),
    )


def gain_by_distance(found: Found) -> tuple[Figure, Drawn] | None:
    tried = ranks(found)
    if len(tried) < 2:
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    axes.axhline(0, color=FAINT, lw=1.4)
    numbers: list[tuple[object, ...]] = []
    for i, domain in enumerate(found["domains"]):
        colour, gains = SERIES[i % len(SERIES)], rank_gain_bits(found, domain)
        x, at = bits_per_byte(found, domain, found["base"][domain]), over_seeds(gains)
        if at is None:
            continue
        numbers.append((domain, "mean", x, at.mean, at.low, at.high))
        numbers += [(domain, f"seed {seed}", x, gain, None, None) for seed, gain in gains.items()]
        axes.plot([x] * len(gains), list(gains.values()), "o", color=colour, ms=4, mew=0, alpha=0.35)
        if at.low is not None and at.high is not None:
            axes.plot([x, x], [at.low, at.high], color=colour, lw=2, solid_capstyle="round")
        axes.plot([x], [at.mean], "o", color=colour, ms=7.5, mec=WHITE)
        axes.annotate(domain, (x, at.mean), (8, 0), textcoords="offset points", va="center", color=text_colour(colour))
    axes.margins(x=0.15)
    axes.set_xlabel(wrapped("loss of the base (bits a byte): further right, further from what it knows"))
    axes.set_ylabel(f"loss of rank {tried[0]} − rank {tried[-1]}\n(bits a byte)")
    return figure, Drawn(
        "gain-by-distance",
        "What a larger rank gains, by how far the domain is from the base",
        f"Test loss of rank {tried[0]} less that of rank {tried[-1]}, each on the domain that it learned, paired by "
        f"seed: mean with 95 % interval, and each seed. {len(found['domains'])} domains are points, not a trend.",
        f"Gain of rank {tried[-1]} over rank {tried[0]} against the base's loss, one point for each of "
        f"{', '.join(by_distance(found))}.",
        Numbers(
            (
                "domain",
                "what",
                "loss of the base (bits a byte)",
                f"loss of rank {tried[0]} − rank {tried[-1]} (bits a byte)",
                "95 % interval, low (bits a byte)",
                "95 % interval, high (bits a byte)",
            ),
            numbers,
        ),
    )
