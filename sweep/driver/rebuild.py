"""A damaged checkpoint is made again: its trial alone is trained anew from step 0 to there; the others go on.

Losses are a function of seed and step, so this is the same trial. What was measured stays as it stands in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sweep.driver.checkpoints import tidy_checkpoints
from sweep.driver.failures import LOSSES, Decision
from sweep.driver.interrupts import uninterrupted
from sweep.driver.packing import Pack, Rebuild, name_trials
from sweep.driver.session import Session, warn
from sweep.study.errors import Damaged
from sweep.study.records import FAILED, Measurement, Prepared
from sweep.tracking.journal import TrialRecord, append_rebuilt, rebuilt

# Relative to a loss above 1: alone and packed, and from one kernel to the next, sums are taken in another order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def set_apart(pack: Pack, error: Damaged, records: Mapping[str, TrialRecord]) -> Decision:
    """What to do about a pack that could not begin: the others go on, the trial is rebuilt, or fails the third time."""
    slot = next(slot for slot in pack.slots if records[slot.name].spec.number == error.trial)
    others = tuple(other for other in pack.slots if other != slot)
    if not others and pack.rebuilds >= LOSSES:
        reason = f"its checkpoint was damaged again after it was made anew {LOSSES} times: {error}"
        return Decision(f"{name_trials(pack)} failed: {reason}", (), FAILED, reason)
    rebuild = Rebuild(pack.stop, str(error))
    alone = Pack((slot,), 0, pack.start, 0, pack.exclusive, rebuild, pack.rebuilds + 1)
    again = (replace(pack, slots=others), alone) if others else (alone,)
    return Decision(f"{error}: it is trained anew from step 0 to {pack.start}", again)


@uninterrupted()
def take_rebuilt(session: Session, prepared: Prepared, pack: Pack, measurement: Measurement) -> Decision:
    """Put the new checkpoint into the place of the damaged one; the trial goes on to where it was bound for."""
    assert pack.rebuild is not None
    name, damage, step = pack.slots[0].name, pack.rebuild.damage, pack.stop
    record, saved = session.records[name], measurement.saved
    if saved is None:
        reason = f"{damage}; trained anew it diverged at step {measurement.diverged_at}"
        return Decision(f"{name_trials(pack)} failed: {reason}", (), FAILED, reason)
    apart = _difference(record, measurement, step)
    same = apart <= TOLERANCE[prepared.precision]
    losses = "with the same losses" if same else f"with losses that differ by up to {apart:.2g} from the journal's"
    warn(session, f"{damage}; the trial was trained anew from step 0 to {step}, {losses}")
    append_rebuilt(record.spec, step, saved, damage)
    record = replace(record, rungs=tuple(rebuilt(rung, step, saved) for rung in record.rungs))
    session.records[name] = record
    tidy_checkpoints(record)
    onward = Pack(pack.slots, step, pack.rebuild.then, 0, pack.exclusive, None, pack.rebuilds)
    return Decision(f"{name_trials(pack)} was trained anew to step {step}, {losses}", (onward,))


def _difference(record: TrialRecord, measurement: Measurement, step: int) -> float:
    """The largest between the journal's losses up to this step and those found now, relative to losses above 1."""
    known = [loss for at, loss in record.train_curve if at <= step]
    known += [loss for at, loss in record.eval_curve if at == step]
    found = [*measurement.train_loss, *([] if measurement.eval_loss is None else [measurement.eval_loss])]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(known, found, strict=True))
