"""Export: a trial's adapter as PEFT loads it, or merged into a plain model; checked before it is said to be done."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sweep.adapters.card import model_card
from sweep.adapters.folders import check_target, whole_folder, write_adapter, write_mark
from sweep.adapters.kept import read_kept
from sweep.adapters.merge import as_plain_lora, merged_weight
from sweep.adapters.peft_format import BASE, CLASSIFIER, LANGUAGE_MODEL, SUBFOLDER, PeftAdapter, Settings
from sweep.adapters.prompt import write_prompt
from sweep.lora.adapter import adaptable_modules, install, remove
from sweep.lora.methods import is_conv1d
from sweep.lora.prefix import PROMPT
from sweep.study.arms import Arm
from sweep.study.errors import Damaged
from sweep.study.lifeline import temporary_folder
from sweep.study.records import COMPLETE, Prepared
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord
from sweep.training.base import HEAD_NAMES, Base, adapter_of, load_base, target_layers
from sweep.training.batches import AnyBatch, collate
from sweep.training.data import TokenisedData, load_data
from sweep.training.images import load_image_processor
from sweep.training.locate import load_tokenizer, quiet
from sweep.training.scratch import find_base
from sweep.training.tasks import CLASSIFICATION, IMAGES, model_inputs

TOLERANCE = 1e-5  # on logits, relative to the largest of them where that is above 1
CHECKED_ROWS = 8


class ExportError(RuntimeError):
    """Nothing was exported; one line that says why and what to do."""


@dataclass(frozen=True)
class Check:
    """A few rows, the engine's own logits for them, and what a fresh process is told to load."""

    question: dict[str, Any]  # see `verify`
    inputs: dict[str, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Exported:
    path: Path
    largest_difference: float  # of the logits in a fresh process to ours
    check: Check


def export(
    study: Study,
    record: StudyRecord,
    trial: TrialRecord,
    to: Path,
    merge: bool,
    evidence: str,
    cache: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a trial's adapter (or, with merge, the whole model) to a folder, and check it in a fresh process.

    evidence: the report's sentences about the arm, for the model card. say: told before the base is read.
    The folder appears only once its logits equal ours. Both are over the base in full precision: one that was trained
    in 4 or 8 bits is read whole here, and merged whole. Raises ExportError, or FieldError where model or data can no
    longer be used, and as `check_target` does.
    """
    weights = _weights_of(trial, merge)
    check_target(to, study.name)
    if record.prepared is None:
        raise ExportError(f"study {study.name} has no prepared model and data; run it first")
    say(f"exporting trial {trial.spec.number} ({trial.spec.arm.name}), and loading it back in a fresh process")
    setup = study.setup(str(cache))
    place = find_base(setup)
    data = load_data(setup, place)
    base = load_base(place, study.task, record.prepared.labels, data.pad_token_id, "float32", "eager")
    base.model.to("cpu")  # where the fresh process computes too: devices differ by more than the tolerance
    batch = few_rows(data)
    with whole_folder(to, study.name) as half:
        ours = _our_logits(base, trial.spec.arm, weights, batch)
        if merge:
            _write_merged(base, trial.spec.arm, weights, half)
        else:
            _write_adapters(base, study, trial.spec.arm, weights, half)
        if study.pretrain is not None and not merge:  # nobody else has this base: it goes with its adapter
            shutil.copytree(place.path, half / BASE)
            place = replace(place, path=str(half / BASE))
        with quiet():
            processor = load_image_processor(place) if study.task == IMAGES else load_tokenizer(place)
            processor.save_pretrained(half)
        (half / "README.md").write_text(model_card(study, record, trial, merge, evidence))
        write_mark(half, _provenance(study, record.prepared, trial, merge))
        question = {
            "folder": str(half),
            "base": None if merge else place.path,
            "gguf_file": None if merge else place.gguf_file,
            "trust_remote_code": study.trust_remote_code,
            "task": study.task,
            "labels": len(record.prepared.labels),
            "pad_token_id": data.pad_token_id,
        }
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        check = Check(question, inputs, ours)
        difference = check_in_fresh_process(check, "the export")
    return Exported(to, difference, check)


def _weights_of(trial: TrialRecord, merge: bool) -> dict[str, Tensor]:
    spec = trial.spec
    if trial.state != COMPLETE or trial.last is None:
        raise ExportError(
            f"trial {spec.number} ({spec.arm.name}) is {trial.state or 'unfinished'}: export a complete one"
        )
    if spec.arm.is_full and not merge:
        raise ExportError("full fine-tuning has no adapter; add --merge for the whole model")
    if spec.arm.prefix_length and merge:
        raise ExportError("a prefix stands before the input, so no weight can hold it; export without --merge")
    if trial.kept is None:
        raise ExportError(f"trial {spec.number} ({spec.arm.name}) kept no weights; export one of its confirm trials")
    try:
        return read_kept(trial)
    except Damaged as error:
        raise ExportError(f"{error}, or export another one with --trial") from None


def _our_logits(base: Base, arm: Arm, weights: dict[str, Tensor], batch: AnyBatch) -> Tensor:
    """The logits of the engine itself, in float64 as in `verify`. The base is left as it was, in float32."""
    nn.Module.double(base.model)  # transformers' own refuses for models read from GGUF files
    try:
        return _logits_with(base, arm, weights, batch)
    finally:
        nn.Module.float(base.model)


def _logits_with(base: Base, arm: Arm, weights: dict[str, Tensor], batch: AnyBatch) -> Tensor:
    if arm.is_full:
        before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
        _copy_in(base.model, weights)
        logits = _logits(base.model, batch)
        _copy_in(base.model, before)
        return logits
    pack = install(base.model, [adapter_of(base, arm, weights)], base.head)
    try:
        return _logits(base.model, batch)
    finally:
        remove(base.model, pack)


def _write_adapters(base: Base, study: Study, arm: Arm, weights: dict[str, Tensor], to: Path) -> None:
    """A LoRA adapter, or a prefix, or the one with the other in a folder below it."""
    adapted = list(target_layers(base.model, base.head, arm.target_modules).values())
    if arm.r and arm.prefix_length and _tied_end(base.model, adapted):
        raise ExportError(
            "PEFT loads a prefix behind LoRA once LoRA is merged, and merged into one end of tied embeddings LoRA "
            "changes both; export an arm whose modules are not the embeddings"
        )
    if arm.r:
        _write_adapter(base, study, arm, {name: t for name, t in weights.items() if name != PROMPT}, to)
    if arm.prefix_length:
        write_prompt(base, study.model, _saved_modules(base), weights, to / SUBFOLDER if arm.r else to)


def _write_adapter(base: Base, study: Study, arm: Arm, weights: dict[str, Tensor], to: Path) -> None:
    targets = target_layers(base.model, base.head, arm.target_modules)
    factor = 1
    if arm.method == "pissa":
        factor, plain = 2, [as_plain_lora(name, weights) for name in targets]
        weights = {name: t for name, t in weights.items() if ".initial_" not in name}
        weights = {**weights, **{name: tensor for layer in plain for name, tensor in layer.items()}}
    ranks = {name: factor * arm.rank_at(name) for name in targets}
    adapter = PeftAdapter(
        method="dora" if arm.method == "dora" else "lora",
        ranks=ranks,
        alphas={n: arm.scaling_at(n) * (math.sqrt(r) if arm.method == "rslora" else r) for n, r in ranks.items()},
        state=weights,
        use_rslora=arm.method == "rslora",
        fan_in_fan_out=any(is_conv1d(layer) for layer in targets.values()),
        saved=base.head,
        modules_to_save=tuple(_saved_modules(base) or ()),
        task_type={CLASSIFICATION: CLASSIFIER, IMAGES: None}.get(study.task, LANGUAGE_MODEL),
        base_model=study.model if study.pretrain is None else BASE,
        settings=Settings(
            factor * arm.r,
            factor * arm.lora_alpha,
            {key: factor * r for key, r in arm.rank_pattern},
            {key: factor * alpha for key, alpha in arm.alpha_pattern},
        ),
    )
    write_adapter(adapter, to, endings(base, targets), study.train.dropout)


def _write_merged(base: Base, arm: Arm, weights: dict[str, Tensor], to: Path) -> None:
    """The update folded into every adapted layer, and the head's own weights."""
    model = copy.deepcopy(base.model)
    if arm.is_full:
        _copy_in(model, weights)
    else:
        targets = target_layers(model, base.head, arm.target_modules)
        _untie(model, list(targets.values()))
        for name, layer in targets.items():
            layer.get_parameter("weight").data = merged_weight(name, layer, arm, weights)
        _copy_in(model, {n: t for n, t in weights.items() if ".lora_" not in n and ".initial_" not in n})
    with quiet():
        model.save_pretrained(to)  # type: ignore[operator]


def _untie(model: Any, adapted: list[nn.Module]) -> None:
    """An adapter on tied embeddings changes the look-up alone (or the output alone), so merged they differ."""
    if _tied_end(model, adapted):
        output = model.get_output_embeddings()
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _tied_end(model: Any, adapted: list[nn.Module]) -> bool:
    """Whether one of the adapted layers shares its weights between the input and the output."""
    output = model.get_output_embeddings()
    if output is None:  # some models of images do not even have a way to say that they have no input embeddings
        return False
    ends = [model.get_input_embeddings(), output]
    return ends[0].weight is output.weight and any(end in adapted for end in ends)


def endings(base: Base, modules: Collection[str]) -> list[str]:
    """Endings where they name exactly the adapted layers, else the layers' full names."""
    last = sorted({name.split(".")[-1] for name in modules})
    named = {name for name in adaptable_modules(base.model) if name.split(".")[-1] in last}
    return last if named == set(modules) else sorted(modules)


def _saved_modules(base: Base) -> list[str] | None:
    """The head's modules as PEFT names them."""
    firsts = {name: name.split(".")[0] for name in base.head}
    return sorted({first if first in HEAD_NAMES else name for name, first in firsts.items()}) or None


def few_rows(data: TokenisedData) -> AnyBatch:
    """What logits are compared on."""
    return collate(data.validation, range(min(CHECKED_ROWS, len(data.validation))), data.pad_token_id)


@torch.no_grad()
def _logits(model: nn.Module, batch: AnyBatch) -> Tensor:
    logits: Tensor = model(**model_inputs(model, batch)).logits
    return logits.double().cpu()


@torch.no_grad()
def _copy_in(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def check_in_fresh_process(check: Check, what: str, env: dict[str, str] | None = None) -> float:
    """The largest difference of logits when another process loads it as a user would; see `verify`.

    what: how the error calls it. env: added to that process's environment. Raises ExportError where it does not load
    or its logits differ.
    """
    with temporary_folder("sweep-check-") as folder:
        expected = folder / "expected.safetensors"
        save_file({**check.inputs, "logits": check.logits.contiguous()}, expected)
        done = subprocess.run(
            [sys.executable, "-m", "sweep.adapters.verify"],
            input=json.dumps({**check.question, "expected": str(expected)}),
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ExportError(f"{what} does not load in a fresh process: {lines[-1] if lines else done.returncode}")
    difference = float(json.loads(done.stdout.splitlines()[-1])["largest_difference"])
    allowed = TOLERANCE * max(1.0, float(check.logits.abs().max()))
    if not difference <= allowed:
        raise ExportError(f"{what}'s logits differ from ours by {difference:.2g} (allowed {allowed:.2g})")
    return difference


def _provenance(study: Study, prepared: Prepared, trial: TrialRecord, merge: bool) -> dict[str, object]:
    spec = trial.spec
    return {
        "study": study.name,
        "task": study.task,
        "trial": spec.number,
        "arm": spec.arm.name,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "steps": trial.step,
        "merged": merge,
        "model": study.model,
        "model_fingerprint": prepared.model_fingerprint,
        "data_fingerprint": prepared.data_fingerprint,
        "labels": list(prepared.labels),
        "versions": prepared.versions,
    }
