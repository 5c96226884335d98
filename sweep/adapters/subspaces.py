"""Which directions trials share: φ of the LoRA paper's section 7.2, between ranks, between seeds, and by chance.

Shapes: I input features, k and q numbers of directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sweep.lora.methods import generator_for
from sweep.lora.spectra import random_rows, similarity
from sweep.study.arms import Arm, full_arm

# Whose: the right singular vectors of A, as in the paper, or of ΔW; or ΔW's left ones, which are B's. A begins at
# random and ΔW's right ones lie in its rows, B begins at zero: what was learned shows best in the left ones.
A, INPUT, OUTPUT = "A", "input", "output"
Directions = Callable[[str, Arm, int], Tensor | None]  # (of, arm, seed): rows (k, I) or (k, O), None for no update


@dataclass
class Comparison:
    """Two arms' directions over pairs of seeds, and what was found so far, a layer at a time."""

    of: str
    one: Arm
    other: Arm
    pairs: list[tuple[int, int]]
    control: bool = False  # random Gaussian matrices of the two ranks in their place
    grids: dict[tuple[int, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # by pair
    tops: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # φ(1, 1) by module kind


def plan_comparisons(chosen: Sequence[tuple[Arm, Sequence[int]]], full: Sequence[int]) -> list[Comparison]:
    """Every smaller rank with the largest, the largest with itself and with full fine-tuning. Between other seeds.

    chosen: one arm a rank with its seeds, the largest last. Of one seed the A of two ranks begin with the same rows,
    so that they would be alike even untrained: one such comparison is made to show it, and where there is one seed
    alone there is no other.
    """
    largest, seeds = chosen[-1]
    plan = []
    for arm, own in chosen[:-1]:
        pairs = other_seeds(own, seeds)
        plan += [Comparison(of, arm, largest, pairs) for of in (A, INPUT, OUTPUT)]
        plan += [Comparison(of, arm, largest, pairs, control=True) for of in (A, OUTPUT)]
        same = [(seed, seed) for seed in own if seed in seeds]
        if same and same != pairs:
            plan.append(Comparison(A, arm, largest, same))
    if len(seeds) > 1:
        pairs = other_seeds(seeds, seeds)[: len(seeds) if len(seeds) > 2 else 1]  # (1, 2) and (2, 1) are one pair
        plan += [Comparison(of, largest, largest, pairs) for of in (A, INPUT, OUTPUT)]
        plan += [Comparison(of, largest, largest, pairs, control=True) for of in (A, OUTPUT)]
    if full:
        plan += [Comparison(of, largest, full_arm(), other_seeds(seeds, full)) for of in (INPUT, OUTPUT)]
    return [comparison for comparison in plan if comparison.pairs]


def other_seeds(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of different seeds, each of ours with the next of theirs; equal ones where there is but one seed."""
    pairs = []
    for i, seed in enumerate(sorted(ours)):
        others = [s for s in sorted(theirs) if s != seed] or list(theirs)
        pairs.append((seed, others[i % len(others)]))
    return pairs


def compare(comparison: Comparison, name: str, kind: str, directions: Directions, largest: int) -> None:
    """Add a layer that both arms adapt."""
    for one, other in comparison.pairs:
        ours = directions(comparison.of, comparison.one, one)
        theirs = directions(comparison.of, comparison.other, other)
        if ours is None or theirs is None:
            continue
        ours, theirs = ours[:largest], theirs[:largest]
        if comparison.control:
            generator = generator_for(one, f"{name}/{comparison.of}/{other}")
            ours, theirs = (random_rows(len(rows), rows.shape[1], generator) for rows in (ours, theirs))
        phi = similarity(ours, theirs)
        comparison.grids[one, other].append(phi)
        comparison.tops[kind].append(float(phi[0, 0]))


def found(comparison: Comparison) -> dict[str, Any]:
    """Plain numbers: means over the layers, the grid over the pairs too, at the steps i and j."""
    means = {pair: torch.stack(_cut(grids)).mean(0) for pair, grids in comparison.grids.items()}
    i, j = (steps(n) for n in next(iter(means.values())).shape)
    grid = torch.stack(list(means.values())).mean(0)[[n - 1 for n in i]][:, [n - 1 for n in j]]
    return {
        "of": f"random {OUTPUT if comparison.of == OUTPUT else INPUT}" if comparison.control else comparison.of,
        "one": comparison.one.name,
        "other": comparison.other.name,
        "pairs": [list(pair) for pair in means],
        "top": [short(float(phi[0, 0])) for phi in means.values()],
        "whole": [short(float(phi[-1, -1])) for phi in means.values()],
        "top_by_kind": {kind: short(sum(tops) / len(tops)) for kind, tops in comparison.tops.items()},
        "i": i,
        "j": j,
        "grid": [[short(value) for value in row] for row in grid.tolist()],
    }


def steps(n: int) -> list[int]:
    """1 to 8 one by one, then about √2 apart, and n: where spectra and grids are written down."""
    wide = [8]
    while wide[-1] < n:
        wide.append(wide[-1] * 3 // 2 if wide[-1].bit_count() == 1 else wide[-1] * 4 // 3)
    return sorted({*range(1, min(8, n) + 1), *(step for step in wide if step <= n), n})


def short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def _cut(grids: Sequence[Tensor]) -> list[Tensor]:
    """The part that every layer has: a layer narrower than the rank has fewer directions."""
    k, q = (min(grid.shape[side] for grid in grids) for side in (0, 1))
    return [grid[:k, :q] for grid in grids]
