"""The whole search of a study: ours with and without pruning, beside Optuna + PEFT + Trainer doing every trial.

    python -m tests.benchmarks.search [--study studies/quickstart.yaml] [--set key=value …] [--repeats 1] [--out DIR]

Writes DIR/search.json and DIR/search.md. Every variant runs in a fresh process. The clock starts after the imports and
stops when the search phase is over: reading data and loading models count, and for ours the calibration too. The
incumbent's own calibration does not count, and it starts every trial from the same weights, so that decisions compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sweep.driver.driver import run_study
from sweep.driver.plan import search_slots
from sweep.execution.executor import InlineExecutor
from sweep.execution.worker import Work, prepare, train_rung
from sweep.study.arms import Arm
from sweep.study.file import read_study
from sweep.study.finalists import finalist_groups
from sweep.study.home import Home
from sweep.study.records import CONFIRM, Measurement, Prepared, Setup, Unit
from sweep.study.schema import Study
from sweep.tracking.journal import read_study_record

from .records import Provenance, provenance, write_json
from .search_tables import search_markdown

INCUMBENT, UNPRUNED, PRUNED = "(b) every trial to its end", "(a) ours, without pruning", "(a) ours, with pruning"
VARIANTS = {"incumbent": INCUMBENT, "unpruned": UNPRUNED, "pruned": PRUNED}


@dataclass(frozen=True)
class Found:
    """What the search found of one trial."""

    arm: str
    learning_rate: float
    steps: int
    eval_loss: float | None  # None: diverged


@dataclass(frozen=True)
class Variant:
    name: str
    repetition: int
    seconds: float
    prepare_s: float  # of them: reading data and model, checking and calibrating, before the first trial
    setting: str  # precision, attention, pack size
    trials: tuple[Found, ...]
    decision: dict[str, tuple[str, float]]  # by rank: the arm and the learning rate that go to the confirm phase
    pack_size: int | None = None


@dataclass(frozen=True)
class SearchResults:
    provenance: Provenance
    study: str
    epsilon: float  # the margin that the study declares
    variants: tuple[Variant, ...]


class SearchOver(BaseException):
    """The first trial of the confirm phase was about to train. Passes through the executor as an interrupt does."""


def main(words: Sequence[str]) -> None:
    given = parse(words)
    if given.variant:
        study = read_study(given.study, given.set).study
        ours = {"unpruned": unpruned, "pruned": pruned}
        run = ours.get(given.variant)
        print(json.dumps(asdict(run(study, given.pack_size) if run else incumbent(study))))
        return
    variants, pack_size = [], None
    for repetition in range(given.repeats):
        for variant in VARIANTS:
            found = in_fresh_process(variant, given, pack_size)
            variants.append(Variant(**{**found, "repetition": repetition}))
            pack_size = pack_size or variants[-1].pack_size
            print(f"{variants[-1].name} #{repetition}: {variants[-1].seconds:.1f} s", file=sys.stderr)
    epsilon = read_study(given.study, given.set).study.confirm.epsilon
    command = f"python -m tests.benchmarks.search {' '.join(words)}".strip()
    results = SearchResults(provenance(command), str(given.study), epsilon, tuple(variants))
    write_json(results, given.out / "search.json")
    text = search_markdown(json.loads((given.out / "search.json").read_text()))
    (given.out / "search.md").write_text(text)
    print(text)


def in_fresh_process(variant: str, given: argparse.Namespace, pack_size: int | None) -> dict[str, Any]:
    overrides = [word for entry in given.set for word in ("--set", entry)]
    command = [sys.executable, "-m", __spec__.name, "--variant", variant, "--study", str(given.study), *overrides]
    if pack_size:
        command += ["--pack-size", str(pack_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unpruned(study: Study, pack_size: int | None) -> Variant:
    """Nothing is judged on the way, and so there is one rung."""
    rungs = study.search.model_copy(update={"keep": 1.0, "rungs": [study.train.steps]})
    return packed(study.model_copy(update={"search": rungs}), UNPRUNED, pack_size)


def pruned(study: Study, pack_size: int | None) -> Variant:
    return packed(study, PRUNED, pack_size)


def packed(study: Study, name: str, pack_size: int | None) -> Variant:
    """The search phase of `sweep run` in a new home.

    pack_size: what the first of our runs found, for all of them, so that pruning alone is all that they differ in;
    each takes the time to calibrate nonetheless.
    """
    import sweep.training.prepare  # noqa: F401 - the clock starts after the imports

    spent: list[float] = []

    def timed_prepare(setup: Setup, arms: tuple[Arm, ...]) -> Prepared:
        began = time.perf_counter()
        found = prepare(setup, arms)
        spent.append(time.perf_counter() - began)
        return replace(found, pack_size=pack_size or found.pack_size)

    with tempfile.TemporaryDirectory() as root:
        home = Home(Path(root))
        folder = home.study(study.name)
        folder.path.mkdir(parents=True)
        began = time.perf_counter()
        work = Work(prepare=timed_prepare, train_rung=train_rung_of_search)
        with contextlib.suppress(SearchOver):
            run_study(study, folder, InlineExecutor(), home.optuna_url, home.cache, work)
        seconds = time.perf_counter() - began
        record = read_study_record(folder)
    prepared = record.prepared
    assert prepared is not None and record.finalists is not None
    setting = f"{prepared.precision}/{prepared.attention}, packs of up to {prepared.pack_size}"
    trials = [t for t in record.trials if t.spec.phase != CONFIRM]
    found = tuple(
        Found(t.spec.arm.name, t.spec.learning_rate, t.step, t.last.eval_loss if t.last else None) for t in trials
    )
    group_of = {arm.name: group for group, arms in finalist_groups(study).items() for arm in arms}
    decision = {group_of[arm]: (arm, rate) for arm, rate in record.finalists}
    return Variant(name, 0, seconds, sum(spent), setting, found, decision, prepared.pack_size)


def train_rung_of_search(unit: Unit) -> tuple[Measurement, ...]:
    if unit.trials[0].phase == CONFIRM:
        raise SearchOver
    return train_rung(unit)


def incumbent(study: Study) -> Variant:
    """Every trial of the search, to its end, one by one: one process, one base in memory, copied for each trial."""
    from .incumbent_search import choose_modes, initial_states, search_one_by_one
    from .peft_loop import plain_base

    with tempfile.TemporaryDirectory() as cache:
        aside, setup = study.setup(f"{cache}/aside"), study.setup(cache)  # the search reads its data itself
        states = initial_states(aside, search_slots(study))
        lora, full = choose_modes(aside, study)
        plain_base.cache_clear()
        began = time.perf_counter()
        losses = search_one_by_one(setup, search_slots(study), states, lora, full)
        seconds = time.perf_counter() - began
    steps = study.train.steps
    found = [Found(slot.arm.name, slot.rate or 0.0, steps, losses[slot.name]) for slot in search_slots(study)]
    decision = {}
    for group, arms in finalist_groups(study).items():
        own = [(f.eval_loss, f.arm, f.learning_rate) for f in found if f.arm in {arm.name for arm in arms}]
        _, arm, rate = min(entry for entry in own if entry[0] is not None)
        decision[group] = (arm, rate)
    return Variant(INCUMBENT, 0, seconds, 0.0, f"{lora.name}; full fine-tuning {full.name}", tuple(found), decision)


def parse(words: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m tests.benchmarks.search", description=summary, epilog=rest)
    parser.add_argument("--study", type=Path, default=Path("studies/quickstart.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one alone, here, and print it as JSON")
    parser.add_argument("--pack-size", type=int, help="of our variants; default: what the first of them finds")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    given = parser.parse_args(words)
    if read_study(given.study, given.set).study.search.sampler != "grid":
        parser.error("search.sampler must be grid: both sides must do the same trials")
    return given


if __name__ == "__main__":
    main(sys.argv[1:])
