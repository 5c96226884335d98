"""Successive halving: the best of a rank go on, and the answer never depends on when it is asked."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sweep.driver.pruning import Standing, judge, kept, steps_left, survivors

RUNGS = (1, 2, 4)
LOSSES = st.floats(0, 10)
SHARES = st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])


def test_the_share_that_goes_on_is_rounded_up_and_not_by_a_rounding_error() -> None:
    assert [kept(n, 0.5) for n in (1, 2, 3, 6)] == [1, 1, 2, 3]
    assert 0.55 * 100 > 55 and kept(100, 0.55) == 55
    assert kept(0, 0.5) == 0


def test_the_lowest_losses_survive_and_ties_go_to_the_earlier_trial() -> None:
    assert survivors({0: 2.0, 1: 1.0, 2: 3.0, 3: 1.5}, 0.5) == {1, 3}
    assert survivors({5: 1.0, 3: 1.0, 4: 1.0}, 1 / 3) == {3}


@given(st.dictionaries(st.integers(0, 50), LOSSES, max_size=20), SHARES)
def test_no_survivor_is_worse_than_a_pruned_trial(losses: dict[int, float], keep: float) -> None:
    best = survivors(losses, keep)
    assert len(best) == kept(len(losses), keep)
    assert all(losses[a] <= losses[b] for a in best for b in losses.keys() - best)


def test_nobody_is_judged_while_a_trial_of_the_rank_is_on_its_way() -> None:
    verdict = judge([Standing(0, {1: 9.0}, False), Standing(1, {}, False)], RUNGS, 0.5)
    assert (verdict.rung, verdict.go_on, verdict.waiting, verdict.pruned) == (1, (1,), (0,), ())


def test_trials_that_ended_before_the_rung_do_not_count_among_those_that_reached_it() -> None:
    standings = [
        Standing(0, {}, True),
        Standing(1, {}, True),
        Standing(2, {1: 1.0}, False),
        Standing(3, {1: 2.0}, False),
    ]
    verdict = judge(standings, RUNGS, 0.5)  # ceil(0.5·2) = 1, not ceil(0.5·4) = 2
    assert verdict.go_on == (2,)
    assert verdict.pruned == ((3, 1),)


def test_one_survivor_of_a_rank_goes_on_to_the_end() -> None:
    verdict = judge([Standing(0, {1: 1.0}, False)], RUNGS, 0.5)
    assert (verdict.rung, verdict.go_on) == (2, (0,))


def run_to_the_end(curves: list[dict[int, float]], keep: float, ends: bool) -> dict[int, int]:
    """The rung each trial got to. `ends`: whether a pruned trial's end is known when it is judged again."""
    seen: dict[int, dict[int, float]] = {key: {} for key in range(len(curves))}
    pruned: set[int] = set()
    while True:
        standings = [Standing(key, losses, ends and key in pruned) for key, losses in seen.items()]
        verdict = judge(standings, RUNGS, keep)
        pruned |= {key for key, _ in verdict.pruned}
        if not verdict.go_on:
            return {key: max(losses, default=0) for key, losses in seen.items()}
        for key in verdict.go_on:
            seen[key][verdict.rung] = curves[key][verdict.rung]


CURVES = st.lists(st.fixed_dictionaries({rung: LOSSES for rung in RUNGS}), min_size=1, max_size=12)


@given(CURVES, SHARES)
def test_each_rung_keeps_its_share_of_those_that_reached_it(curves: list[dict[int, float]], keep: float) -> None:
    got_to = run_to_the_end(curves, keep, ends=True)
    alive = len(curves)
    for before, rung in pairwise(RUNGS):
        alive = kept(alive, keep)
        assert sum(reached >= rung for reached in got_to.values()) == alive, f"after rung {before}"


@given(CURVES, SHARES)
def test_judging_again_after_a_crash_gives_the_same_answer(curves: list[dict[int, float]], keep: float) -> None:
    assert run_to_the_end(curves, keep, ends=True) == run_to_the_end(curves, keep, ends=False)


@given(CURVES, SHARES)
def test_the_steps_foreseen_are_the_steps_taken(curves: list[dict[int, float]], keep: float) -> None:
    n = len(curves)
    assert steps_left(n, n, RUNGS[0], RUNGS, keep) == sum(run_to_the_end(curves, keep, ends=True).values())


@given(st.integers(1, 30))
def test_keeping_all_prunes_none(n: int) -> None:
    assert steps_left(n, n, 1, RUNGS, 1.0) == 4 * n
    assert not judge([Standing(k, {1: math.pi}, False) for k in range(n)], RUNGS, 1.0).pruned
