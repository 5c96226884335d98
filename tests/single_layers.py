"""Models of one layer, with a pack on it."""

from __future__ import annotations

import torch
from torch import nn

from sweep.lora.adapter import Adapter, Pack, install


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(layer: nn.Module) -> nn.Module:
    """A frozen model of one layer, named "layer"."""
    model = nn.Module()
    model.layer = layer
    return model.requires_grad_(False)


def installed(model: nn.Module, states: list[dict[str, torch.Tensor]], r: int, scaling: float, rows: int) -> Pack:
    pack = install(model, [Adapter(r, scaling, ("layer",), state) for state in states], head=())
    pack.forward_pass.rows = rows
    return pack
