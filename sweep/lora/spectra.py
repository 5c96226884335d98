"""How much of its rank an update uses, and which directions: spectra, subspaces and what they share with the base.

Shapes: I input features, O output features, k and q numbers of directions, n = min(O, I).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sweep.lora.lowrank import Parts


def effective_rank(S_n: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 for no update at all.

    Roy and Vetterli 2007, "The effective rank", definition 1: k for k equal ones, 1 where one is all there is.
    """
    whole = S_n.sum()
    return float(torch.special.entr(S_n / whole).sum().exp()) if whole > 0 else 0.0


def kept_rank(S_n: Tensor, share: float) -> int:
    """How many leading singular values hold `share` of ‖ΔW‖² (Frobenius); 0 for no update at all."""
    held_n = S_n.square().cumsum(0)
    if not len(S_n) or held_n[-1] == 0:
        return 0
    return min(len(S_n), int((held_n < share * held_n[-1]).sum()) + 1)


def dense_parts(update_OI: Tensor, most: int) -> Parts:
    """U (O, k), S (n,) and Vᵀ (k, I) of a dense update in float64: all singular values, k ≤ `most` leading vectors."""
    U, S, Vh = torch.linalg.svd(update_OI.double(), full_matrices=False)
    return U[:, :most].clone(), S, Vh[:most].clone()


def row_space(A_kI: Tensor) -> Tensor:
    """The right singular vectors of A, (k, I), the strongest first."""
    return torch.linalg.svd(A_kI.double(), full_matrices=False)[2]


def similarity(V_kI: Tensor, V_qI: Tensor) -> Tensor:
    """φ(i, j) of the first i and the first j of two sets of orthonormal rows, for all i ≤ k and j ≤ q: (k, q).

    ‖V₁[:i] V₂[:j]ᵀ‖²_F / min(i, j): 1 where the smaller space lies in the larger, 0 where the two are orthogonal.
    LoRA, arXiv 2106.09685, section 7.2, equation 4.
    """
    shared_kq = (V_kI @ V_qI.T).square().cumsum(0).cumsum(1)
    i_k, j_q = (torch.arange(1, n + 1, dtype=shared_kq.dtype) for n in shared_kq.shape)
    return shared_kq / torch.minimum(i_k[:, None], j_q[None, :])


def random_rows(k: int, width: int, generator: torch.Generator) -> Tensor:
    """The singular vectors of a random Gaussian matrix, (k, width): k directions of which none is preferred."""
    gaussian = torch.randn(width, k, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].T


def projected_norm(W_OI: Tensor, U_Ok: Tensor, Vh_kI: Tensor) -> float:
    """‖UᵀWV‖_F: how strong W is in the directions of U and V. LoRA, arXiv 2106.09685, section 7.3."""
    return float(torch.linalg.matrix_norm(U_Ok.T @ W_OI.double() @ Vh_kI.T))


def amplification(parts: Parts, W_OI: Tensor, k: int) -> float | None:
    """‖ΔW‖_F / ‖UᵀWV‖_F with the k leading singular vectors of ΔW; None where either is nothing.

    LoRA, arXiv 2106.09685, section 7.3 and table 7: above 1, ΔW strengthens directions that W hardly has.
    """
    U, S, Vh = parts
    norm, already = float(S.norm()), projected_norm(W_OI, U[:, :k], Vh[:k])
    return norm / already if norm and already else None
