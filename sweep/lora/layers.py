"""Packed layers: one frozen matrix, and K trials' low-rank updates on top of it.

LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3: h = W₀x + scaling · BAx, scaling = alpha / r; rsLoRA, Kalajdzievski
2023, arXiv 2312.03732, equation 5: scaling = alpha / √r.

Shapes: K trials in the pack, G neighbouring trials of one bucket, R = K·b rows, N tokens a trial (b·T, or b),
I input features, O output features, r rank, V entries of an embedding, D its features, C channels, P places of an
image. Rows are ordered by trial: rows k·b … (k+1)·b − 1 belong to trial k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sweep.lora.dora import dora
from sweep.lora.passes import ForwardPass, UnpackableError, dropout_keep
from sweep.lora.quantized import Frozen, dense, frozen_matrix, is_quantized

PACKED = (torch.uint8, torch.int8)  # what a quantised weight is stored in


@dataclass(frozen=True)
class Bucket:
    """Neighbouring trials start … stop−1 of one rank and kind. No padding: rank 64 costs rank 2 nothing.

    A, B: (G, r, I) and (G, O, r) at a matrix, (G, r, V) and (G, D, r) at an embedding, (G, r, C, kh, kw) and
    (G, O, r, 1, 1) at a convolution.
    """

    start: int
    stop: int
    A: nn.Parameter
    B: nn.Parameter
    scaling_G11: Tensor
    initial: tuple[Tensor, Tensor] | None = None  # PiSSA: A and B at step 0, which the base's residual lacks
    magnitude_GO: nn.Parameter | None = None  # DoRA

    def factors(self, dropout: bool) -> list[tuple[Tensor, Tensor, bool]]:
        """(G, r, I) and (G, O, r) of each update, and whether dropout acts on its input.

        PiSSA: BA − B₀A₀ = [B − B₀, B₀]·[A; A − A₀], of twice the rank, and of small differences that a low precision
        keeps. With dropout these are two updates: −B₀A₀ belongs to the base, whose input stays whole.
        """
        if self.initial is None:
            return [(self.A, self.B, True)]
        A0_GrI, B0_GOr = self.initial
        if dropout:
            return [(self.A, self.B, True), (A0_GrI, -B0_GOr, False)]
        return [(torch.cat([self.A, self.A - A0_GrI], 1), torch.cat([self.B - B0_GOr, B0_GOr], 2), True)]


class PackedLayer(nn.Module):
    """A frozen layer with the updates of K trials; its kinds differ in `forward`."""

    def __init__(self, base: nn.Module, trials: int, buckets: list[Bucket], forward_pass: ForwardPass, key: int):
        super().__init__()
        self.base, self.trials, self.buckets, self.forward_pass, self.key = base, trials, buckets, forward_pass, key
        for i, bucket in enumerate(buckets):
            self.register_parameter(f"A{i}", bucket.A)
            self.register_parameter(f"B{i}", bucket.B)
            self.register_parameter(f"magnitude{i}", bucket.magnitude_GO)

    @property
    def weight(self) -> Tensor:
        """The base's: some models ask their layers for its dtype."""
        return self.base.get_parameter("weight")

    def by_trial(self, x: Tensor) -> Tensor:
        """(R, …) as (K, b, …). Raises UnpackableError where the layer does not see the batch's rows."""
        if self.trials > 1 and len(x) != self.forward_pass.rows:
            raise UnpackableError(f"an adapted layer sees {len(x)} rows of a batch of {self.forward_pass.rows}")
        return x.reshape(self.trials, -1, *x.shape[1:])

    def keep(self, x_Kb: Tensor) -> Tensor | None:
        """What dropout multiplies the updates' inputs with, shaped like them."""
        if not self.forward_pass.dropout:
            return None
        return dropout_keep(x_Kb.shape, self.forward_pass, self.key).to(x_Kb.dtype)


