"""Before the first trial: do model, data and arms fit, and which precision, attention and pack size are fastest?"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.records import Prepared, Setup
from sweep.training.base import check_arm, find_device, load_base
from sweep.training.calibration import FIRST_PACKS, calibrate
from sweep.training.data import SPLITS, Split, TokenisedData
from sweep.training.forgetting import check_source_text, describe_source_text
from sweep.training.locate import model_fingerprint
from sweep.training.quantization import check_quantization, count_parameters
from sweep.training.rung import located, tokenised
from sweep.training.scratch import pretraining_record
from sweep.training.source_text import load_source_text

PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy", "bitsandbytes")


def prepare(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
    """Load model and data, check every arm against them, and calibrate. Raises FieldError with all problems found."""
    check_quantization(setup.quantization)
    place, data = located(setup), tokenised(setup)
    if len(data.train) < setup.train.batch_size:
        raise FieldError(
            ("train.batch_size", f"{setup.train.batch_size} is more than the {len(data.train)} training rows there are")
        )
    base = load_base(place, setup.task, data.labels, data.pad_token_id, "float32", "eager", setup.quantization)
    trainable, problems = {}, []
    for arm in arms:
        try:
            trainable[arm.name] = check_arm(base, arm)
        except FieldError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    longest = max(arm.prefix_length for arm in arms) if arms else 0
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < setup.data.max_length:  # XLNet says −1: as many as you like
        problems.append(("data.max_length", f"{setup.data.max_length} is more than the model's {positions} positions"))
    elif isinstance(positions, int) and 0 < positions < setup.data.max_length + longest:
        behind = (
            f"{longest} before data.max_length ({setup.data.max_length}) tokens is more than the model's {positions}"
        )
        problems.append(("arms.prefix_length", f"{behind} positions"))
    if setup.forgetting and isinstance(positions, int) and 0 < positions < setup.forgetting.max_length + longest:
        before = f" behind a prefix of {longest}" if longest else ""
        lengths = f"{setup.forgetting.max_length}{before} is more than the model's {positions} positions"
        problems.append(("forgetting.max_length", lengths))
    if problems:
        raise FieldError(*problems)
    if setup.forgetting:
        check_source_text(setup, place)
    device = find_device()
    chance_loss, chance_accuracy = chance(data) if data.labels else (None, None)
    prepared = Prepared(
        rows={"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        duplicates_removed=data.duplicates_removed,
        data_fingerprint=data.fingerprint,
        labels=data.labels,
        model_fingerprint=model_fingerprint(place),
        total_params=count_parameters(base.model),
        trainable_params=trainable,
        device=device_name(device),
        precision="float32",
        attention="eager",
        pack_size=FIRST_PACKS[0],
        tokens_per_step=float(data.train.lengths.mean()) * setup.train.batch_size,
        versions=library_versions(),
        truncation={name: s.truncation for name in SPLITS if isinstance(s := getattr(data, name), Split)},
        chance_loss=chance_loss,
        chance_accuracy=chance_accuracy,
        pretraining=pretraining_record(place) if setup.pretrain else {},
    )
    prepared = calibrate(setup, prepared, [arm for arm in arms if not arm.is_full])
    if not setup.forgetting:
        return prepared
    finetuned = any(arm.is_full for arm in arms)
    return replace(prepared, source_text=describe_source_text(setup, prepared, place, finetuned))


def chance(data: TokenisedData) -> tuple[float, float]:
    """Test loss and accuracy of always answering by the training labels' frequencies: what a trial that learned nothing
    comes to."""
    shares = np.bincount(data.train.labels, minlength=len(data.labels)) / len(data.train)
    return float(-np.log(shares[data.test.labels]).mean()), float((data.test.labels == shares.argmax()).mean())


def fingerprints(setup: Setup) -> tuple[str, str, str]:
    """Of data, model and source text as they are now: a study that goes on must find what it began with."""
    place = located(setup)
    text = load_source_text(setup, place).fingerprint if setup.forgetting else ""
    return tokenised(setup).fingerprint, model_fingerprint(place), text


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    many = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"cpu ({platform.machine()}, {many}, {torch.backends.cpu.get_cpu_capability()})"


def library_versions() -> dict[str, str]:
    """Of the packages that are there: a bare GPU machine lacks some."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
