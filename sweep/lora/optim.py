"""The optimizer of a pack: torch's own AdamW or SGD, with a parameter group for each trial; none knows its neighbours.

Shapes: K trials in the pack, G trials of one flat buffer, P elements a trial in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sweep.lora.adapter import Flat, Pack
from sweep.lora.methods import State

ADAMW, SGD = "adamw", "sgd"
MOMENTS = {ADAMW: {"mean": "exp_avg", "square": "exp_avg_sq"}, SGD: {"mean": "momentum_buffer"}}


@dataclass(frozen=True)
class Recipe:
    """How one trial's numbers move.

    AdamW: Loshchilov & Hutter, arXiv 1711.05101; weight decay is on all but biases. LoRA+: Hayou et al. 2024,
    arXiv 2402.12354: B learns `lr_ratio` times as fast as A, and as a head's weights and biases.
    """

    learning_rate: float
    steps: int  # the trial ends after so many, whatever its neighbours do
    schedule: str = "linear"
    warmup: float = 0.0  # share of the steps
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of the trial's own gradient
    betas: tuple[float, float] = (0.9, 0.999)  # SGD takes the first as its momentum
    lr_ratio: float = 1.0  # lr_B / lr_A


def moment_count(kind: str, betas: tuple[float, float]) -> int:
    """How many numbers the optimizer keeps for each that it trains."""
    return 2 if kind == ADAMW else int(betas[0] > 0)


def lr_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate for the step after `step` of `steps`; as transformers' get_*_schedule do.

    Linear warm-up over the first `warmup` share of the steps (rounded up), then linear to 0, half a cosine to 0,
    or constant.
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return step / max(1, warm)
    done = (step - warm) / max(1, steps - warm)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"schedule {schedule!r} is not linear, cosine or constant")


@dataclass
class PackedOptimizer:
    """A trial whose loss or gradient norm is not finite stops for good: its tensors keep their last finite values."""

    pack: Pack
    kind: str
    recipes: Sequence[Recipe]
    optimizer: torch.optim.Optimizer
    rows: list[list[Tensor]]  # of each flat: each of its trials' row, the optimizer's parameter
    clip_K: Tensor  # inf: no clipping
    alive_K: Tensor  # bool
    step_count: int

    @torch.no_grad()
    def step(self, loss_K: Tensor) -> Tensor:
        """One step of every live trial from the gradients on the stacks; clears them. Returns gradient norms (K,)."""
        gradients = [_gradient(flat) for flat in self.pack.flats]
        square_K = torch.zeros_like(self.clip_K)
        for flat, gradient_GP in zip(self.pack.flats, gradients, strict=True):
            square_K[flat.start : flat.stop] += torch.linalg.vector_norm(gradient_GP, dim=1).square()
        norm_K = square_K.sqrt()
        self.alive_K &= torch.isfinite(norm_K) & torch.isfinite(loss_K)
        factor_K = (self.clip_K / (norm_K + 1e-6)).clamp(max=1.0)
        trains = [
            alive and self.step_count < r.steps for alive, r in zip(self.alive_K.tolist(), self.recipes, strict=True)
        ]
        clipped = (factor_K < 1).tolist()
        for flat, gradient_GP, rows in zip(self.pack.flats, gradients, self.rows, strict=True):
            for k, row_P, gradient_P in zip(range(flat.start, flat.stop), rows, gradient_GP, strict=True):
                if clipped[k]:
                    gradient_P.mul_(factor_K[k])
                row_P.grad = gradient_P if trains[k] else None
        for group in self.optimizer.param_groups:
            recipe = self.recipes[group["trial"]]
            factor = lr_factor(recipe.schedule, self.step_count, recipe.steps, recipe.warmup)
            group["lr"] = recipe.learning_rate * factor * group["ratio"]
        self.optimizer.step()
        for rows in self.rows:
            for row_P in rows:
                row_P.grad = None
        self.step_count += 1
        return norm_K


def start_optimizer(
    pack: Pack,
    recipes: Sequence[Recipe],
    kind: str = ADAMW,
    step_count: int = 0,
    states: Sequence[State] | None = None,
) -> PackedOptimizer:
    """An optimizer at step 0, or one that goes on from each trial's `optimizer_state`.

    kind: "adamw" or "sgd", for the whole pack; all else is each trial's own.
    """
    rows = [list(flat.value_GP) for flat in pack.flats]
    groups = []
    for flat, trials in zip(pack.flats, rows, strict=True):
        for k, row_P in zip(range(flat.start, flat.stop), trials, strict=True):
            recipe = recipes[k]
            decay = 0.0 if flat.role == "bias" else recipe.weight_decay
            ratio = recipe.lr_ratio if flat.role == "B" else 1.0
            group = {"params": [row_P], "weight_decay": decay, "trial": k, "ratio": ratio}
            groups.append({**group, **({"betas": recipe.betas} if kind == ADAMW else {"momentum": recipe.betas[0]})})
    optimizer: torch.optim.Optimizer
    if kind == ADAMW:
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, fused=True)
    if states is not None:
        for flat, trials in zip(pack.flats, rows, strict=True):
            for k, row_P in zip(range(flat.start, flat.stop), trials, strict=True):
                optimizer.state[row_P] = _moments(kind, flat, states[k], row_P, step_count)
    device = pack.forward_pass.seeds_K.device
    return PackedOptimizer(
        pack,
        kind,
        recipes,
        optimizer,
        rows,
        clip_K=torch.tensor([math.inf if r.clip is None else r.clip for r in recipes], device=device),
        alive_K=torch.ones(pack.trials, dtype=torch.bool, device=device),
        step_count=step_count,
    )


def optimizer_state(optimizer: PackedOptimizer, k: int) -> State:
    """Trial k's moments, shaped like its tensors, on the CPU."""
    state: State = {}
    for flat, rows in zip(optimizer.pack.flats, optimizer.rows, strict=True):
        if not flat.start <= k < flat.stop:
            continue
        row_P = rows[k - flat.start]
        found = optimizer.optimizer.state[row_P]
        for ours, theirs in MOMENTS[optimizer.kind].items():
            moment = found.get(theirs)  # SGD without momentum has none
            parts = (
                (torch.zeros_like(row_P) if moment is None else moment)
                .cpu()
                .split([stack.tensor[0].numel() for stack in flat.stacks])
            )
            for stack, part in zip(flat.stacks, parts, strict=True):
                state[f"{ours}.{stack.name}"] = part.view(stack.tensor.shape[1:]).clone()
    return state


def _moments(kind: str, flat: Flat, state: State, row_P: Tensor, step_count: int) -> dict[str, Tensor]:
    moments = {
        theirs: torch.cat([state[f"{ours}.{stack.name}"].reshape(-1) for stack in flat.stacks]).to(row_P.device)
        for ours, theirs in MOMENTS[kind].items()
    }
    if kind == ADAMW:
        moments["step"] = torch.tensor(float(step_count), device=row_P.device)
    return moments


def _gradient(flat: Flat) -> Tensor:
    """(G, P) in a buffer of its own, taken from the stacks; zero where no loss of this step came through a layer."""
    parts = []
    for stack in flat.stacks:
        gradient = stack.tensor.grad
        gradient = torch.zeros_like(stack.tensor) if gradient is None else gradient
        parts.append(gradient.reshape(flat.stop - flat.start, -1))
        stack.tensor.grad = None
    return torch.cat(parts, 1)
