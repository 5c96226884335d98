"""The tasks: the loss of every trial of a pack, and what is measured on held-out rows.

Shapes: K trials in the pack, b rows a trial, R = K·b rows, T tokens a row, M target tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sweep.training.batches import Batch, collate
from sweep.training.data import Split

CLASSIFICATION, CAUSAL_LM = "sequence-classification", "causal-lm"
EVAL_TOKENS, EVAL_LOGITS = 4096, 2**26  # of one forward pass in evaluation


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


def evaluation_batches(model: nn.Module, split: Split, task: str, trials: int, pad_token_id: int) -> Iterator[Batch]:
    """All rows of a split, shortest first, the same ones for every trial."""
    order = np.argsort(split.lengths, kind="stable")
    tokens = EVAL_TOKENS
    if task == CAUSAL_LM:  # the logits of a pass are tokens × vocabulary
        tokens = min(tokens, EVAL_LOGITS // int(model.get_input_embeddings().num_embeddings))  # type: ignore[operator]
    per_pass = max(1, tokens // (trials * int(split.lengths.max())))
    for i in range(0, len(order), per_pass):
        yield collate(split, np.tile(order[i : i + per_pass], trials), pad_token_id)


def summarise(passes: Sequence[Scores], task: str) -> list[dict[str, float]]:
    """Of every trial over all passes: `loss` and the task's own, `accuracy` or `perplexity`."""
    loss_K = torch.stack([scores.loss_K.double().cpu() for scores in passes]).sum(0)
    correct_K = torch.stack([scores.correct_K.double().cpu() for scores in passes]).sum(0)
    count_K = torch.stack([scores.count_K.double().cpu() for scores in passes]).sum(0)
    results = []
    for loss, correct, count in zip(loss_K.tolist(), correct_K.tolist(), count_K.tolist(), strict=True):
        mean = loss / count
        if task == CLASSIFICATION:
            results.append({"loss": mean, "accuracy": correct / count})
        else:
            results.append({"loss": mean, "perplexity": math.exp(min(mean, 700.0))})
    return results
