"""The contenders of `steps`: what each does once in a repetition, and the precision and attention each does it in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from sweep.study.records import Prepared, Setup
from sweep.training.data import TokenisedData

from .incumbent import time_trainer
from .ours import full_trial, time_pack
from .peft_loop import DEFAULT, MODES, Mode, time_loop
from .processes import ProcessPool
from .records import BARE, FULL, OURS, OURS_THIRD, PROCESSES, TRAINER, TRAINER_DEFAULT, Chosen
from .work import RANKS, Shape, modules_of, packs_of, prepared_for, trials_of

WARMUP = 1  # steps before those that are timed


@dataclass(frozen=True)
class Bench:
    """One shape and its modules: what all contenders share."""

    shape: Shape
    modules: str
    packs: tuple[int, ...]
    setup: Setup
    data: TokenisedData
    steps: int
    repeats: int
    tokens: tuple[float, float]  # of one trial and step: padding not counted, and counted

    @property
    def endings(self) -> tuple[str, ...]:
        return modules_of(self.shape, self.modules)


@dataclass(frozen=True)
class Figures:
    """Of trials of these ranks that step together."""

    ranks: tuple[int, ...]
    seconds: tuple[float, ...]
    optimizer_s: tuple[float, ...] = ()
    startup_s: float | None = None


@dataclass(frozen=True)
class Job:
    """One contender of one cell. `run` does all its trials once."""

    contender: str
    choice: str
    pack: int
    run: Callable[[], Iterable[Figures]]


@dataclass(frozen=True)
class Choices:
    """The fastest precision and attention of each contender."""

    ours: Prepared
    bare: Mode
    trainer: Mode

    @property
    def own(self) -> str:
        return f"{self.ours.precision}/{self.ours.attention}"


def list_jobs(bench: Bench, choices: Choices, third: tuple[str, ...], pool: ProcessPool) -> list[Job]:
    """Every contender of every cell of this shape. What goes trial by trial is one cell for every K.

    third: the modules of the top third of the layers.
    """
    prepared, own, jobs = choices.ours, choices.own, []
    for pack in bench.packs:
        jobs.append(Job(OURS, own, pack, partial(run_ours, bench, prepared, pack, bench.endings)))
        if pack > 1:
            jobs.append(Job(PROCESSES, choices.bare.name, pack, partial(run_processes, bench, pool, pack)))
    at = max([pack for pack in bench.packs if pack <= 12], default=bench.packs[0])
    jobs.append(Job(OURS_THIRD, own, at, partial(run_ours, bench, prepared, at, third)))
    jobs.append(Job(TRAINER, choices.trainer.name, 1, partial(run_trainer, bench, choices.trainer)))
    jobs.append(Job(TRAINER_DEFAULT, DEFAULT.name, 1, partial(run_trainer, bench, DEFAULT)))
    for mode in dict.fromkeys([choices.bare, *breakdown_modes(prepared.precision, prepared.attention)]):
        jobs.append(Job(BARE, mode.name, 1, partial(run_bare, bench, mode)))
    jobs.append(Job(FULL, own, 1, partial(run_full, bench, prepared)))
    return jobs


def breakdown_modes(precision: str, attention: str) -> list[Mode]:
    """PEFT from its default to our precision and attention: the default, precision alone, attention alone, both."""
    return [
        DEFAULT,
        Mode(precision, False, "sdpa"),
        Mode("float32", False, attention),
        Mode(precision, False, attention),
    ]


def run_ours(bench: Bench, prepared: Prepared, pack: int, modules: tuple[str, ...]) -> list[Figures]:
    found = []
    for ranks in packs_of(pack):
        steps = time_pack(bench.setup, prepared, bench.data, trials_of(ranks, modules), WARMUP, bench.steps)
        found.append(Figures(ranks, steps.seconds, steps.optimizer_s))
    return found


def run_full(bench: Bench, prepared: Prepared) -> list[Figures]:
    steps = time_pack(bench.setup, prepared, bench.data, [full_trial()], WARMUP, bench.steps)
    return [Figures((0,), steps.seconds, steps.optimizer_s)]


def run_bare(bench: Bench, mode: Mode) -> list[Figures]:
    return [_bare(bench, mode, rank) for rank in RANKS]


def run_trainer(bench: Bench, mode: Mode) -> list[Figures]:
    return [_trainer(bench, mode, rank) for rank in RANKS]


def run_processes(bench: Bench, pool: ProcessPool, pack: int) -> list[Figures]:
    """One figure a process."""
    return [
        Figures((rank,), seconds)
        for ranks in packs_of(pack)
        for rank, seconds in zip(ranks, pool.time(ranks, WARMUP, bench.steps), strict=True)
    ]


def calibrate(bench: Bench) -> tuple[Choices, list[Chosen]]:
    """By a few steps: ours in a pack of every rank, theirs at rank 8. Raises RuntimeError where nothing works."""
    prepared = {f"{p}/{a}": prepared_for(bench.data, p, a) for p in ("float32", "bfloat16") for a in ("sdpa", "eager")}
    modes = {mode.name: mode for mode in MODES}
    tried: dict[str, dict[str, Callable[[], tuple[float, ...]]]] = {
        OURS: {name: partial(_packed, bench, choice) for name, choice in prepared.items()},
        BARE: {name: partial(_seconds, _bare, bench, mode) for name, mode in modes.items()},
        TRAINER: {name: partial(_seconds, _trainer, bench, mode) for name, mode in modes.items()},
    }
    found = []
    for contender, ways in tried.items():
        choice, figures = fastest(ways)
        found.append(Chosen(bench.shape.name, bench.modules, contender, choice, figures))
    ours, bare, trainer = (chosen.choice for chosen in found)
    return Choices(prepared[ours], modes[bare], modes[trainer]), found


def fastest(ways: Mapping[str, Callable[[], tuple[float, ...]]]) -> tuple[str, dict[str, float | str]]:
    """The fastest way's name, and the shortest step of each, or its error: what disturbs a step only adds to it."""
    figures: dict[str, float | str] = {}
    for name, way in ways.items():
        try:
            figures[name] = min(way())
        except Exception as error:  # a precision or an attention that this model or machine does not have
            figures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    shortest = {name: seconds for name, seconds in figures.items() if isinstance(seconds, float)}
    if not shortest:
        raise RuntimeError(f"no precision and attention works: {figures}")
    return min(shortest, key=lambda name: shortest[name]), figures


def _packed(bench: Bench, prepared: Prepared) -> tuple[float, ...]:
    steps = time_pack(bench.setup, prepared, bench.data, trials_of(RANKS, bench.endings), WARMUP, bench.steps)
    return tuple(seconds / len(RANKS) for seconds in steps.seconds)


def _bare(bench: Bench, mode: Mode, rank: int) -> Figures:
    return Figures((rank,), time_loop(bench.setup, bench.data, mode, rank, bench.endings, WARMUP, bench.steps))


def _trainer(bench: Bench, mode: Mode, rank: int) -> Figures:
    found = time_trainer(bench.setup, bench.data, mode, rank, bench.endings, WARMUP, bench.steps)
    return Figures((rank,), found.seconds, startup_s=found.startup_s)


def _seconds(run: Callable[[Bench, Mode, int], Figures], bench: Bench, mode: Mode) -> tuple[float, ...]:
    return run(bench, mode, 8).seconds
