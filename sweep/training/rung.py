"""One rung of one pack: `train_rung(unit) -> measurements`, from checkpoints on disk to checkpoints on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sweep.lora.adapter import (
    Adapter,
    Pack,
    init_head,
    init_lora,
    install,
    linear_modules,
    pack_order,
    remove,
    trial_state,
)
from sweep.lora.optim import PackedAdamW, lr_factor, optimizer_state, start_adamw
from sweep.study.arms import Arm
from sweep.study.records import Measurement, Prepared, Setup, TrialSpec, Unit
from sweep.training.base import Base, load_base, target_layers
from sweep.training.batches import Batch, collate, step_rows
from sweep.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sweep.training.data import Split, TokenisedData, load_data
from sweep.training.full import start_full
from sweep.training.locate import ModelPlace, locate_model
from sweep.training.tasks import evaluation_batches, mean_loss, score, summarise


class Trainee(Protocol):
    """K trials on one model: a pack of adapters, or a pack of one full fine-tuning."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def trials(self) -> int: ...

    @property
    def alive_K(self) -> Tensor: ...  # bool: no loss or gradient norm was other than finite so far

    def step(self, loss_K: Tensor, lr_K: Tensor) -> None: ...

    def states(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def close(self) -> None: ...


@dataclass
class PackTrainee:
    """Adapters on the shared base, with the packed AdamW."""

    model: nn.Module
    pack: Pack
    optimizer: PackedAdamW

    @property
    def trials(self) -> int:
        return self.pack.trials

    @property
    def alive_K(self) -> Tensor:
        return self.optimizer.alive_K

    def step(self, loss_K: Tensor, lr_K: Tensor) -> None:
        self.optimizer.step(loss_K.detach(), lr_K)

    def states(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return trial_state(self.pack, k), optimizer_state(self.optimizer, k)

    def close(self) -> None:
        remove(self.model, self.pack)


def train_rung(unit: Unit) -> tuple[Measurement, ...]:
    """Train the unit's trials from step `start` to `stop`, evaluate them and write their checkpoints.

    Returns a measurement a trial, in the unit's order. Raises FieldError where model or data can't be used.
    """
    began = time.perf_counter()
    train, setup = unit.setup.train, unit.setup
    data = tokenised(setup)
    order = pack_order([_modules_and_rank(trial) for trial in unit.trials])
    trials = [unit.trials[i] for i in order]
    trainee = start_trainee(setup, unit.prepared, trials, unit.start)
    try:
        losses: list[Tensor] = []
        alive: list[Tensor] = []
        tokens = np.zeros(len(trials), dtype=np.int64)
        rate_K = torch.tensor([trial.learning_rate for trial in trials], device=trainee.alive_K.device)
        for step, (batch, tokens_K) in enumerate(pack_batches(data, setup, trials, unit.start, unit.stop), unit.start):
            loss_K = training_loss(trainee, batch, setup, unit.prepared, step)
            loss_K.sum().backward()
            trainee.step(loss_K, rate_K * lr_factor(train.schedule, step, train.steps, train.warmup))
            losses.append(loss_K.detach())
            alive.append(trainee.alive_K.clone())
            tokens += tokens_K
        losses_KS, alive_KS = torch.stack(losses, 1).cpu().tolist(), torch.stack(alive, 1).cpu()
        scores = held_out_scores(trainee, data.validation, setup, unit.prepared)
        tests = held_out_scores(trainee, data.test, setup, unit.prepared) if unit.test else None

        found = {}
        for k, trial in enumerate(trials):
            lived = int(alive_KS[k].sum())  # steps until the first loss or gradient norm that is not finite
            measurement = Measurement(
                number=trial.number,
                start=unit.start,
                stop=unit.stop,
                train_loss=tuple(losses_KS[k][:lived]),
                eval_loss=None,
                eval_metrics={},
                test_metrics={},
                checkpoint="",
                diverged_at=min(unit.start + lived + 1, unit.stop),
                pack_size=len(trials),
                pack_seconds=0.0,
                tokens=int(tokens[k]),
            )
            held_out = [scores[k]["loss"], *(tests[k].values() if tests else ())]
            if alive_KS[k].all() and np.isfinite(held_out).all():
                weights, moments = trainee.states(k)
                info = {"arm": trial.arm.name, "learning_rate": trial.learning_rate, "seed": trial.seed}
                measurement = replace(
                    measurement,
                    eval_loss=scores[k]["loss"],
                    eval_metrics=_named("eval", scores[k]),
                    test_metrics={"test_loss": tests[k]["loss"], **_named("test", tests[k])} if tests else {},
                    checkpoint=save_checkpoint(Path(trial.folder), Checkpoint(unit.stop, weights, moments), info),
                    diverged_at=None,
                )
            found[trial.number] = measurement
    finally:
        trainee.close()
    seconds = time.perf_counter() - began
    return tuple(replace(found[trial.number], pack_seconds=seconds) for trial in unit.trials)


def start_trainee(setup: Setup, prepared: Prepared, trials: list[TrialSpec], start: int) -> Trainee:
    """The trials at step `start`: fresh from their seeds, or from their checkpoints."""
    train, base = setup.train, base_for(setup, prepared, trials[0].arm)
    checkpoints = [load_checkpoint(Path(trial.folder), start) for trial in trials] if start else []
    if trials[0].arm.is_full:
        weights, moments = (checkpoints[0].weights, checkpoints[0].optimizer) if start else (None, None)
        return start_full(base, trials[0].seed, train.weight_decay, train.clip, start, weights, moments)
    states = [c.weights for c in checkpoints] if start else [fresh_state(base, trial) for trial in trials]
    adapters = [
        Adapter(
            trial.arm.r,
            trial.arm.scaling,
            tuple(target_layers(base.model, base.head, trial.arm.target_modules)),
            state,
            trial.seed,
        )
        for trial, state in zip(trials, states, strict=True)
    ]
    pack = install(base.model, adapters, base.head, train.dropout)
    try:
        moments_of = [c.optimizer for c in checkpoints] if start else None
        decays, clips = [train.weight_decay] * len(trials), [train.clip] * len(trials)
        return PackTrainee(base.model, pack, start_adamw(pack, decays, clips, start, moments_of))
    except BaseException:
        remove(base.model, pack)
        raise


def base_for(setup: Setup, prepared: Prepared, arm: Arm) -> Base:
    """The frozen model as the arm trains on it: full fine-tuning copies float32 weights in every precision."""
    precision = "float32" if arm.is_full else prepared.precision
    pad_token_id = tokenised(setup).pad_token_id
    place = located(setup.model)
    return load_base(place, setup.task, prepared.labels, pad_token_id, precision, prepared.attention)


def fresh_state(base: Base, trial: TrialSpec) -> dict[str, Tensor]:
    """A trial's tensors at step 0: a function of its seed, its rank and its modules."""
    layers = linear_modules(base.model)
    targets = target_layers(base.model, base.head, trial.arm.target_modules)
    return {
        **init_lora(targets, trial.arm.r, trial.seed),
        **init_head({name: layers[name] for name in base.head}, trial.seed),
    }


def training_loss(trainee: Trainee, batch: Batch, setup: Setup, prepared: Prepared, step: int) -> Tensor:
    """Every trial's mean loss (K,) on its own rows of the pack's batch."""
    with _forward_pass(trainee, len(batch.input_ids_RT), step), _autocast(trainee, prepared):
        return mean_loss(score(trainee.model, batch, setup.task, trainee.trials))


def held_out_scores(trainee: Trainee, split: Split, setup: Setup, prepared: Prepared) -> list[dict[str, float]]:
    """Every trial on all rows of a split; see `summarise`."""
    trials, found = trainee.trials, []
    for batch in evaluation_batches(trainee.model, split, setup.task, trials, tokenised(setup).pad_token_id):
        with torch.no_grad(), _forward_pass(trainee, len(batch.input_ids_RT), None), _autocast(trainee, prepared):
            found.append(score(trainee.model, batch, setup.task, trials))
    return summarise(found, setup.task)


def pack_batches(
    data: TokenisedData, setup: Setup, trials: list[TrialSpec], start: int, stop: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """The pack's batch of each step, rows ordered by trial, and every trial's tokens in it (padding not counted)."""
    lengths = data.train.lengths
    orders = [step_rows(lengths, setup.train.batch_size, trial.seed, start, stop) for trial in trials]
    for rows in zip(*orders, strict=True):
        yield (
            collate(data.train, np.concatenate(rows), data.pad_token_id),
            np.array([lengths[own].sum() for own in rows], dtype=np.int64),
        )


@lru_cache(maxsize=2)
def tokenised(setup: Setup) -> TokenisedData:
    return load_data(setup, located(setup.model))


@lru_cache(maxsize=8)
def located(model: str) -> ModelPlace:
    """Found once a process: a hub that goes away later must not end trials."""
    return locate_model(model)


@contextlib.contextmanager
def _forward_pass(trainee: Trainee, rows: int, step: int | None) -> Iterator[None]:
    """Tell the packed layers of a pass over `rows` rows: of a training step, or (None) without dropout."""
    if isinstance(trainee, PackTrainee):
        told = trainee.pack.forward_pass
        told.rows, told.step, told.dropout = rows, step or 0, step is not None and told.p > 0
    yield


def _autocast(trainee: Trainee, prepared: Prepared) -> contextlib.AbstractContextManager[object]:
    """bfloat16 for full fine-tuning means float32 weights under autocast; a pack's frozen base is bfloat16 itself."""
    if isinstance(trainee, PackTrainee) or prepared.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(trainee.alive_K.device.type, dtype=torch.bfloat16)


def _modules_and_rank(trial: TrialSpec) -> Adapter:
    return Adapter(trial.arm.r, trial.arm.scaling, trial.arm.target_modules, {})


def _named(split: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in scores.items() if name != "loss"}
