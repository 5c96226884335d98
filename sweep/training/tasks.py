"""The tasks: the loss of every trial of a pack, and what is measured on held-out rows.

Shapes: K trials in the pack, b rows a trial, R = K·b rows, T tokens a row, M target tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from sweep.lora.passes import ForwardPass
from sweep.training.batches import AnyBatch, Batch, collate
from sweep.training.data import AnySplit, Split

CLASSIFICATION, CAUSAL_LM, IMAGES = "sequence-classification", "causal-lm", "image-classification"
CLASSIFIERS = (CLASSIFICATION, IMAGES)
EVAL_TOKENS, EVAL_LOGITS = 4096, 2**26  # of one forward pass in evaluation
CHUNK_LOGITS = 2**23  # of the output layer at a time


@dataclass(frozen=True)
class Scores:
    """Sums over rows (classification) or target tokens (causal-lm), by trial and by row of a trial."""

    loss_Kb: Tensor
    correct_K: Tensor
    count_Kb: Tensor

    @property
    def loss_K(self) -> Tensor:
        return self.loss_Kb.sum(1)

    @property
    def count_K(self) -> Tensor:
        return self.count_Kb.sum(1)


def score(model: Any, batch: AnyBatch, task: str, trials: int, plain_head: bool = False) -> Scores:
    """One forward pass over K·b rows, ordered by trial.

    plain_head: see `Base`; the output layer is then computed at target positions alone.
    """
    inputs = model_inputs(model, batch)
    device = next(model.parameters()).device
    labels = torch.from_numpy(batch.labels).to(device)
    if task in CLASSIFIERS:
        logits_RC = model(**inputs).logits.float()
        loss_R = cross_entropy(logits_RC, labels, reduction="none")
        correct_R = (logits_RC.argmax(-1) == labels).float()
        loss_Kb = loss_R.view(trials, -1)
        return Scores(loss_Kb, correct_R.view(trials, -1).sum(1), torch.ones_like(loss_Kb))
    target_RT = labels[:, 1:]  # position t predicts token t + 1
    wanted_M = inputs["input_ids"][:, 1:][target_RT]
    output = model.get_output_embeddings()
    if plain_head and isinstance(output, nn.Linear):  # an adapted output layer goes through the model's own forward
        hidden_MH = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][target_RT]
        if output.weight.requires_grad:
            loss_M, correct_M = _token_loss(output(hidden_MH).float(), wanted_M)
        else:
            loss_M, correct_M = _FrozenHeadLoss.apply(hidden_MH, output.weight, output.bias, wanted_M)
    else:
        loss_M, correct_M = _token_loss(model(**inputs, use_cache=False).logits[:, :-1][target_RT].float(), wanted_M)
    return sums_by_row(loss_M, correct_M, target_RT, trials)


def sums_by_row(loss_M: Tensor, correct_M: Tensor, target_RT: Tensor, trials: int) -> Scores:
    """Scores of K·b rows, ordered by trial, from those of the M places where target_RT is true."""
    zeros_R = torch.zeros(len(target_RT), device=target_RT.device)
    row_M = torch.arange(len(target_RT), device=target_RT.device)[:, None].expand_as(target_RT)[target_RT]
    return Scores(
        zeros_R.index_add(0, row_M, loss_M).view(trials, -1),
        zeros_R.index_add(0, row_M, correct_M).view(trials, -1).sum(1),
        target_RT.sum(1).view(trials, -1),
    )


def model_inputs(model: Any, batch: AnyBatch) -> dict[str, Tensor]:
    """What the model's forward is given, on its device; pixels in the dtype of its frozen weights."""
    frozen = next((p for p in model.parameters() if not p.requires_grad), None)  # full fine-tuning has none: float32
    dtype, device = torch.float32 if frozen is None else frozen.dtype, next(model.parameters()).device
    tensors = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    return {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in tensors.items()}


