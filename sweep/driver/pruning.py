"""Which trials of one rank go on: synchronous successive halving (arXiv 1502.07943). Pure.

Trials of different ranks never meet here: their early curves are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What is known of one trial when its rank is judged. `key` breaks ties, the lower first."""

    key: int
    losses: Mapping[int, float]  # rung -> validation loss
    ended: bool


@dataclass(frozen=True)
class Verdict:
    """`go_on` train to `rung`; `waiting` are measured there already; `pruned` end, each at the rung it lost."""

    rung: int
    go_on: tuple[int, ...]
    waiting: tuple[int, ...]
    pruned: tuple[tuple[int, int], ...]  # (key, rung)


def kept(n: int, keep: float) -> int:
    """How many of n trials go on: ceil(keep·n), with no room for rounding errors (0.55·100 > 55 in floats)."""
    return math.ceil(keep * n - 1e-9)


def survivors(losses: Mapping[int, float], keep: float) -> set[int]:
    """The keys of the trials with the lowest losses at a rung."""
    ranked = sorted(losses, key=lambda key: (losses[key], key))
    return set(ranked[: kept(len(ranked), keep)])


def judge(standings: Sequence[Standing], rungs: Sequence[int], keep: float) -> Verdict:
    """Judge the trials of one rank, from the first rung on: the same answer whenever and however often it is asked.

    A rung is judged once no trial is on its way to it; those that ended before it (diverged, failed) don't count.
    """
    contenders = list(standings)
    pruned: list[tuple[int, int]] = []
    rung = rungs[-1]
    for rung in rungs:
        if rung == rungs[-1] or any(not s.ended and rung not in s.losses for s in contenders):
            break
        best = survivors({s.key: s.losses[rung] for s in contenders if rung in s.losses}, keep)
        pruned += [(s.key, rung) for s in contenders if rung in s.losses and s.key not in best and not s.ended]
        contenders = [s for s in contenders if s.key in best]
    live = [s for s in contenders if not s.ended]
    return Verdict(
        rung,
        go_on=tuple(s.key for s in live if rung not in s.losses),
        waiting=tuple(s.key for s in live if rung in s.losses),
        pruned=tuple(pruned),
    )


def steps_left(on_their_way: int, alive: int, rung: int, rungs: Sequence[int], keep: float) -> int:
    """Trial-steps still to come: of `alive` trials `on_their_way` have `rung` before them, and then some are pruned."""
    at = rungs.index(rung)
    bounds = (0, *rungs)
    total = on_their_way * (rung - bounds[at])
    for before, after in zip(rungs[at:], rungs[at + 1 :], strict=False):
        alive = kept(alive, keep)
        total += alive * (after - before)
    return total
