"""A frozen base in 4 or 8 bits, as bitsandbytes packs it: its weights as dense matrices, made anew for each product.

QLoRA, Dettmers et al. 2023, arXiv 2305.14314, equation 5: y = dequantised(W₀)x + scaling · BAx. The adapter keeps its
own precision, and no gradient goes to W₀. LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, equation 5: a row of W₀
is its 8-bit numbers times its largest absolute value, / 127.

Shapes: I input features, O output features, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A frozen matrix (O, I): there as a tensor, or made when a product asks for it in its own dtype.
Frozen = Tensor | Callable[[torch.dtype], Tensor]


def is_quantized(layer: nn.Module) -> bool:
    """By name, since this room imports torch alone."""
    return isinstance(layer, nn.Linear) and type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The layer's weight (O, I), without gradient."""
    weight: Any = layer.weight
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    state: Any = layer.state
    scale_O = state.SCB if weight.SCB is None else weight.SCB  # bitsandbytes moves it there when the layer first runs
    return (weight.data.float() * (scale_O.float()[:, None] / 127)).to(dtype)


def frozen_matrix(layer: nn.Module) -> Frozen:
    """The matrix of a quantised layer as `frozen_product` takes it."""
    return lambda dtype: dequantized(layer, dtype)


def dense(W_OI: Frozen, dtype: torch.dtype) -> Tensor:
    return W_OI if isinstance(W_OI, Tensor) else W_OI(dtype)


def run_dequantized(model: nn.Module) -> None:
    """Let every quantised layer of a model compute as the packed ones do: by its dequantised weight.

    bitsandbytes' own 8-bit product rounds the input too, and takes out columns by what else is in the batch: a trial
    would depend on its neighbours in the pack.
    """
    for layer in model.modules():
        if is_quantized(layer):
            layer.forward = _Product(layer)


class _Product:
    """A quantised layer's forward."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        bias: Any = self.layer.bias
        y: Tensor = _FrozenLinear.apply(x, self.layer, None if bias is None else bias.to(x.dtype))
        return y


class _FrozenLinear(torch.autograd.Function):
    """x W₀ᵀ + b of which the dense W₀ is not kept: the gradient to x makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, bias_O: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantized(layer, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        return g @ dequantized(ctx.layer, g.dtype) if ctx.needs_input_grad[0] else None, None, None
