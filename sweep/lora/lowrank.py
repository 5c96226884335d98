"""Low-rank updates by their singular parts, without the dense product: spectra, and adapters of a smaller rank.

Shapes: I input features, O output features, r rank, k ≤ r kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]  # U (O, r), S (r,) descending, Vᵀ (r, I), all float64


def update_parts(A_rI: Tensor, B_Or: Tensor, scaling: float) -> Parts:
    """The singular value decomposition of ΔW = scaling · BA, from QR decompositions of the factors.

    With B = Q_b R_b and Aᵀ = Q_a R_a, ΔW = Q_b (scaling · R_b R_aᵀ) Q_aᵀ, so an r × r matrix is all that is decomposed.
    """
    Q_b, R_b = torch.linalg.qr(B_Or.double())
    Q_a, R_a = torch.linalg.qr(A_rI.double().T)
    U, S, Vh = torch.linalg.svd(scaling * (R_b @ R_a.T), full_matrices=False)
    return Q_b @ U, S, Vh @ Q_a.T


def factors(parts: Parts, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (k, I) and B (O, k) in float32 with scaling · BA = the `rank` leading singular parts (Eckart and Young 1936:
    of all matrices of that rank the nearest in Frobenius norm), each singular value shared evenly between them.
    """
    U, S, Vh = parts
    root_k = (S[:rank] / scaling).sqrt()
    return (root_k[:, None] * Vh[:rank]).float().contiguous(), (U[:, :rank] * root_k).float().contiguous()


def lost_share(S_r: Tensor, rank: int) -> float:
    """The share of ‖ΔW‖² (Frobenius) that the singular values behind the first `rank` carry; 0 for no update at all."""
    whole = float(S_r.square().sum())
    return float(S_r[rank:].square().sum()) / whole if whole else 0.0


def weighted_sum(updates: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """A (Σr, I) and B (O, Σr) with BA = Σ factor · B_i A_i, exactly: ranks are concatenated.

    updates: (A, B, factor) of each, the factor its weight times its scaling.
    """
    A = torch.cat([A_rI for A_rI, _, _ in updates])
    return A, torch.cat([factor * B_Or for _, B_Or, factor in updates], 1)
