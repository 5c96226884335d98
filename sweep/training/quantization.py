"""A base that is loaded in 4 or 8 bits: whether it can be here, how it is asked for, and what it counts and weighs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sweep.lora.methods import matrix_shape
from sweep.lora.quantized import is_quantized
from sweep.study.errors import FieldError
from sweep.training.locate import ModelPlace

FIELD = "quantization"
HOW = "`pip install 'lora-sweep[quantized]'`"


def check_quantization(quantization: str | None) -> None:
    """Raises FieldError on `quantization` where this machine cannot do it."""
    if quantization is None:
        return
    if not torch.cuda.is_available():
        why = "needs a CUDA device, and there is none here: run it where there is one, or leave the key out"
        raise FieldError((FIELD, f"{quantization} {why}"))
    if find_spec("bitsandbytes") is None:
        raise FieldError((FIELD, f"{quantization} needs the package bitsandbytes: {HOW}, or leave the key out"))


def loading_settings(
    quantization: str, place: ModelPlace, head_names: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` is given. 4bit: NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3).

    head_names: layers that stay as they are; without any, transformers spares the output layer.
    """
    if place.gguf_file:
        why = "a GGUF file is unpacked when it is read: name the model's folder or id"
        raise FieldError((FIELD, f"{quantization}: {why}"))
    from transformers import BitsAndBytesConfig

    skipped = list(head_names) or None
    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )
    return {"quantization_config": config}


def count_parameters(model: nn.Module) -> int:
    """Of a quantised weight its numbers, not the bytes that they are packed into."""
    packed = [layer for layer in model.modules() if is_quantized(layer)]
    weights = {id(layer.weight) for layer in packed}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in weights)
    return plain + sum(rows * columns for rows, columns in map(matrix_shape, packed))


def base_bytes(model: nn.Module) -> int:
    """What the weights take, and the scales that quantised ones have beside them."""
    scales = [scale for layer in model.modules() if is_quantized(layer) for scale in _scales(layer)]
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *scales))


def _scales(layer: nn.Module) -> list[Tensor]:
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        own: Any = layer.state
        return [scale for scale in (weight.SCB, own.SCB) if scale is not None][:1]
    inner = state.state2  # double quantisation: the scales' own
    return [state.absmax, *([inner.absmax] if inner is not None else [])]
