"""Forgetting: what a trial still knows of held-out text of the source domain.

Causal-lm: the trial's own loss on that text. Sequence classification: the loss of the checkpoint's own language-model
head, over the backbone as the trial has trained it.

Shapes: K trials in the pack, R = K·b rows, T tokens a row, M target tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sweep.lora.adapter import Adapter, adaptable_modules, install, remove
from sweep.lora.methods import State
from sweep.lora.passes import ForwardPass
from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.records import Prepared, Setup, SourceText
from sweep.training.base import DTYPES, find_device, has_plain_head, load_base
from sweep.training.batches import Batch
from sweep.training.locate import ModelPlace, load_tokenizer, quiet
from sweep.training.source_text import HeldOutText, has_masked_head, load_source_text
from sweep.training.tasks import (
    CAUSAL_LM,
    CLASSIFICATION,
    Scores,
    evaluation_batches,
    evaluation_passes,
    summarise,
    sums_by_row,
    tell_pass,
)
from sweep.training.trust import CODE, reading_weights, unusable


@dataclass(frozen=True)
class LanguageModel:
    model: Any
    plain_head: bool  # see `Base`


def check_source_text(setup: Setup, place: ModelPlace) -> None:
    """Raise FieldError where there is no such text, or no language model to read it."""
    load_source_text(setup, place)
    if setup.task == CLASSIFICATION:
        if setup.quantization is not None:
            raise FieldError(("forgetting", "a quantised classifier's backbone cannot be put under its language head"))
        load_language_model(place, "float32", "eager")


def describe_source_text(setup: Setup, prepared: Prepared, place: ModelPlace, finetuned: bool) -> SourceText:
    """The text and the base's loss on it. finetuned: whether an arm is full fine-tuning, in a precision of its own."""
    text = load_source_text(setup, place)
    loss = _base_loss(setup, prepared, place, text, full=False)
    differs = finetuned and prepared.precision != "float32"
    return SourceText(
        rows=len(text.split),
        targets=int(text.split.labels.sum()),
        removed=text.removed,
        fingerprint=text.fingerprint,
        masked=text.mask_token_id is not None,
        loss=loss,
        full_loss=_base_loss(setup, prepared, place, text, full=True) if differs else loss,
    )


def _base_loss(setup: Setup, prepared: Prepared, place: ModelPlace, text: HeldOutText, full: bool) -> float:
    pad_token_id = int(load_tokenizer(place).pad_token_id)
    precision = "float32" if full else prepared.precision
    if setup.task == CAUSAL_LM:
        held = None if full else setup.quantization
        base = load_base(place, setup.task, prepared.labels, pad_token_id, precision, prepared.attention, held)
        model = LanguageModel(base.model, base.plain_head)
    else:
        model = load_language_model(place, precision, prepared.attention)
    under = full and prepared.precision == "bfloat16"
    with torch.autocast(find_device().type, dtype=torch.bfloat16, enabled=under):
        return text_losses(model, text, 1, pad_token_id)[0]


@lru_cache(maxsize=2)
def load_language_model(place: ModelPlace, precision: str, attention: str) -> LanguageModel:
    """The checkpoint with its own language-model head, frozen.

    Raises FieldError on `forgetting.source` where it carries none: a fresh head would know nothing to forget.
    """
    import transformers

    settings: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": attention, **reading_weights(place)}
    auto: Any = transformers.AutoModelForMaskedLM if has_masked_head(place) else transformers.AutoModelForCausalLM
    lacking: list[str] = []
    with quiet():
        try:
            model, info = auto.from_pretrained(place.path, output_loading_info=True, **settings)
            lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        except (ValueError, KeyError) as error:  # a kind of model that has no such head
            if CODE in str(error):
                raise unusable(place, "", error) from error
            raise FieldError(("forgetting.source", _no_head(place, []))) from error
    if lacking:
        raise FieldError(("forgetting.source", _no_head(place, lacking)))
    model.requires_grad_(False)
    model.to(find_device()).eval()
    return LanguageModel(model, not has_masked_head(place) and has_plain_head(model))


def text_losses(
    model: LanguageModel, text: HeldOutText, trials: int, pad_token_id: int, told: ForwardPass | None = None
) -> list[float]:
    """Each trial's mean loss over the text's target tokens. told: see `evaluation_passes`."""
    if text.mask_token_id is None:
        passes = evaluation_passes(model.model, text.split, CAUSAL_LM, trials, pad_token_id, model.plain_head, told)
    else:
        passes = []
        for batch in evaluation_batches(model.model, text.split, CAUSAL_LM, trials, pad_token_id):
            tell_pass(told, batch, None)
            passes.append(_masked_scores(model.model, batch, trials, text.mask_token_id))
    return [scores["loss"] for scores in summarise(passes, CAUSAL_LM)]


@torch.no_grad()
def _masked_scores(model: Any, batch: Batch, trials: int, mask_token_id: int) -> Scores:
    device = next(model.parameters()).device
    ids_RT = torch.from_numpy(batch.input_ids_RT).to(device)
    hidden_RT = torch.from_numpy(batch.labels).to(device)
    mask_RT = torch.from_numpy(batch.attention_mask_RT).to(device)
    logits_RTV = model(input_ids=ids_RT.masked_fill(hidden_RT, mask_token_id), attention_mask=mask_RT).logits
    logits_MV, wanted_M = logits_RTV[hidden_RT].float(), ids_RT[hidden_RT]
    loss_M = cross_entropy(logits_MV, wanted_M, reduction="none")
    return sums_by_row(loss_M, (logits_MV.argmax(-1) == wanted_M).float(), hidden_RT, trials)


def adapted_losses(
    model: LanguageModel, arms: Sequence[Arm], states: Sequence[State], text: HeldOutText, pad_token_id: int
) -> list[float]:
    """Of K classifiers' adapters, put onto the language model by module name; what it lacks (a pooler) is left out."""
    layers = adaptable_modules(model.model)
    adapters = [_adapter(arm, state, layers) for arm, state in zip(arms, states, strict=True)]
    pack = install(model.model, adapters, ())
    try:
        return text_losses(model, text, len(adapters), pad_token_id, pack.forward_pass)
    finally:
        remove(model.model, pack)


@torch.no_grad()
def finetuned_loss(model: LanguageModel, weights: dict[str, Tensor], text: HeldOutText, pad_token_id: int) -> float:
    """Of a classifier all of whose weights trained: those that the language model has too are put into a copy of it.

    A head that is tied to the embeddings moves with them, as in a language model that is fine-tuned itself.
    """
    trained: nn.Module = copy.deepcopy(model.model)
    for name, parameter in trained.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    return text_losses(LanguageModel(trained, model.plain_head), text, 1, pad_token_id)[0]


def _adapter(arm: Arm, state: State, layers: Container[str]) -> Adapter:
    """The trial's adapter on those of its modules that are among the layers."""
    adapted = sorted({name.partition(".lora_")[0] for name in state if ".lora_" in name})
    modules = tuple(name for name in adapted if name in layers)
    ranks, scalings = {name: arm.rank_at(name) for name in modules}, {name: arm.scaling_at(name) for name in modules}
    return Adapter(arm.r, arm.scaling, modules, state, 0, arm.method, ranks, scalings, arm.prefix_length)


def _no_head(place: ModelPlace, lacking: list[str]) -> str:
    why = f" (it lacks {', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''})" if lacking else ""
    return (
        f"{place.name} carries no language-model head{why}, so forgetting cannot be measured by its loss on text: "
        "leave forgetting out, or take a checkpoint that has its head"
    )
