"""Full fine-tuning: an arm like any other, in a pack of one, over a copy of the base whose every weight trains."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweep.lora.adapter import linear_modules
from sweep.lora.methods import init_head
from sweep.lora.optim import ADAMW, MOMENTS, SGD, Recipe, lr_factor
from sweep.lora.readout import read_first_position
from sweep.training.base import Base


@dataclass
class FullTrainee:
    """A model all of whose weights train. Weights and moments are float32 in every precision."""

    model: nn.Module
    plain_head: bool
    recipe: Recipe
    kind: str  # of the optimizer, "adamw" or "sgd"
    optimizer: torch.optim.Optimizer
    alive_K: Tensor  # (1,) bool
    step_count: int
    trials: int = 1

    def step(self, loss_K: Tensor) -> None:
        """One optimizer step; none at all once a loss or a gradient norm was not finite."""
        recipe = self.recipe
        limit = float("inf") if recipe.clip is None else recipe.clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.alive_K &= torch.isfinite(norm) & torch.isfinite(loss_K.detach())
        if self.alive_K.item():
            factor = lr_factor(recipe.schedule, self.step_count, recipe.steps, recipe.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate * factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1

    def states(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights and the optimizer's moments, under the model's own names."""
        weights = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
        moments = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state[p]
            for ours, theirs in MOMENTS[self.kind].items():
                if state.get(theirs) is not None:
                    moments[f"{ours}.{name}"] = state[theirs].cpu().clone()
        return weights, moments

    def close(self) -> None:
        """The base was never touched."""


def start_full(
    base: Base,
    seed: int,
    recipe: Recipe,
    kind: str = ADAMW,
    step: int = 0,
    weights: dict[str, Tensor] | None = None,
    moments: dict[str, Tensor] | None = None,
) -> FullTrainee:
    """A trainee at step 0, its head fresh from `seed`, or one that goes on from a checkpoint's tensors."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    if base.behind is not None:
        read_first_position(model, base.behind)
    with torch.no_grad():
        head = {name: linear_modules(model)[name] for name in base.head}
        fresh = weights if weights is not None else init_head(head, seed)
        for name, p in model.named_parameters():
            if name in fresh:
                p.copy_(fresh[name])
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2]
    plain = [p for name, p in model.named_parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if kind == SGD:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=recipe.betas[0], fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=True)
    for name, p in model.named_parameters():
        if moments and f"mean.{name}" in moments:
            state = {theirs: moments[f"{ours}.{name}"].to(p.device) for ours, theirs in MOMENTS[kind].items()}
            count = {"step": torch.tensor(float(step), device=p.device)} if kind == ADAMW else {}
            optimizer.state[p] = {**state, **count}
    alive_K = torch.ones(1, dtype=torch.bool, device=next(model.parameters()).device)
    return FullTrainee(model, base.plain_head, recipe, kind, optimizer, alive_K, step)
