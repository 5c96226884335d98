"""Marks that figures of confirmed arms share: a mean with its interval and seeds, and its colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from sweep.report.results import ArmResult, Findings
from sweep.report.style import BLUE, SOFT, VERMILION, WHITE
from sweep.study.arms import Arm


def short_name(arm: Arm) -> str:
    return "full fine-tuning" if arm.is_full else arm.name


def colour_of(result: ArmResult, findings: Findings) -> str:
    """The recommended arm stands out; full fine-tuning stays in the background."""
    if result.arm.name == findings.recommended:
        return VERMILION
    return SOFT if result.arm.is_full else BLUE


def lowest(result: ArmResult) -> float:
    return min(result.test_losses) if result.loss_low is None else min(result.loss_low, *result.test_losses)


def highest(result: ArmResult) -> float:
    return max(result.test_losses) if result.loss_high is None else max(result.loss_high, *result.test_losses)


def mark_mean(axes: Axes, x: float, mean: float, low: float | None, high: float | None, colour: str) -> None:
    """A mean as a dot, with its interval as a line where it has one."""
    if low is not None and high is not None:
        axes.plot([x, x], [low, high], color=colour, lw=2, solid_capstyle="round")
    axes.plot([x], [mean], "o", color=colour, ms=7.5, mec=WHITE, mew=1)


def mark_means(axes: Axes, x: Sequence[float], results: Sequence[ArmResult], colour: str) -> None:
    """Means as `mark_mean` draws one: hundreds as two shapes."""
    gap = math.nan  # between two intervals, and in place of one that is not known
    ends = [
        (at, gap if y is None else y) for at, r in zip(x, results, strict=True) for y in (r.loss_low, r.loss_high, gap)
    ]
    axes.plot([at for at, _ in ends], [y for _, y in ends], color=colour, lw=2, solid_capstyle="round")
    axes.plot(x, [r.loss_mean for r in results], "o", color=colour, ms=7.5, mec=WHITE, mew=1)


def mark_seeds(axes: Axes, x: float, losses: Sequence[float], colour: str) -> None:
    """Each seed as a faint dot."""
    axes.plot([x] * len(losses), losses, "o", color=colour, alpha=0.4, ms=4.5, mew=0)
