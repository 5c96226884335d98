"""AdamW over a pack: every trial with its own learning rate and clipping, none knows its neighbours.

Shapes: K trials in the pack, G trials of one stack, P elements a trial in that stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sweep.lora.adapter import Pack, Stack, State


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
class PackedAdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on the stacks of a pack.

    Weight decay is on matrices, not on biases. A trial whose loss or gradient norm is not finite stops for good:
    its tensors keep their last finite values, and its neighbours see nothing of it.
    """

    pack: Pack
    moments: list[tuple[Tensor, Tensor]]  # of each stack: mean (G, P), square (G, P)
    step_count: int
    alive_K: Tensor  # bool
    weight_decay_K: Tensor
    clip_K: Tensor  # largest gradient norm of a trial; inf: no clipping
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @torch.no_grad()
    def step(self, loss_K: Tensor, lr_K: Tensor) -> Tensor:
        """One step of every live trial from the gradients on the stacks; clears them. Returns gradient norms (K,)."""
        self.step_count += 1
        grads_GP = [_gradient(stack) for stack in self.pack.stacks]
        square_K = torch.zeros_like(lr_K)
        for stack, grad_GP in zip(self.pack.stacks, grads_GP, strict=True):
            square_K[stack.start : stack.stop] += grad_GP.square().sum(1)
        norm_K = square_K.sqrt()
        self.alive_K &= torch.isfinite(norm_K) & torch.isfinite(loss_K)
        factor_K = (self.clip_K / (norm_K + 1e-6)).clamp(max=1.0)
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
        all_alive = bool(self.alive_K.all())
        for stack, grad_GP, (mean_GP, square_GP) in zip(self.pack.stacks, grads_GP, self.moments, strict=True):
            part = slice(stack.start, stack.stop)
            lr_G1 = lr_K[part, None]
            value_GP = stack.tensor.view(stack.stop - stack.start, -1)
            grad_GP = grad_GP * factor_K[part, None]
            if not all_alive:  # a dead trial's values stay: where, since 0 · NaN is NaN
                alive_G1 = self.alive_K[part, None]
                grad_GP = torch.where(alive_G1, grad_GP, 0.0)
                lr_G1 = torch.where(alive_G1, lr_G1, 0.0)
            if not stack.name.endswith(".bias"):
                value_GP.mul_(1 - lr_G1 * self.weight_decay_K[part, None])
            mean_GP.lerp_(grad_GP, 1 - beta1)
            square_GP.mul_(beta2).addcmul_(grad_GP, grad_GP, value=1 - beta2)
            denominator_GP = square_GP.sqrt().div_(math.sqrt(correction2)).add_(self.eps)
            value_GP.sub_((mean_GP / denominator_GP).mul_(lr_G1 / correction1))
            stack.tensor.grad = None
        return norm_K


def start_adamw(
    pack: Pack,
    weight_decays: Sequence[float],
    clips: Sequence[float | None],
    step_count: int = 0,
    states: Sequence[State] | None = None,
) -> PackedAdamW:
    """An optimizer at step 0, or one that goes on from each trial's `optimizer_state`.

    weight_decays, clips: of each trial; a clip of None is no clipping.
    """
    moments = []
    for stack in pack.stacks:
        shape = (stack.stop - stack.start, stack.tensor[0].numel())
        mean_GP, square_GP = (torch.zeros(shape, device=stack.tensor.device) for _ in range(2))
        if states is not None:
            for row, k in enumerate(range(stack.start, stack.stop)):
                mean_GP[row] = states[k][f"mean.{stack.name}"].reshape(-1)
                square_GP[row] = states[k][f"square.{stack.name}"].reshape(-1)
        moments.append((mean_GP, square_GP))
    device = pack.stacks[0].tensor.device
    return PackedAdamW(
        pack,
        moments,
        step_count,
        alive_K=torch.ones(pack.trials, dtype=torch.bool, device=device),
        weight_decay_K=torch.tensor(weight_decays, device=device),
        clip_K=torch.tensor([math.inf if clip is None else clip for clip in clips], device=device),
    )


def optimizer_state(optimizer: PackedAdamW, k: int) -> State:
    """Trial k's moments, shaped like its tensors, on the CPU."""
    state: State = {}
    for stack, (mean_GP, square_GP) in zip(optimizer.pack.stacks, optimizer.moments, strict=True):
        if stack.start <= k < stack.stop:
            shape = stack.tensor.shape[1:]
            state[f"mean.{stack.name}"] = mean_GP[k - stack.start].view(shape).cpu().clone()
            state[f"square.{stack.name}"] = square_GP[k - stack.start].view(shape).cpu().clone()
    return state


def _gradient(stack: Stack) -> Tensor:
    """(G, P); zero where no loss of this step came through the layer."""
    gradient = stack.tensor.grad
    return (torch.zeros_like(stack.tensor) if gradient is None else gradient).reshape(stack.stop - stack.start, -1)
