"""Full fine-tuning: an arm like any other, in a pack of one, over a copy of the base whose every weight trains."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweep.lora.adapter import init_head, linear_modules
from sweep.training.base import Base


@dataclass
class FullTrainee:
    """A model all of whose weights train, with torch's AdamW. Weights and moments are float32 in every precision."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    clip: float | None
    alive_K: Tensor  # (1,) bool
    trials: int = 1

    def step(self, loss_K: Tensor, lr_K: Tensor) -> None:
        """One AdamW step; none at all once a loss or a gradient norm was not finite."""
        limit = float("inf") if self.clip is None else self.clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.alive_K &= torch.isfinite(norm) & torch.isfinite(loss_K.detach())
        if self.alive_K.item():
            for group in self.optimizer.param_groups:
                group["lr"] = lr_K.item()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def states(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights and the optimizer's moments, under the model's own names."""
        weights = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
        moments = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state[p]
            if state:
                moments[f"mean.{name}"] = state["exp_avg"].cpu().clone()
                moments[f"square.{name}"] = state["exp_avg_sq"].cpu().clone()
        return weights, moments

    def close(self) -> None:
        """The base was never touched."""


def start_full(
    base: Base,
    seed: int,
    weight_decay: float,
    clip: float | None,
    step: int = 0,
    weights: dict[str, Tensor] | None = None,
    moments: dict[str, Tensor] | None = None,
) -> FullTrainee:
    """A trainee at step 0, its head fresh from `seed`, or one that goes on from a checkpoint's tensors."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    with torch.no_grad():
        head = {name: linear_modules(model)[name] for name in base.head}
        fresh = weights if weights is not None else init_head(head, seed)
        for name, p in model.named_parameters():
            if name in fresh:
                p.copy_(fresh[name])
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2]
    plain = [p for name, p in model.named_parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    if moments:
        for name, p in model.named_parameters():
            if f"mean.{name}" in moments:
                optimizer.state[p] = {
                    "step": torch.tensor(float(step), device=p.device),
                    "exp_avg": moments[f"mean.{name}"].to(p.device),
                    "exp_avg_sq": moments[f"square.{name}"].to(p.device),
                }
    alive_K = torch.ones(1, dtype=torch.bool, device=next(model.parameters()).device)
    return FullTrainee(model, optimizer, clip, alive_K)
