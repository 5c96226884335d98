"""(c) PEFT in a bare loop, written as its best user would: fused AdamW, no host synchronisation, no needless work."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sweep.study.arms import ALL_LINEAR
from sweep.study.records import Setup
from sweep.training.batches import collate, step_rows
from sweep.training.data import TokenisedData
from sweep.training.locate import locate_model, quiet

from .work import RATE, SEED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Mode:
    """How PEFT's user sets precision and attention. Adapter and head are float32 in every mode."""

    base: str  # dtype of the frozen weights
    autocast: bool  # bfloat16 autocast: `bf16=True` of the Trainer
    attention: str

    @property
    def name(self) -> str:
        return f"{self.base}{'+autocast' if self.autocast else ''}/{self.attention}"

    @property
    def dtype(self) -> str:
        """In which the large matrix products are done."""
        return "bfloat16" if self.autocast else self.base


MODES = tuple(
    Mode(base, autocast, attention)
    for base in ("float32", "bfloat16")
    for autocast in (False, True)
    for attention in ("sdpa", "eager")
)
DEFAULT = Mode("float32", False, "sdpa")  # what transformers and PEFT do when they are told nothing


@lru_cache(maxsize=4)
def plain_base(setup: Setup, labels: tuple[str, ...], base: str, attention: str) -> nn.Module:
    """The model as transformers loads it, kept for the next trial as a careful user does.

    The model's own dropout is off, as in our arms: otherwise the contenders would do different work.
    """
    import transformers

    place = locate_model(setup.model)
    settings: dict[str, Any] = {"dtype": DTYPES[base], "attn_implementation": attention}
    if place.gguf_file:
        settings["gguf_file"] = place.gguf_file
    auto: Any = transformers.AutoModelForCausalLM
    if setup.task == "sequence-classification":
        auto, settings["num_labels"] = transformers.AutoModelForSequenceClassification, len(labels)
    with quiet():
        model: Any = auto.from_pretrained(place.path, **settings)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # a GGUF file's weights are unpacked by now
        model.is_quantized, model.hf_quantizer = False, None  # else the Trainer refuses to train
    model.config.use_cache = False  # nobody keeps keys and values in training
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found: nn.Module = model
    return found


def peft_model(
    setup: Setup,
    data: TokenisedData,
    mode: Mode,
    rank: int,
    modules: tuple[str, ...],
    alpha: float | None = None,
    rslora: bool = False,
) -> nn.Module:
    """A copy of the base with a fresh adapter. alpha: by default the rank, a scaling of 1."""
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils import ModulesToSaveWrapper

    classify = setup.task == "sequence-classification"
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        use_rslora=rslora,
        target_modules=ALL_LINEAR if modules == (ALL_LINEAR,) else list(modules),
        task_type=TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM,
    )
    base = copy.deepcopy(plain_base(setup, data.labels, mode.base, mode.attention))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries, about each other
        model: nn.Module = get_peft_model(base, config).train()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):  # PEFT would train a bfloat16 head in bfloat16, and badly
            head = module.modules_to_save["default"].float()
            head.register_forward_pre_hook(lambda head, given: (given[0].float(), *given[1:]))
    return model


def torch_batch(data: TokenisedData, rows: Sequence[int] | np.ndarray, task: str) -> dict[str, Tensor]:
    """What a model is called with, by our own collation, so that no contender pays for a slower one."""
    batch = collate(data.train, rows, data.pad_token_id)
    ids, labels = torch.from_numpy(batch.input_ids_RT), torch.from_numpy(batch.labels)
    if task == "causal-lm":
        labels = torch.where(labels, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.from_numpy(batch.attention_mask_RT), "labels": labels}


class Loop:
    """One trial, step by step."""

    def __init__(self, setup: Setup, data: TokenisedData, mode: Mode, rank: int, modules: tuple[str, ...]):
        self.setup, self.data, self.mode = setup, data, mode
        self.model = peft_model(setup, data, mode, rank, modules)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=setup.train.weight_decay, fused=True)
        self.rows: Iterator[np.ndarray] = step_rows(
            data.train.lengths, setup.train.batch_size, SEED, 0, setup.train.steps
        )

    def step(self) -> float:
        """Seconds of the next step, collation included."""
        began = time.perf_counter()
        batch = torch_batch(self.data, next(self.rows), self.setup.task)
        with torch.autocast("cpu", torch.bfloat16) if self.mode.autocast else contextlib.nullcontext():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.setup.train.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def time_loop(
    setup: Setup, data: TokenisedData, mode: Mode, rank: int, modules: tuple[str, ...], warmup: int, steps: int
) -> tuple[float, ...]:
    """Seconds of each step after `warmup` ones."""
    loop = Loop(setup, data, mode, rank, modules)
    return tuple(loop.step() for _ in range(warmup + steps))[warmup:]
