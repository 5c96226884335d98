"""(b) the incumbent: Optuna, PEFT and the Hugging Face Trainer in one process, as its best user would write it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import optuna
import torch
import transformers

from sweep.study.records import Setup
from sweep.training.batches import step_rows
from sweep.training.data import TokenisedData
from sweep.training.locate import quiet

from .peft_loop import DEFAULT, Mode, peft_model, torch_batch
from .work import RANKS, RATE, SEED


@dataclass(frozen=True)
class TrainerRun:
    seconds: tuple[float, ...]  # of each step after the warm-up, from the end of the one before it
    startup_s: float  # from asking Optuna to the first step


class StepClock(transformers.TrainerCallback):
    """When the first step began and each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.times:
            self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def time_trainer(
    setup: Setup, data: TokenisedData, mode: Mode, rank: int, modules: tuple[str, ...], warmup: int, steps: int
) -> TrainerRun:
    """Ask, train `warmup + steps` steps, tell."""
    study = _study()
    began = time.perf_counter()
    study.enqueue_trial({"rank": rank})
    trial = study.ask({"rank": optuna.distributions.CategoricalDistribution(RANKS)})
    model = peft_model(setup, data, mode, trial.params["rank"], modules)
    clock = StepClock()
    trainer = make_trainer(setup, data, mode, model, RATE, SEED, warmup + steps, clock)
    with quiet():
        found = trainer.train()
    study.tell(trial, found.training_loss)
    differences = np.diff(clock.times).tolist()
    return TrainerRun(tuple(differences[warmup:]), clock.times[0] - began)


def make_trainer(
    setup: Setup,
    data: TokenisedData,
    mode: Mode,
    model: torch.nn.Module,
    learning_rate: float,
    seed: int,
    steps: int,
    *callbacks: transformers.TrainerCallback,
) -> transformers.Trainer:
    """A Trainer without logging, saving or evaluation, over rows in our order, collated as we collate.

    In its default mode the precision, the attention and the choice of optimizer are the library's own.
    """
    train = setup.train
    given: dict[str, Any] = {} if mode == DEFAULT else {"optim": "adamw_torch_fused", "bf16": mode.autocast}
    arguments = transformers.TrainingArguments(
        output_dir=_scratch(),
        max_steps=steps,
        per_device_train_batch_size=train.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=int(np.ceil(train.warmup * train.steps)),
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip or 0.0,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_num_workers=0,
        **given,
    )
    orders = step_rows(data.train.lengths, train.batch_size, seed, 0, steps)
    rows = [int(row) for batch in orders for row in batch]
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(_collate, data, setup.task),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _collate(data: TokenisedData, task: str, rows: list[int]) -> dict[str, torch.Tensor]:
    return torch_batch(data, rows, task)


@lru_cache(maxsize=1)
def _study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


@lru_cache(maxsize=1)
def _scratch() -> str:
    return tempfile.mkdtemp(prefix="trainer-")  # the Trainer wants a folder, and writes nothing to it