class PackedLinear(PackedLayer):
    """On nn.Linear, in 4 or 8 bits too, or on GPT-2's Conv1D, which is the same with its weight transposed."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.base.weight
        bias: Any = self.base.bias
        W_OI = weight if isinstance(self.base, nn.Linear) else weight.T
        if weight.dtype in PACKED and is_quantized(self.base):
            W_OI, bias = frozen_matrix(self.base), None if bias is None else bias.to(x.dtype)
        x_Kb = self.by_trial(x)
        keep_Kb = self.keep(x_Kb)
        x_KNI = x_Kb.reshape(self.trials, -1, x.shape[-1])
        keep_KNI = None if keep_Kb is None else keep_Kb.view(x_KNI.shape)
        if all(bucket.magnitude_GO is None for bucket in self.buckets):
            return packed_lora(x_KNI, W_OI, bias, self.buckets, 0, keep_KNI).reshape(*x.shape[:-1], -1)
        parts, done = [], 0
        for bucket in [*self.buckets, None]:  # runs of trials without DoRA, and DoRA's buckets between them
            stop = self.trials if bucket is None else bucket.start
            if bucket is not None and bucket.magnitude_GO is None:
                continue
            if stop > done:
                inside = [b for b in self.buckets if done <= b.start < stop]
                kept = None if keep_KNI is None else keep_KNI[done:stop]
                parts.append(packed_lora(x_KNI[done:stop], W_OI, bias, inside, done, kept))
            if bucket is not None and bucket.magnitude_GO is not None:
                span = slice(bucket.start, bucket.stop)
                kept = None if keep_KNI is None else keep_KNI[span]
                W0_OI = dense(W_OI, x.dtype)  # autograd keeps it: at a quantised layer DoRA takes its dense memory
                parts.append(
                    dora(x_KNI[span], W0_OI, bias, bucket.A, bucket.B, bucket.scaling_G11, bucket.magnitude_GO, kept)
                )
                done = bucket.stop
        return torch.cat(parts).reshape(*x.shape[:-1], -1)


def packed_lora(
    x_KNI: Tensor, W_OI: Frozen, bias_O: Tensor | None, buckets: Sequence[Bucket], offset: int, keep_KNI: Tensor | None
) -> Tensor:
    """W₀x + b, and scaling · BAx for every trial that has an adapter here. Returns (K, N, O).

    offset: the pack's trial that row 0 of x_KNI is. keep_KNI: what dropout multiplies the updates' inputs with.
    """
    updates = [(bucket, *update) for bucket in buckets for update in bucket.factors(keep_KNI is not None)]
    factors = [factor for _, A_GrI, B_GOr, _ in updates for factor in (A_GrI, B_GOr)]
    spans = [(bucket.start - offset, bucket.stop - offset, drops) for bucket, _, _, drops in updates]
    scalings = [bucket.scaling_G11 for bucket, *_ in updates]
    y_KNO: Tensor = _PackedLora.apply(x_KNI, W_OI, bias_O, keep_KNI, spans, scalings, *factors)
    return y_KNO


class _PackedLora(torch.autograd.Function):
    """The base product and its updates as one function: updates are added in place, forward and backward.

    Autograd's own graph of the same products copies every trial's rows twice more each way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_KNI: Tensor,
        W_OI: Frozen,
        bias_O: Tensor | None,
        keep_KNI: Tensor | None,
        spans: list[tuple[int, int, bool]],
        scalings: list[Tensor],
        *factors: Tensor,
    ) -> Tensor:
        y_KNO = F.linear(x_KNI, dense(W_OI, x_KNI.dtype), bias_O)
        kept = []
        for i, (start, stop, drops) in enumerate(spans):
            A_GrI, B_GOr = (scalings[i] * factors[2 * i]).to(x_KNI.dtype), factors[2 * i + 1].to(x_KNI.dtype)
            h_GNr = torch.bmm(_dropped(x_KNI, keep_KNI if drops else None, start, stop), A_GrI.transpose(1, 2))
            y_KNO[start:stop].baddbmm_(h_GNr, B_GOr.transpose(1, 2))
            kept += [A_GrI, B_GOr, h_GNr]
        here = W_OI if isinstance(W_OI, Tensor) else None
        ctx.save_for_backward(x_KNI, here, keep_KNI, *kept)
        ctx.spans, ctx.scalings, ctx.made = spans, scalings, None if here is not None else W_OI
        return y_KNO

    @staticmethod
    def backward(ctx: Any, g_KNO: Tensor) -> tuple[Tensor | None, ...]:
        x_KNI, W_OI, keep_KNI, *kept = ctx.saved_tensors
        dx_KNI = g_KNO @ (W_OI if ctx.made is None else ctx.made(g_KNO.dtype)) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = []
        for i, (start, stop, drops) in enumerate(ctx.spans):
            A_GrI, B_GOr, h_GNr = kept[3 * i : 3 * i + 3]
            g_GNO, x_GNI = g_KNO[start:stop], _dropped(x_KNI, keep_KNI if drops else None, start, stop)
            u_GNr = torch.bmm(g_GNO, B_GOr)
            gradients.append(torch.bmm(u_GNr.transpose(1, 2), x_GNI).float() * ctx.scalings[i])
            gradients.append(torch.bmm(h_GNr.transpose(1, 2), g_GNO).transpose(1, 2).float())
            if dx_KNI is not None and (keep_KNI is None or not drops):
                dx_KNI[start:stop].baddbmm_(u_GNr, A_GrI)
            elif dx_KNI is not None:
                dx_KNI[start:stop].addcmul_(torch.bmm(u_GNr, A_GrI), keep_KNI[start:stop])
        return dx_KNI, None, None, None, None, None, *gradients


