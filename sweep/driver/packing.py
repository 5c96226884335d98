"""Which trials train together. Pure: what is ready goes in, packs come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from sweep.driver.plan import Slot
from sweep.study.records import Prepared


@dataclass(frozen=True)
class Rebuild:
    """Why a trial is trained anew to a step that it has been at, and where it goes from there."""

    then: int
    damage: str


MS = "ms_per_trial_step"


@dataclass(frozen=True)
class Pack:
    """Slots whose trials go from `start` to `stop` together."""

    slots: tuple[Slot, ...]
    start: int
    stop: int
    losses: int = 0  # of workers that trained it
    exclusive: bool = False  # with nothing else in training
    rebuild: Rebuild | None = None  # of a single trial, from step 0
    rebuilds: int = 0  # of its trial's checkpoint at this rung


@dataclass(frozen=True)
class Ready:
    """A slot whose trial may go on from `start` to `stop`."""

    slot: Slot
    start: int
    stop: int


def plan_packs(ready: Sequence[Ready], pack_size: int, workers: int = 1) -> list[Pack]:
    """Packs of at most `pack_size`, lowest start first and as even as can be; full fine-tuning and what may not fit
    alone, the latter with nothing else in training.

    Within a start the plan's order holds; it goes by rank, so that a pack has few ranks. Several workers share what is
    ready: a large pack on one of them while others idle takes longer than small ones on all.
    """
    packs: list[Pack] = []
    largest = max(1, min(pack_size, -(-len(ready) // workers)))
    for (start, stop, alone), members in groupby(sorted(ready, key=_order), key=_kind):
        slots = [member.slot for member in members]
        size = 1 if alone else largest
        count = -(-len(slots) // size)
        bounds = [len(slots) * i // count for i in range(count + 1)]
        packs += [Pack(tuple(slots[a:b]), start, stop, 0, slots[a].doubtful) for a, b in pairwise(bounds)]
    return packs


def halves(pack: Pack) -> tuple[Pack, Pack]:
    """A pack of two or more, split: a trial is not lost because of its neighbours."""
    middle = len(pack.slots) // 2
    return replace(pack, slots=pack.slots[:middle]), replace(pack, slots=pack.slots[middle:])


def at_most(pack: Pack, pack_size: int) -> list[Pack]:
    """The pack, or its halves, or theirs, so that none is larger than `pack_size`."""
    if len(pack.slots) <= max(1, pack_size):
        return [pack]
    return [part for half in halves(pack) for part in at_most(half, pack_size)]


def name_trials(pack: Pack) -> str:
    """How messages name a pack."""
    names = list(dict.fromkeys(slot.arm.name for slot in pack.slots))
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(pack.slots)} trial{'s' if len(pack.slots) > 1 else ''} ({shown})"


def calibration_lines(prepared: Prepared) -> list[str]:
    """What was chosen, and the figures that decided."""
    chosen = f"{prepared.precision}, {prepared.attention} attention, on {prepared.device}"
    lines = [f"packs of up to {prepared.pack_size} trials in {chosen}"]
    if prepared.calibration:
        figures = (
            f"{f['precision']} {f['attention']} ×{f['pack_size']} {f['failed'] if 'failed' in f else f[MS]}"
            for f in prepared.calibration
        )
        when = "kept from before" if prepared.calibration_kept else "of now, which is kept"
        lines.append(
            f"calibration {when}, ms a trial and step (the larger of two packs within 3 %): {', '.join(figures)}"
        )
    return lines


def disturbance(prepared: Prepared) -> list[str]:
    """A warning where something else kept the machine busy during the calibration, so that it may have chosen badly."""
    apart = [
        f"{f['precision']} {f['attention']} ×{f['pack_size']} took {f['ms_per_trial_step']:.0f} "
        f"and {f['slowest_ms']:.0f}"
        for f in prepared.calibration
        if "slowest_ms" in f
    ]
    if not apart:
        return []
    return [
        f"calibration was disturbed: {', '.join(apart)} ms a trial and step in two rounds, so that precision, "
        "attention or pack size may be badly chosen; to calibrate anew, remove calibration-*.json in the home's cache"
    ]


def _kind(ready: Ready) -> tuple[int, int, bool]:
    return ready.start, ready.stop, ready.slot.arm.is_full or ready.slot.doubtful


def _order(ready: Ready) -> tuple[int, int, bool, int]:
    return *_kind(ready), ready.slot.index
