"""DoRA, Liu et al. 2024, arXiv 2402.09353, equation 5: W' = m · (W₀ + scaling · BA) / ‖W₀ + scaling · BA‖, by row.

Shapes: G trials, N tokens a trial, I input features, O output features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def row_norms(W_OI: Tensor, A_GrI: Tensor, B_GOr: Tensor, scaling_G11: Tensor) -> Tensor:
    """‖W₀ + scaling · BA‖ of every output row, (G, O), without the dense product: from W₀Aᵀ and AAᵀ.

    ‖w + s·bA‖² = ‖w‖² + 2s·(wAᵀ)·b + s²·b(AAᵀ)b.
    """
    W_OI = W_OI.float()
    WA_GOr = W_OI @ A_GrI.transpose(1, 2)
    AA_Grr = A_GrI @ A_GrI.transpose(1, 2)
    cross_GO = (WA_GOr * B_GOr).sum(2)
    update_GO = ((B_GOr @ AA_Grr) * B_GOr).sum(2)
    scaling_G1 = scaling_G11[..., 0]
    square_GO = W_OI.square().sum(1) + 2 * scaling_G1 * cross_GO + scaling_G1**2 * update_GO
    return square_GO.clamp(min=0).sqrt()


def dora(
    x_GNI: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    A_GrI: Tensor,
    B_GOr: Tensor,
    scaling_G11: Tensor,
    magnitude_GO: Tensor,
    keep_GNI: Tensor | None,
) -> Tensor:
    """c · (W₀x + scaling · BAx) + b with c = m / ‖W₀ + scaling · BA‖. Returns (G, N, O).

    The norm is a constant to the gradient (section 4.3). As in PEFT, dropout acts on all that is not W₀x itself:
    W₀x + (c − 1) · W₀x̃ + c · scaling · BAx̃, at the price of a second base product. In a pack a DoRA trial costs what
    it costs alone: elementwise work over (N, O), W₀'s norms and a product of W₀ with Aᵀ a pass; it is as exact as LoRA.
    """
    with torch.no_grad():
        norm_GO = row_norms(W_OI, A_GrI, B_GOr, scaling_G11)
    c_G1O = (magnitude_GO / norm_GO)[:, None, :]  # float32: in bfloat16 a step of 0.4 % would be its smallest
    base_GNO = F.linear(x_GNI, W_OI)
    input_GNI = x_GNI if keep_GNI is None else x_GNI * keep_GNI
    h_GNr = torch.bmm(input_GNI, (scaling_G11 * A_GrI).to(x_GNI.dtype).transpose(1, 2))
    update_GNO = torch.bmm(h_GNr, B_GOr.to(x_GNI.dtype).transpose(1, 2))
    if keep_GNI is None:
        y_GNO = c_G1O * (base_GNO + update_GNO)
    else:
        y_GNO = base_GNO + (c_G1O - 1) * F.linear(input_GNI, W_OI) + c_G1O * update_GNO
    return (y_GNO if bias_O is None else y_GNO + bias_O).to(x_GNI.dtype)
