"""From raw runs to figures: medians over repetitions, ratios within them, shares of the machine's limit. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .records import (
    BARE,
    DOES_NOT_FIT,
    FAILED,
    FULL,
    OURS,
    PROCESSES,
    TRAINER,
    TRAINER_DEFAULT,
    Facts,
    Missing,
    Results,
    Run,
)

RIVALS = (TRAINER, TRAINER_DEFAULT, BARE, PROCESSES, FULL)
DEFAULT_CHOICE = "float32/sdpa"
PRODUCTS = {FULL: 6}  # times N · tokens: forward 2, inputs' gradients 2, and where all weights train theirs 2


@dataclass(frozen=True)
class Spread:
    """A median and the range that it comes from."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One shape, modules and K: seconds a trial and step of every contender, or why there are none."""

    shape: str
    modules: str
    pack: int
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]  # a rival's time over ours: above 1 we win
    shares: dict[str, float]  # of the machine's matrix-product rate in the dtype used
    computed_share: float | None  # ours, by the products that it really computes
    missing: dict[str, Missing]
    tokens: float
    padded_tokens: float


@dataclass(frozen=True)
class Breakdown:
    """What each part gives alone, and what all give together; None where a part was not measured."""

    shape: str
    modules: str
    pack: int
    precision: Spread | None  # PEFT's loop, float32 against our precision, both with our attention
    attention: Spread | None  # PEFT's loop, sdpa against our attention, both in our precision
    engine: Spread | None  # PEFT's loop in our precision and attention against our pack of one
    packing: Spread | None  # our pack of one against our pack of K
    together: Spread | None  # PEFT's loop as it comes against our pack of K


Times = Mapping[int, float]  # seconds a trial and step, by repetition


def times(results: Results, shape: str, modules: str, contender: str, pack: int, choice: str = "") -> Times:
    """Of one contender: the mean over steps, whose lengths differ, and ranks. A step of K trials is divided by K."""
    found: dict[int, list[float]] = {}
    for run in results.runs:
        same = (run.shape, run.modules, run.contender, run.pack) == (shape, modules, contender, pack)
        if same and choice in ("", run.choice):
            found.setdefault(run.repetition, []).append(statistics.fmean(run.seconds) / run.pack)
    return {repetition: statistics.fmean(values) for repetition, values in found.items()}


def spread(found: Times) -> Spread | None:
    values = list(found.values())
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def ratio(theirs: Times, ours: Times) -> Spread | None:
    """Within each repetition, since the machine's own speed drifts between them."""
    return spread({repetition: theirs[repetition] / ours[repetition] for repetition in theirs if repetition in ours})


def chosen(results: Results, shape: str, modules: str, contender: str) -> str:
    """The precision and attention that a contender was measured in."""
    for entry in results.chosen:
        if (entry.shape, entry.modules, entry.contender) == (shape, modules, contender):
            return entry.choice
    return DEFAULT_CHOICE


def best_bare(results: Results, shape: str, modules: str) -> str:
    """The mode of (c) that was fastest over all repetitions: a disturbed calibration must not be our gain."""
    runs = [r for r in results.runs if (r.shape, r.modules, r.contender) == (shape, modules, BARE)]
    medians = {
        choice: statistics.median(times(results, shape, modules, BARE, 1, choice).values())
        for choice in dict.fromkeys(run.choice for run in runs)
    }
    return min(medians, key=lambda choice: medians[choice], default=DEFAULT_CHOICE)


def cells(results: Results) -> list[Cell]:
    """Every cell that was tried, in the order in which it was measured; those left out are in results.missing."""
    keys = [(run.shape, run.modules, run.pack) for run in results.runs if run.contender == OURS]
    keys += [(m.shape, m.modules, m.pack) for m in results.missing if m.contender == OURS and m.status in _TRIED]
    return [_cell(results, *key) for key in dict.fromkeys(keys)]


