"""The whole search by the incumbent: every trial of the study to its end with the Trainer, asked of Optuna."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import optuna
import torch
from torch import Tensor, nn

from sweep.driver.plan import Slot
from sweep.study.arms import ALL_LINEAR, Arm, full_arm
from sweep.study.records import Setup, TrialSpec
from sweep.study.schema import Study
from sweep.training.base import load_base
from sweep.training.data import TokenisedData
from sweep.training.locate import locate_model, quiet
from sweep.training.rung import fresh_state

from .contenders import fastest
from .incumbent import StepClock, make_trainer
from .peft_loop import MODES, Mode, peft_model, plain_base, torch_batch
from .work import read_data

CALIBRATION_STEPS = 4
EVAL_ROWS = 64


def initial_states(setup: Setup, slots: Sequence[Slot]) -> dict[str, dict[str, Tensor]]:
    """Of every trial, by slot name: the weights that ours starts it from. Full fine-tuning starts with a fresh head."""
    data = read_data(setup)
    base = load_base(locate_model(setup.model), setup.task, data.labels, data.pad_token_id, "float32", "eager")
    states = {}
    for slot in slots:
        arm = replace(slot.arm, method="lora", r=1, target_modules=(ALL_LINEAR,)) if slot.arm.is_full else slot.arm
        spec = TrialSpec(0, arm, 0.0, slot.seed, slot.phase, "")
        state = fresh_state(base, spec, setup.train)
        states[slot.name] = {k: v for k, v in state.items() if not slot.arm.is_full or ".lora_" not in k}
    load_base.cache_clear()
    return states


def choose_modes(setup: Setup, study: Study) -> tuple[Mode, Mode]:
    """The fastest precision and attention for the arms, by the one of the middle rank, and for full fine-tuning."""
    data = read_data(setup)
    arms = [arm for arm in study.list_arms() if not arm.is_full]
    trainable = [mode for mode in MODES if mode.base == "float32"]  # bfloat16 weights would not move
    middle = arms[len(arms) // 2]
    lora, _ = fastest({mode.name: partial(_a_few_steps, setup, data, mode, middle) for mode in MODES})
    full = lora
    if any(arm.is_full for arm in study.list_arms()):
        full, _ = fastest({mode.name: partial(_a_few_steps, setup, data, mode, full_arm()) for mode in trainable})
    by_name = {mode.name: mode for mode in MODES}
    return by_name[lora], by_name[full]


def search_one_by_one(
    setup: Setup, slots: Sequence[Slot], states: Mapping[str, dict[str, Tensor]], lora: Mode, full: Mode
) -> dict[str, float | None]:
    """Each trial's validation loss, by slot name; None where it is not finite."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data = read_data(setup)
    names = [slot.name for slot in slots]
    grid = {"slot": names}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid, seed=0))
    losses: dict[str, float | None] = {}
    by_name = {slot.name: slot for slot in slots}
    for name in names:
        study.enqueue_trial({"slot": name})
        trial = study.ask({"slot": optuna.distributions.CategoricalDistribution(names)})
        slot = by_name[trial.params["slot"]]
        loss = _train(setup, data, slot, states[slot.name], full if slot.arm.is_full else lora)
        losses[slot.name] = loss if math.isfinite(loss) else None
        if math.isfinite(loss):
            study.tell(trial, loss, skip_if_finished=True)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return losses


def _train(setup: Setup, data: TokenisedData, slot: Slot, state: dict[str, Tensor], mode: Mode) -> float:
    model = _model(setup, data, slot.arm, mode, state)
    trainer = make_trainer(setup, data, mode, model, slot.rate or 0.0, slot.seed, setup.train.steps)
    trainer.data_collator = partial(_collate_either, data, setup.task)
    trainer.args.per_device_eval_batch_size = EVAL_ROWS
    with quiet():
        trainer.train()
        order = data.validation.lengths.argsort(kind="stable")  # rows of one batch about equally long, as in ours
        found = trainer.evaluate([-1 - int(row) for row in order])
    return float(found["eval_loss"])


def _a_few_steps(setup: Setup, data: TokenisedData, mode: Mode, arm: Arm) -> tuple[float, ...]:
    clock = StepClock()
    make_trainer(setup, data, mode, _model(setup, data, arm, mode, {}), 1e-4, 0, CALIBRATION_STEPS, clock).train()
    return tuple(later - earlier for earlier, later in zip(clock.times[1:], clock.times[2:], strict=False))


def _model(setup: Setup, data: TokenisedData, arm: Arm, mode: Mode, state: Mapping[str, Tensor]) -> nn.Module:
    """A trial's model: PEFT's, or a copy of the base all of whose weights train; from the weights of `state`."""
    if arm.is_full:
        model = copy.deepcopy(plain_base(setup, data.labels, mode.base, mode.attention)).train()
    else:
        model = peft_model(setup, data, mode, arm.r, arm.target_modules, arm.lora_alpha, arm.method == "rslora")
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            module, kind = name.rsplit(".", 1)
            inside = "default." if ".lora_" in name else "modules_to_save.default."
            full_name = name if arm.is_full else f"base_model.model.{module}.{inside}{kind}"
            named[full_name].copy_(value)
    return model


def _collate_either(data: TokenisedData, task: str, rows: list[int]) -> dict[str, Tensor]:
    """Rows of the training split, or, negative, of the validation split: a Trainer has one collator."""
    if rows[0] >= 0:
        return torch_batch(data, rows, task)
    return torch_batch(replace(data, train=data.validation), [-1 - row for row in rows], task)
