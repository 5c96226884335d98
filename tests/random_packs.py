"""Packs of trials on tiny random models by the engine's own step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from random_models import FAMILIES, PAD, Family, frozen_model, frozen_rows
from torch import Tensor

from sweep.lora.adapter import install
from sweep.lora.optim import Recipe, start_optimizer
from sweep.lora.readout import behind_attention, read_first_position
from sweep.study.arms import ALL_LINEAR, Arm
from sweep.study.records import DataSettings, Prepared, Setup, TrainSettings, TrialSpec
from sweep.training.base import Base, adapter_of
from sweep.training.batches import collate, step_rows
from sweep.training.rung import PackTrainee, fresh_state, train_step

ROWS, STEPS = 4, 4  # rows of a trial's batch, steps of a run
LINEAR_ONLY = ("dora", "pissa", "lora+")  # lora+ knows convolutions too, but no embeddings
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On layers this small a second thread costs twice what it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixed_pack(family: Family, rates: float = 1.0) -> list[Trial]:
    """All that trials of one pack may differ in, with buckets of one trial and of two. rates: a factor on all rates.

    The first two see the same rows.
    """
    first, second = family.linear[0], family.linear[2]
    of_block_1 = (rf".*\.1\..*{first}", 6)
    pack = [
        Trial(8, 0.5, "rslora", seed=1, clip=0.05, rate=3e-2, schedule="cosine"),
        Trial(2, 1, "lora", (first, second), seed=1, warmup=0.5, decay=0.2),
        Trial(2, 2, "lora+", (first, second), seed=2, betas=(0.8, 0.95), init="gaussian", schedule="constant"),
        Trial(4, 1, "dora", seed=3, clip=0.3, decay=0.5, rate=2e-2),
        Trial(4, 2, "dora", (second,), seed=7, steps=9, clip=0.1),
        Trial(3, 2, "pissa", (second, family.linear[-1]), seed=4, schedule="cosine", warmup=0.25),
        Trial(3, 1, "pissa", (second,), seed=8),
        Trial(3, 1, "rslora", (*family.others, first), seed=5, decay=0.3, rate=2e-2),
        Trial(3, 2, "lora", family.others, seed=9),
        Trial(1, 4, "lora", (first,), seed=6, steps=2, schedule="constant", betas=(0.5, 0.9)),
        Trial(2, 1, "rslora", (first, second), seed=10, ranks=(of_block_1,), alphas=((second, 5.0),)),
        Trial(3, 2, "pissa", seed=11, ranks=((second, 2), of_block_1, (first, 5)), alphas=((first, 1.5),)),
        Trial(4, 1, "dora", (first, second), seed=12, ranks=((first, 1),), alphas=((of_block_1[0], 3.0),)),
    ]
    return [replace(trial, rate=trial.rate * rates) for trial in pack]


def prefixed_pack(family: Family, rates: float = 1.0) -> list[Trial]:
    """Prefixes of three lengths, alone and with LoRA, among trials without; two see the same rows.

    rates: a factor on all rates.
    """
    first, second = family.linear[0], family.linear[2]
    only = {"r": 0, "ratio": 0.0, "method": "prefix", "endings": ()}
    pack = [
        Trial(2, 1, "lora", (first, second), seed=1, warmup=0.5, decay=0.2),
        Trial(**only, prefix=5, seed=1, clip=0.3, rate=0.1),
        Trial(2, 2, "lora+prefix", (first,), seed=2, prefix=3, rate=3e-2, decay=0.3, schedule="cosine"),
        Trial(2, 2, "lora+prefix", (first,), seed=7, prefix=3, ranks=((first, 4),), betas=(0.8, 0.95)),
        Trial(4, 1, "dora", seed=3, clip=0.3, decay=0.5, rate=2e-2),
        Trial(**only, prefix=1, seed=4, steps=2, decay=0.2),
        Trial(3, 2, "lora+prefix", (family.others[0], second), seed=5, prefix=5, steps=9),
        Trial(**only, prefix=5, seed=6, rate=0.3, schedule="constant"),
        Trial(3, 1, "lora+prefix", seed=8, prefix=2, clip=0.05),
    ]
    return [replace(trial, rate=trial.rate * rates) for trial in pack]


@dataclass(frozen=True)
class Trial:
    """One trial of a pack; `endings` are its target modules."""

    r: int = 2
    ratio: float = 1.0
    method: str = "lora"
    endings: tuple[str, ...] = (ALL_LINEAR,)
    seed: int = 0
    init: str = "kaiming"
    rate: float = 1e-2
    steps: int = STEPS
    schedule: str = "linear"
    warmup: float = 0.0
    decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    lr_ratio: float = 4.0  # of lora+ alone
    ranks: tuple[tuple[str, int], ...] = ()  # rank_pattern
    alphas: tuple[tuple[str, float], ...] = ()  # alpha_pattern
    prefix: int = 0

    @property
    def arm(self) -> Arm:
        return Arm("", self.method, self.r, self.ratio, self.endings, self.ranks, self.alphas, self.prefix)

    @property
    def recipe(self) -> Recipe:
        ratio = self.lr_ratio if self.method == "lora+" else 1.0
        return Recipe(
            self.rate, self.steps, self.schedule, self.warmup, self.decay, self.clip, self.betas, lr_ratio=ratio
        )

    @property
    def lives(self) -> int:
        return min(self.steps, STEPS)


@dataclass(frozen=True)
class Run:
    """What the trials of a pack must share."""

    optimizer: str = "adamw"
    dropout: float = 0.0
    micro: int | None = None  # rows of a trial in one device batch
    plain_head: bool = False
    repeats_known: bool = True  # whether batches say which rows are the same
    first_position: bool = False  # whether an encoder's top is computed at the first position alone


@dataclass
class Trained:
    """A trial after some steps."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    alive: bool = True


