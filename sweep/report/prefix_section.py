"""The report's part on prefix tuning: LoRA, a prefix and both together, held against one another seed by seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from sweep.report.drawing import Drawn, Numbers, draw
from sweep.report.intervals import Interval
from sweep.report.results import ArmResult, Findings
from sweep.report.sections import Section
from sweep.report.statistics import paired_interval
from sweep.report.style import FAINT, SERIES, WHITE, legend_above, new_figure, wrapped
from sweep.report.tables import Cell, Row, Table, change
from sweep.report.words import loss_decimals, plural
from sweep.study.arms import LORA_PREFIX, PREFIX
from sweep.study.schema import Study

PAPER = "The LoRA paper (arXiv 2106.09685, table 15, GPT-3 with prefix embeddings)"
HELD = ("both − LoRA", "both − prefix", "prefix − LoRA")  # differences of test losses: below 0 the first is better


@dataclass(frozen=True)
class Trio:
    """LoRA of one setting, a prefix of one length, and both together. Differences are paired by seed."""

    name: str
    differences: tuple[Interval | None, Interval | None, Interval | None]  # in the order of HELD


def prefix_section(study: Study, findings: Findings, figures: Path) -> Section | None:
    """None where no LoRA, prefix and both of one rank and length were all confirmed."""
    trios = _trios(findings)
    if not trios:
        return None
    drawn = draw(differences_of_methods, figures, trios)
    return Section(
        "LoRA, a prefix, or both?",
        (_sentence(study, trios), _literature(trios)),
        (
            (
                "Differences of test loss, paired by seed: means with 95 % intervals, each for itself",
                _table(study, trios),
            ),
        ),
        (drawn,) if drawn else (),
    )


def _trios(findings: Findings) -> list[Trio]:
    def setting(result: ArmResult) -> tuple[object, ...]:
        arm = result.arm
        return arm.r, arm.alpha_ratio, arm.target_modules, arm.rank_pattern, arm.alpha_pattern

    prefixes = {r.arm.prefix_length: r for r in findings.arms if r.arm.method == PREFIX}
    lora = {setting(r): r for r in findings.arms if r.arm.method == "lora"}
    several = len({r.arm.alpha_ratio for r in findings.arms if r.arm.r}) > 1
    modules = len({r.arm.target_modules for r in findings.arms if r.arm.r}) > 1
    trios = []
    for both in (r for r in findings.arms if r.arm.method == LORA_PREFIX):
        prefix, alone = prefixes.get(both.arm.prefix_length), lora.get(setting(both))
        if prefix is None or alone is None:
            continue
        name = f"rank {both.arm.r}"
        name += f", alpha ratio {both.arm.alpha_ratio:g}" if several else ""
        name += f", {'+'.join(both.arm.target_modules)}" if modules else ""
        pairs = ((both, alone), (both, prefix), (prefix, alone))
        first, second, third = (paired_interval(one, other) for one, other in pairs)
        trios.append(Trio(f"{name}, prefix {both.arm.prefix_length}", (first, second, third)))
    return trios


def differences_of_methods(trios: list[Trio]) -> tuple[Figure, Drawn] | None:
    if not any(found is not None for trio in trios for found in trio.differences):
        return None
    figure = new_figure(1.3 + 0.55 * len(trios))
    axes = figure.subplots()
    axes.axvline(0, color=FAINT, lw=1.2)
    for i, trio in enumerate(trios):
        for k, found in enumerate(trio.differences):
            if found is None:
                continue
            y = -i + 0.25 * (1 - k)
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [y, y], color=SERIES[k], lw=2, solid_capstyle="round")
            label = HELD[k] if i == 0 else None
            axes.plot([found.mean], [y], "o", color=SERIES[k], ms=6.5, mec=WHITE, mew=1, label=label)
    axes.set_yticks([-i for i in range(len(trios))], [trio.name for trio in trios])
    axes.set_xlabel(wrapped("difference of test loss (nats); left of 0 the first is better"))
    legend_above(figure, axes.get_legend_handles_labels()[0], 3)
    return figure, Drawn(
        "prefix-or-lora",
        "LoRA, a prefix, and both",
        "Differences of test loss between LoRA, a prefix and both together at equal steps: means over the seeds with "
        "95 % t-intervals. An interval that holds 0 shows no difference.",
        "Differences of test loss, one row for each of: " + "; ".join(trio.name for trio in trios) + ".",
        Numbers(
            (
                "setting",
                "difference",
                "mean (nats)",
                "95 % interval, low (nats)",
                "95 % interval, high (nats)",
                "paired seeds",
            ),
            [
                (trio.name, what, found.mean, found.low, found.high, found.n)
                for trio in trios
                for what, found in zip(HELD, trio.differences, strict=True)
                if found is not None
            ],
        ),
    )


def _sentence(study: Study, trios: list[Trio]) -> str:
    of = plural(len(trios), "pair")
    parts = [
        _shown("both together were", "LoRA alone", _counts(trios, 0)),
        _shown("both were", "the prefix alone", _counts(trios, 1)),
        _shown("the prefix alone was", "LoRA alone", _counts(trios, 2)),
    ]
    return (
        f"Every arm trained for {study.train.steps} steps with as many learning rates. Over {of} of a rank and a "
        f"length: {'; '.join(parts)}. Each interval stands for itself: among many, one in twenty misses."
        + (
            " Both together learn at one rate, from LoRA's grid, where the prefix alone has a grid of its own: where "
            "both do worse than the prefix, that may be why."
            if study.tune.prefix
            else ""
        )
    )


def _shown(one: str, other: str, counts: tuple[int, int]) -> str:
    better, worse = counts
    if not better and not worse:
        return f"{one} shown neither better nor worse than {other} at any"
    return f"{one} shown better than {other} at {better} and worse at {worse}"


def _counts(trios: list[Trio], k: int) -> tuple[int, int]:
    """How often the first of HELD[k] is shown better, and worse."""
    found = [trio.differences[k] for trio in trios]
    better = sum(f is not None and f.high is not None and f.high < 0 for f in found)
    worse = sum(f is not None and f.low is not None and f.low > 0 for f in found)
    return better, worse


def _literature(trios: list[Trio]) -> str:
    both, alone = _counts(trios, 0), _counts(trios, 2)
    if alone[0]:
        word = (
            f"A prefix shown better than LoRA at {alone[0]} of {len(trios)}, each interval for itself and none "
            "corrected for their number, speaks against that"
        )
    elif alone[1]:
        word = "That the prefix is worse is shown here too"
    else:
        word = "That the prefix is worse is not shown here, nor the contrary"
    if both[0] and not both[1]:
        gain = "that both together can gain on LoRA is shown too"
    elif both[1] and not both[0]:
        gain = "that both together gain on LoRA is contradicted"
    else:
        gain = "whether both together gain on LoRA stays open, as between the paper's two tasks"
    return (
        f"{PAPER} has accuracies on WikiSQL and MNLI-m of 73.8 and 91.6 % for LoRA of rank 8, 63.1 and 88.6 % for the "
        f"prefix, and 75.0 and 91.4 % for both. {word}; {gain}. Model, task and number of steps are others here."
    )


def _table(study: Study, trios: list[Trio]) -> Table:
    decimals = loss_decimals(study.confirm.epsilon)
    rows = [Row((Cell(trio.name), *(change(found, decimals) for found in trio.differences)), False) for trio in trios]
    return Table(("LoRA and prefix", *HELD), tuple(rows))
