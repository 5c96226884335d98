"""Rank patterns suggested by spectra: a rank for every layer, in PEFT's words. None of them has been trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sweep.lora.spectra import kept_rank


def keep_share(spectra: Mapping[str, Sequence[Tensor]], share: float, most: int) -> dict[str, int]:
    """Of every layer the smallest rank that keeps `share` of ‖ΔW‖² in every seed; at least 1, at most `most`.

    spectra: by layer, the singular values of each seed.
    """
    kept = {name: [kept_rank(S_n, share) for S_n in seeds] for name, seeds in spectra.items()}
    return {name: min(most, max([1, *ranks])) for name, ranks in kept.items()}


def within_budget(
    spectra: Mapping[str, Sequence[Tensor]], costs: Mapping[str, int], budget: int, most: int
) -> dict[str, int]:
    """Ranks of at most `budget` parameters: a rank of 1 everywhere, then the singular value that holds most of ‖ΔW‖²
    for its parameters (the mean over the seeds), over all layers, until none fits.

    costs: parameters of one rank at a layer, O + I. A budget below rank 1 everywhere is exceeded by that.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(costs[name] for name in ranks)
    energy = {name: torch.stack(list(seeds)).square().mean(0)[:most] for name, seeds in spectra.items()}
    worth = [(float(e) / costs[n], n, i) for n, e_n in energy.items() for i, e in enumerate(e_n) if i]
    for gain, name, i in sorted(worth, key=lambda entry: (-entry[0], entry[1], entry[2])):
        if gain > 0 and i == ranks[name] and costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def as_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(rank, rank_pattern): the rank that most layers have (of several, the smallest), and the others by full name."""
    counts = Counter(ranks.values())
    common = min(counts, key=lambda r: (-counts[r], r))
    return common, {name: r for name, r in ranks.items() if r != common}
