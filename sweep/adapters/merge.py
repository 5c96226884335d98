"""Merging: the weights that a plain model has when a trial's adapter is folded into it.

Shapes: O output features, I input features, r rank; see `sweep.lora.methods` for each layer's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sweep.lora.dora import row_norms
from sweep.lora.methods import State, is_conv1d, tensor_names
from sweep.study.arms import Arm


def merged_weight(name: str, layer: nn.Module, arm: Arm, state: State) -> Tensor:
    """The layer's weight with the update folded in, in its own layout and dtype, float32 inside.

    W₀ + scaling · BA; PiSSA: W₀ + scaling · (BA − B₀A₀); DoRA: its rows scaled to the magnitudes (see `dora`).
    """
    weight = layer.get_parameter("weight").detach()
    W0 = weight.float().cpu()
    A, B = (state[f"{name}.{tensor}"].float() for tensor in tensor_names(layer))
    scaling = arm.scaling_at(name)
    if isinstance(layer, nn.Embedding):
        merged = W0 + scaling * (B @ A).T
    elif isinstance(layer, nn.Conv2d):
        merged = W0 + scaling * torch.einsum("or,rchw->ochw", B.flatten(1), A)
    else:
        W_OI = W0.T if is_conv1d(layer) else W0
        update_OI = scaling * (B @ A)
        if arm.method == "pissa":
            update_OI -= scaling * (state[f"{name}.initial_B.weight"] @ state[f"{name}.initial_A.weight"])
        W_OI = W_OI + update_OI
        if arm.method == "dora":
            norm_1O = row_norms(W0.T if is_conv1d(layer) else W0, A[None], B[None], torch.full((1, 1, 1), scaling))
            W_OI = (state[f"{name}.lora_magnitude_vector"] / norm_1O[0])[:, None] * W_OI
        merged = W_OI.T if is_conv1d(layer) else W_OI
    return merged.to(weight)


def as_plain_lora(name: str, state: State) -> State:
    """PiSSA's layer as LoRA of twice the rank over the whole base: [B, −B₀]·[A; A₀], arXiv 2404.02948 appendix C."""
    A, B = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    A0, B0 = state[f"{name}.initial_A.weight"], state[f"{name}.initial_B.weight"]
    return {f"{name}.lora_A.weight": torch.cat([A, A0]), f"{name}.lora_B.weight": torch.cat([B, -B0], 1)}
