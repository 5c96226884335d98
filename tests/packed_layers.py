"""Layers whose weights are packed into 4 or 8 bits, made by hand in bitsandbytes' layout, and unpacked by hand."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# bitsandbytes runs nowhere in the default tests: where it is installed its own layers are tested too.
MAKERS = ["by hand", "bitsandbytes"] if find_spec("bitsandbytes") else ["by hand"]
BLOCK = 64  # numbers that share a scale
# The 16 values of NormalFloat 4, arXiv 2305.14314, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


class Linear4bit(nn.Linear):
    """By its name bitsandbytes' layer; its own forward must not be needed."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the packed layer asks for the weight")


class Linear8bitLt(Linear4bit):
    pass


def packed(layer: nn.Linear, bits: int, maker: str) -> nn.Linear:
    """The layer with its weight packed, on the CPU."""
    if maker == "bitsandbytes":
        return _by_bitsandbytes(layer, bits)
    made = (Linear4bit if bits == 4 else Linear8bitLt)(
        layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float32
    )
    made.bias = layer.bias
    W_OI = layer.weight.detach()
    if bits == 8:
        scale_O = W_OI.abs().amax(1)
        weight: Any = nn.Parameter((W_OI * 127 / scale_O[:, None]).round().to(torch.int8), requires_grad=False)
        weight.SCB, made.state = scale_O, SimpleNamespace(SCB=None)  # type: ignore[assignment]
    else:
        blocks = W_OI.reshape(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        codes = (blocks / absmax[:, None]).reshape(-1, 1).sub(NF4).abs().argmin(1).to(torch.uint8)
        weight = nn.Parameter((codes[0::2] << 4 | codes[1::2])[:, None], requires_grad=False)
        weight.quant_state = SimpleNamespace(absmax=absmax, shape=W_OI.shape, state2=None)
    made.weight = weight
    return made


def unpacked(layer: Any) -> Tensor:
    """The weight of either maker's layer (O, I) in float32, without bitsandbytes."""
    if layer.weight.dtype == torch.int8:
        scale_O = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scale_O[:, None] / 127
    state, codes = layer.weight.quant_state, layer.weight.data.flatten().long()
    absmax = state.absmax
    if state.state2 is not None:  # double quantisation: the scales are 8-bit codes, around their mean
        inner = state.state2
        scales = inner.absmax.repeat_interleave(inner.blocksize)[: len(absmax)]
        absmax = inner.code[absmax.long()] * scales + state.offset
    values = NF4[torch.stack([codes >> 4, codes & 15], 1).flatten()]
    return (values.reshape(-1, BLOCK) * absmax.float()[:, None]).reshape(state.shape)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of bitsandbytes.functional one function that unpacks by hand."""

    def dequantize_4bit(data: Tensor, state: Any) -> Tensor:
        return unpacked(SimpleNamespace(weight=SimpleNamespace(dtype=data.dtype, data=data, quant_state=state)))

    functional = ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = dequantize_4bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)


def _by_bitsandbytes(layer: nn.Linear, bits: int) -> nn.Linear:
    import bitsandbytes

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    W_OI = layer.weight.detach().clone()
    if bits == 4:
        made = bitsandbytes.nn.Linear4bit(*sizes, bias, torch.float32, quant_type="nf4")
        made.weight = bitsandbytes.nn.Params4bit(W_OI, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bitsandbytes.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(W_OI, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    result: nn.Linear = made.to("cpu")  # where it is packed
    return result