def _dropped(x_KNI: Tensor, keep_KNI: Tensor | None, start: int, stop: int) -> Tensor:
    return x_KNI[start:stop] if keep_KNI is None else x_KNI[start:stop] * keep_KNI[start:stop]


class PackedEmbedding(PackedLayer):
    """On nn.Embedding: the update of entry v is scaling · B A[:, v]. No dropout there, as in PEFT.

    Where the weights are tied, the output layer keeps the base's alone: the update is of the look-up.
    """

    def forward(self, ids: Tensor) -> Tensor:
        if len(ids) == 1 and self.trials > 1:  # positions: one row for all
            ids = ids.expand(self.forward_pass.rows, *ids.shape[1:])
        ids_KN = self.by_trial(ids).reshape(self.trials, -1)
        y = self.base(ids)
        y_KND = y.reshape(self.trials, -1, y.shape[-1])
        padding: Any = getattr(self.base, "padding_idx", None)
        factor: Any = getattr(self.base, "embed_scale", 1.0)
        updates = []
        for bucket in self.buckets:
            ids_G1N = ids_KN[bucket.start : bucket.stop, None, :]
            h_GrN = bucket.A.gather(2, ids_G1N.expand(-1, bucket.A.shape[1], -1))
            if padding is not None:  # padding's entry gets no gradient, and so stays 0
                h_GrN = h_GrN * (ids_G1N != padding)
            updates.append(torch.bmm(bucket.B, h_GrN).transpose(1, 2) * bucket.scaling_G11 * factor)
        return _add(y_KND, self.buckets, updates).reshape(y.shape)


class PackedConv2d(PackedLayer):
    """On nn.Conv2d with groups = 1: A is a convolution of the base's kernel and stride to r channels, B a 1×1 one.

    A bucket's A's run as one grouped convolution over its trials' channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        x_KbCHW = self.by_trial(x)
        keep_KbCHW = self.keep(x_KbCHW.flatten(3)) if self.forward_pass.dropout else None
        y = base(x)
        y_KbOP = y.reshape(self.trials, -1, y.shape[1], y.shape[2] * y.shape[3])
        updates = []
        for bucket in self.buckets:
            x_GbCHW = x_KbCHW[bucket.start : bucket.stop]
            if keep_KbCHW is not None:
                x_GbCHW = x_GbCHW * keep_KbCHW[bucket.start : bucket.stop].view(x_GbCHW.shape)
            G, b, *image = x_GbCHW.shape
            x_bGCHW = x_GbCHW.transpose(0, 1).reshape(b, -1, *image[1:])
            kernels = bucket.A.flatten(0, 1).to(x.dtype)
            h = F.conv2d(x_bGCHW, kernels, None, base.stride, base.padding, base.dilation, groups=G)
            h_GbrP = h.view(b, G, bucket.A.shape[1], -1).transpose(0, 1)
            B_G1Or = bucket.B.flatten(2).to(x.dtype)[:, None]
            updates.append(torch.matmul(B_G1Or, h_GbrP) * bucket.scaling_G11[..., None])
        return _add(y_KbOP, self.buckets, updates).reshape(y.shape)


def _add(y_K: Tensor, buckets: Sequence[Bucket], updates: Sequence[Tensor]) -> Tensor:
    """y, with each bucket's update added to its trials' part."""
    parts, done = [], 0
    for bucket, update_G in zip(buckets, updates, strict=True):
        parts += [y_K[done : bucket.start], y_K[bucket.start : bucket.stop] + update_G.to(y_K.dtype)]
        done = bucket.stop
    return torch.cat([*parts, y_K[done:]])


class PackedTrainedLinear(nn.Module):
    """K trained copies of one nn.Linear: a head of each trial's own. Computes in float32, since it is tiny."""

    def __init__(self, weight_KOI: nn.Parameter, bias_KO: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight_KOI, bias_KO

    def forward(self, x: Tensor) -> Tensor:
        x_KNI = x.reshape(self.weight.shape[0], -1, x.shape[-1]).float()
        y_KNO = torch.bmm(x_KNI, self.weight.transpose(1, 2))
        if self.bias is not None:
            y_KNO = y_KNO + self.bias[:, None, :]
        return y_KNO.reshape(*x.shape[:-1], -1)