def initial_state(family: Family, trial: Trial) -> dict[str, Tensor]:
    model = frozen_model(family)
    base = Base(model, family.head)
    spec = TrialSpec(0, trial.arm, trial.rate, trial.seed, "search", "")
    return fresh_state(base, spec, TrainSettings(STEPS, ROWS, init_lora_weights=trial.init))


def start_pack(
    family: Family, trials: Sequence[Trial], run: Run, start: int = 0, earlier: Sequence[Trained] | None = None
) -> PackTrainee:
    """The trials on the family's model, at step 0 or where `earlier` left them."""
    model = frozen_model(family)
    states = [initial_state(family, t) for t in trials] if earlier is None else [one.weights for one in earlier]
    base = Base(model, family.head)
    adapters = [adapter_of(base, t.arm, state, t.seed) for t, state in zip(trials, states, strict=True)]
    behind = behind_attention(model)
    pack = install(model, adapters, family.head, run.dropout)
    if run.first_position:
        assert behind is not None
        pack.hooks.append(read_first_position(model, behind))
    moments = None if earlier is None else [one.moments for one in earlier]
    optimizer = start_optimizer(pack, [trial.recipe for trial in trials], run.optimizer, start, moments)
    return PackTrainee(model, run.plain_head, pack, optimizer)


def train_pack(
    family: Family,
    trials: Sequence[Trial],
    run: Run = Run(),
    start: int = 0,
    stop: int = STEPS,
    earlier: Sequence[Trained] | None = None,
    watch: Callable[[PackTrainee], object] = lambda trainee: None,
) -> list[Trained]:
    """Steps start+1 … stop of a pack. watch: called with the pack before its first step."""
    data = frozen_rows(family)
    settings = TrainSettings(STEPS, ROWS, micro_batch_size=run.micro, precision="float32", optimizer=run.optimizer)
    setup = Setup("", family.task, DataSettings("", 0, "", ""), settings, 0, "")
    prepared = Prepared({}, 0, "", (), "", 0, {}, "cpu", "float32", "eager", len(trials))
    trainee = start_pack(family, trials, run, start, earlier)
    try:
        watch(trainee)
        orders = [step_rows(data.lengths, ROWS, trial.seed, start, stop) for trial in trials]
        losses = []
        for step, rows in enumerate(zip(*orders, strict=True), start):
            batch = collate(data, np.concatenate(rows), PAD)
            if not run.repeats_known:
                batch = replace(batch, source_R=np.arange(len(batch.source_R)))
            losses.append(train_step(trainee, batch, setup, prepared, step))
        found = []
        for k, loss_S in enumerate(torch.stack(losses, 1).tolist()):
            found.append(Trained(loss_S, *trainee.states(k), bool(trainee.alive_K[k])))
    finally:
        trainee.close()
    return found
