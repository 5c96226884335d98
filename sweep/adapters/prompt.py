"""A trial's prefix as PEFT's prompt tuning loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sweep.lora.methods import State
from sweep.lora.prefix import PROMPT
from sweep.training.base import Base


def write_prompt(base: Base, model: str, saved: list[str] | None, weights: State, to: Path) -> None:
    """PEFT's own PromptTuningConfig writes the config; a head's keys carry the prefix `base_model.`, the prompt's none.

    model: the base's name. saved: the modules of the head, as PEFT names them. weights: those of the head and
    `prompt_embeddings` are taken.
    """
    from peft import PromptTuningConfig, TaskType

    body: Any = base.model
    settings = body.config.get_text_config()
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_CLS if base.head else TaskType.CAUSAL_LM,
        base_model_name_or_path=model,
        num_virtual_tokens=len(weights[PROMPT]),
        token_dim=weights[PROMPT].shape[1],
        num_transformer_submodules=1,
        num_attention_heads=getattr(settings, "num_attention_heads", None),
        num_layers=getattr(settings, "num_hidden_layers", None),
        modules_to_save=saved,
        inference_mode=True,
    )
    config.save_pretrained(str(to))
    head = {n: t for n, t in weights.items() if n.rpartition(".")[0] in base.head}
    named = {PROMPT: weights[PROMPT], **{f"base_model.{name}": tensor for name, tensor in head.items()}}
    save_file(
        {n: t.contiguous() for n, t in named.items()}, to / "adapter_model.safetensors", metadata={"format": "pt"}
    )
