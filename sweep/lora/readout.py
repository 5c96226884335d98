"""The top of an encoder whose classifier reads the first position alone: what the others would add is not computed.

BERT and its kin classify at [CLS]. Behind the last block's attention every position goes its own way, so that block's
output layers and feed-forward run at one position of a row instead of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sweep.lora.trunk import block_list


def behind_attention(model: nn.Module) -> str | None:
    """The name of the module that takes (attention's output, the residual) of the last block; None in other models."""
    blocks = block_list(model)
    if blocks is None:
        return None
    last: Any = model.get_submodule(blocks)
    name = f"{blocks}.{len(last) - 1}.attention.output"
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return name if isinstance(getattr(module, "dense", None), nn.Linear) else None


def read_first_position(model: nn.Module, behind: str) -> RemovableHandle:
    """From the module `behind` on, only the first position of every row is computed."""

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(v[:, :1].contiguous() if isinstance(v, Tensor) and v.ndim == 3 else v for v in args)

    return model.get_submodule(behind).register_forward_pre_hook(narrow)


@torch.no_grad()
def reads_first_position(model: Any) -> str | None:
    """The module from which on the first position is enough, seen to leave the logits of a few tokens as they are."""
    behind = behind_attention(model)
    if behind is None:
        return None
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device).view(2, 6) % model.config.vocab_size
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], device=device)
    whole = model(input_ids=ids, attention_mask=mask).logits
    hook = read_first_position(model, behind)
    try:
        narrowed = model(input_ids=ids, attention_mask=mask).logits
    except (RuntimeError, ValueError, IndexError):  # a model that reads more than the first position
        return None
    finally:
        hook.remove()
    tolerance = 1e-5 if whole.dtype == torch.float32 else 5e-3
    same = narrowed.shape == whole.shape and torch.allclose(whole, narrowed, rtol=tolerance, atol=tolerance)
    return behind if same else None
