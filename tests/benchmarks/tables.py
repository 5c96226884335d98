"""The tables and sentences of `steps`, as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .records import (
    BARE,
    CONTENDERS,
    LEFT_OUT,
    OURS,
    OURS_THIRD,
    TRAINER,
    TRAINER_DEFAULT,
    Provenance,
    Results,
)
from .summary import RIVALS, Cell, Spread, best_rates, breakdown, cells, facts_of, optimizer_share, ratio, spread, times

GOAL_SHAPES, GOAL_TRAINER, GOAL_BARE, GOAL_SHARE = ("minilm-8x32", "minilm-16x64"), 2.5, 2.0, 0.6
GOAL_OPTIMIZER, OPTIMIZER_PACK = 0.05, 24


def steps_markdown(results: Results) -> str:
    """All tables of `steps`, each followed by where its numbers come from."""
    found = cells(results)
    if not found:
        return "\n".join(["No cell was measured.", "", *_missing(results)]) + "\n"
    sections = [
        ("Time of a trial and step", _times(results, found)),
        ("Ratios", _ratios(found)),
        ("Where we lose", losses(found)),
        ("Goals", _goals(results, found)),
        ("What gives what", _breakdown(results, found)),
        ("The limit", _limit(results, found)),
        ("Optimizer, and the top third alone", [*_optimizer(results), "", *_top_third(results)]),
        ("Chosen by calibration", _choices(results)),
        ("Start-up of a trial with the Trainer", _startup(results)),
        ("Cells without a figure", _missing(results)),
    ]
    tabled = [f"### {title}\n\n" + "\n".join(lines) + "\n\n" + source(results.provenance) for title, lines in sections]
    return "\n\n".join(tabled) + "\n"


def source(provenance: Provenance) -> str:
    """The line that every table ends with."""
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions.items())
    return f"<sub>`{provenance.command}`; {provenance.machine}; {versions}; {provenance.date}</sub>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *rows)]


def milliseconds(figure: Spread | None) -> str:
    return "not measured" if figure is None else f"{1000 * figure.median:.4g}"


def factor(figure: Spread | None) -> str:
    """A median ratio and its range over the repetitions."""
    return "not measured" if figure is None else f"{figure.median:.2f} ({figure.low:.2f}–{figure.high:.2f})"


def losses(found: Sequence[Cell]) -> list[str]:
    """A sentence for every cell in which a rival is as fast as we are or faster."""
    lines = []
    for cell, rival in itertools.product(found, RIVALS):
        figure = cell.ratios.get(rival)
        if figure is None or figure.low >= 1.0:
            continue
        times_ms = f"{milliseconds(cell.seconds[rival])} against our {milliseconds(cell.seconds[OURS])} ms"
        verdict = "we lose" if figure.median < 1.0 else "we win by the median, but not in every repetition"
        lines.append(
            f"- {_name(cell)} against {rival}: {verdict}, ratio {factor(figure)}, {times_ms} a trial and step."
        )
    return lines or ["In no measured cell."]


def _name(cell: Cell) -> str:
    return f"{cell.shape}, {cell.modules}, K = {cell.pack}"


def _entry(cell: Cell, contender: str) -> str:
    if contender in cell.missing:
        return cell.missing[contender].status
    return milliseconds(cell.seconds.get(contender))


def _times(results: Results, found: Sequence[Cell]) -> list[str]:
    rows = [
        [_name(cell), f"{cell.tokens:.0f} ({cell.padded_tokens:.0f})", *(_entry(cell, c) for c in CONTENDERS)]
        for cell in found
    ]
    text = (
        "Milliseconds, collation included: medians over repetitions, means over steps and the ranks 2, 4, 8, 64. "
        "What goes trial by trial does not depend on K and is repeated in each row. "
        "Tokens are those of one trial and step, in brackets with padding. All trials of a pack share their rows, "
        "as in the search phase. The models' own dropout is off for everybody. "
        f"Repetitions and, in each, steps: {_effort(results)}."
    )
    return [text, "", *table(["shape, modules, pack", "tokens", *CONTENDERS], rows)]


def _effort(results: Results) -> str:
    """How often each shape was measured."""
    parts = []
    for shape in dict.fromkeys(run.shape for run in results.runs):
        runs = [run for run in results.runs if run.shape == shape]
        parts.append(f"{len({run.repetition for run in runs})} × {len(runs[0].seconds)} ({shape})")
    return ", ".join(parts)


def _ratios(found: Sequence[Cell]) -> list[str]:
    rows = []
    for cell in found:
        entries = [cell.missing[r].status if r in cell.missing else factor(cell.ratios.get(r)) for r in RIVALS]
        rows.append([_name(cell), *entries])
    text = "Their time over ours: above 1 ours is faster. Medians of the ratios within a repetition, and their range."
    return [text, "", *table(["shape, modules, pack", *(f"{rival} / (a)" for rival in RIVALS)], rows)]


def _goals(results: Results, found: Sequence[Cell]) -> list[str]:
    """Each goal against the best K of its shape."""
    lines = []
    for shape in GOAL_SHAPES:
        of = [cell for cell in found if cell.shape == shape and cell.modules == "q,v" and OURS in cell.seconds]
        if not of:
            lines.append(f"- {shape}, q,v: not measured.")
            continue
        best = min(of, key=lambda cell: cell.seconds[OURS].median)
        parts = []
        for rival, goal in ((TRAINER, GOAL_TRAINER), (BARE, GOAL_BARE)):
            if rival in best.ratios:
                got = best.ratios[rival].median
                parts.append(f"{got:.2f}× of {goal:g}× over {rival}: {_met(got >= goal)}")
        if OURS in best.shares:
            reached = best.shares[OURS]
            parts.append(f"{reached:.0%} of {GOAL_SHARE:.0%} of the limit: {_met(reached >= GOAL_SHARE)}")
        lines.append(f"- {_name(best)} (the fastest K): " + "; ".join(parts) + ".")
    for shape, modules, share in _optimizer_shares(results, OPTIMIZER_PACK):
        met = _met(share.median <= GOAL_OPTIMIZER)
        lines.append(f"- optimizer at K = 24, {shape}, {modules}: {share.median:.1%} of at most 5 %: {met}.")
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "**missed**"


def _breakdown(results: Results, found: Sequence[Cell]) -> list[str]:
    rows = []
    for cell in found:
        parts = breakdown(results, cell)
        columns = (parts.precision, parts.attention, parts.engine, parts.packing, parts.together)
        rows.append([_name(cell), *(factor(column) for column in columns)])
    text = (
        "Each alone, never mixed. Precision: PEFT's loop in float32 over the same in our precision, both with our "
        "attention. Attention: PEFT's loop with sdpa over the same with ours, both in our precision. Engine: PEFT's "
        "loop in our precision and attention over our pack of one. Packing: our pack of one over our pack of K. "
        "All together: PEFT's loop as it comes (float32, sdpa) over our pack of K."
    )
    return [text, "", *table(["cell", "precision", "attention", "engine", "packing", "all together"], rows)]


def _limit(results: Results, found: Sequence[Cell]) -> list[str]:
    rate_rows = [
        [shape, dtype, f"{rate / 1e9:.0f}", of]
        for shape in dict.fromkeys(cell.shape for cell in found)
        for dtype, (rate, of) in best_rates(results, shape).items()
    ]
    rows = [
        [_name(cell), _percent(cell.computed_share), *(_percent(cell.shares.get(name)) for name in CONTENDERS)]
        for cell in found
    ]
    sizes = {facts.shape: facts.matrix_parameters for facts in results.facts}
    numbers = ", ".join(f"{size / 1e6:.2f} M ({shape})" for shape, size in sizes.items())
    text = (
        "Share of the machine's own matrix-product rate in the dtype used, from 4·N·tokens for LoRA and 6·N·tokens "
        "for full fine-tuning, padding counted as the machine computes it too. N, the weights that meet every token: "
        f"{numbers}. The rate is the best median, over the repetitions, of `linear` at a large square and at the "
        "model's own layers, measured in between. Ours leaves out products whose result nobody needs, and gets that "
        "credited here as all do; by the products that it really computes, counted by torch, its share is the "
        "first column's."
    )
    rates = table(["shape", "dtype", "GFLOP/s", "reached at"], rate_rows)
    return [text, "", *rates, "", *table(["cell", "(a), computed products", *CONTENDERS], rows)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _optimizer(results: Results) -> list[str]:
    packs = sorted({run.pack for run in results.runs if run.contender == OURS})
    rows = [
        [f"{shape}, {modules}, K = {pack}", f"{share.median:.1%} ({share.low:.1%}–{share.high:.1%})"]
        for pack in packs
        for shape, modules, share in _optimizer_shares(results, pack)
    ]
    return ["The optimizer's share of our step, clipping and schedule included.", "", *table(["cell", "share"], rows)]


def _optimizer_shares(results: Results, pack: int) -> list[tuple[str, str, Spread]]:
    ours = [run for run in results.runs if run.contender == OURS and run.pack == pack]
    found = []
    for shape, modules in dict.fromkeys((run.shape, run.modules) for run in ours):
        share = optimizer_share([run for run in ours if (run.shape, run.modules) == (shape, modules)])
        found += [(shape, modules, share)] if share else []
    return found


def _top_third(results: Results) -> list[str]:
    runs = [run for run in results.runs if run.contender == OURS_THIRD]
    rows = []
    for shape, modules, pack in dict.fromkeys((run.shape, run.modules, run.pack) for run in runs):
        third, every = (times(results, shape, modules, name, pack) for name in (OURS_THIRD, OURS))
        facts = facts_of(results, shape, modules)
        rows.append(
            [
                f"{shape}, {modules}, K = {pack}",
                f"{facts.top_third} of {facts.layers}" if facts else "",
                *(milliseconds(spread(found)) for found in (every, third)),
                factor(ratio(every, third)),
            ]
        )
    text = (
        "Adapting the top third of the layers only: what lies below is the same for all trials and needs no gradient."
    )
    return [text, "", *table(["cell", "layers", "all layers, ms", "top third, ms", "faster by"], rows)]


def _choices(results: Results) -> list[str]:
    rows = []
    for entry in results.chosen:
        figures = ", ".join(
            f"{name} {1000 * figure:.4g}" if isinstance(figure, float) else f"{name} failed"
            for name, figure in entry.figures.items()
        )
        rows.append([f"{entry.shape}, {entry.modules}", entry.contender, entry.choice, figures])
    text = (
        "Precision of the base and attention, by the shortest of a few steps (ms a trial and step); +autocast is "
        "bf16=True. Of (c) the tables take whichever mode was fastest over all repetitions. "
        "(d) takes what (c) takes, (e) what (a) takes; (b) default is float32/sdpa. PEFT's adapters are float32 in all."
    )
    return [text, "", *table(["shape, modules", "contender", "chosen", "figures"], rows)]


def _startup(results: Results) -> list[str]:
    rows = []
    for name in (TRAINER, TRAINER_DEFAULT):
        runs = [run for run in results.runs if run.contender == name and run.startup_s is not None]
        for shape, modules in dict.fromkeys((run.shape, run.modules) for run in runs):
            own = [run.startup_s for run in runs if (run.shape, run.modules) == (shape, modules)]
            figure = spread({i: seconds for i, seconds in enumerate(own) if seconds is not None})
            rows.append([f"{shape}, {modules}", name, milliseconds(figure)])
    text = "Milliseconds from asking Optuna to the first step, the base being loaded already; in no other table."
    return [text, "", *table(["shape, modules", "contender", "ms"], rows)]


def _missing(results: Results) -> list[str]:
    """Failures one by one; what was left out, by shape and modules."""
    lines = [
        f"- {m.shape}, {m.modules}, {m.contender}, K = {m.pack}: {m.status}. {m.why}"
        for m in results.missing
        if m.status != LEFT_OUT
    ]
    left_out = [m for m in results.missing if m.status == LEFT_OUT]
    for (shape, modules, why), group in itertools.groupby(left_out, key=lambda m: (m.shape, m.modules, m.why)):
        packs = ", ".join(str(m.pack) for m in group)
        lines.append(f"- {shape}, {modules}, K = {packs}: left out, {why}.")
    return lines or ["None."]