def _cell(results: Results, shape: str, modules: str, pack: int) -> Cell:
    missing = {}
    for entry in results.missing:
        own_pack = pack if entry.contender in (OURS, PROCESSES) else entry.pack
        if (entry.shape, entry.modules, entry.pack) == (shape, modules, own_pack) and entry.status in _TRIED:
            missing[entry.contender] = entry
    found = {}
    for contender in (OURS, *RIVALS):
        at = pack if contender in (OURS, PROCESSES) else 1
        one_process = contender == PROCESSES and pack == 1  # which is (c)
        choice = best_bare(results, shape, modules) if contender == BARE or one_process else ""
        if contender not in missing:
            found[contender] = times(results, shape, modules, BARE if one_process else contender, at, choice)
    run = next((run for run in results.runs if (run.shape, run.modules) == (shape, modules)), None)
    seconds = {name: figure for name, values in found.items() if (figure := spread(values))}
    ratios = {name: figure for name in RIVALS if name in found and (figure := ratio(found[name], found.get(OURS, {})))}
    tokens, padded = (run.tokens, run.padded_tokens) if run else (0.0, 0.0)
    shares = _shares(results, shape, modules, seconds, padded)
    computed = None
    facts = facts_of(results, shape, modules)
    if facts is not None and OURS in shares:
        computed = shares[OURS] * facts.flops_a_token / (4 * facts.matrix_parameters)
    return Cell(shape, modules, pack, seconds, ratios, shares, computed, missing, tokens, padded)


def facts_of(results: Results, shape: str, modules: str) -> Facts | None:
    return next((facts for facts in results.facts if (facts.shape, facts.modules) == (shape, modules)), None)


def _shares(
    results: Results, shape: str, modules: str, seconds: Mapping[str, Spread], padded: float
) -> dict[str, float]:
    """4·N·tokens (6 where all weights train) over the step's time, against the best rate. Padding is computed too."""
    facts = facts_of(results, shape, modules)
    rates = best_rates(results, shape)
    if facts is None:
        return {}
    found = {}
    for contender, figure in seconds.items():
        dtype = dtype_of(_choice_of(results, shape, modules, contender))
        if dtype in rates:
            flops = PRODUCTS.get(contender, 4) * facts.matrix_parameters * padded
            found[contender] = flops / figure.median / rates[dtype][0]
    return found


def _choice_of(results: Results, shape: str, modules: str, contender: str) -> str:
    same_as = {PROCESSES: BARE, FULL: OURS}  # (e) takes ours
    if contender == TRAINER_DEFAULT:
        return DEFAULT_CHOICE
    if contender == BARE:
        return best_bare(results, shape, modules)
    return chosen(results, shape, modules, same_as.get(contender, contender))


def dtype_of(choice: str) -> str:
    """In which the large matrix products are done."""
    return "bfloat16" if "bfloat16" in choice or "autocast" in choice else "float32"


def best_rates(results: Results, shape: str) -> dict[str, tuple[float, str]]:
    """By dtype: the best median over repetitions, and of what: the machine has shown that it can do this much."""
    rates = [rate for rate in results.rates if rate.shape == shape]
    best: dict[str, tuple[float, str]] = {}
    for dtype, of in sorted({(rate.dtype, rate.of) for rate in rates}):
        median = statistics.median(r.flop_per_s for r in rates if (r.dtype, r.of) == (dtype, of))
        if median > best.get(dtype, (0.0, ""))[0]:
            best[dtype] = (median, of)
    return best


def breakdown(results: Results, cell: Cell) -> Breakdown:
    """The factors of one cell. Precision × attention do not quite multiply: each is taken with the other as ours."""
    where = (results, cell.shape, cell.modules)
    precision, attention = chosen(*where, OURS).split("/")

    def peft(choice: str) -> Times:
        return times(*where, BARE, 1, choice)

    both = peft(f"{precision}/{attention}")
    one, ours = times(*where, OURS, 1), times(*where, OURS, cell.pack)
    return Breakdown(
        cell.shape,
        cell.modules,
        cell.pack,
        precision=ratio(peft(f"float32/{attention}"), both),
        attention=ratio(peft(f"{precision}/sdpa"), both),
        engine=ratio(both, one),
        packing=ratio(one, ours),
        together=ratio(peft(DEFAULT_CHOICE), ours),
    )


def optimizer_share(runs: list[Run]) -> Spread | None:
    """The optimizer's part of a step, over these runs."""
    shares = {i: sum(run.optimizer_s) / sum(run.seconds) for i, run in enumerate(runs) if run.optimizer_s}
    return spread(shares)


_TRIED = (DOES_NOT_FIT, FAILED)
