"""A part of the report that one analysis fills; it stands behind what was confirmed."""

from __future__ import annotations

from dataclasses import dataclass

from sweep.report.drawing import Drawn
from sweep.report.tables import Table


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: tuple[str, ...]
    tables: tuple[tuple[str, Table], ...] = ()  # (caption, table)
    figures: tuple[Drawn, ...] = ()  # drawn into the report's figures/
    listings: tuple[tuple[str, str], ...] = ()  # (caption, text to copy)
