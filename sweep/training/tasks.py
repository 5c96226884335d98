"""The tasks: the loss of every trial of a pack, and what is measured on held-out rows.

Shapes: K trials in the pack, b rows a trial, R = K·b rows, T tokens a row, M target tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sweep.training.batches import Batch, collate
from sweep.training.data import Split

CLASSIFICATION, CAUSAL_LM = "sequence-classification", "causal-lm"
EVAL_TOKENS = 4096  # of one forward pass in evaluation


@dataclass(frozen=True)
class Scores:
    """Sums over rows (classification) or target tokens (causal-lm), by trial."""

    loss_K: Tensor
    correct_K: Tensor
    count_K: Tensor


def score(model: nn.Module, batch: Batch, task: str, trials: int) -> Scores:
    """One forward pass over K·b rows, ordered by trial."""
    device = next(model.parameters()).device
    input_ids_RT = torch.from_numpy(batch.input_ids_RT).to(device)
    attention_mask_RT = torch.from_numpy(batch.attention_mask_RT).to(device)
    labels = torch.from_numpy(batch.labels).to(device)
    if task == CLASSIFICATION:
        logits_RC = model(input_ids=input_ids_RT, attention_mask=attention_mask_RT).logits.float()
        loss_R = cross_entropy(logits_RC, labels, reduction="none")
        correct_R = (logits_RC.argmax(-1) == labels).float()
        rows_K = torch.full((trials,), len(labels) // trials, device=device)
        return Scores(loss_R.view(trials, -1).sum(1), correct_R.view(trials, -1).sum(1), rows_K)
    logits_RTV = model(input_ids=input_ids_RT, attention_mask=attention_mask_RT, use_cache=False).logits
    target_RT = labels[:, 1:]  # position t predicts token t + 1
    logits_MV = logits_RTV[:, :-1][target_RT].float()
    wanted_M = input_ids_RT[:, 1:][target_RT]
    loss_M = cross_entropy(logits_MV, wanted_M, reduction="none")
    trial_M = torch.arange(trials, device=device).repeat_interleave(len(labels) // trials)
    trial_M = trial_M[:, None].expand_as(target_RT)[target_RT]
    zeros_K = torch.zeros(trials, device=device)
    return Scores(
        zeros_K.index_add(0, trial_M, loss_M),
        zeros_K.index_add(0, trial_M, (logits_MV.argmax(-1) == wanted_M).float()),
        target_RT.reshape(trials, -1).sum(1),
    )


def mean_loss(scores: Scores) -> Tensor:
    """(K,): every trial's mean over its own rows or target tokens."""
    return scores.loss_K / scores.count_K.clamp(min=1)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, task: str, trials: int, pad_token_id: int) -> list[dict[str, float]]:
    """Every trial on all rows of a split: `loss` and the task's own, `accuracy` or `perplexity`."""
    order = np.argsort(split.lengths, kind="stable")
    per_pass = max(1, EVAL_TOKENS // (trials * int(split.lengths.max())))
    loss_K, correct_K, count_K = (torch.zeros(trials, dtype=torch.float64) for _ in range(3))
    for i in range(0, len(order), per_pass):
        scores = score(model, collate(split, np.tile(order[i : i + per_pass], trials), pad_token_id), task, trials)
        loss_K += scores.loss_K.double().cpu()
        correct_K += scores.correct_K.double().cpu()
        count_K += scores.count_K.double().cpu()
    results = []
    for loss, correct, count in zip(loss_K.tolist(), correct_K.tolist(), count_K.tolist(), strict=True):
        mean = loss / count
        if task == CLASSIFICATION:
            results.append({"loss": mean, "accuracy": correct / count})
        else:
            results.append({"loss": mean, "perplexity": math.exp(min(mean, 700.0))})
    return results
