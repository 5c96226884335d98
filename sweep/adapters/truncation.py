"""What truncated adapters lose: installed in packs, with their trials' heads, and scored on the test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sweep.lora.adapter import Adapter, install, remove
from sweep.lora.methods import State
from sweep.lora.optim import start_optimizer
from sweep.lora.readout import read_first_position
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.base import target_layers
from sweep.training.rung import PackTrainee, base_for, held_out_scores, recipe, tokenised


@dataclass(frozen=True)
class Truncated:
    """A trial's update at a smaller rank, as a LoRA adapter of scaling 1, and the trial's own head."""

    trial: TrialSpec
    rank: int
    state: State


def score_truncated(setup: Setup, prepared: Prepared, adapters: Sequence[Truncated]) -> list[dict[str, float]]:
    """The test scores of each, found as a confirm trial's are: same rows, precision, attention and largest pack."""
    scores = []
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].rank, i))  # a rank's stand side by side
    for start in range(0, len(order), prepared.pack_size):
        scores += _score_pack(setup, prepared, [adapters[i] for i in order[start : start + prepared.pack_size]])
    by_place = dict(zip(order, scores, strict=True))
    return [by_place[i] for i in range(len(adapters))]


def _score_pack(setup: Setup, prepared: Prepared, adapters: Sequence[Truncated]) -> list[dict[str, float]]:
    arm = adapters[0].trial.arm
    base = base_for(setup, prepared, arm)
    modules = tuple(target_layers(base.model, base.head, arm.target_modules))
    installed = [Adapter(a.rank, 1.0, modules, a.state, a.trial.seed) for a in adapters]
    pack = install(base.model, installed, base.head)
    try:
        if base.behind is not None:
            pack.hooks.append(read_first_position(base.model, base.behind))
        optimizer = start_optimizer(pack, [recipe(setup.train, a.trial) for a in adapters])  # a trainee has one
        trainee = PackTrainee(base.model, base.plain_head, pack, optimizer)
        return held_out_scores(trainee, tokenised(setup).test, setup, prepared)
    finally:
        remove(base.model, pack)
