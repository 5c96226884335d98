"""Time of a trial and step: our packs beside everything else, interleaved in one process.

    python -m tests.benchmarks.steps [--shapes minilm-8x32 …] [--modules q,v all-linear] [--packs 1 4 12]
                                     [--repeats N] [--steps N] [--memory GIB] [--all] [--out DIR]

Writes DIR/steps.json (every repetition) and DIR/steps.md (the tables). Without a choice of cells it takes those that
fit into about three quarters of an hour on two quiet cores, and writes down which it left out; `--all` leaves out none.
A language model's steps take seconds: unless told otherwise it gets one of them in each of two repetitions.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from sweep.study.arms import ALL_LINEAR
from sweep.training.base import load_base, target_layers
from sweep.training.rung import base_for

from .contenders import WARMUP, Bench, Job, calibrate, list_jobs
from .limit import measure_rates, sizes_of
from .ours import count_flops
from .peft_loop import plain_base
from .processes import ProcessPool
from .records import DOES_NOT_FIT, FAILED, LEFT_OUT, Facts, Missing, Results, Run, provenance, write_json
from .tables import steps_markdown
from .work import (
    RANKS,
    SHAPES,
    TINY,
    is_out_of_memory,
    matrix_layers,
    memory_held,
    packs_of,
    read_data,
    setup_for,
    tokens_of,
    top_third,
    trial_of,
    trials_of,
)

QV = "q,v"
PACKS = (1, 2, 4, 8, 12, 24)
GRID = [(name, modules) for name in SHAPES if name != TINY for modules in (QV, ALL_LINEAR)]
DEFAULT_CELLS = {
    ("minilm-8x32", QV): PACKS,
    ("minilm-8x32", ALL_LINEAR): (1, 4, 12),
    ("minilm-16x64", QV): (1, 4, 8, 12),
    ("minilm-16x64", ALL_LINEAR): (1, 8),
    ("minilm-8x128", QV): (1, 4, 8),
    ("smollm2-4x64", QV): (1, 4, 12),
    ("smollm2-8x128", QV): (1, 4),
}
LARGEST_M = 4096  # rows of the matrix products that the limit is measured with

Cells = dict[tuple[str, str], tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    cells: Cells
    repeats: int | None  # None: as many as suit the shape
    steps: int | None
    memory: int  # bytes
    out: Path


def main(words: Sequence[str]) -> Results:
    options = parse(words)
    results = Results(provenance(f"python -m tests.benchmarks.steps {' '.join(words)}".strip()))
    results.missing += left_out(options.cells)
    with memory_held(options.memory), tempfile.TemporaryDirectory() as cache:
        for (name, modules), packs in options.cells.items():
            long = SHAPES[name].task == "causal-lm"
            steps, repeats = options.steps or (1 if long else 2), options.repeats or (2 if long else 3)
            setup = setup_for(SHAPES[name], WARMUP + steps, Path(cache))
            data = read_data(setup)
            bench = Bench(
                SHAPES[name], modules, packs, setup, data, steps, repeats, tokens_of(setup, data, WARMUP, steps)
            )
            try:
                run_bench(bench, options.memory, results)
            except Exception as error:  # the other shapes go on
                results.missing += [Missing(name, modules, "all", pack, *_why(error)) for pack in packs]
            write_json(results, options.out / "steps.json")  # after each shape: an interrupt loses one at most
            load_base.cache_clear()
            plain_base.cache_clear()
            gc.collect()
    text = steps_markdown(results)
    (options.out / "steps.md").write_text(text)
    print(text)
    return results


def run_bench(bench: Bench, memory: int, results: Results) -> None:
    """Calibrate every contender, then run all of them in turn, repetition by repetition."""
    choices, chosen = calibrate(bench)
    results.chosen += chosen
    base = base_for(bench.setup, choices.ours, trial_of(8, bench.endings).arm)
    third = top_third(list(target_layers(base.model, base.head, bench.endings)))
    layers = int(base.model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    numbers = sum(layer.weight.numel() for layer in matrix_layers(base.model).values())
    flops = count_flops(bench.setup, choices.ours, bench.data, trials_of(RANKS, bench.endings))
    results.facts.append(Facts(bench.shape.name, bench.modules, numbers, layers // 3, layers, flops))
    sizes = sizes_of(base.model)
    rows = sorted({min(LARGEST_M, int(bench.tokens[1] * pack)) for pack in (4, max(bench.packs))})
    pool = ProcessPool(bench.setup, choices.bare, bench.endings, int(0.9 * memory))
    jobs = list_jobs(bench, choices, third, pool)
    given_up: set[int] = set()
    try:
        for repetition in range(bench.repeats):
            order = [(repetition + i) % len(jobs) for i in range(len(jobs))]  # nobody always comes first
            for index in order:
                if index not in given_up and not attempt(bench, jobs[index], repetition, results):
                    given_up.add(index)
            results.rates += measure_rates(bench.shape.name, sizes, rows, repetition)
    finally:
        pool.close()


def attempt(bench: Bench, job: Job, repetition: int, results: Results) -> bool:
    """Run a job once and keep its figures, or why there are none. Returns whether it may be tried again."""
    began, problem = time.perf_counter(), ""
    where = (bench.shape.name, bench.modules, job.contender)
    try:
        runs = [
            Run(
                *where,
                job.choice,
                job.pack,
                found.ranks,
                repetition,
                found.seconds,
                *bench.tokens,
                found.optimizer_s,
                found.startup_s,
            )
            for found in job.run()
        ]
        results.runs += runs
    except Exception as error:  # whatever it is: the table says so, and the others go on
        status, problem = _why(error)
        results.missing.append(Missing(*where, job.pack, status, problem))
    gc.collect()
    took = time.perf_counter() - began
    print(f"{' '.join(where)} {job.choice} K={job.pack} #{repetition}: {took:.1f} s {problem}", file=sys.stderr)
    return not problem


def left_out(cells: Cells) -> list[Missing]:
    """The cells of the whole grid that this command does not measure."""
    why = "not among the cells of this command; --all measures every cell"
    return [
        Missing(shape, modules, "all", pack, LEFT_OUT, why)
        for shape, modules in GRID
        for pack in PACKS
        if pack not in cells.get((shape, modules), ())
    ]


def parse(words: Sequence[str]) -> Options:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m tests.benchmarks.steps", description=summary, epilog=rest)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--modules", nargs="+", choices=[QV, ALL_LINEAR])
    parser.add_argument("--packs", nargs="+", type=int)
    parser.add_argument("--repeats", type=int, help="default: 3, of language models 2")
    parser.add_argument("--steps", type=int, help="measured in each repetition; default: 2, of language models 1")
    parser.add_argument("--memory", type=float, help="GiB that a contender may take; default: 0.8 of what is free")
    parser.add_argument("--all", action="store_true", help="every cell")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    given = parser.parse_args(words)
    cells: Cells = dict(DEFAULT_CELLS)
    if given.all or given.shapes or given.modules or given.packs:
        shapes = given.shapes or list(dict.fromkeys(shape for shape, _ in GRID))
        packs = tuple(sorted(given.packs or PACKS))
        cells = {(shape, modules): packs for shape in shapes for modules in given.modules or [QV, ALL_LINEAR]}
    for pack in {pack for packs in cells.values() for pack in packs}:
        try:
            packs_of(pack)
        except ValueError as error:
            parser.error(str(error))
    memory = given.memory * 2**30 if given.memory else 0.8 * psutil.virtual_memory().available
    return Options(cells, given.repeats, given.steps, int(memory), given.out)


def _why(error: Exception) -> tuple[str, str]:
    """The status of a cell that ended so, and the error in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return (DOES_NOT_FIT if is_out_of_memory(error) else FAILED), text


if __name__ == "__main__":
    main(sys.argv[1:])
