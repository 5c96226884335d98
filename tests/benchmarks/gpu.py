"""On a GPU: packs of 32 trials beside PEFT one by one and compiled, on random weights of two models' shapes.

    python -m tests.benchmarks.gpu [--shapes 135m 1.3b] [--packs 1 8 32] [--repeats 3] [--steps 10] [--out DIR]
    python -m tests.benchmarks.gpu --tiny --out /tmp/bench-out      # on a CPU: shows that the command works, no more

Needs torch, transformers, safetensors and numpy, and peft for the contenders (c). Writes DIR/gpu.json and DIR/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sweep.lora.adapter import Adapter, install, remove
from sweep.lora.methods import init_adapter
from sweep.lora.optim import Recipe, start_optimizer
from sweep.training.base import has_plain_head, target_layers
from sweep.training.batches import Batch
from sweep.training.tasks import CAUSAL_LM, score

from .gpu_tables import BARE, COMPILED, OURS, gpu_markdown
from .records import DOES_NOT_FIT, FAILED, Provenance, provenance, write_json
from .work import RANKS, RATE, is_out_of_memory, packs_of

QV = ("q_proj", "v_proj")
WARMUP = 3
COMPILED_RANK = 8  # compiling takes minutes, and the rank hardly moves the time


@dataclass(frozen=True)
class GpuShape:
    name: str
    config: dict[str, Any]  # of transformers' LlamaConfig
    batch_size: int
    length: int


SHAPES = {
    "135m": GpuShape(
        "SmolLM2-135M",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        batch_size=4,
        length=256,
    ),
    "1.3b": GpuShape(
        "1.3B",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 5632,
            "vocab_size": 32000,
        },
        batch_size=4,
        length=256,
    ),
}
TINY = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class GpuRun:
    shape: str
    contender: str
    choice: str
    pack: int
    ranks: tuple[int, ...]
    repetition: int
    seconds: float  # of one step, from a run of several without waiting in between
    tokens: int  # of one trial and step
    peak_bytes: int | None  # above what lay on the device before the model; None on a CPU
    first_steps_s: float  # build-up and warm-up, compilation among it


@dataclass(frozen=True)
class GpuMissing:
    shape: str
    contender: str
    pack: int
    status: str
    why: str


@dataclass(frozen=True)
class GpuResults:
    provenance: Provenance
    tiny: bool  # no GPU's figures
    base_bytes: dict[str, int]
    runs: list[GpuRun]
    missing: list[GpuMissing]


Step = Callable[[], None]


def main(words: Sequence[str]) -> None:
    given = parse(words)
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --tiny shows on a CPU that the command works")
    torch.set_float32_matmul_precision("high")
    where = provenance(f"python -m tests.benchmarks.gpu {' '.join(words)}".strip())
    if torch.cuda.is_available():
        where = replace(where, machine=f"{torch.cuda.get_device_name()}; {where.machine}")
    results = GpuResults(where, given.tiny, {}, [], [])
    for name in given.shapes:
        shape = SHAPES[name]
        if given.tiny:
            shape = GpuShape(f"tiny, in place of {shape.name}", TINY, batch_size=2, length=16)
        bench(shape, given, results)
        write_json(results, given.out / "gpu.json")
    text = gpu_markdown(json.loads((given.out / "gpu.json").read_text()))
    (given.out / "gpu.md").write_text(text)
    print(text)


def bench(shape: GpuShape, given: argparse.Namespace, results: GpuResults) -> None:
    """All contenders in turn, repetition by repetition."""
    base = make_base(shape)
    results.base_bytes[shape.name] = sum(p.numel() * p.element_size() for p in base.parameters())
    choices = {f"bfloat16{'+autocast' if autocast else ''}": autocast for autocast in (False, True)}
    best = min(choices, key=lambda choice: _calibrated(shape, base, choices[choice], given.steps))
    kept: dict[str, Step] = {}  # compiled once, used in every repetition
    jobs: list[tuple[str, str, tuple[int, ...], Callable[[], contextlib.AbstractContextManager[Step]]]] = []
    for pack in given.packs:
        for ranks in packs_of(pack):
            jobs.append((OURS, "bfloat16", ranks, lambda ranks=ranks: our_pack(shape, base, ranks)))  # type: ignore[misc]
    for rank in RANKS:
        jobs.append((BARE, best, (rank,), lambda rank=rank: peft_loop(shape, base, rank, choices[best])))  # type: ignore[misc]
    jobs.append((COMPILED, best, (COMPILED_RANK,), lambda: compiled_loop(shape, base, choices[best], kept)))
    failed: set[int] = set()
    for repetition in range(given.repeats):
        for index, (contender, choice, ranks, start) in enumerate(jobs):
            if index in failed:
                continue
            problem = ""
            try:
                found = measure(start, given.steps)
                tokens = shape.batch_size * shape.length
                seconds, peak, first = found
                results.runs.append(
                    GpuRun(shape.name, contender, choice, len(ranks), ranks, repetition, seconds, tokens, peak, first)
                )
            except Exception as error:  # the table says so, and the others go on
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                status = DOES_NOT_FIT if is_out_of_memory(error) else FAILED
                results.missing.append(GpuMissing(shape.name, contender, len(ranks), status, problem))
                failed.add(index)
            _free()
            print(f"{shape.name} {contender} ranks {_short(ranks)} #{repetition} {problem}", file=sys.stderr)


def measure(
    start: Callable[[], contextlib.AbstractContextManager[Step]], steps: int
) -> tuple[float, int | None, float]:
    """Seconds of a step, the peak of the memory above what was there, and the seconds until the first timed step."""
    _free()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with start() as step:
        for _ in range(WARMUP):
            step()
        _wait()
        first = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(steps):
            step()
        _wait()
        seconds = (time.perf_counter() - began) / steps
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
    return seconds, peak, first


def make_base(shape: GpuShape) -> nn.Module:
    """A Llama of this shape with random frozen weights in bfloat16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(max_position_embeddings=shape.length, **shape.config)
    with torch.device(_device()):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.requires_grad_(False).eval()


