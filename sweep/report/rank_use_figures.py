"""Figures of the rank that updates use: spectra, effective rank by layer, shared directions, truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweep.report.drawing import Drawn, Numbers
from sweep.report.intervals import t_interval
from sweep.report.marks import mark_mean, mark_seeds
from sweep.report.rank_use_numbers import (
    Found,
    Truncated,
    arms_of,
    called,
    chosen_of,
    kinds_of,
    rows_of,
    similarity_of,
    trained_losses,
)
from sweep.report.style import (
    BLUE,
    SERIES,
    SOFT,
    VERMILION,
    grid_of,
    hide_empty,
    legend_above,
    loss_axis,
    new_figure,
    panel_title,
    rank_axis,
    readable_log,
)
from sweep.study.arms import Arm
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

MOST_PANELS = 9


def spectra(study: Study, found: Found) -> tuple[Figure, Drawn] | None:
    kinds, arms = kinds_of(found)[:MOST_PANELS], arms_of(study, found)
    rows, columns = grid_of(len(kinds))
    figure = new_figure(0.9 + 2.1 * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel())
    tops, ends = [], [1]
    numbers: list[tuple[object, ...]] = []
    for axes, kind in zip(panels, kinds, strict=False):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for i, arm in enumerate(arms):
            at, mean = _mean_spectrum([row for row in rows_of(found, arm) if row["kind"] == kind])
            if not at:
                continue
            colour = SOFT if arm.is_full else SERIES[i % len(SERIES)]
            axes.plot(at, mean, "o-", color=colour, lw=1.4, ms=3, label=called(study, found, arm))
            numbers += [(kind, called(study, found, arm), *point) for point in zip(at, mean, strict=True)]
            tops.append(mean[0])
            ends.append(at[-1])
        panel_title(axes, kind)
    if not tops:
        return None
    panels[0].set_ylim(max(tops) / 1e4, max(tops) * 2)
    readable_log(panels[0].xaxis, 1, max(ends))
    hide_empty(panels, len(kinds), columns)
    legend_above(figure, panels[0].get_legend_handles_labels()[0], 5)
    figure.supxlabel("index of the singular value (log scale)", fontsize=9.5, color=SOFT)
    figure.supylabel("singular value of ΔW (log scale)", fontsize=9.5, color=SOFT)
    more = len(kinds_of(found)) - len(kinds)
    return figure, Drawn(
        "rank-use-spectra",
        "Spectra of the updates",
        "Singular values of ΔW, geometric means over the blocks and the seeds, one panel for each kind of layer; a "
        "line ends where an arm's rank does, and values below a ten-thousandth of the largest are cut off."
        + (f" {more} more kinds are in rank-use.csv." if more else ""),
        f"Singular values of the updates against their index on log scales, for {', '.join(kinds)}.",
        Numbers(("layers", "arm", "index", "singular value of ΔW, geometric mean"), numbers),
    )


def rank_by_layer(study: Study, found: Found) -> tuple[Figure, Drawn] | None:
    arms, kinds = arms_of(study, found), kinds_of(found)[: len(SERIES)]
    blocks = sorted({row["block"] for row in found["layers"] if row["block"] is not None})
    if len(blocks) < 2:
        return None
    rows, columns = grid_of(len(arms))
    figure = new_figure(0.9 + 2.1 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    numbers: list[tuple[object, ...]] = []
    for axes, arm in zip(panels, arms, strict=False):
        highest = 0.0
        for i, kind in enumerate(kinds):
            here = [row for row in rows_of(found, arm) if row["kind"] == kind]
            mean = {b: [row["effective_rank"] for row in here if row["block"] == b] for b in blocks}
            at = [b for b in blocks if mean[b]]
            heights = [float(np.mean(mean[b])) for b in at]
            axes.plot(at, heights, "o-", color=SERIES[i % len(SERIES)], lw=1.2, ms=3, label=kind)
            numbers += [(called(study, found, arm), kind, *point) for point in zip(at, heights, strict=True)]
            highest = max([highest, *heights])
        axes.set_ylim(0, 1.08 * max(highest, arm.r))
        if arm.r:
            axes.axhline(arm.r, color=SOFT, lw=0.9, ls=(0, (5, 3)))
        panel_title(axes, called(study, found, arm))
        axes.set_xticks(blocks[:: max(1, len(blocks) // 6)])
    hide_empty(panels, len(arms), columns)
    legend_above(figure, panels[0].get_legend_handles_labels()[0], 3)
    figure.supxlabel("block", fontsize=9.5, color=SOFT)
    figure.supylabel("effective rank of ΔW", fontsize=9.5, color=SOFT)
    return figure, Drawn(
        "rank-use-layers",
        "Effective rank by layer",
        "Effective rank of each layer's update, the mean over the seeds; the dashed line is the arm's rank, which it "
        "cannot exceed but in DoRA and PiSSA. Each panel has its own scale.",
        f"Effective rank against the block, one panel for each of {', '.join(called(study, found, a) for a in arms)}.",
        Numbers(("arm", "layers", "block", "effective rank of ΔW, mean over the seeds"), numbers),
    )


def subspaces(study: Study, found: Found) -> tuple[Figure, Drawn] | None:
    *smaller, largest = chosen_of(study, found)
    small = smaller[-1] if smaller else largest
    wanted: list[tuple[str, str, Arm, Arm]] = [("A", "A", small, largest), ("A", "A", largest, largest)]
    wanted += [("chance", "random input", small, largest)]
    for of in ("input", "output"):
        wanted += [(of, of, small, largest), (of, of, largest, largest)]
        wanted += [(of, of, largest, arm) for arm in arms_of(study, found) if arm.is_full]
    panels: list[tuple[str, Mapping[str, Any], Arm, Arm]] = []
    for name, of, one, other in dict.fromkeys(wanted):
        entry = similarity_of(found, of, one, other) or similarity_of(found, of, one, other, same_seed=True)
        if entry is not None:
            panels.append((name, entry, one, other))
    if not panels:
        return None
    rows, columns = grid_of(len(panels))
    figure = new_figure(0.7 + 2.3 * rows)
    axes_of = list(figure.subplots(rows, columns, squeeze=False).ravel())
    brightest = max(max(max(row) for row in entry["grid"]) for _, entry, _, _ in panels)
    for axes, (name, entry, one, other) in zip(axes_of, panels, strict=False):
        image = _heat(axes, entry, brightest)
        axes.set_title(f"{name}: {one.r} and {'full' if other.is_full else other.r}")
        axes.set_xlabel(f"j, of {_short(other)}", fontsize=8.5)
        axes.set_ylabel(f"i, of {_short(one)}", fontsize=8.5)
    hide_empty(axes_of, len(panels), columns)
    figure.colorbar(image, ax=axes_of, shrink=0.7, aspect=30, label="φ(i, j)")
    values = "; ".join(f"{name} {one.name} and {other.name} {_top(entry):.2f}" for name, entry, one, other in panels)
    return figure, Drawn(
        "rank-use-subspaces",
        "Directions that two trials share",
        "φ(i, j): how much of the space of one's i strongest directions lies in the other's j strongest, 1 for "
        "all and 0 for nothing; after the LoRA paper's figures 3 and 4. Means over the layers and over pairs of "
        "different seeds. A: the right singular vectors of A, as in the paper; input and output: the right and the "
        "left ones of ΔW; chance: random Gaussian matrices. The scale ends at the largest value shown.",
        f"Heat maps of the subspace similarity. φ(1, 1): {values}.",
        Numbers(
            ("directions", "one", "other", "i, of one", "j, of the other", "φ(i, j), 0 to 1"),
            [
                (name, one.name, other.name, i, j, entry["grid"][row][column])
                for name, entry, one, other in panels
                for row, i in enumerate(entry["i"])
                for column, j in enumerate(entry["j"])
            ],
        ),
    )


def truncation(
    study: Study, record: StudyRecord, found: Found, rows: Sequence[Truncated]
) -> tuple[Figure, Drawn] | None:
    chosen = {arm.r: arm for arm in chosen_of(study, found)}
    rows = [row for row in rows if row.rank in chosen]
    if len(rows) < 2:
        return None
    figure = new_figure(3.5)
    axes = figure.subplots()
    rank_axis(axes, [row.rank for row in rows])
    heights: list[float] = []
    numbers: list[tuple[object, ...]] = []
    for row in rows:
        cut = {entry["seed"]: entry["test_loss"] for entry in found["truncated"] if entry["rank"] == row.rank}
        trained = trained_losses(record, chosen[row.rank])
        for what, by_seed, aside, colour in (("truncated", cut, 0.94, VERMILION), ("trained", trained, 1.06, BLUE)):
            losses = list(by_seed.values())
            if losses:
                at = t_interval(losses)
                numbers.append((row.rank, what, "mean", at.mean, at.low, at.high))
                numbers += [(row.rank, what, f"seed {seed}", loss, None, None) for seed, loss in by_seed.items()]
                mark_seeds(axes, row.rank * aside, losses, colour)
                mark_mean(axes, row.rank * aside, at.mean, at.low, at.high, colour)
                heights += [*losses, *(end for end in (at.low, at.high) if end is not None)]
    loss_axis(axes, heights)
    handles = axes.plot([], [], "o-", color=VERMILION, label=f"rank {max(chosen)}, truncated to it by SVD")
    handles += axes.plot([], [], "o-", color=BLUE, label="trained at it")
    legend_above(figure, handles, 2)
    axes.set_xlabel("rank (log scale)")
    axes.set_ylabel("test loss at the last step (nats)")
    values = "; ".join(f"rank {row.rank} {row.loss.mean:.3f}" for row in rows)
    return figure, Drawn(
        "rank-use-truncated",
        "Truncated against trained",
        f"Test loss of the adapters of rank {max(chosen)} cut to their strongest singular parts at every layer, beside "
        "adapters trained at that rank: means with 95 % t-intervals over the seeds, each seed as a faint dot. A "
        "truncated adapter keeps its own head.",
        f"Test loss against rank. Truncated: {values}.",
        Numbers(
            (
                "rank",
                "adapters",
                "what",
                "test loss (nats)",
                "95 % interval, low (nats)",
                "95 % interval, high (nats)",
            ),
            numbers,
        ),
    )


def _mean_spectrum(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """(indices, geometric means) of the singular values that all rows have and none of which is nothing."""
    at = sorted(set.intersection(*(set(row["steps"]) for row in rows))) if rows else []
    columns = {i: [row["singular_values"][row["steps"].index(i)] for row in rows] for i in at}
    at = [i for i in at if min(columns[i]) > 0]
    return at, [float(np.exp(np.mean(np.log(columns[i])))) for i in at]


def _heat(axes: Axes, entry: Mapping[str, Any], brightest: float) -> Any:
    grid = np.array(entry["grid"])
    image = axes.imshow(grid, cmap=colormaps["cividis"], vmin=0, vmax=brightest, origin="upper", aspect="auto")
    for numbers, ticks in ((entry["j"], axes.set_xticks), (entry["i"], axes.set_yticks)):
        places = [k for k, n in enumerate(numbers) if n.bit_count() == 1 or k == len(numbers) - 1]
        ticks(places, [str(numbers[k]) for k in places], fontsize=8)
    axes.grid(False)
    axes.tick_params(length=0)
    return image


def _top(entry: Mapping[str, Any]) -> float:
    return float(np.mean(entry["top"]))


def _short(arm: Arm) -> str:
    return "full" if arm.is_full else f"r = {arm.r}"
