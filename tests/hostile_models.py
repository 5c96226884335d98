"""Model folders to load with care or not at all: one that brings its own code, one whose weights are a pickle.

Each leaves a file behind where its code runs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from tiny_texts import save_tiny_llama

OWN_MODEL = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({canary!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN_TOKENIZER = """
from pathlib import Path

from transformers import PreTrainedTokenizerFast

Path({canary!r}).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Trap:
    """Its pickle makes a file when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def save_model_with_code(folder: Path, canaries: Path) -> None:
    """A tiny causal language model that transformers cannot load without the code beside it."""
    save_tiny_llama(folder)
    code = OWN_MODEL.format(canary=str(canaries / "ran-model"))
    (folder / "modeling_own.py").write_text(code)
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER.format(canary=str(canaries / "ran-tokenizer")))
    maps = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder / "config.json", model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=maps)
    tokenizer = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)


def save_pickled_model(folder: Path, canary: Path) -> None:
    """The same without code, its weights beside a trap in pytorch_model.bin."""
    save_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": torch.zeros(1), "trap": Trap(canary)}, folder / "pytorch_model.bin")


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
