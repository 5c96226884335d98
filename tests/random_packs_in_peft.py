"""Trials of random packs alone in PEFT, which the engine is held against.

The reference is PEFT's own model with a plain torch optimizer, clip_grad_norm_ and transformers' own schedules;
all that the two share are initial tensors, the rows' order and what dropout drops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from random_models import PAD, Family, frozen_model, frozen_rows
from random_packs import ROWS, Run, Trained, Trial, initial_state, train_pack
from torch import Tensor, nn

from sweep.lora.methods import is_conv1d
from sweep.lora.passes import ForwardPass, dropout_keep, layer_key
from sweep.lora.prefix import PROMPT
from sweep.study.arms import ALL_LINEAR
from sweep.training.batches import Batch, collate, step_rows
from sweep.training.tasks import CAUSAL_LM

SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warm, _: transformers.get_constant_schedule_with_warmup(optimizer, warm),
}


class SeededDropout(nn.Module):
    """In the place of PEFT's lora_dropout: drops what the engine's generator says for (seed, step, layer, row)."""

    def __init__(self, forward_pass: ForwardPass, name: str):
        super().__init__()
        self.forward_pass, self.key = forward_pass, layer_key(name)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.flatten(2) if x.ndim == 4 else x  # a convolution's image: (rows, channels, places)
        return x * dropout_keep(inputs[None].shape, self.forward_pass, self.key).view(x.shape)


def peft_model(family: Family, trial: Trial, dropout: float = 0.0, init: bool | str = True) -> nn.Module:
    """PEFT's own model of the arm, with PEFT's own choice of layers and its own initial tensors."""
    model, all_linear = copy.deepcopy(frozen_model(family)), trial.endings == (ALL_LINEAR,)
    classify = family.task != CAUSAL_LM
    lora = LoraConfig(
        r=trial.r,
        lora_alpha=trial.arm.lora_alpha,  # type: ignore[arg-type]
        target_modules=ALL_LINEAR if all_linear else list(trial.endings),
        rank_pattern=dict(trial.ranks),
        alpha_pattern=dict(trial.alphas),
        exclude_modules=list(family.head) or None,
        modules_to_save=[name.rpartition(".")[2] for name in family.head] or None,
        use_rslora=trial.method == "rslora",
        use_dora=trial.method == "dora",
        init_lora_weights=init,
        fan_in_fan_out=family.name == "gpt2",
        lora_dropout=dropout,
        task_type=None if classify else TaskType.CAUSAL_LM,
    )
    if not trial.prefix:
        return get_peft_model(model, lora)  # type: ignore[arg-type]
    if trial.r:  # PEFT has no such pair: its LoRA layers inside, its prompt tuning around
        lora.modules_to_save = None
        inject_adapter_in_model(lora, model)
    task = TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM
    both = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=trial.prefix))  # type: ignore[arg-type]
    both.word_embeddings = model.get_input_embeddings()  # type: ignore[operator]  # the adapted one, if it is
    for name, p in both.named_parameters():
        p.requires_grad_(p.requires_grad or ".lora_" in name)
    return both


def peft_name(name: str, prefixed: bool = False) -> str:
    """A tensor's name in PEFT's model for its name in a trial's state. prefixed: in a model of its prompt tuning."""
    if name == PROMPT:
        return "prompt_encoder.default.embedding.weight"
    if prefixed:
        return peft_name(name).replace("base_model.model.", "base_model.", 1)
    module, _, tensor = name.rpartition(".")
    if ".lora_embedding_" in name:
        return f"base_model.model.{name}.default"
    if name.endswith("lora_magnitude_vector"):
        return f"base_model.model.{name}.default.weight"
    if ".lora_" in name:
        return f"base_model.model.{module}.default.{tensor}"
    return f"base_model.model.{module}.modules_to_save.default.{tensor}"


