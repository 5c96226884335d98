"""From a figure's function to what a report carries: a PNG, the numbers behind it as CSV, and SVG for the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from sweep.report.style import DPI, NARROW_STYLE, STYLE, settle
from sweep.report.svg import inline_svg


@dataclass(frozen=True)
class Numbers:
    """What a figure shows, in full precision; the heads name the units. None is written as nothing."""

    heads: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    def as_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.heads)
        writer.writerows(self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. `name` is its files without .png and .csv; `alt` is for those who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    numbers: Numbers
    wide: str = ""  # SVG for a page, and for a phone
    narrow: str = ""


def draw(figure: Callable[..., tuple[Figure, Drawn] | None], to: Path, *args: object) -> Drawn | None:
    """Draw one figure, and write its PNG and CSV into the folder `to`; None where there is nothing to show."""
    with rc_context(STYLE):
        made = figure(*args)
        if made is None:
            return None
        canvas, drawn = made
        settle(canvas)
        canvas.savefig(to / f"{drawn.name}.png", dpi=DPI, metadata={"Software": None})
        wide = inline_svg(canvas, f"{drawn.name}-wide")
    (to / f"{drawn.name}.csv").write_text(drawn.numbers.as_csv(), encoding="utf-8")
    with rc_context(NARROW_STYLE):
        again = figure(*args)
        assert again is not None
        settle(again[0])
        return replace(drawn, wide=wide, narrow=inline_svg(again[0], f"{drawn.name}-narrow"))
