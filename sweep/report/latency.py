"""The report's section on what adapters cost when they answer."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sweep.report.drawing import Drawn, Numbers, draw
from sweep.report.sections import Section
from sweep.report.style import GRID, INK, SERIES, SOFT, WHITE, legend_above, new_figure
from sweep.report.tables import Cell, Row, Table
from sweep.report.words import join, plural, signed
from sweep.study.schema import Study

TITLE = "What does an adapter cost when it answers?"
BASE, MERGED, UNMERGED, MIXED = "base", "merged", "unmerged", "mixed"
COVERAGE = 0.95
Found = dict[str, Any]
CellFound = dict[str, Any]
Interval = tuple[float, float]


def latency_section(study: Study, found: Found, figures: Path) -> Section:
    """The section, its figure drawn and every time that was taken written beside the folder `figures`."""
    write_times(found, figures.parent / "latency.csv")
    drawn = draw(overheads, figures, found)
    return Section(
        TITLE,
        latency_sentences(study, found),
        (
            ("Overhead against the base, in %: the median over the turns, and its interval", overhead_table(found)),
            ("Milliseconds of one forward pass: the median, and the quartiles", times_table(found)),
        ),
        () if drawn is None else (drawn,),
    )


def overhead(cell: CellFound, variant: str) -> list[float]:
    """Of every turn: how many per cent longer than the base the variant took in it."""
    return [
        100 * (seconds / base - 1)
        for seconds, base in zip(cell["seconds"][variant], cell["seconds"][BASE], strict=True)
    ]


def median_interval(values: Sequence[float]) -> Interval | None:
    """Two order statistics that hold the median between them in at least 95 % of samples, whatever is drawn from;
    None for fewer than six values, which no two can.

    The number of values below the median is binomial (n, ½): the k-th smallest and largest have coverage
    1 − 2·P(at most k − 1 of n).
    """
    n, low = len(values), sorted(values)
    k = 0
    while 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n >= COVERAGE:
        k += 1
    return (low[k - 1], low[n - k]) if k else None


def latency_sentences(study: Study, found: Found) -> tuple[str, ...]:
    """What was measured, what it shows, how it stands to the paper, and what it does not show."""
    cells = found["cells"]
    shown = [v for v in found["variants"] if v["kind"] != BASE]
    merged = next(v["name"] for v in shown if v["kind"] == MERGED)
    said = [_said(cells, variant) for variant in shown]
    return (
        f"One forward pass, over batch × tokens, on {found['device']}, in {found['precision']} with "
        f"{found['attention']} attention: the base; merged, with the largest rank's update folded into its weights; "
        "each confirmed rank's adapter, unmerged; and rows of different adapters in one batch. In each of "
        f"{plural(found['repeats'], 'turn')} every variant ran once, in random order; overheads are against the base "
        "of the same turn, so what else the machine did meets all alike.",
        " ".join(said),
        _against_the_paper(cells, merged, [v["name"] for v in shown if v["kind"] == UNMERGED]),
        "It does not show: answers that are generated token by token with a cache, other devices, or engines with "
        "kernels of their own for adapters. Ours run batched matrix products beside the base's, in PyTorch. Putting "
        f"an adapter in place took {_standing(cells, UNMERGED, found)} and merging {_standing(cells, MERGED, found)} "
        "(medians); a pass does not pay for that, a switch does.",
    )


def overhead_table(found: Found) -> Table:
    names = [v["name"] for v in found["variants"] if v["kind"] != BASE]
    rows = []
    for cell in found["cells"]:
        cells = [Cell(_size(cell), value=cell["batch"] * cell["length"])]
        for name in names:
            if name not in cell["seconds"]:
                cells.append(Cell("–"))
                continue
            values = overhead(cell, name)
            ends = median_interval(values)
            below = "" if ends is None else f"{signed(ends[0], 1)} to {signed(ends[1], 1)}"
            middle = statistics.median(values)
            cells.append(Cell(signed(middle, 1), below, value=middle))
        rows.append(Row(tuple(cells)))
    return Table(("Batch × tokens", *names), tuple(rows))


def times_table(found: Found) -> Table:
    names = [v["name"] for v in found["variants"]]
    rows = []
    for cell in found["cells"]:
        cells = [Cell(_size(cell), value=cell["batch"] * cell["length"])]
        for name in names:
            times = [1000 * seconds for seconds in cell["seconds"].get(name, ())]
            if not times:
                cells.append(Cell("–"))
                continue
            low, middle, high = _quartiles(times)
            cells.append(Cell(_ms(middle), f"{_ms(low)} to {_ms(high)}", value=middle))
        rows.append(Row(tuple(cells)))
    return Table(("Batch × tokens", *names), tuple(rows))


def overheads(found: Found) -> tuple[Figure, Drawn] | None:
    variants = [v for v in found["variants"] if v["kind"] != BASE]
    cells = found["cells"]
    figure = new_figure(3.9)
    axes = figure.subplots()
    axes.axhline(0, color=INK, lw=0.9)
    told, numbers = [], []
    for i, variant in enumerate(variants):
        colour = SOFT if variant["kind"] == MERGED else SERIES[(i - 1) % len(SERIES)]
        aside = 0.7 * ((i + 0.5) / len(variants) - 0.5)
        for x, cell in enumerate(cells):
            if variant["name"] not in cell["seconds"]:
                continue
            values = overhead(cell, variant["name"])
            ends = median_interval(values) or (min(values), max(values))
            numbers.append((cell["batch"], cell["length"], variant["name"], statistics.median(values), *ends))
            axes.plot([x + aside] * 2, ends, color=colour, lw=2, solid_capstyle="round")
            axes.plot([x + aside], [statistics.median(values)], "o", color=colour, ms=6, mec=WHITE, mew=0.8)
        axes.plot([], [], "o", color=colour, label=variant["name"])
        told.append(_said(cells, variant))
    for x in range(1, len(cells)):
        axes.axvline(x - 0.5, color=GRID, lw=0.8)
    axes.grid(False, axis="x")
    axes.set_xticks(range(len(cells)), [_size(cell) for cell in cells])
    axes.set_xlabel("batch × tokens of a pass")
    axes.set_ylabel("overhead against the base, %")
    legend_above(figure, axes.get_legend_handles_labels()[0], 3, handlelength=1.2)
    lines = "95 % intervals of the medians" if found["repeats"] >= 6 else "the range of the turns"
    return figure, Drawn(
        "latency",
        "Overhead of a forward pass against the base",
        f"How much longer a pass takes than the base's in the same turn: medians over "
        f"{plural(found['repeats'], 'turn')}; lines are {lines}. At 0 an adapter costs nothing.",
        f"Overhead in per cent by batch and tokens. {' '.join(told)}",
        Numbers(
            ("batch", "tokens", "variant", "median overhead (%)", "low (%)", "high (%)"),
            numbers,
        ),
    )


def write_times(found: Found, to: Path) -> None:
    """Every time that was taken, a row each, in the order of the turns. Raises OSError."""
    with open(to, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["batch", "length", "variant", "turn", "seconds", "standing_seconds"])
        for cell in found["cells"]:
            for name, times in cell["seconds"].items():
                for turn, pair in enumerate(zip(times, cell["standing_seconds"][name], strict=True), start=1):
                    writer.writerow([cell["batch"], cell["length"], name, turn, *pair])


def _said(cells: Sequence[CellFound], variant: dict[str, Any]) -> str:
    """One variant's least and largest overhead, and where it is shown to be slower or faster than the base."""
    here = [cell for cell in cells if variant["name"] in cell["seconds"]]
    name = {MERGED: "Merged", UNMERGED: f"{variant['name']}, unmerged"}.get(variant["kind"], variant["name"])
    if not here:
        return f"{name}: not measured, no batch has a row for each."
    medians = [(statistics.median(overhead(cell, variant["name"])), _size(cell)) for cell in here]
    (least, at), (most, there) = min(medians), max(medians)
    verdicts = [_verdict(overhead(cell, variant["name"])) for cell in here]
    counted = f"{plural(len(here), 'size')}"
    if None in verdicts:
        shown = f"with so few turns no difference can be shown ({counted})"
    else:
        slower, faster = verdicts.count("slower"), verdicts.count("faster")
        parts = [f"shown slower at {slower} of {counted}" if slower else f"shown slower at none of {counted}"]
        parts += [f"shown faster at {faster}"] if faster else []
        shown = ", ".join(parts)
    if at == there:
        return f"{name}: {signed(least, 1)} % ({at}); {shown}."
    return f"{name}: {signed(least, 1)} % ({at}) to {signed(most, 1)} % ({there}); {shown}."


