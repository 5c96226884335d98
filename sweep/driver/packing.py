"""Which trials train together. Pure: what is ready goes in, packs come out."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise

from sweep.driver.plan import Slot
from sweep.study.records import Prepared


@dataclass(frozen=True)
class Pack:
    """Slots whose trials go from `start` to `stop` together."""

    slots: tuple[Slot, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Ready:
    """A slot whose trial may go on from `start` to `stop`."""

    slot: Slot
    start: int
    stop: int


def plan_packs(ready: Iterable[Ready], pack_size: int) -> list[Pack]:
    """Packs of at most `pack_size`, lowest start first and as even as can be; full fine-tuning alone.

    Within a start the plan's order holds; it goes by rank, so that a pack has few ranks.
    """
    packs: list[Pack] = []
    for (start, stop, alone), members in groupby(sorted(ready, key=_order), key=_kind):
        slots = [member.slot for member in members]
        size = 1 if alone else max(1, pack_size)
        count = -(-len(slots) // size)
        bounds = [len(slots) * i // count for i in range(count + 1)]
        packs += [Pack(tuple(slots[a:b]), start, stop) for a, b in pairwise(bounds)]
    return packs


def halves(pack: Pack) -> tuple[Pack, Pack]:
    """A pack of two or more, split: a trial is not lost because of its neighbours."""
    middle = len(pack.slots) // 2
    return Pack(pack.slots[:middle], pack.start, pack.stop), Pack(pack.slots[middle:], pack.start, pack.stop)


def at_most(pack: Pack, pack_size: int) -> list[Pack]:
    """The pack, or its halves, or theirs, so that none is larger than `pack_size`."""
    if len(pack.slots) <= max(1, pack_size):
        return [pack]
    return [part for half in halves(pack) for part in at_most(half, pack_size)]


def is_out_of_memory(error: BaseException) -> bool:
    """By name and text, since the driver knows no torch: CUDA's own error, Python's, and the CPU allocator's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return getattr(error, "errno", None) == errno.ENOMEM or any(words in str(error) for words in told)


def calibration_lines(prepared: Prepared) -> list[str]:
    """What was chosen, and the figures that decided."""
    chosen = f"{prepared.precision}, {prepared.attention} attention, on {prepared.device}"
    lines = [f"packs of up to {prepared.pack_size} trials in {chosen}"]
    if prepared.calibration:
        figures = (
            f"{f['precision']} {f['attention']} ×{f['pack_size']} {f.get('ms_per_trial_step') or f['failed']}"
            for f in prepared.calibration
        )
        lines.append(f"calibration, ms a trial and step (the larger of two packs within 3 %): {', '.join(figures)}")
    return lines


def _kind(ready: Ready) -> tuple[int, int, bool]:
    return ready.start, ready.stop, ready.slot.arm.is_full


def _order(ready: Ready) -> tuple[int, int, bool, int]:
    return *_kind(ready), ready.slot.index
