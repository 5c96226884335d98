"""Which precision, attention and pack size are fastest here: found by a few steps of a real pack, and kept."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sweep import __version__
from sweep.lora.optim import moment_count
from sweep.lora.passes import UnpackableError
from sweep.study.arms import Arm
from sweep.study.errors import in_one_line
from sweep.study.files import read_json, write_json
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.batches import AnyBatch, Batch, collate
from sweep.training.data import TokenisedData
from sweep.training.images import ImageSplit
from sweep.training.memory import forward_cost, free_bytes
from sweep.training.rung import start_trainee, tell, timed_steps, tokenised
from sweep.training.tasks import score

FIRST_PACKS = (4, 2, 1)  # the first that fits is what precisions and attentions are compared with
# A CPU is fastest while a pack's activations stay in its cache; a GPU once it is full.
PACK_SIZES_CPU, PACK_SIZES_CUDA = (1, 2, 4, 8), (4, 8, 16, 32, 64)
ROUNDS = 2  # over precisions and attentions: what disturbs one for a second must not decide
DISTURBED = 1.5  # times as long in one round as in another: the machine had something else to do
NEARLY = 1.03  # of two sizes that differ by less the larger is taken: it saves work between steps
MEMORY_SHARE = 0.6  # of what is free, for a pack: evaluation, other programs and the allocator need some


def calibrate(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> Prepared:
    """Choose by a few steps of a real pack: first precision and attention, then the pack size; cached."""
    if not arms:
        precision = "float32" if setup.train.precision == "auto" else setup.train.precision
        return replace(prepared, precision=precision)
    key = _calibration_key(setup, prepared, arms)
    path = Path(setup.cache) / f"calibration-{key}.json"
    figures: list[dict[str, Any]] | None = read_json(path)
    kept = figures is not None
    if figures is None:
        figures = _measure(setup, prepared, arms)
        write_json(path, figures)
    best = choose(figures)
    return replace(
        prepared,
        precision=best["precision"],
        attention=best["attention"],
        pack_size=best["pack_size"],
        calibration=tuple(figures),
        calibration_kept=kept,
    )


def choose(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest figure, or one of its precision and attention in a larger pack that is as fast within 3 %."""
    timed = [f for f in figures if "ms_per_trial_step" in f]
    fastest = min(timed, key=lambda f: f["ms_per_trial_step"])
    near = [
        f
        for f in timed
        if (f["precision"], f["attention"]) == (fastest["precision"], fastest["attention"])
        and f["ms_per_trial_step"] <= NEARLY * fastest["ms_per_trial_step"]
    ]
    return max(near, key=lambda f: f["pack_size"])


