"""The crossover: speed-up of our packs over PEFT's loop against K × tokens, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from .records import BARE, CONTENDERS, OURS
from .summary import Cell

CROSSOVER_COLUMNS = ("shape", "modules", "pack", "tokens_of_a_trial", "tokens_of_the_pack", "speed_up", "low", "high")


def write_crossover(found: Sequence[Cell], folder: Path) -> None:
    """crossover.csv and crossover.png."""
    measured = [cell for cell in found if BARE in cell.ratios]
    with (folder / "crossover.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CROSSOVER_COLUMNS)
        for cell in measured:
            figure = cell.ratios[BARE]
            tokens = (f"{cell.padded_tokens:.0f}", f"{cell.pack * cell.padded_tokens:.0f}")
            ratios = (f"{value:.4f}" for value in (figure.median, figure.low, figure.high))
            writer.writerow([cell.shape, cell.modules, cell.pack, *tokens, *ratios])
    _draw(measured, folder / "crossover.png")


def write_cells(found: Sequence[Cell], path: Path) -> None:
    """Milliseconds a trial and step, one row a cell; the status where there are none."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "modules", "pack", "tokens", "padded_tokens", *CONTENDERS])
        for cell in found:
            entries = [
                cell.missing[name].status
                if name in cell.missing
                else f"{1000 * cell.seconds[name].median:.3f}"
                if name in cell.seconds
                else ""
                for name in CONTENDERS
            ]
            writer.writerow([cell.shape, cell.modules, cell.pack, cell.tokens, cell.padded_tokens, *entries])


def _draw(found: Sequence[Cell], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for shape, modules in dict.fromkeys((cell.shape, cell.modules) for cell in found):
        cells = sorted((c for c in found if (c.shape, c.modules) == (shape, modules)), key=lambda c: c.pack)
        x = [cell.pack * cell.padded_tokens for cell in cells]
        y = [cell.ratios[BARE].median for cell in cells]
        low = [cell.ratios[BARE].low for cell in cells]
        high = [cell.ratios[BARE].high for cell in cells]
        (line,) = axes.plot(x, y, marker="o", label=f"{shape}, {modules}")
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        for cell, at, height in zip(cells, x, y, strict=True):
            axes.annotate(f"K={cell.pack}", (at, height), xytext=(0, 6), textcoords="offset points", fontsize=7)
    axes.axhline(1.0, color="0.4", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.1 * max([1.0, *(cell.ratios[BARE].high for cell in found)]))
    axes.set_xlabel("tokens of the pack in a step (K × tokens of a trial)")
    axes.set_ylabel(f"speed-up of {OURS} over {BARE}")
    if found:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
