"""What an adapter costs when it answers: one forward pass of the base, merged, unmerged, and of many adapters at once.

The variants take turns in random order within every repetition, so that what else the machine does meets all alike.
Shapes: R rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sweep.adapters.kept import read_kept
from sweep.adapters.merge import merged_weight
from sweep.adapters.serve import plan_slots
from sweep.lora.adapter import Adapter, install, pack_order, remove
from sweep.report.confirmed import confirm_trials
from sweep.report.statistics import confirmed_of_ranks
from sweep.study.arms import Arm
from sweep.study.errors import Damaged, FieldError
from sweep.study.records import COMPLETE
from sweep.study.schema import Latency, Study
from sweep.tracking.journal import StudyRecord, TrialRecord
from sweep.training.base import Base, adapter_of, find_device, target_layers
from sweep.training.prepare import device_name, library_versions
from sweep.training.rung import base_for
from sweep.training.tasks import CAUSAL_LM, CLASSIFICATION

MERGEABLE = ("lora", "rslora", "lora+", "dora", "pissa")
BASE, MERGED, UNMERGED, MIXED = "base", "merged", "unmerged", "mixed"
SEED = 0  # of the tokens and of the order of turns
Standing = Callable[[], AbstractContextManager[None]]  # puts a variant on the base, and takes it down


class LatencyError(RuntimeError):
    """Nothing was measured; one line that says why and what to do."""


@dataclass(frozen=True)
class Variant:
    kind: str
    arms: tuple[str, ...]  # of the adapters in it
    name: str


@dataclass(frozen=True)
class Confirmed:
    arm: Arm
    adapter: Adapter


def measure_latency(
    study: Study, record: StudyRecord, cache: Path, asked: Latency, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Seconds of one forward pass, every one that was timed, by batch × length and variant.

    The adapters are those of the confirmed arms, one a rank, each by its trial of the lowest validation loss. Inputs
    are random tokens without padding. Raises LatencyError where there is nothing to measure, FieldError where model or
    data can no longer be used.
    """
    prepared = record.prepared
    if prepared is None or study.task not in (CLASSIFICATION, CAUSAL_LM):
        raise LatencyError(f"latency is measured over tokens, of a study that has run; {study.name} is none")
    if study.quantization is not None:
        raise LatencyError("a quantised base has no merged model to hold adapters against")
    precision = prepared.precision if asked.precision == "study" else asked.precision
    prepared = replace(prepared, precision=precision)
    arms = [arm for arm in confirmed_of_ranks(study, record).values() if arm.method in MERGEABLE]
    trials = {arm: trial for arm in arms if (trial := _kept(record, arm)) is not None}
    if not trials:
        raise LatencyError(f"study {study.name} has no complete confirm trial of LoRA whose weights are kept")
    base = base_for(study.setup(str(cache)), prepared, arms[0])
    config: Any = base.model.config
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max(asked.lengths):
        raise FieldError(("latency.lengths", f"{max(asked.lengths)} is more than the model's {positions} positions"))
    confirmed = [Confirmed(arm, _adapter(base, arm, trial)) for arm, trial in trials.items()]
    rng = np.random.default_rng(SEED)
    cells = []
    for batch in asked.batch_sizes:
        for length in asked.lengths:
            say(f"timing a batch of {batch} × {length} tokens")
            ids_RT = torch.from_numpy(rng.integers(0, config.vocab_size, (batch, length)))
            variants = list_variants(base, confirmed, batch)
            seconds, standing = _take_turns(base.model, variants, ids_RT.to(find_device()), asked.repeats, rng)
            cells.append({"batch": batch, "length": length, "seconds": seconds, "standing_seconds": standing})
    every = {
        variant.name: variant for batch in asked.batch_sizes for variant, _ in list_variants(base, confirmed, batch)
    }
    return {
        "precision": precision,
        "attention": prepared.attention,
        "device": device_name(find_device()),
        "versions": library_versions(),
        "repeats": asked.repeats,
        "ranks": {arm.name: arm.r for arm in trials},
        "variants": [{"name": v.name, "kind": v.kind, "arms": list(v.arms)} for v in every.values()],
        "cells": cells,
    }


