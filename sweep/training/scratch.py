"""A base model that the study makes itself, from the rows of some classes: for where no hub is reached.

It is an ordinary model folder in the cache: config.json, safetensors, preprocessor_config.json, and beside them
pretraining.json with what it scored on rows that it never saw.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sweep.lora.optim import lr_factor
from sweep.study.errors import FieldError, first_line
from sweep.study.files import file_sha256, read_json, write_json
from sweep.study.records import PretrainSettings, Setup
from sweep.training.batches import collate, step_rows
from sweep.training.data import distinct_rows, make_splits, of_classes, row_fingerprint
from sweep.training.images import PROCESSOR, ImageSplit, image_splits
from sweep.training.locate import ModelPlace, locate_model, quiet
from sweep.training.tasks import IMAGES, Scores, evaluation_batches, model_inputs, score, summarise

RECORD = "pretraining.json"
WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0
_CODE_VERSION = 1  # raise it when the same settings would make another base


def find_base(setup: Setup) -> ModelPlace:
    """The study's base model: where `model` says, or the one that `pretrain` makes, made now if it is not cached.

    Raises FieldError on `model`, `pretrain.…` or `data.…`.
    """
    if setup.pretrain is not None:
        return _pretrained(setup, setup.pretrain)
    return locate_model(setup.model, setup.trust_remote_code)


def pretraining_record(place: ModelPlace) -> dict[str, Any]:
    """What was written down when the base was made here; empty for any other base."""
    path = Path(place.path) / RECORD
    found: dict[str, Any] = json.loads(path.read_text()) if place.local and path.exists() else {}
    return found


def _pretrained(setup: Setup, settings: PretrainSettings) -> ModelPlace:
    """Its place in the cache, under all that decides its weights."""
    config = _configuration(settings)
    rows, _ = distinct_rows(setup)
    present = sorted({row["label"] for own in rows.values() for row in own})
    unknown = [label for label in settings.labels if label not in present]
    if unknown:
        there = f"there are {', '.join(present)}"
        raise FieldError(("pretrain.labels", f"no row has the label {', '.join(map(repr, unknown))}; {there}"))
    if len(present) - len(settings.labels) < 2:
        raise FieldError(("pretrain.labels", f"leaves under two of {', '.join(present)} for the study itself"))
    rows = make_splits(of_classes(rows, settings.labels, wanted=True), setup.data, setup.split_seed)
    if len(rows["train"]) < settings.batch_size:
        many = f"{settings.batch_size} is more than the {len(rows['train'])} rows of these labels"
        raise FieldError(("pretrain.batch_size", many))
    fingerprint = row_fingerprint(rows)
    versions = [_CODE_VERSION, version("torch"), version("transformers")]
    decided_by = [versions, vars(settings), fingerprint]
    key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:32]
    folder, digests = Path(setup.cache) / f"base-{key}", Path(setup.cache) / f"base-{key}.json"
    if not folder.exists() or read_json(digests) != _digests(folder):
        aside = folder.with_name(f"{folder.name}.{uuid4().hex}.tmp")  # process ids repeat on a share
        aside.mkdir(parents=True)
        try:
            _write_processor(config, settings, aside)
            place = ModelPlace(setup.model, str(aside), None, True)
            splits = image_splits(rows, settings.labels, place, fingerprint, Path(setup.cache))
            _pretrain(config, settings, splits, aside)
            write_json(digests, _digests(aside))
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return ModelPlace(setup.model, str(folder), None, True)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir())}


def _configuration(settings: PretrainSettings) -> Any:
    """The architecture's, checked by transformers. Raises FieldError on `pretrain.architecture` and `.config`."""
    import transformers
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if settings.architecture not in known:
        near = difflib.get_close_matches(settings.architecture, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"
        message = f"transformers has no image classifier of model type {settings.architecture!r}; {hint}"
        raise FieldError(("pretrain.architecture", message))
    given: dict[str, Any] = json.loads(settings.config)
    usual = transformers.AutoConfig.for_model(settings.architecture)
    for key in given:  # transformers takes any key without a word
        if not hasattr(usual, key):
            near = difflib.get_close_matches(key, usual.to_dict(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise FieldError((f"pretrain.config.{key}", f"{settings.architecture} has no such setting{hint}"))
    labels = {"id2label": dict(enumerate(settings.labels)), "label2id": {x: i for i, x in enumerate(settings.labels)}}
    try:
        return transformers.AutoConfig.for_model(settings.architecture, **{**given, **labels})
    except Exception as error:  # transformers raises many kinds; the message says which setting
        raise FieldError(("pretrain.config", " ".join(str(error).split()))) from None


def _write_processor(config: Any, settings: PretrainSettings, to: Path) -> None:
    """Images resized to one size, bytes scaled to −1 … 1."""
    from transformers import ViTImageProcessorPil

    configured = getattr(config, "image_size", None)
    if settings.image_size is not None and configured is not None and configured != settings.image_size:
        message = f"is {settings.image_size}, and pretrain.config.image_size {configured}: the second is enough"
        raise FieldError(("pretrain.image_size", message))
    size = configured or settings.image_size
    if not isinstance(size, int):
        message = f"missing: {settings.architecture} does not set one; to how many pixels a side are images resized?"
        raise FieldError(("pretrain.image_size", message))
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise FieldError(("pretrain.config.num_channels", f"is {channels}: 3 for colours, or 1 for greys"))
    middle = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=middle, image_std=middle)
    processor.save_pretrained(to)
    assert (to / PROCESSOR).exists()


def _pretrain(config: Any, settings: PretrainSettings, splits: Mapping[str, ImageSplit], to: Path) -> None:
    """All weights from their random start, in float32: AdamW, linear schedule; the model in training mode."""
    import transformers

    train = splits["train"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            with quiet():
                model = transformers.AutoModelForImageClassification.from_config(config, attn_implementation="eager")
            model.eval()
            with torch.no_grad():
                model(**model_inputs(model, collate(train, [0, 1], 0)))
        except Exception as error:  # settings that do not go together show only here, as any kind of error
            raise FieldError(("pretrain.config", f"makes no model that runs: {first_line(error)}")) from None
        model.to(device).train()
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        steps = step_rows(train.lengths, settings.batch_size, settings.seed, 0, settings.steps)
        for step, rows in enumerate(steps):
            batch = collate(train, rows, 0)
            loss = cross_entropy(model(**model_inputs(model, batch)).logits, torch.from_numpy(batch.labels).to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * lr_factor("linear", step, settings.steps, WARMUP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    scores = _held_out(model.eval(), splits)
    if not np.isfinite(scores["loss"]):
        message = f"the base diverged at {settings.learning_rate:g}: try a lower one"
        raise FieldError(("pretrain.learning_rate", message))
    with quiet():
        model.save_pretrained(to)
    record = {
        **{"architecture": settings.architecture, "labels": settings.labels, "steps": settings.steps},
        **{"batch_size": settings.batch_size, "total_params": sum(p.numel() for p in model.parameters())},
        **{"train_rows": len(train), "held_out_rows": len(splits["validation"]) + len(splits["test"]), **scores},
    }
    (to / RECORD).write_text(json.dumps(record, indent=1))


def _held_out(model: Any, splits: Mapping[str, ImageSplit]) -> dict[str, float]:
    """Loss and accuracy on the rows of validation and test together."""
    passes: list[Scores] = []
    with torch.no_grad():
        for name in ("validation", "test"):
            batches = evaluation_batches(model, splits[name], IMAGES, 1, 0) if len(splits[name]) else ()
            passes += [score(model, batch, IMAGES, 1) for batch in batches]
    return summarise(passes, IMAGES)[0]
