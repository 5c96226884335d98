"""Packed layers: one frozen matrix, and K trials' low-rank updates on top of it.

Shapes: K trials in the pack, G neighbouring trials of one bucket, b rows a trial, N tokens a trial (b·T, or b),
I input features, O output features, r rank. Rows are ordered by trial: rows k·b … (k+1)·b − 1 belong to trial k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class UnpackableError(ValueError):
    """A layer of this model does not see the batch's rows, so trials cannot share a pass; a pack of one can."""


@dataclass
class ForwardPass:
    """What the packed layers must know of the pass that is under way; set before each."""

    seeds_K: Tensor  # int64; with the step they decide which inputs dropout drops
    p: float  # dropout of the updates' inputs
    rows: int = 0  # K·b
    step: int = 0
    dropout: bool = False  # off in evaluation


@dataclass(frozen=True)
class Bucket:
    """Neighbouring trials start … stop−1 of one rank. No padding: rank 64 costs rank 2 nothing."""

    start: int
    stop: int
    A_GrI: nn.Parameter
    B_GOr: nn.Parameter
    scaling_G11: Tensor


def packed_lora(x_KNI: Tensor, y_KNO: Tensor, buckets: list[Bucket], keep_KNI: Tensor | None = None) -> Tensor:
    """y + scaling · (x Aᵀ) Bᵀ for every trial that has an adapter here; y for the others. Returns (K, N, O).

    LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3: h = W₀x + (alpha / r)·BAx.
    keep_KNI: 0 where dropout drops an input of the update, 1 / (1 − p) where it stays.
    """
    parts, done = [], 0
    for bucket in buckets:
        if bucket.start > done:
            parts.append(y_KNO[done : bucket.start])
        x_GNI, y_GNO = x_KNI[bucket.start : bucket.stop], y_KNO[bucket.start : bucket.stop]
        if keep_KNI is not None:
            x_GNI = x_GNI * keep_KNI[bucket.start : bucket.stop]
        A_GrI, B_GOr = bucket.A_GrI.to(x_GNI.dtype), bucket.B_GOr.to(x_GNI.dtype)
        h_GNr = torch.bmm(x_GNI, A_GrI.transpose(1, 2)) * bucket.scaling_G11.to(x_GNI.dtype)
        parts.append(torch.baddbmm(y_GNO, h_GNr, B_GOr.transpose(1, 2)))
        done = bucket.stop
    if done < len(y_KNO):
        parts.append(y_KNO[done:])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PackedLoraLinear(nn.Module):
    """A frozen nn.Linear with the updates of K trials."""

    def __init__(self, base: nn.Linear, trials: int, buckets: list[Bucket], forward_pass: ForwardPass, index: int):
        super().__init__()
        self.base, self.trials, self.buckets, self.forward_pass, self.index = base, trials, buckets, forward_pass, index
        for i, bucket in enumerate(buckets):
            self.register_parameter(f"A{i}", bucket.A_GrI)
            self.register_parameter(f"B{i}", bucket.B_GOr)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.trials > 1 and len(x) != self.forward_pass.rows:
            raise UnpackableError(f"an adapted layer sees {len(x)} rows of a batch of {self.forward_pass.rows}")
        x_KNI = x.reshape(self.trials, -1, x.shape[-1])
        keep_KNI = None
        if self.forward_pass.dropout:
            keep_KNI = dropout_keep(x.reshape(self.trials, -1, *x.shape[1:]).shape, self.forward_pass, self.index)
            keep_KNI = keep_KNI.reshape(x_KNI.shape).to(x.dtype)
        y_KNO = y.reshape(self.trials, -1, y.shape[-1])
        return packed_lora(x_KNI, y_KNO, self.buckets, keep_KNI).reshape(y.shape)


class PackedTrainedLinear(nn.Module):
    """K trained copies of one nn.Linear: a head of each trial's own. Computes in float32, since it is tiny."""

    def __init__(self, weight_KOI: Tensor, bias_KO: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight_KOI)
        self.bias = nn.Parameter(bias_KO) if bias_KO is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x_KNI = x.reshape(self.weight.shape[0], -1, x.shape[-1]).float()
        y_KNO = torch.bmm(x_KNI, self.weight.transpose(1, 2))
        if self.bias is not None:
            y_KNO = y_KNO + self.bias[:, None, :]
        return y_KNO.reshape(*x.shape[:-1], -1)


def dropout_keep(shape: torch.Size, keys: ForwardPass, layer: int) -> Tensor:
    """0 or 1 / (1 − p) for each element of (K, b, …, I), a hash of (trial's seed, step, layer, place in the trial).

    Counter-based, so that a trial drops the same inputs whatever its neighbours and however far rows are padded:
    the place is (row, position, feature), and none of them depends on the pack.
    """
    device = keys.seeds_K.device
    _, rows, *middle, features = shape
    positions = middle[0] if middle else 1
    state = _mix(keys.seeds_K + 0x9E3779B9 * (keys.step + 1) + 0x85EBCA6B * (layer + 1))[:, None, None, None]
    state = _mix(state + torch.arange(rows, device=device)[:, None, None] * 0x27D4EB2F)
    state = _mix(state + torch.arange(positions, device=device)[:, None] * 0x165667B1)
    state = _mix(state + torch.arange(features, device=device) * 0x9E3779B1)
    keep = state >= int(keys.p * 2**32)
    return (keep.float() / (1.0 - keys.p)).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3, in int64: every bit of the input moves every bit of the output."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