def list_variants(base: Base, confirmed: Sequence[Confirmed], batch: int) -> list[tuple[Variant, Standing]]:
    """What is timed at a batch size. Merged: the largest rank's, since what is merged has no rank any more. Mixed:
    rows in turn by every adapter, where there are two adapters and as many rows."""
    largest = confirmed[-1]
    variants: list[tuple[Variant, Standing]] = [
        (Variant(BASE, (), BASE), nullcontext),
        (Variant(MERGED, (largest.arm.name,), MERGED), partial(_merged, base, largest)),
    ]
    for one in confirmed:
        variant = Variant(UNMERGED, (one.arm.name,), one.arm.name)
        variants.append((variant, partial(_packed, base, [one.adapter], batch)))
    if 2 <= len(confirmed) <= batch:
        names = [one.arm.name for one in confirmed]
        adapters = {one.arm.name: one.adapter for one in confirmed}
        order = [names[i] for i in pack_order(list(adapters.values()))]
        slots, _ = plan_slots([names[i % len(names)] for i in range(batch)], order)
        several = [adapters[name] for name in slots if name is not None]
        variant = Variant(MIXED, tuple(names), f"{len(names)} adapters in one batch")
        variants.append((variant, partial(_packed, base, several, batch)))
    return variants


def _take_turns(
    model: nn.Module,
    variants: Sequence[tuple[Variant, Standing]],
    ids_RT: Tensor,
    repeats: int,
    rng: np.random.Generator,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By variant: the seconds of a pass, and those of putting its layers in place. A first round is not counted."""
    passes: dict[str, list[float]] = {variant.name: [] for variant, _ in variants}
    standing: dict[str, list[float]] = {variant.name: [] for variant, _ in variants}
    for turn in range(repeats + 1):
        for i in rng.permutation(len(variants)):
            variant, stand = variants[i]
            began = time.perf_counter()
            with stand():
                _wait()
                stood = time.perf_counter() - began
                _pass(model, ids_RT[:, :4])  # touches what was just put in place
                took = _pass(model, ids_RT)
            if turn > 0:
                passes[variant.name].append(took)
                standing[variant.name].append(stood)
    return passes, standing


@torch.no_grad()
def _pass(model: nn.Module, ids_RT: Tensor) -> float:
    mask_RT = torch.ones_like(ids_RT)
    _wait()
    began = time.perf_counter()
    model(input_ids=ids_RT, attention_mask=mask_RT)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _packed(base: Base, adapters: Sequence[Adapter], rows: int) -> Iterator[None]:
    pack = install(base.model, adapters, base.head)
    pack.forward_pass.rows = rows
    try:
        yield
    finally:
        remove(base.model, pack)


@contextmanager
def _merged(base: Base, one: Confirmed) -> Iterator[None]:
    """The merged weights in place of the adapted layers' own, which come back after: as many bytes, the same layers."""
    own: dict[nn.Parameter, Tensor] = {}
    layers = target_layers(base.model, base.head, one.arm.target_modules)
    weights: Mapping[str, Tensor] = one.adapter.state
    try:
        for name, layer in layers.items():
            weight = layer.get_parameter("weight")
            if weight not in own:
                own[weight] = weight.data
                weight.data = merged_weight(name, layer, one.arm, dict(weights))
        yield
    finally:
        for weight, data in own.items():
            weight.data = data


def _kept(record: StudyRecord, arm: Arm) -> TrialRecord | None:
    """The arm's confirm trial with the lowest validation loss, of those whose weights are there."""
    found = [
        (trial.last.eval_loss, trial.spec.seed, trial)
        for trial in confirm_trials(record, arm)
        if trial.state == COMPLETE
        and trial.last is not None
        and trial.last.eval_loss is not None
        and trial.kept is not None
    ]
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _adapter(base: Base, arm: Arm, trial: TrialRecord) -> Adapter:
    try:
        return adapter_of(base, arm, read_kept(trial))
    except Damaged as error:
        raise LatencyError(str(error)) from None
