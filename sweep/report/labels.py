"""Labels that cover no mark: those of lines outside the axes, those of points where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from sweep.report.style import WHITE, settle, spread, text_colour

TEXT: dict[str, Any] = {"fontsize": 8.5, "xytext": (0, 0), "textcoords": "offset points"}
ROW = 12.0  # points from one line of text to the next
AWAY = 5.0  # points between a mark and its label
ALIGNED = (("center", 0.0), ("left", 0.6), ("right", 0.6))  # and how much worse each is
BEFORE = {"left": 0.0, "center": 0.5, "right": 1.0}  # how much of a label is left of where it is anchored
MARK, LINE, OUTSIDE = 10.0, 3.0, 30.0  # how bad it is to cover a mark or a label, a line, or to leave the axes


@dataclass(frozen=True)
class PointLabel:
    x: float
    low: float  # the ends of what is drawn at x
    high: float
    text: str
    colour: str


def label_lines(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Name horizontal lines by their labels, in the right margin; names nearer than a line are spread."""
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height * 72 / axes.figure.dpi
    places = spread([height_of(line) for line in lines], 1.15 * ROW / points * (high - low))
    for line, place in zip(lines, places, strict=True):
        colour = line.get_color()
        axes.annotate(
            str(line.get_label()),
            (1, height_of(line)),
            (1.03, place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            color=text_colour(colour),
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 0},
        )


def height_of(line: Line2D) -> float:
    return float(np.asarray(line.get_ydata())[0])


def label_points(
    axes: Axes, labels: Sequence[PointLabel], marks: Sequence[tuple[float, float, float]], lines: Sequence[float]
) -> None:
    """Put each label above or below its own marks, centred or aside, where it covers least. marks: (x, low, high).

    It comes last: the figure's layout is settled by it, and nothing that is put in later gets room.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    settle(figure)  # the layout decides where the marks are
    pixel = figure.dpi / 72
    inside = axes.get_window_extent()
    taken = [(_around(axes, *mark, 4 * pixel), MARK) for mark in marks]
    for y in lines:
        height = axes.transData.transform((labels[0].x, y))[1] if labels else 0.0
        taken.append((Bbox.from_extents(inside.x0, height - pixel, inside.x1, height + pixel), LINE))
    for label in labels:
        text = axes.annotate(label.text, (label.x, label.high), color=text_colour(label.colour), **TEXT)
        text.set_path_effects([withStroke(linewidth=2.5, foreground=WHITE)])
        size = text.get_window_extent()
        above, below = ((label.x, label.high), AWAY, "bottom"), ((label.x, label.low), -AWAY, "top")
        best: tuple[float, Any, Bbox] | None = None
        for further in (0.0, ROW, 2 * ROW):
            for (at, offset, side), (align, worse) in product((above, below), ALIGNED):
                offset += further if offset > 0 else -further
                x, y = axes.transData.transform(at)
                left = x - size.width * BEFORE[align]
                bottom = y + offset * pixel - size.height * (side == "top")
                box = Bbox.from_bounds(left, bottom, size.width, size.height)
                cost = sum(weight for other, weight in taken if box.overlaps(other)) + further / ROW + worse
                cost += OUTSIDE * (box.y0 < inside.y0 or box.y1 > inside.y1)
                cost += OUTSIDE * (box.x0 < inside.x0 or box.x1 > figure.bbox.x1)
                if best is None or cost < best[0]:
                    best = (cost, {"at": at, "offset": offset, "ha": align, "va": side}, box)
        assert best is not None
        _, place, box = best
        text.xy, text.xyann = place["at"], (0, place["offset"])
        text.set(ha=place["ha"], va=place["va"])
        taken.append((box, MARK))


def _around(axes: Axes, x: float, low: float, high: float, air: float) -> Bbox:
    ends = axes.transData.transform([(x, low), (x, high)])
    return Bbox.from_extents(ends[0][0] - air, ends[0][1] - air, ends[1][0] + air, ends[1][1] + air)
