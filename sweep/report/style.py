"""How figures look: one style, colours that colour-blind readers tell apart, axes whose ticks can be read."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Okabe & Ito's palette.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
)
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
INK, SOFT, FAINT, WHITE = "#222222", "#6b6b6b", "#d9d9d9", "#ffffff"
AXIS, GRID, BAND, EMPTY = "#9a9a9a", "#ececec", "#e4e4e4", "#f4f4f4"
# The series' colours are too light for text on paper: the same hues, with a contrast of 4.5 and more.
TEXT = {
    ORANGE: "#8a5f00",
    SKY: "#1b6d9c",
    GREEN: "#00704f",
    VERMILION: "#b34a00",
    PURPLE: "#9a3d74",
}
# What the page's style sheet knows each colour as; there it has a light and a dark value.
VARIABLES = {
    BLACK: "black",
    ORANGE: "orange",
    SKY: "sky",
    GREEN: "green",
    BLUE: "blue",
    VERMILION: "vermilion",
    PURPLE: "purple",
    INK: "ink",
    SOFT: "soft",
    FAINT: "faint",
    WHITE: "paper",
    AXIS: "axis",
    GRID: "grid",
    BAND: "band",
    EMPTY: "empty",
    TEXT[ORANGE]: "orange-text",
    TEXT[SKY]: "sky-text",
    TEXT[GREEN]: "green-text",
    TEXT[VERMILION]: "vermilion-text",
    TEXT[PURPLE]: "purple-text",
}
LEGEND_CHARACTERS = 16.0  # of a legend's text in a row, for each inch of width
LABEL_CHARACTERS = 12.0  # of an axis's label in a line, for each inch of width
PANEL_CHARACTERS = 18  # of a panel's title, or an arm's name, where it is narrow
LEGEND_ROW = 0.17  # inches
WIDE, NARROW = 6.2, 3.7  # inches: text is as large as the page's on a screen, and on a phone
DPI = 150
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": AXIS,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": WHITE,
    "figure.figsize": (WIDE, 4.0),
    "svg.fonttype": "path",
    "svg.hashsalt": "sweep",
}
NARROW_STYLE = {**STYLE, "figure.figsize": (NARROW, 4.0)}


def new_figure(height: float) -> Figure:
    """A figure of that many inches, as wide as the style in use says."""
    return Figure(figsize=(rcParams["figure.figsize"][0], height), layout="constrained")


def settle(figure: Figure) -> None:
    """Lay the figure out, once and for all: else it is laid out, and drawn, twice for every file it is written to."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)


def is_narrow() -> bool:
    """Whether the style in use is the one for phones."""
    return bool(rcParams["figure.figsize"][0] < WIDE)


def wrapped(label: str) -> str:
    """An axis's label in as many lines as the style in use needs."""
    return "\n".join(wrap(label, int(LABEL_CHARACTERS * rcParams["figure.figsize"][0])))


def panel_title(axes: Axes, title: str) -> None:
    """Of one of several panels."""
    axes.set_title(shortened(title))


def shortened(name: str) -> str:
    """Where it is narrow, a long name's beginning is left out."""
    return name if len(name) <= PANEL_CHARACTERS or not is_narrow() else f"…{name[1 - PANEL_CHARACTERS :]}"


def text_colour(colour: str) -> str:
    """For words about a series of that colour."""
    return TEXT.get(colour, colour)


def legend_columns(labels: Sequence[str], most: int) -> int:
    """How many entries of a legend above the axes fit beside one another."""
    longest = max((len(label) for label in labels), default=0)
    fit = int(LEGEND_CHARACTERS * rcParams["figure.figsize"][0]) // (longest + 5)  # 5: the handle and the gap
    return max(1, min(most, len(labels), fit))


def legend_above(figure: Figure, handles: Sequence[Any], most: int, **how: Any) -> None:
    """A legend above the axes, with as many entries in a row as fit, and at most `most`; the figure grows by it."""
    columns = legend_columns([str(handle.get_label()) for handle in handles], most)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (-(-len(handles) // columns) - 1))
    how = {"fontsize": 8.5, "handlelength": 1.6, "columnspacing": 1.4, **how}
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns, **how)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places for labels: near where they belong, and at least `gap` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    put = [places[i] for i in order]
    for _ in range(60):
        moved = False
        for i in range(len(put) - 1):
            lack = gap - (put[i + 1] - put[i])
            if lack > gap * 1e-3:
                put[i] -= lack / 2
                put[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(places)
    for i, place in zip(order, put, strict=True):
        result[i] = place
    return result


def readable_log(axis: Axis, low: float, high: float) -> None:
    """A log axis with ticks at 1, 2, 5 (at 1, 3 or at 1 over a longer way), written as plain numbers."""
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.8 else (1.0, 3.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda x, _: _plain(x)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Log where losses span more than a factor 4, else linear; with some air."""
    low, high = min(losses), max(losses)
    if low > 0 and high / low > 4:
        axes.set_yscale("log")
        readable_log(axes.yaxis, low, high)
        axes.set_ylim(low / 1.15, high * 1.15)
    else:
        air = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
        axes.set_ylim(low - air, high + air)


def rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    """Ranks on a log2 axis, a tick for each that was tried."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(r) for r in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    wide = max(1.6, (ranks[-1] / ranks[0]) ** 0.09) if len(ranks) > 1 else 3
    axes.set_xlim(ranks[0] / wide, ranks[-1] * wide)
    axes.grid(False, axis="x")


def grid_of(n: int) -> tuple[int, int]:
    """(rows, columns) of small multiples."""
    most = 2 if is_narrow() else 3
    columns = min(n, most if n != 4 else 2)
    return -(-n // columns), columns


def hide_empty(panels: Sequence[Axes], used: int, columns: int) -> None:
    """Hide the panels that hold nothing; the ones above them then show the ticks of the shared axis."""
    for i in range(used, len(panels)):
        panels[i].set_visible(False)
        if i >= columns:
            panels[i - columns].tick_params(labelbottom=True)


def _plain(x: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if x >= limit:
            return f"{x / (1000 if unit == 'k' else limit):g} {unit}"
    return f"{x:g}"