def _measure(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every precision and attention with a first pack, then other sizes with the fastest of them.

    What fails is written down with its error. Sizes that would not fit into the free memory are left out; so are those
    after the first that does not. Raises the error of a model that trains in no way at all.
    """
    sizes = PACK_SIZES_CUDA if torch.cuda.is_available() else PACK_SIZES_CPU
    choices = [replace(prepared, precision=p, attention=a) for p in _precisions(setup) for a in ("sdpa", "eager")]
    figures: list[dict[str, Any]] = []
    needed = _bytes_a_trial(setup, prepared, arms)
    affordable = [size for size in FIRST_PACKS if size == 1 or size * needed <= MEMORY_SHARE * free_bytes()]
    one_of_each = {arm.target_modules: arm for arm in arms}.values()
    for first in affordable if all(packs_see_rows(setup, choices[-1], arm) for arm in one_of_each) else [1]:
        rounds = [
            [_try_pack(setup, replace(choice, pack_size=first), arms, steps=1) for choice in choices]
            for _ in range(ROUNDS)
        ]
        figures += [_least_disturbed(tries) for tries in zip(*rounds, strict=True)]
        timed = [figure for figure in figures if "ms_per_trial_step" in figure]
        if timed:
            break
    else:
        raise RuntimeError(figures[-1]["failed"])
    best = min(timed, key=lambda figure: figure["ms_per_trial_step"])
    choice = replace(prepared, precision=best["precision"], attention=best["attention"])
    for size in sizes:
        if size == first or first == 1:  # a first pack of one: nothing larger can be
            continue
        if size > first and size * needed > MEMORY_SHARE * free_bytes():
            break
        figures.append(_try_pack(setup, replace(choice, pack_size=size), arms))
        if "failed" in figures[-1]:
            break
    return figures


def _precisions(setup: Setup) -> list[str]:
    if setup.train.precision != "auto":
        return [setup.train.precision]
    if setup.quantization is not None:
        return ["bfloat16"]  # QLoRA's
    return ["float32"] if _emulates_bfloat16() else ["float32", "bfloat16"]


def _emulates_bfloat16() -> bool:
    """Whether this is a CPU that is known to have no bfloat16: there a step takes several times as long."""
    has = torch.cpu.get_capabilities()
    known = not torch.cuda.is_available() and has.get("architecture") == "x86_64"
    return known and not (has.get("avx512_bf16") or has.get("amx_bf16"))


def _bytes_a_trial(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> int:
    """What a trial of the largest arm takes beside the base, in float32: by one forward pass, before a step is risked.

    What it keeps for the backward pass, and 4 bytes for each trained weight, its gradient and its moments.
    """
    largest = max(arms, key=lambda arm: prepared.trainable_params[arm.name])
    alone = [TrialSpec(-1, largest, 1e-4, setup.split_seed, "calibration", "")]
    trainee = start_trainee(setup, replace(prepared, precision="float32", attention="eager"), alone, 0)
    try:
        kept = forward_cost(setup, prepared, alone, trainee)[1]
    finally:
        trainee.close()
    each = 4 * (2 + moment_count(setup.train.optimizer, setup.train.betas))
    return kept + each * prepared.trainable_params[largest.name]


def packs_see_rows(setup: Setup, choice: Prepared, arm: Arm) -> bool:
    """Whether every adapted layer sees the batch's rows first, so that they can be told apart by trial.

    Seen on two trials of three rows, of five tokens: in a batch with as many rows as tokens a layer that sees tokens
    first (XLNet's, Longformer's) could not be told from one that sees rows.
    """
    trials = [TrialSpec(-1, arm, 1e-4, 0, "calibration", "")] * 2
    trainee = start_trainee(setup, choice, trials, 0)
    data = tokenised(setup)
    try:
        tell(trainee, few_tokens(data, rows=6, tokens=5), 0)
        with torch.no_grad():
            score(trainee.model, few_tokens(data, rows=6, tokens=5), setup.task, 2)
    except UnpackableError:
        return False
    finally:
        trainee.close()
    return True


def few_tokens(data: TokenisedData, rows: int, tokens: int) -> AnyBatch:
    """A batch of that shape, of the first tokens of training rows, or of so many images; each counts as a row of its
    own."""
    if isinstance(data.train, ImageSplit):
        images = collate(data.train, np.arange(rows) % len(data.train), data.pad_token_id)
        return replace(images, source_R=np.arange(rows))
    ids_RT = np.resize(data.train.input_ids, (rows, tokens)).astype(np.int64)
    per_token = data.train.labels.dtype == np.int8
    labels = np.ones((rows, tokens), dtype=bool) if per_token else np.zeros(rows, dtype=np.int64)
    return Batch(ids_RT, np.ones_like(ids_RT), labels, np.arange(rows))


def _least_disturbed(tries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of several figures of one pack, or the first of their errors. Where they lie far apart the slowest
    is told too."""
    timed = [figure for figure in tries if "ms_per_trial_step" in figure]
    if not timed:
        return tries[0]
    slowest = max(figure["ms_per_trial_step"] for figure in timed)
    best = min(timed, key=lambda figure: figure["ms_per_trial_step"])
    return {**best, "slowest_ms": slowest} if slowest > DISTURBED * best["ms_per_trial_step"] else best


def _try_pack(setup: Setup, choice: Prepared, arms: Sequence[Arm], steps: int = 2) -> dict[str, Any]:
    """The figure of a pack, or the error that it ended in: an attention that the model does not have, no memory."""
    try:
        return _time_pack(setup, choice, arms, steps)
    except (ValueError, NotImplementedError, ImportError, RuntimeError, MemoryError) as error:
        failed = in_one_line(error)[:200]
    tried = {"precision": choice.precision, "attention": choice.attention, "pack_size": choice.pack_size}
    return {**tried, "failed": failed}


def mixed_trials(setup: Setup, arms: Sequence[Arm], size: int) -> list[TrialSpec]:
    """Ranks mixed as the study mixes them; all trials share a seed, and so their rows, as in the search."""
    mixed = [arms[i * len(arms) // size % len(arms)] for i in range(size)]
    return [TrialSpec(-1, arm, 1e-4, setup.split_seed, "calibration", "") for arm in mixed]


def _time_pack(setup: Setup, choice: Prepared, arms: Sequence[Arm], steps: int) -> dict[str, Any]:
    """Milliseconds a trial and step."""
    size = choice.pack_size
    trials = mixed_trials(setup, arms, size)
    trainee = start_trainee(setup, choice, trials, 0)
    try:
        times = timed_steps(setup, choice, trials, trainee, warmup=1, steps=steps)
    finally:
        trainee.close()
    return {
        "precision": choice.precision,
        "attention": choice.attention,
        "pack_size": size,
        "ms_per_trial_step": round(1000 * min(times) / size, 2),  # the least disturbed
    }


def _calibration_key(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> str:
    parts = {
        "machine": [platform.node(), prepared.device, prepared.versions],
        "model": prepared.model_fingerprint,
        "task": setup.task,
        "quantization": setup.quantization,
        "shape": [setup.train.batch_size, setup.data.max_length, prepared.tokens_per_step],
        "train": [setup.train.precision, setup.train.dropout, setup.train.optimizer, setup.train.micro_batch_size],
        "engine": __version__,
        "arms": [asdict(arm) for arm in arms],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