def target_counts(batch: AnyBatch, trials: int) -> np.ndarray:
    """(K,): over how many rows, or target tokens, each trial's loss is a mean."""
    if batch.labels.ndim == 1:
        return np.full(trials, len(batch.labels) // trials)
    return batch.labels[:, 1:].reshape(trials, -1).sum(1).clip(min=1)


class _FrozenHeadLoss(torch.autograd.Function):
    """Loss and hits of M positions under a frozen output layer, a chunk of logits at a time.

    The gradient to the hidden state is made on the way forward, while a chunk's logits are there: no logits are kept
    and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, W_VH: Tensor, bias_V: Tensor | None, wanted_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, hits, gradients = [], [], []
        for hidden_CH, wanted_C in _chunks(hidden_MH, wanted_M, max(1, CHUNK_LOGITS // len(W_VH))):
            logits_CV = linear(hidden_CH, W_VH, bias_V).float()
            loss_C, hit_C = _token_loss(logits_CV, wanted_C)
            losses.append(loss_C)
            hits.append(hit_C)
            if ctx.needs_input_grad[0]:
                slope_CV = logits_CV.softmax(-1)
                slope_CV[torch.arange(len(wanted_C), device=wanted_C.device), wanted_C] -= 1
                gradients.append(slope_CV.to(W_VH.dtype) @ W_VH)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        hit_M = torch.cat(hits)
        ctx.mark_non_differentiable(hit_M)
        return torch.cat(losses), hit_M

    @staticmethod
    def backward(ctx: Any, slope_M: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return (gradient_MH * slope_M[:, None]).to(gradient_MH.dtype), None, None, None


def _chunks(hidden_MH: Tensor, wanted_M: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden_MH.split(size), wanted_M.split(size), strict=True)


def _token_loss(logits_MV: Tensor, wanted_M: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(logits_MV, wanted_M, reduction="none"), (logits_MV.argmax(-1) == wanted_M).float()


@overload
def evaluation_batches(model: Any, split: Split, task: str, trials: int, pad_token_id: int) -> Iterator[Batch]: ...
@overload
def evaluation_batches(
    model: Any, split: AnySplit, task: str, trials: int, pad_token_id: int
) -> Iterator[AnyBatch]: ...
def evaluation_batches(model: Any, split: AnySplit, task: str, trials: int, pad_token_id: int) -> Iterator[AnyBatch]:
    """All rows of a split, shortest first, the same ones for every trial."""
    order = np.argsort(split.lengths, kind="stable")
    tokens = EVAL_TOKENS
    if task == CAUSAL_LM:  # the logits of a pass are tokens × vocabulary
        tokens = min(tokens, EVAL_LOGITS // int(model.config.get_text_config().vocab_size))
    per_pass = max(1, tokens // (trials * split.longest))
    for i in range(0, len(order), per_pass):
        yield collate(split, np.tile(order[i : i + per_pass], trials), pad_token_id)


def evaluation_passes(
    model: Any,
    split: AnySplit,
    task: str,
    trials: int,
    pad_token_id: int,
    plain_head: bool = False,
    told: ForwardPass | None = None,
) -> list[Scores]:
    """Every trial on all rows of a split, in one order whatever the number of trials; see `summarise`, `row_losses`.

    told: the installed pack's, None where there is none.
    """
    found = []
    for batch in evaluation_batches(model, split, task, trials, pad_token_id):
        tell_pass(told, batch, None)
        with torch.no_grad():
            found.append(score(model, batch, task, trials, plain_head))
    return found


def row_losses(passes: Sequence[Scores], trial: int) -> dict[str, Tensor]:
    """One trial's `loss` (sum) and `targets` (rows or tokens that the sum is over) of each row, float32 (R,)."""
    return {
        "loss": torch.cat([scores.loss_Kb[trial].float().cpu() for scores in passes]),
        "targets": torch.cat([scores.count_Kb[trial].float().cpu() for scores in passes]),
    }


def tell_pass(told: ForwardPass | None, batch: AnyBatch, step: int | None, first_row: int = 0) -> None:
    """Tell the packed layers of the pass that comes: of a training step, or (None) without dropout."""
    if told is None:
        return
    told.rows, told.first_row, told.step = len(batch.source_R), first_row, step or 0
    told.dropout = step is not None and told.p > 0
    told.widened = False
    _, distinct_U, place_R = np.unique(batch.source_R, return_index=True, return_inverse=True)
    repeats = len(distinct_U) < len(place_R)
    device = told.seeds_K.device
    told.distinct_U = torch.from_numpy(distinct_U).to(device) if repeats else None
    told.place_R = torch.from_numpy(place_R).to(device) if repeats else None


def summarise(passes: Sequence[Scores], task: str) -> list[dict[str, float]]:
    """Of every trial over all passes: `loss` and the task's own, `accuracy` or `perplexity`."""
    loss_K = torch.stack([scores.loss_K.double().cpu() for scores in passes]).sum(0)
    correct_K = torch.stack([scores.correct_K.double().cpu() for scores in passes]).sum(0)
    count_K = torch.stack([scores.count_K.double().cpu() for scores in passes]).sum(0)
    results = []
    for loss, correct, count in zip(loss_K.tolist(), correct_K.tolist(), count_K.tolist(), strict=True):
        mean = loss / count
        if task in CLASSIFIERS:
            results.append({"loss": mean, "accuracy": correct / count})
        else:
            results.append({"loss": mean, "perplexity": math.exp(min(mean, 700.0))})
    return results