def _verdict(values: Sequence[float]) -> str | None:
    """Whether the median's interval lies on one side of 0."""
    ends = median_interval(values)
    if ends is None:
        return None
    return "slower" if ends[0] > 0 else "faster" if ends[1] < 0 else "no difference"


def _against_the_paper(cells: Sequence[CellFound], merged: str, unmerged: Sequence[str]) -> str:
    """Held against Hu et al. 2021, section 3, table 1."""
    told = (
        "Hu et al. 2021 (section 3, table 1) timed adapter layers in GPT-2 medium on a GPU: 21 % and 30 % above the "
        "base at batch 1 and 128 tokens, 2 % and 3 % at batch 32 and 512; LoRA they merged, which by its making adds "
        "nothing. Unmerged LoRA they did not time."
    )
    verdicts = [(_verdict(overhead(cell, merged)), _size(cell)) for cell in cells]
    apart = [f"{verdict} at {size}" for verdict, size in verdicts if verdict in ("slower", "faster")]
    if None in [verdict for verdict, _ in verdicts]:
        told += " Too few turns here to say whether merged LoRA agrees."
    elif apart:
        told += (
            f" Here the merged model is not the base's equal everywhere ({join(apart)}), though it has the same layers "
            "and as many bytes: that contradicts the paper, or tells how far these times can be trusted; with "
            f"{plural(len(cells), 'size')} at 95 % each, about {0.05 * len(cells):.2g} would differ by chance."
        )
    else:
        ends = [median_interval(overhead(cell, merged)) or (0.0, 0.0) for cell in cells]
        told += (
            " Here too no difference between the merged model and the base is shown at any size; the intervals leave "
            f"room for {signed(min(low for low, _ in ends), 1)} to {signed(max(high for _, high in ends), 1)} %."
        )
    return told + _by_size(cells, unmerged)


