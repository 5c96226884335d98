"""Adapters that PEFT itself wrote, with random tensors, over the tiny random models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from random_models import FAMILIES, VOCAB, Family, frozen_model, frozen_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sweep.training.batches import collate
from sweep.training.tasks import CLASSIFICATION

WORDS = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}


def write_with_peft(family: str, to: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter whose every tensor is random, so that nothing is without effect, saved by PEFT."""
    of = FAMILIES[family]
    settings.setdefault("task_type", TaskType.SEQ_CLS if of.task == CLASSIFICATION else TaskType.CAUSAL_LM)
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(frozen_model(of)), LoraConfig(**settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
            elif ".lora_" in name or ".modules_to_save." in name:
                p.normal_(std=0.3)
    model.save_pretrained(str(to))
    return to


def in_peft(family: str, **folders: Path) -> PeftModel:
    """The base with these adapters, as PEFT loads them."""
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(copy.deepcopy(frozen_model(FAMILIES[family])), str(folder), first)  # type: ignore[arg-type]
    for name, other in others:
        model.load_adapter(str(other), name)
    return model.eval()


def inputs_of(family: str | Family, rows: int) -> dict[str, Tensor]:
    of = FAMILIES[family] if isinstance(family, str) else family
    batch = collate(frozen_rows(of), range(rows), 0)
    return {
        "input_ids": torch.from_numpy(batch.input_ids_RT),
        "attention_mask": torch.from_numpy(batch.attention_mask_RT),
    }


def logits_in_peft(model: PeftModel, inputs: dict[str, Tensor], adapter: str | None = None, **more: Any) -> Tensor:
    """adapter: the one that is active."""
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad():
        found: Tensor = model(**inputs, **more).logits
    return found


def on_disk(family: str, to: Path, **adapters: dict[str, object]) -> dict[str, Path]:
    """A base with a tokenizer of a word a token, and adapters that name it."""
    frozen_model(FAMILIES[family]).save_pretrained(to / "base")  # type: ignore[operator]
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(to / "base")
    folders = {}
    for seed, (name, settings) in enumerate(adapters.items()):
        folders[name] = write_with_peft(family, to / name, seed, **settings)
        config = folders[name] / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(to / "base")}))
    return folders
