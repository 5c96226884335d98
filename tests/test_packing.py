"""Packs: small enough, of one start, everyone in exactly one, full fine-tuning alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sweep.driver.failures import decide
from sweep.driver.packing import Pack, Ready, at_most, halves, plan_packs
from sweep.driver.plan import Slot
from sweep.study.arms import Arm, full_arm
from sweep.study.errors import WorkerLost

RUNGS = {0: 15, 15: 30, 30: 60}


def slot(index: int, r: int) -> Slot:
    arm = Arm(f"r{r}", "lora", r, 1.0, ("all-linear",)) if r else full_arm()
    return Slot(index, f"slot {index}", "search", arm, 0, 1e-3, 0)


@st.composite
def ready_trials(draw: st.DrawFn) -> list[Ready]:
    cells = draw(st.lists(st.tuples(st.sampled_from([0, 2, 4, 64]), st.sampled_from([0, 15, 30])), max_size=40))
    cells.sort(key=lambda cell: (cell[0] == 0, cell[0]))  # a plan goes by rank
    return [Ready(slot(index, r), start, RUNGS[start]) for index, (r, start) in enumerate(cells)]


@given(ready_trials(), st.integers(1, 12))
def test_every_trial_is_in_exactly_one_pack_and_no_pack_is_too_large(ready: list[Ready], pack_size: int) -> None:
    packs = plan_packs(ready, pack_size)
    assert sorted(s.index for pack in packs for s in pack.slots) == [r.slot.index for r in ready]
    assert all(1 <= len(pack.slots) <= pack_size for pack in packs)


@given(ready_trials(), st.integers(1, 12))
def test_a_pack_has_one_start_and_full_fine_tuning_trains_alone(ready: list[Ready], pack_size: int) -> None:
    starts = {r.slot.index: r.start for r in ready}
    for pack in plan_packs(ready, pack_size):
        assert {starts[s.index] for s in pack.slots} == {pack.start}
        assert pack.stop == RUNGS[pack.start]
        assert len(pack.slots) == 1 or not any(s.arm.is_full for s in pack.slots)


@given(ready_trials(), st.integers(1, 12), st.randoms())
def test_the_order_in_which_trials_became_ready_does_not_matter(ready: list[Ready], pack_size: int, random) -> None:
    shuffled = list(ready)
    random.shuffle(shuffled)
    assert plan_packs(shuffled, pack_size) == plan_packs(ready, pack_size)


@given(ready_trials(), st.integers(1, 12))
def test_packs_are_as_few_and_as_even_as_can_be(ready: list[Ready], pack_size: int) -> None:
    for start in RUNGS:
        sizes = [len(p.slots) for p in plan_packs(ready, pack_size) if p.start == start and not p.slots[0].arm.is_full]
        if sizes:
            assert len(sizes) == -(-sum(sizes) // pack_size)
            assert max(sizes) - min(sizes) <= 1


def test_a_pack_has_few_ranks() -> None:
    ready = [Ready(slot(i, r), 0, 15) for i, r in enumerate([2, 2, 2, 8, 8, 8])]
    packs = plan_packs(ready, 3)
    assert [{s.arm.r for s in pack.slots} for pack in packs] == [{2}, {8}]


def test_trials_that_ended_leave_room_for_others() -> None:
    ready = [Ready(slot(i, r), 15, 30) for i, r in enumerate([2, 4, 8, 64])]  # one survivor a rank
    assert [len(pack.slots) for pack in plan_packs(ready, 12)] == [4]


@given(st.integers(2, 12))
def test_halves_hold_every_trial_once_and_both_hold_some(n: int) -> None:
    pack = Pack(tuple(slot(i, 2) for i in range(n)), 0, 15)
    first, second = halves(pack)
    assert first.slots + second.slots == pack.slots
    assert first.slots and second.slots
    assert (first.start, first.stop, second.start, second.stop) == (0, 15, 0, 15)


def test_parts_of_a_pack_keep_what_has_happened_to_it() -> None:
    pack = Pack(tuple(slot(i, 2) for i in range(5)), 15, 30, losses=1, rebuilds=2)
    assert {(p.start, p.stop, p.losses, p.rebuilds) for p in (*halves(pack), *at_most(pack, 2))} == {(15, 30, 1, 2)}


def test_packs_that_lost_their_worker_twice_for_want_of_memory_are_smaller_from_then_on() -> None:
    pack, lost = Pack(tuple(slot(i, 2) for i in range(5)), 0, 15), WorkerLost("killed, perhaps for want of memory")
    assert decide(pack, lost, shared=False).most is None
    assert decide(Pack(pack.slots, 0, 15, losses=1), lost, shared=False).most == 2
    assert decide(Pack(pack.slots, 0, 15, losses=1), WorkerLost("did nothing for 9 s"), shared=False).most is None
