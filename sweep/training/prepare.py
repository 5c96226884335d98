"""Before the first trial: do model, data and arms fit, and which precision, attention and pack size are fastest?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sweep.lora.passes import UnpackableError
from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.base import check_arm, find_device, load_base
from sweep.training.data import TokenisedData
from sweep.training.locate import model_fingerprint
from sweep.training.rung import Trainee, located, pack_batches, start_trainee, tokenised, train_step

CALIBRATION_PACK = 4
PACK_SIZES_CPU, PACK_SIZES_CUDA = (4, 8), (8, 16, 32)
PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy")


def prepare(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
    """Load model and data, check every arm against them, and calibrate. Raises FieldError with all problems found."""
    place, data = located(setup.model), tokenised(setup)
    if len(data.train) < setup.train.batch_size:
        raise FieldError(
            ("train.batch_size", f"{setup.train.batch_size} is more than the {len(data.train)} training rows there are")
        )
    base = load_base(place, setup.task, data.labels, data.pad_token_id, "float32", "eager")
    trainable, problems = {}, []
    for arm in arms:
        try:
            trainable[arm.name] = check_arm(base, arm)
        except FieldError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and setup.data.max_length > positions:
        problems.append(("data.max_length", f"{setup.data.max_length} is more than the model's {positions} positions"))
    if problems:
        raise FieldError(*problems)
    device = find_device()
    chance_loss, chance_accuracy = chance(data) if data.labels else (None, None)
    prepared = Prepared(
        rows={"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        duplicates_removed=data.duplicates_removed,
        data_fingerprint=data.fingerprint,
        labels=data.labels,
        model_fingerprint=model_fingerprint(place),
        total_params=sum(p.numel() for p in base.model.parameters()),
        trainable_params=trainable,
        device=device_name(device),
        precision="float32",
        attention="eager",
        pack_size=CALIBRATION_PACK,
        tokens_per_step=float(data.train.lengths.mean()) * setup.train.batch_size,
        versions=_versions(),
        chance_loss=chance_loss,
        chance_accuracy=chance_accuracy,
    )
    return calibrate(setup, prepared, [arm for arm in arms if not arm.is_full])


def chance(data: TokenisedData) -> tuple[float, float]:
    """Test loss and accuracy of always answering by the training labels' frequencies: what a trial that learned nothing
    comes to."""
    shares = np.bincount(data.train.labels, minlength=len(data.labels)) / len(data.train)
    return float(-np.log(shares[data.test.labels]).mean()), float((data.test.labels == shares.argmax()).mean())


def fingerprints(setup: Setup) -> tuple[str, str]:
    """Of the data and of the model as they are now: a study that goes on must find what it began with."""
    return tokenised(setup).fingerprint, model_fingerprint(located(setup.model))


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
    best = min(figures, key=lambda figure: figure["ms_per_trial_step"])
    return replace(
        prepared,
        precision=best["precision"],
        attention=best["attention"],
        pack_size=best["pack_size"],
        calibration=tuple(figures),
    )


def _measure(setup: Setup, prepared: Prepared, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    sizes = PACK_SIZES_CUDA if torch.cuda.is_available() else PACK_SIZES_CPU
    try:
        return _measure_packs(setup, prepared, arms, CALIBRATION_PACK, sizes)
    except UnpackableError:
        return _measure_packs(setup, prepared, arms, 1, ())


def _measure_packs(
    setup: Setup, prepared: Prepared, arms: Sequence[Arm], first_size: int, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Every precision and attention with packs of first_size, then the other sizes with the fastest of them."""
    precisions = ["float32", "bfloat16"] if setup.train.precision == "auto" else [setup.train.precision]
    figures = []
    for precision in precisions:
        for attention in ("sdpa", "eager"):
            choice = replace(prepared, precision=precision, attention=attention, pack_size=first_size)
            try:
                figures.append(_time_pack(setup, choice, arms))
            except UnpackableError:
                raise
            except (ValueError, NotImplementedError, RuntimeError):  # an attention this model does not have
                if (attention, precision) == ("eager", precisions[-1]) and not figures:
                    raise
    best = min(figures, key=lambda figure: figure["ms_per_trial_step"])
    choice = replace(prepared, precision=best["precision"], attention=best["attention"])
    for size in sizes:
        if size != first_size:
            try:
                figures.append(_time_pack(setup, replace(choice, pack_size=size), arms))
            except torch.OutOfMemoryError:
                break
    return figures


def _time_pack(setup: Setup, choice: Prepared, arms: Sequence[Arm], steps: int = 2) -> dict[str, Any]:
    """Milliseconds a trial and step, of a pack whose ranks are mixed as the study mixes them."""
    size = choice.pack_size
    mixed = [arms[i * len(arms) // size % len(arms)] for i in range(size)]
    trials = [TrialSpec(-1, arm, 1e-4, seed, "calibration", "") for seed, arm in enumerate(mixed)]
    trainee = start_trainee(setup, choice, trials, 0)
    try:
        times = timed_steps(setup, choice, trials, trainee, warmup=1, steps=steps)
    finally:
        trainee.close()
    return {
        "precision": choice.precision,
        "attention": choice.attention,
        "pack_size": size,
        "ms_per_trial_step": round(1000 * statistics.median(times) / size, 2),
    }


def timed_steps(
    setup: Setup, prepared: Prepared, trials: list[TrialSpec], trainee: Trainee, warmup: int, steps: int
) -> list[float]:
    """Seconds of each of `steps` training steps after `warmup` ones."""
    times = []
    for step, (batch, _) in enumerate(pack_batches(tokenised(setup), setup, trials, 0, warmup + steps)):
        began = time.perf_counter()
        train_step(trainee, batch, setup, prepared, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[warmup:]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def _versions() -> dict[str, str]:
    """Of the packages that are there: a bare GPU machine lacks some."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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