def trained_parameters(family: Family, trial: Trial, model: nn.Module) -> dict[str, nn.Parameter]:
    """What PEFT trains, by the engine's names, with the engine's initial tensors copied in."""
    initial = {name: value for name, value in initial_state(family, trial).items() if ".initial_" not in name}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = {peft_name(name, trial.prefix > 0): name for name in initial}
    assert set(found) == set(ours), set(found) ^ set(ours)  # PEFT adapts the same layers and trains the same tensors
    with torch.no_grad():
        for name, p in found.items():
            p.copy_(initial[ours[name]])
    return {ours[name]: p for name, p in found.items()}


@torch.no_grad()
def take_residuals(model: nn.Module) -> None:
    """PiSSA: PEFT's base is what A and B leave of it."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base = layer.get_base_layer()
            base.weight -= layer.scaling["default"] * ((B @ A).T if is_conv1d(base) else B @ A)


def train_in_peft(family: Family, trial: Trial, run: Run) -> Trained:
    """A plain PyTorch loop over the trial alone, to its own last step."""
    model = peft_model(family, trial, run.dropout)
    trained = trained_parameters(family, trial, model)
    if trial.method == "pissa":
        take_residuals(model)
    forward_pass = ForwardPass(torch.tensor([trial.seed]), run.dropout, dropout=True)
    if run.dropout:
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                above = "base_model." if trial.prefix else "base_model.model."
                layer.lora_dropout["default"] = SeededDropout(forward_pass, name.removeprefix(above))
    model.train(run.dropout > 0)  # PEFT's DoRA asks for the mode; the models' own dropout is 0
    groups = []
    for name, p in trained.items():
        rate = trial.rate * (trial.recipe.lr_ratio if "lora_B" in name or "embedding_B" in name else 1.0)
        groups.append({"params": [p], "lr": rate, "weight_decay": 0.0 if name.endswith(".bias") else trial.decay})
    optimizer: torch.optim.Optimizer
    if run.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=trial.betas)
    else:
        optimizer = torch.optim.SGD(groups, momentum=trial.betas[0])
    schedule = SCHEDULES[trial.schedule](optimizer, math.ceil(trial.warmup * trial.steps), trial.steps)
    data, losses = frozen_rows(family), []
    for step, rows in enumerate(step_rows(data.lengths, ROWS, trial.seed, 0, trial.lives)):
        forward_pass.step = step
        inputs = tensors(family, collate(data, rows, PAD))
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), math.inf if trial.clip is None else trial.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(losses, {name: p.detach().clone() for name, p in trained.items()})


def tensors(family: Family, batch: Batch) -> dict[str, Tensor]:
    """A batch as the model's own forward takes it, which then makes the loss by itself."""
    ids, mask, labels = (torch.from_numpy(a) for a in (batch.input_ids_RT, batch.attention_mask_RT, batch.labels))
    if family.task == CAUSAL_LM:
        labels = torch.where(labels, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same(ours: Trained, theirs: Trained, steps: int, what: object, atol: float = 5e-5) -> None:
    """Every loss of the first `steps` steps to 2e-5, and every trained tensor after the last to atol.

    Tensors by their root mean square: AdamW divides by the gradient, and where an entry's is no larger than rounding,
    neither ours nor PEFT's step there means anything.
    """
    tolerance = min(2e-5, atol)
    np.testing.assert_allclose(
        ours.losses[:steps], theirs.losses[:steps], tolerance, tolerance, err_msg=f"loss of {what}"
    )
    for name, value in theirs.weights.items():
        difference = (ours.weights[name] - value).square().mean().sqrt().item()
        assert difference <= atol, f"{name} differs by {difference:.2g} in {what}"


def assert_trained_as_in_peft(family: Family, trials: list[Trial], run: Run) -> None:
    for trial, ours in zip(trials, train_pack(family, trials, run), strict=True):
        assert_same(ours, train_in_peft(family, trial, run), trial.lives, (trial, run))
