"""One pass over a pack's rows: what the packed layers must know of it, and which inputs dropout drops in it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


class UnpackableError(ValueError):
    """A layer of this model does not see the batch's rows, so trials cannot share a pass; a pack of one can."""


@dataclass
class ForwardPass:
    """The pass under way; set before each. Rows are ordered by trial."""

    seeds_K: Tensor  # int64; with the step they decide which inputs dropout drops
    p: float  # dropout of the updates' inputs
    rows: int = 0  # K·b
    step: int = 0
    first_row: int = 0  # of each trial's rows: above 0 in the later passes of a step whose batch is split
    dropout: bool = False  # off in evaluation
    distinct_U: Tensor | None = None  # where inputs repeat over the trials: one row of each different input …
    place_R: Tensor | None = None  # … and which of them every row is
    widened: bool = False  # the pass has left the shared trunk


def layer_key(name: str) -> int:
    """A number of the layer's name alone, so that what dropout drops does not depend on what else is adapted."""
    return zlib.crc32(name.encode())


def dropout_keep(shape: torch.Size, keys: ForwardPass, layer: int) -> Tensor:
    """0 or 1 / (1 − p) for each element of (K, b, …, I), a hash of (trial's seed, step, layer, place in the trial).

    Counter-based, so that a trial drops the same inputs whatever its neighbours, however far rows are padded and
    however its batch is split: the place is (row, position, feature), and none of them depends on the pack.
    """
    device = keys.seeds_K.device
    _, rows, *middle, features = shape
    positions = math.prod(middle)
    row_b11 = keys.first_row + torch.arange(rows, device=device)[:, None, None]
    state = _mix(keys.seeds_K + 0x9E3779B9 * (keys.step + 1) + 0x85EBCA6B * (layer + 1))[:, None, None, None]
    state = _mix(state + row_b11 * 0x27D4EB2F)
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
