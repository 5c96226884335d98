"""The base model: loaded once a process, frozen, and asked which of its layers an arm adapts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sweep.lora.adapter import Adapter, adaptable_modules, linear_modules
from sweep.lora.methods import State, frozen_numbers, is_conv1d, matrix_shape, refusal, trained_numbers
from sweep.lora.prefix import prefix_refusal
from sweep.lora.quantized import is_quantized, run_dequantized
from sweep.lora.readout import reads_first_position
from sweep.study.arms import ALL_LINEAR, Arm, pattern_key
from sweep.study.errors import FieldError
from sweep.training.locate import ModelPlace, quiet
from sweep.training.quantization import check_quantization, loading_settings
from sweep.training.tasks import CLASSIFICATION, CLASSIFIERS, IMAGES
from sweep.training.trust import reading_weights, unusable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_NAMES = ("classifier", "score")  # what PEFT saves with the adapter of a classifier


@dataclass(frozen=True)
class Base:
    model: nn.Module
    head: tuple[str, ...]  # linear layers that come fresh, without pretrained weights: every trial trains its own
    plain_head: bool = False  # a language model whose logits are its output layer's product with the last hidden state
    behind: str | None = None  # the module from which on a classifier needs the first position of a row alone


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=2)
def load_base(
    place: ModelPlace,
    task: str,
    labels: tuple[str, ...],
    pad_token_id: int,
    precision: str,
    attention: str,
    quantization: str | None = None,
) -> Base:
    """The frozen model on this process's device, in evaluation mode: the model's own dropout is off in every arm.

    pad_token_id: what batches are padded with; a decoder classifies at the last token that is another.
    precision: "float32" or "bfloat16", the dtype of the frozen weights; of a quantised base, that of its products.
    quantization: "4bit" or "8bit", or None. Raises FieldError when it cannot be loaded.
    """
    import transformers

    check_quantization(quantization)
    settings: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": attention, **reading_weights(place)}
    if quantization is not None:
        spared = HEAD_NAMES if task in CLASSIFIERS else ()
        settings |= loading_settings(quantization, place, spared, DTYPES[precision])
    if task in CLASSIFIERS:
        auto: Any = transformers.AutoModelForSequenceClassification
        if task == IMAGES:
            auto = transformers.AutoModelForImageClassification
        settings["num_labels"] = len(labels)
        settings["ignore_mismatched_sizes"] = True  # a head for other labels: ours comes fresh anyway
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    else:
        auto = transformers.AutoModelForCausalLM
    with quiet():
        try:
            model, info = auto.from_pretrained(place.path, output_loading_info=True, **settings)
        except Exception as error:  # transformers raises many kinds; each means that this model can't be used
            raise unusable(place, f" cannot be loaded for {task}", error) from error
    layers = linear_modules(model)
    missing = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    head = tuple(
        name
        for name in layers
        if task in CLASSIFIERS and (name.split(".")[0] in HEAD_NAMES or f"{name}.weight" in missing)
    )
    orphans = sorted(key for key in missing if key.rpartition(".")[0] not in head)
    if orphans:
        raise FieldError(("model", f"{place.name} lacks weights for {task}: {', '.join(orphans[:4])}"))
    if task == CLASSIFICATION:
        model.config.pad_token_id = pad_token_id
    if quantization is not None:  # on its device already
        run_dequantized(model)
        packed = [name for name in head if is_quantized(layers[name])]
        if packed:
            raise FieldError(("quantization", f"{quantization} would pack {packed[0]}, which every trial trains anew"))
    else:
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config  # a GGUF file's weights are unpacked by now
        model.to(find_device())
    model.requires_grad_(False)
    model.eval()
    if task == IMAGES:
        return Base(model, head)
    if task == CLASSIFICATION:
        return Base(model, head, behind=reads_first_position(model))
    return Base(model, head, plain_head=has_plain_head(model))


def target_layers(model: nn.Module, head: tuple[str, ...], target_modules: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers that the endings name, of every kind that can be adapted; `all-linear`: every linear layer (Conv1D
    too) but the head and the output embeddings, as in PEFT. Raises FieldError with the nearest names that exist.
    """
    layers = {name: layer for name, layer in adaptable_modules(model).items() if name not in head}
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if getattr(m, "weight", None) is not None})
        raise FieldError(
            ("arms.target_modules", f"the model has no layer that can be adapted, only {', '.join(kinds)}")
        )
    endings = sorted({name.split(".")[-1] for name in layers})
    if target_modules == (ALL_LINEAR,):
        find_output = getattr(model, "get_output_embeddings", None)
        output = find_output() if callable(find_output) else None
        linear = {n: layer for n, layer in layers.items() if isinstance(layer, nn.Linear) or is_conv1d(layer)}
        found = {name: layer for name, layer in linear.items() if layer is not output}
        if not found:
            message = (
                f"all-linear: but for its head the model has no linear layer; name its other layers by their endings, "
                f"as in [[{endings[0]}]]; there are {', '.join(endings)}"
            )
            raise FieldError(("arms.target_modules", message))
        return found
    for ending in target_modules:
        if not any(_ends(name, ending) for name in layers):
            near = difflib.get_close_matches(ending, [*endings, *layers], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise FieldError(
                (
                    "arms.target_modules",
                    f"no layer's name ends in {ending!r}; {hint}there are {', '.join(endings)}",
                )
            )
    return {name: layer for name, layer in layers.items() if any(_ends(name, ending) for ending in target_modules)}


def check_arm(base: Base, arm: Arm) -> int:
    """The arm's trainable parameters, its head included.

    Raises FieldError for ranks, modules and patterns that don't fit.
    """
    layers = linear_modules(base.model)
    head = sum(p.numel() for name in base.head for p in layers[name].parameters())
    if arm.is_full:
        return sum(p.numel() for p in base.model.parameters())
    prefix = 0
    if arm.prefix_length:
        reason = prefix_refusal(base.model)
        if reason is not None:
            raise FieldError(("arms.method", f"{arm.method}: {reason}"))
        embedding: nn.Embedding = base.model.get_input_embeddings()  # type: ignore[operator]
        prefix = arm.prefix_length * embedding.embedding_dim
    targets = target_layers(base.model, base.head, arm.target_modules)
    _refuse_idle_keys(arm, list(targets))
    for name, layer in targets.items():
        shape, r = matrix_shape(layer), arm.rank_at(name)
        if r > min(shape):
            field = "arms.rank" if pattern_key(arm.rank_pattern, name) is None else "arms.rank_pattern"
            sides = f"{shape[0]}×{shape[1]}"
            raise FieldError((field, f"rank {r} is larger than layer {name} ({sides}); at most {min(shape)}"))
        reason = refusal(layer, arm.method)
        if reason is not None:
            raise FieldError(("arms.method", f"{name}: {reason}"))
    return head + prefix + sum(trained_numbers(layer, arm.rank_at(name), arm.method) for name, layer in targets.items())


def adapter_of(base: Base, arm: Arm, state: State, seed: int = 0) -> Adapter:
    """The arm's adapter with these tensors, as `install` takes it."""
    modules = tuple(target_layers(base.model, base.head, arm.target_modules))
    ranks = {name: arm.rank_at(name) for name in modules} if arm.rank_pattern else {}
    scalings = {name: arm.scaling_at(name) for name in modules} if arm.rank_pattern or arm.alpha_pattern else {}
    return Adapter(arm.r, arm.scaling, modules, state, seed, arm.method, ranks, scalings, arm.prefix_length)


def frozen_bytes(base: Base, arm: Arm) -> int:
    """What a trial of the arm carries beside the base and its trained numbers."""
    if arm.is_full:
        return 0
    targets = target_layers(base.model, base.head, arm.target_modules)
    return 4 * sum(frozen_numbers(layer, arm.rank_at(name), arm.method) for name, layer in targets.items())


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether the logits are the output layer's product with the backbone's last hidden state and nothing else.

    Seen on a few tokens: some models scale or cap their logits, and those go through the model's own forward.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or model.base_model is model:
        return False
    ids = torch.arange(4, device=output.weight.device)[None]
    larger = output.register_forward_pre_hook(lambda layer, given: (100 * given[0],))  # a cap of 30 shows on 100
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        return hidden is not None and torch.allclose(output(hidden), logits, rtol=1e-3, atol=1e-3)
    finally:
        larger.remove()


def _refuse_idle_keys(arm: Arm, adapted: list[str]) -> None:
    """Raise FieldError for a pattern's key that no adapted layer falls under: PEFT would pass over it in silence."""
    for field, pattern in (("arms.rank_pattern", arm.rank_pattern), ("arms.alpha_pattern", arm.alpha_pattern)):
        taken = {pattern_key(pattern, name) for name in adapted}
        for key in (key for key, _ in pattern if key not in taken):
            fits = any(pattern_key(((key, 0),), name) for name in adapted)
            endings = sorted({name.split(".")[-1] for name in adapted})
            near = difflib.get_close_matches(key, [*endings, *adapted], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            reason = "a key before it takes every layer that it fits" if fits else "fits no adapted layer"
            raise FieldError((field, f"{key!r}: {reason}; {hint}adapted are {', '.join(endings)}"))


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