def _by_size(cells: Sequence[CellFound], unmerged: Sequence[str]) -> str:
    """Whether unmerged adapters cost more where a pass is small, as adapter layers do: intervals must not meet."""
    ordered = sorted(cells, key=lambda cell: int(cell["batch"]) * int(cell["length"]))
    if len(ordered) < 2 or not unmerged:
        return ""
    ends = []
    for cell in (ordered[0], ordered[-1]):
        of_turns = [statistics.fmean(turn) for turn in zip(*(overhead(cell, name) for name in unmerged), strict=True)]
        ends.append((statistics.median(of_turns), median_interval(of_turns)))
    (small, at_small), (large, at_large) = ends
    if at_small is None or at_large is None:
        return ""
    if at_small[0] > at_large[1]:
        verdict = "like adapter layers they cost more where a pass is small"
    elif at_small[1] < at_large[0]:
        verdict = "unlike adapter layers they cost more where a pass is large"
    else:
        verdict = (
            "the intervals meet, so it is not shown that they cost more where a pass is small, as adapter layers do"
        )
    return (
        f" Unmerged, adapters cost {signed(small, 1)} % ({signed(at_small[0], 1)} to {signed(at_small[1], 1)}) at the "
        f"fewest tokens ({_size(ordered[0])}) and {signed(large, 1)} % ({signed(at_large[0], 1)} to "
        f"{signed(at_large[1], 1)}) at the most ({_size(ordered[-1])}), means over the ranks: {verdict}."
    )


def _standing(cells: Sequence[CellFound], kind: str, found: Found) -> str:
    names = [v["name"] for v in found["variants"] if v["kind"] == kind]
    times = [1000 * t for cell in cells for name in names for t in cell["standing_seconds"].get(name, ())]
    return f"{_ms(statistics.median(times))} ms"


def _quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def _size(cell: CellFound) -> str:
    return f"{cell['batch']} × {cell['length']}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
