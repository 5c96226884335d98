"""Which precision, attention and pack size are fastest here: found by a few steps of a real pack, and kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sweep.lora.passes import UnpackableError
from sweep.study.arms import Arm
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.forecast import forward_cost
from sweep.training.rung import start_trainee, timed_steps

FIRST_PACK = 4
# A CPU is fastest while a pack's activations stay in its cache; a GPU once it is full.
PACK_SIZES_CPU, PACK_SIZES_CUDA = (1, 2, 4, 8), (4, 8, 16, 32, 64)
NEARLY = 1.03  # of two sizes that differ by less the larger is taken: it saves work between steps
MEMORY_SHARE = 0.6  # of what is free, for a pack: evaluation, other programs and the allocator need some


def calibrate(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> Prepared:
    """Choose by a few steps of a real pack: first precision and attention, then the pack size; cached."""
    if not arms:
        precision = "float32" if setup.train.precision == "auto" else setup.train.precision
        return replace(prepared, precision=precision)
    key = _calibration_key(setup, prepared, arms)
    path = Path(setup.cache) / f"calibration-{key}.json"
    figures = _read_figures(path)
    if figures is None:
        figures = _measure(setup, prepared, arms)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.tmp")
        half.write_text(json.dumps(figures, indent=1))
        os.replace(half, path)
    best = choose(figures)
    return replace(
        prepared,
        precision=best["precision"],
        attention=best["attention"],
        pack_size=best["pack_size"],
        calibration=tuple(figures),
    )


def choose(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest figure, or one of its precision and attention in a larger pack that is as fast within 3 %."""
    fastest = min(figures, key=lambda f: f["ms_per_trial_step"])
    near = [
        f
        for f in figures
        if (f["precision"], f["attention"]) == (fastest["precision"], fastest["attention"])
        and f["ms_per_trial_step"] <= NEARLY * fastest["ms_per_trial_step"]
    ]
    return max(near, key=lambda f: f["pack_size"])


def _measure(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    sizes = PACK_SIZES_CUDA if torch.cuda.is_available() else PACK_SIZES_CPU
    try:
        return _measure_packs(setup, prepared, arms, FIRST_PACK, sizes)
    except UnpackableError:
        return _measure_packs(setup, prepared, arms, 1, ())


def _measure_packs(
    setup: Setup, prepared: Prepared, arms: Sequence[Arm], first_size: int, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Every precision and attention with packs of first_size, then the other sizes with the fastest of them.

    Sizes that would not fit into the free memory are left out; so are those after the first that does not.
    """
    precisions = ["float32", "bfloat16"] if setup.train.precision == "auto" else [setup.train.precision]
    figures: list[dict[str, Any]] = []
    for precision in precisions:
        for attention in ("sdpa", "eager"):
            choice = replace(prepared, precision=precision, attention=attention, pack_size=first_size)
            try:
                figures.append(_time_pack(setup, choice, arms))
            except UnpackableError:
                raise
            except (ValueError, NotImplementedError, RuntimeError):  # an attention this model does not have; no memory
                if first_size > 1 and not figures and (attention, precision) == ("eager", precisions[-1]):
                    return _measure_packs(setup, prepared, arms, 1, ())
                if not figures and (attention, precision) == ("eager", precisions[-1]):
                    raise
    best = min(figures, key=lambda figure: figure["ms_per_trial_step"])
    choice = replace(prepared, precision=best["precision"], attention=best["attention"])
    for size in sizes:
        if size == first_size:
            continue
        if size > first_size and size * best["bytes_per_trial"] > MEMORY_SHARE * free_bytes():
            break
        try:
            figures.append(_time_pack(setup, replace(choice, pack_size=size), arms))
        except RuntimeError:  # out of memory after all
            break
    return figures


def _time_pack(setup: Setup, choice: Prepared, arms: Sequence[Arm], steps: int = 3) -> dict[str, Any]:
    """Milliseconds a trial and step, of a pack whose ranks are mixed as the study mixes them.

    All trials share a seed, and so their rows, as in the search.
    """
    size = choice.pack_size
    mixed = [arms[i * len(arms) // size % len(arms)] for i in range(size)]
    trials = [TrialSpec(-1, arm, 1e-4, setup.split_seed, "calibration", "") for arm in mixed]
    trainee = start_trainee(setup, choice, trials, 0)
    try:
        times = timed_steps(setup, choice, trials, trainee, warmup=1, steps=steps)
        kept = forward_cost(setup, choice, trials, trainee)[1]
    finally:
        trainee.close()
    trained = sum(choice.trainable_params[trial.arm.name] for trial in trials)
    return {
        "precision": choice.precision,
        "attention": choice.attention,
        "pack_size": size,
        "ms_per_trial_step": round(1000 * statistics.median(times) / size, 2),
        "bytes_per_trial": (kept + 16 * trained) // size,  # 4 bytes each: weights, gradients, two moments
    }


def free_bytes() -> int:
    """What a pack may take: free memory of the CUDA device, or available memory of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: the memory that a pack may take cannot be told")


def _calibration_key(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> str:
    parts = {
        "machine": [platform.node(), prepared.device, prepared.versions],
        "model": prepared.model_fingerprint,
        "task": setup.task,
        "shape": [setup.train.batch_size, setup.data.max_length, prepared.tokens_per_step],
        "precision": setup.train.precision,
        "arms": [asdict(arm) for arm in arms],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_figures(path: Path) -> list[dict[str, Any]] | None:
    try:
        figures: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return figures
