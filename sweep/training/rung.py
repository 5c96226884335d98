"""One rung of one pack: `train_rung(unit) -> measurements`, from checkpoints on disk to checkpoints on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sweep.lora.adapter import Adapter, Pack, install, linear_modules, pack_order, remove, trial_state
from sweep.lora.methods import State, init_adapter, init_head
from sweep.lora.optim import PackedOptimizer, Recipe, optimizer_state, start_optimizer
from sweep.lora.passes import ForwardPass
from sweep.lora.prefix import init_prefix
from sweep.lora.readout import read_first_position
from sweep.study.arms import Arm
from sweep.study.records import CONFIRM, Measurement, Prepared, Saved, Setup, TrainSettings, TrialSpec, Unit
from sweep.tracking.store import TEST_ROWS, try_place
from sweep.training.base import Base, adapter_of, load_base, target_layers
from sweep.training.batches import AnyBatch, collate, split_batch, step_rows
from sweep.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sweep.training.data import AnySplit, TokenisedData, load_data
from sweep.training.forgetting import (
    LanguageModel,
    adapted_losses,
    finetuned_loss,
    load_language_model,
    text_losses,
)
from sweep.training.full import start_full
from sweep.training.inputs import refuse_other_inputs
from sweep.training.locate import ModelPlace
from sweep.training.scratch import find_base
from sweep.training.source_text import load_source_text
from sweep.training.tasks import (
    CAUSAL_LM,
    Scores,
    evaluation_passes,
    row_losses,
    score,
    summarise,
    target_counts,
    tell_pass,
)


class Trainee(Protocol):
    """K trials on one model: a pack of adapters, or a pack of one full fine-tuning."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def plain_head(self) -> bool: ...  # see Base

    @property
    def trials(self) -> int: ...

    @property
    def alive_K(self) -> Tensor: ...  # bool: no loss or gradient norm was other than finite so far

    def step(self, loss_K: Tensor) -> None: ...

    def states(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def close(self) -> None: ...


@dataclass
class PackTrainee:
    """Adapters on the shared base, with the pack's optimizer."""

    model: nn.Module
    plain_head: bool
    pack: Pack
    optimizer: PackedOptimizer

    @property
    def trials(self) -> int:
        return self.pack.trials

    @property
    def alive_K(self) -> Tensor:
        return self.optimizer.alive_K

    def step(self, loss_K: Tensor) -> None:
        self.optimizer.step(loss_K)

    def states(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return trial_state(self.pack, k), optimizer_state(self.optimizer, k)

    def close(self) -> None:
        remove(self.model, self.pack)


def train_rung(unit: Unit) -> tuple[Measurement, ...]:
    """Train the unit's trials from step `start` to `stop`, evaluate them and write their checkpoints.

    Returns a measurement a trial, in the unit's order. Raises FieldError where model or data can't be used, Damaged
    where a checkpoint is not as it was written, OSError where one cannot be read or written.
    """
    began = time.perf_counter()
    setup = unit.setup
    data = tokenised(setup)
    refuse_other_inputs(setup, unit.prepared, data, located(setup))
    try_place(unit.trials[0])
    order = pack_order([_modules_and_rank(trial) for trial in unit.trials])
    trials = [unit.trials[i] for i in order]
    checkpoints = [unit.checkpoints[i] for i in order] if unit.start else []
    trainee = start_trainee(setup, unit.prepared, trials, unit.start, checkpoints)
    forgets = setup.forgetting is not None and all(trial.phase == CONFIRM for trial in trials)
    try:
        fresh = held_out_scores(trainee, data.validation, setup, unit.prepared) if forgets and not unit.start else None
        losses: list[Tensor] = []
        alive: list[Tensor] = []
        tokens = np.zeros(len(trials), dtype=np.int64)
        first_step = time.perf_counter()
        for step, (batch, tokens_K) in enumerate(pack_batches(data, setup, trials, unit.start, unit.stop), unit.start):
            losses.append(train_step(trainee, batch, setup, unit.prepared, step))
            alive.append(trainee.alive_K.clone())
            tokens += tokens_K
        losses_KS, alive_KS = torch.stack(losses, 1).cpu().tolist(), torch.stack(alive, 1).cpu()
        train_seconds = time.perf_counter() - first_step  # the device is done: the losses are here
        scores = held_out_scores(trainee, data.validation, setup, unit.prepared)
        passes = held_out_passes(trainee, data.test, setup, unit.prepared) if unit.test else None
        tests = summarise(passes, setup.task) if passes else None
        source = source_losses(trainee, trials, setup, unit.prepared) if forgets else None

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
                pack_train_seconds=train_seconds,
            )
            held_out = [scores[k]["loss"], *(tests[k].values() if tests else ()), *([source[k]] if source else ())]
            if alive_KS[k].all() and np.isfinite(held_out).all():
                weights, moments = trainee.states(k)
                info = {"arm": trial.arm.name, "learning_rate": trial.learning_rate, "seed": trial.seed}
                rows = row_losses(passes, k) if passes else None
                saved = save_checkpoint(trial, Checkpoint(unit.stop, weights, moments), info, rows)
                measurement = replace(
                    measurement,
                    eval_loss=scores[k]["loss"],
                    eval_metrics=_named("eval", scores[k]),
                    test_metrics={"test_loss": tests[k]["loss"], **_named("test", tests[k])} if tests else {},
                    checkpoint=saved.name,
                    checkpoint_sha256=saved.sha256,
                    diverged_at=None,
                    test_rows=f"{saved.name}/{TEST_ROWS}" if passes else "",
                    forgetting_loss=source[k] if source else None,
                    eval_loss_at_start=fresh[k]["loss"] if fresh and np.isfinite(fresh[k]["loss"]) else None,
                )
            found[trial.number] = measurement
    finally:
        trainee.close()
    seconds = time.perf_counter() - began
    return tuple(replace(found[trial.number], pack_seconds=seconds) for trial in unit.trials)


def start_trainee(
    setup: Setup, prepared: Prepared, trials: list[TrialSpec], start: int, saved: Sequence[Saved] = ()
) -> Trainee:
    """The trials at step `start`: fresh from their seeds, or from their checkpoints. Raises Damaged."""
    train, base = setup.train, base_for(setup, prepared, trials[0].arm)
    checkpoints = [load_checkpoint(t, s) for t, s in zip(trials, saved, strict=True)] if start else []
    if trials[0].arm.is_full:
        weights, moments = (checkpoints[0].weights, checkpoints[0].optimizer) if start else (None, None)
        return start_full(base, trials[0].seed, recipe(train, trials[0]), train.optimizer, start, weights, moments)
    states = [c.weights for c in checkpoints] if start else [fresh_state(base, trial, train) for trial in trials]
    adapters = [adapter_of(base, t.arm, state, t.seed) for t, state in zip(trials, states, strict=True)]
    pack = install(base.model, adapters, base.head, train.dropout)
    try:
        if base.behind is not None:
            pack.hooks.append(read_first_position(base.model, base.behind))
        moments_of = [c.optimizer for c in checkpoints] if start else None
        recipes = [recipe(train, trial) for trial in trials]
        optimizer = start_optimizer(pack, recipes, train.optimizer, start, moments_of)
        return PackTrainee(base.model, base.plain_head, pack, optimizer)
    except BaseException:
        remove(base.model, pack)
        raise


def base_for(setup: Setup, prepared: Prepared, arm: Arm) -> Base:
    """The frozen model as the arm trains on it: full fine-tuning copies float32 weights in every precision."""
    precision = "float32" if arm.is_full else prepared.precision
    pad_token_id = tokenised(setup).pad_token_id
    place = located(setup)
    return load_base(
        place, setup.task, prepared.labels, pad_token_id, precision, prepared.attention, setup.quantization
    )


def recipe(train: TrainSettings, trial: TrialSpec) -> Recipe:
    """How the trial's numbers move."""
    return Recipe(
        trial.learning_rate,
        train.steps,
        train.schedule,
        train.warmup,
        train.weight_decay,
        train.clip,
        train.betas,
        train.loraplus_lr_ratio if trial.arm.method == "lora+" else 1.0,
    )


def fresh_state(base: Base, trial: TrialSpec, train: TrainSettings) -> dict[str, Tensor]:
    """A trial's tensors at step 0: a function of its seed, its arm and the base."""
    arm, layers = trial.arm, linear_modules(base.model)
    state: State = {}
    for name, layer in target_layers(base.model, base.head, arm.target_modules).items():
        r, scaling = arm.rank_at(name), arm.scaling_at(name)
        state |= init_adapter({name: layer}, arm.method, r, scaling, trial.seed, train.init_lora_weights)
    if arm.prefix_length:
        state |= init_prefix(base.model.get_input_embeddings(), arm.prefix_length, trial.seed)  # type: ignore[operator]
    return {**state, **init_head({name: layers[name] for name in base.head}, trial.seed)}


def train_step(trainee: Trainee, batch: AnyBatch, setup: Setup, prepared: Prepared, step: int) -> Tensor:
    """One optimizer step of every trial on its own rows of the pack's batch. Returns the mean losses (K,) before it."""
    losses = []
    for loss_K in training_losses(trainee, batch, setup, prepared, step):
        loss_K.sum().backward()
        losses.append(loss_K.detach())
    loss_K = torch.stack(losses).sum(0)
    trainee.step(loss_K)
    return loss_K


def training_losses(trainee: Trainee, batch: AnyBatch, setup: Setup, prepared: Prepared, step: int) -> Iterator[Tensor]:
    """The trials' mean losses (K,), as the parts of them that each device batch adds; mostly there is one."""
    counts = target_counts(batch, trainee.trials)
    for first_row, part in split_batch(batch, trainee.trials, setup.train.micro_batch_size):
        tell(trainee, part, step, first_row)
        with _autocast(trainee, prepared):
            loss_K = score(trainee.model, part, setup.task, trainee.trials, trainee.plain_head).loss_K
        yield loss_K / torch.from_numpy(counts).to(loss_K)


def timed_steps(
    setup: Setup, prepared: Prepared, trials: list[TrialSpec], trainee: Trainee, warmup: int, steps: int
) -> list[float]:
    """Seconds of each of `steps` training steps after `warmup` ones."""
    times = []
    for step, (batch, _) in enumerate(pack_batches(tokenised(setup), setup, trials, 0, warmup + steps)):
        began = time.perf_counter()
        train_step(trainee, batch, setup, prepared, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[warmup:]


def held_out_scores(trainee: Trainee, split: AnySplit, setup: Setup, prepared: Prepared) -> list[dict[str, float]]:
    """Every trial on all rows of a split; see `summarise`."""
    return summarise(held_out_passes(trainee, split, setup, prepared), setup.task)


def held_out_passes(trainee: Trainee, split: AnySplit, setup: Setup, prepared: Prepared) -> list[Scores]:
    """The same row by row."""
    pad_token_id, told, task = tokenised(setup).pad_token_id, _told(trainee), setup.task
    with _autocast(trainee, prepared):
        return evaluation_passes(trainee.model, split, task, trainee.trials, pad_token_id, trainee.plain_head, told)


def source_losses(trainee: Trainee, trials: list[TrialSpec], setup: Setup, prepared: Prepared) -> list[float]:
    """Every trial's loss on the text that forgetting is measured on."""
    place, pad_token_id = located(setup), tokenised(setup).pad_token_id
    text = load_source_text(setup, place)
    with _autocast(trainee, prepared):
        if setup.task == CAUSAL_LM:
            itself = LanguageModel(trainee.model, trainee.plain_head)
            return text_losses(itself, text, trainee.trials, pad_token_id, _told(trainee))
        if isinstance(trainee, PackTrainee):
            states = [trial_state(trainee.pack, k) for k in range(len(trials))]
            arms = [trial.arm for trial in trials]
            model = load_language_model(place, prepared.precision, prepared.attention)
            return adapted_losses(model, arms, states, text, pad_token_id)
        model = load_language_model(place, "float32", prepared.attention)
        return [finetuned_loss(model, dict(trainee.model.named_parameters()), text, pad_token_id)]


def pack_batches(
    data: TokenisedData, setup: Setup, trials: list[TrialSpec], start: int, stop: int
) -> Iterator[tuple[AnyBatch, np.ndarray]]:
    """The pack's batch of each step, rows ordered by trial, and each trial's tokens in it (no padding) or images."""
    lengths = data.train.lengths
    orders = [step_rows(lengths, setup.train.batch_size, trial.seed, start, stop) for trial in trials]
    for rows in zip(*orders, strict=True):
        yield (
            collate(data.train, np.concatenate(rows), data.pad_token_id),
            np.array([lengths[own].sum() for own in rows], dtype=np.int64),
        )


@lru_cache(maxsize=2)
def tokenised(setup: Setup) -> TokenisedData:
    return load_data(setup, located(setup))


@lru_cache(maxsize=8)
def located(setup: Setup) -> ModelPlace:
    """The base model, found once a process: a hub that goes away later must not end trials."""
    return find_base(setup)


def tell(trainee: Trainee, batch: AnyBatch, step: int | None, first_row: int = 0) -> None:
    """Tell the packed layers of the pass that comes: of a training step, or (None) without dropout."""
    tell_pass(_told(trainee), batch, step, first_row)


def _told(trainee: Trainee) -> ForwardPass | None:
    return trainee.pack.forward_pass if isinstance(trainee, PackTrainee) else None


def _autocast(trainee: Trainee, prepared: Prepared) -> contextlib.AbstractContextManager[object]:
    """bfloat16 for full fine-tuning means float32 weights under autocast; a pack's frozen base is bfloat16 itself."""
    if isinstance(trainee, PackTrainee) or prepared.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(trainee.alive_K.device.type, dtype=torch.bfloat16)


def _modules_and_rank(trial: TrialSpec) -> Adapter:
    arm = trial.arm
    ranks, p = dict(arm.rank_pattern), arm.prefix_length
    return Adapter(arm.r, arm.scaling, arm.target_modules, {}, method=arm.method, ranks=ranks, prefix_length=p)


def _named(split: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in scores.items() if name != "loss"}
