"""Tiny random models of four families, frozen, and rows of data for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from sweep.training.tasks import CAUSAL_LM, CLASSIFICATION
from sweep.training.tokens import Split

HIDDEN, VOCAB, CLASSES, PAD = 16, 60, 3, 0
TABLE = 12  # rows of the data


@dataclass(frozen=True)
class Family:
    name: str
    task: str
    linear: tuple[str, ...]  # endings of its linear layers
    others: tuple[str, ...] = ()  # endings of its embeddings and convolutions
    head: tuple[str, ...] = ()
    blocks: str = ""


FAMILIES = {
    f.name: f
    for f in (
        Family(
            "bert",
            CLASSIFICATION,
            ("query", "key", "value", "dense", "attention.output.dense"),
            ("word_embeddings", "position_embeddings"),
            ("classifier",),
            "bert.encoder.layer",
        ),
        Family(
            "llama",
            CAUSAL_LM,
            ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "lm_head", "down_proj"),
            ("embed_tokens",),
            blocks="model.layers",
        ),
        Family("gpt2", CAUSAL_LM, ("c_attn", "c_proj", "c_fc", "mlp.c_proj"), ("wte", "wpe"), blocks="transformer.h"),
        Family(
            "vit",
            CLASSIFICATION,
            ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
            ("projection",),
            ("vit.classifier",),
            "vit.vit.layers",
        ),
    )
}


class Images(nn.Module):
    """An image classifier that takes its pixels as rows of bytes, so that they go the way of tokens."""

    def __init__(self, vit: nn.Module, size: int):
        super().__init__()
        self.vit, self.size = vit, size

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        pixels = input_ids.view(len(input_ids), 3, self.size, self.size).float() / 32 - 1
        return self.vit(pixel_values=pixels, labels=labels)


@lru_cache
def frozen_model(family: Family) -> nn.Module:
    """One model for all tests of a family: packs must leave it as it was."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family.name == "bert":
        config: Any = transformers.BertConfig(
            vocab_size=VOCAB, intermediate_size=24, max_position_embeddings=16, num_labels=CLASSES, **size, **no_dropout
        )
        kind: Any = transformers.BertForSequenceClassification
    elif family.name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=16, **size
        )
        kind = transformers.LlamaForCausalLM
    elif family.name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        kind = transformers.GPT2LMHeadModel
    else:
        config = transformers.ViTConfig(
            image_size=8, patch_size=4, intermediate_size=24, num_labels=CLASSES, **size, **no_dropout
        )
        kind = transformers.ViTForImageClassification
    config._attn_implementation = "eager"
    model = kind(config)
    with torch.no_grad():  # at the usual 0.02 these small models hardly answer to their layers
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(6)
    if family.name == "vit":
        model = Images(model, config.image_size)
    return model.requires_grad_(False).eval()


@lru_cache
def frozen_rows(family: Family) -> Split:
    rng = np.random.default_rng(1)
    images = family.name == "vit"
    lengths = np.full(TABLE, 3 * 8 * 8) if images else rng.integers(4, 9, TABLE)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, 64 if images else VOCAB, offsets[-1]).astype(np.int32)
    if family.task == CLASSIFICATION:
        return Split(ids, offsets, rng.integers(0, CLASSES, TABLE))
    targets = (rng.random(len(ids)) < 0.7).astype(np.int8)
    targets[offsets[:-1]] = 0
    targets[offsets[:-1] + 2] = 1  # no row without a target
    return Split(ids, offsets, targets)
