"""What a benchmark found, as plain records, and the provenance that every number carries. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The contenders, as tables name them.
OURS, OURS_THIRD = "(a) ours", "(a) ours, top third"
TRAINER, TRAINER_DEFAULT = "(b) Optuna + PEFT + Trainer", "(b) default"
BARE = "(c) PEFT in a bare loop"
PROCESSES = "(d) K processes of (c)"
FULL = "(e) full fine-tuning"
CONTENDERS = (OURS, TRAINER, TRAINER_DEFAULT, BARE, PROCESSES, FULL)

LEFT_OUT, DOES_NOT_FIT, FAILED = "left out", "does not fit", "failed"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "optuna", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from."""

    command: str
    machine: str
    versions: dict[str, str]
    date: str


@dataclass(frozen=True)
class Run:
    """One contender, once in one repetition: the seconds of each measured step."""

    shape: str
    modules: str
    contender: str
    choice: str  # precision and attention, as in "bfloat16/eager"
    pack: int  # trials that train together, or processes beside each other; 1 where trials go one by one
    ranks: tuple[int, ...]  # of the trials that one step trains
    repetition: int
    seconds: tuple[float, ...]
    tokens: float  # of one trial and step, padding not counted
    padded_tokens: float
    optimizer_s: tuple[float, ...] = ()  # the part of each step that is the optimizer's, where it was measured
    startup_s: float | None = None  # from asking for the trial to its first step


@dataclass(frozen=True)
class Missing:
    """A cell without a figure, and why."""

    shape: str
    modules: str
    contender: str
    pack: int
    status: str  # left out, does not fit, failed
    why: str


@dataclass(frozen=True)
class Rate:
    """The machine's matrix-product rate, once in one repetition."""

    shape: str
    dtype: str
    of: str  # "2048³", or the model's own layers at so many rows
    repetition: int
    flop_per_s: float


@dataclass(frozen=True)
class Chosen:
    """What a short calibration chose for a contender, and every figure that decided, in seconds a trial and step."""

    shape: str
    modules: str
    contender: str
    choice: str
    figures: dict[str, float | str]  # by choice; a text is the error


@dataclass(frozen=True)
class Facts:
    """Of one shape and its modules."""

    shape: str
    modules: str
    matrix_parameters: int  # N: weights that meet every token in a matrix product
    top_third: int  # layers that "adapt the top third only" adapts, of `layers`
    layers: int
    flops_a_token: float  # of our pack's products, counted: ours may do fewer than 4·N


@dataclass
class Results:
    provenance: Provenance
    runs: list[Run] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)


def provenance(command: str = "") -> Provenance:
    """Of this process, now. The command is given in the form in which it can be typed again."""
    shown = command or f"python -m tests.benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    return Provenance(shown, machine(), versions(), time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def machine() -> str:
    """The processor, its cores and the memory; a GPU's name is added by the benchmark that uses it."""
    model, memory = platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        model += " with bfloat16 instructions" if "avx512_bf16" in flags or "amx_bf16" in flags else ""
        kilobytes = int(Path("/proc/meminfo").read_text().split(None, 2)[1])
        memory = f", {kilobytes / 2**20:.0f} GiB"
    except (OSError, StopIteration, ValueError, IndexError):
        pass  # no Linux, or a processor that tells less of itself
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {os.environ.get('OMP_NUM_THREADS', cores)} threads{memory}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(record: Any, path: Path) -> None:
    """Write whole or not at all: a run of an hour must not end in half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(asdict(record), indent=1) + "\n")
    os.replace(half, path)


def read_results(path: Path) -> Results:
    raw = json.loads(path.read_text())

    def run(entry: dict[str, Any]) -> Run:
        tuples = {name: tuple(entry[name]) for name in ("ranks", "seconds", "optimizer_s")}
        return Run(**{**entry, **tuples})

    return Results(
        Provenance(**raw["provenance"]),
        [run(entry) for entry in raw["runs"]],
        [Missing(**entry) for entry in raw["missing"]],
        [Rate(**entry) for entry in raw["rates"]],
        [Chosen(**entry) for entry in raw["chosen"]],
        [Facts(**entry) for entry in raw["facts"]],
    )