def random_rows(shape: GpuShape) -> np.ndarray:
    """Token ids of one trial's step; all trials of a pack see the same, as in the search phase."""
    return np.random.default_rng(0).integers(0, shape.config["vocab_size"], (shape.batch_size, shape.length))


@contextlib.contextmanager
def our_pack(shape: GpuShape, base: nn.Module, ranks: Sequence[int]) -> Iterator[Step]:
    """A pack on the shared base, and its step: forward, backward, optimizer."""
    trials = len(ranks)
    targets = target_layers(base, (), QV)
    states = [init_adapter(targets, "lora", rank, 1.0, k) for k, rank in enumerate(ranks)]
    adapters = [Adapter(rank, 1.0, tuple(targets), state, 0) for rank, state in zip(ranks, states, strict=True)]
    plain = has_plain_head(base)
    pack = install(base, adapters, ())
    try:
        optimizer = start_optimizer(pack, [Recipe(RATE, 10**6, "constant", clip=1.0)] * trials)
        ids_RT = np.tile(random_rows(shape), (trials, 1))
        places_R = np.tile(np.arange(shape.batch_size), trials)
        batch = Batch(ids_RT, np.ones_like(ids_RT), np.ones(ids_RT.shape, dtype=bool), places_R)
        pack.forward_pass.rows = len(ids_RT)

        def step() -> None:
            scores = score(base, batch, CAUSAL_LM, trials, plain)
            loss_K = scores.loss_K / scores.count_K
            loss_K.sum().backward()
            optimizer.step(loss_K.detach())

        yield step
    finally:
        remove(base, pack)


@contextlib.contextmanager
def peft_loop(shape: GpuShape, base: nn.Module, rank: int, autocast: bool, compiled: bool = False) -> Iterator[Step]:
    """One trial in PEFT: fused AdamW, no waiting for the device. Its copy of the base counts as its memory's base."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(QV), task_type=TaskType.CAUSAL_LM)
    model: Any = get_peft_model(copy.deepcopy(base), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    ids_RT = torch.from_numpy(random_rows(shape)).to(_device())
    mask_RT = torch.ones_like(ids_RT)
    forward = torch.compile(model) if compiled else model
    mixed = torch.autocast(_device(), torch.bfloat16, enabled=autocast)

    def step() -> None:
        with mixed:
            loss = forward(input_ids=ids_RT, attention_mask=mask_RT, labels=ids_RT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield step


@contextlib.contextmanager
def compiled_loop(shape: GpuShape, base: nn.Module, autocast: bool, kept: dict[str, Step]) -> Iterator[Step]:
    """The same under torch.compile, compiled in the first repetition."""
    if COMPILED not in kept:
        with peft_loop(shape, base, COMPILED_RANK, autocast, compiled=True) as step:
            kept[COMPILED] = step
    yield kept[COMPILED]


def parse(words: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m tests.benchmarks.gpu", description=summary, epilog=rest)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--packs", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: not the GPU's figures")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    return parser.parse_args(words)


def _calibrated(shape: GpuShape, base: nn.Module, autocast: bool, steps: int) -> float:
    return measure(lambda: peft_loop(shape, base, COMPILED_RANK, autocast), steps)[0]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}, K = {len(ranks)}"


if __name__ == "__main__":
    main(sys.argv[1:])
