"""Tables of a comparison of studies, and compare.csv in full precision."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sweep.report.compare_numbers import Compared, Contrast, Matched, shares
from sweep.report.compare_rules import NO_CAUSE, Comparable, Difference
from sweep.report.intervals import LEVEL, REFERENCE, Interval
from sweep.report.results import ArmResult
from sweep.report.tables import Cell, Row, Table, change
from sweep.report.words import (
    NOTHING,
    arm_title,
    duration,
    loss_decimals,
    metric,
    metric_span,
    number,
    plural,
    rate,
    share,
    signed,
    size,
    span,
)

WIDEST = 30  # characters of a value in a line
INTERVALS = ("test_loss", "to_reference", "to_full")
COLUMNS = (
    *("study", "finished", "ended", "planned", "task", "reference", "epsilon", "recommended"),
    *("arm", "method", "rank", "alpha_ratio", "lora_alpha", "target_modules", "learning_rate", "seeds"),
    *(f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high", "_seeds")),
    *("verdict", "accuracy", "perplexity", "diverged_seeds", "failed_seeds", "infeasible_seeds"),
    *("trainable_params", "peak_memory_bytes", "step_time_s", "adapter_bytes"),
    *("share_of_full_params", "share_of_full_memory", "share_of_full_step_time"),
    *("model_fingerprint", "data_fingerprint", "device", "precision"),
)


def recommended_table(compared: Sequence[Compared]) -> Table:
    """A row a study: what it recommends, and what it would give up."""
    heads = (
        "Study",
        "Recommended",
        "Learning rate, chosen by search",
        "Against its reference",
        "Against full fine-tuning",
        "Reference and ε",
        "Trials ended",
    )
    return Table(heads, tuple(Row(_recommended(c)) for c in compared))


def reference_table(compared: Sequence[Compared], rows: Sequence[Matched]) -> Table:
    """Rank × study: the difference to the study's own reference, and the verdict."""
    heads = ("Rank", *(f"{c.name}: against rank {c.study.confirm.reference}" for c in compared))
    return Table(
        heads,
        tuple(
            Row((Cell(row.title), *(_against(c, r) for c, r in zip(compared, row.results, strict=True))))
            for row in rows
        ),
    )


def confirmed_table(compared: Sequence[Compared]) -> Table:
    """Study × arm: what was confirmed and what it costs, in shares of full fine-tuning and as it is."""
    results = [(c, r) for c in compared for r in c.findings.arms]
    names = {r.metric_name for _, r in results}
    heads = (
        "Arm and study",
        "Test loss",
        names.pop().capitalize() if len(names) == 1 else "Accuracy or perplexity",
        "Difference to full fine-tuning",
        "Learning rate, chosen by search",
        "Parameters, of full fine-tuning",
        "Peak memory, of full fine-tuning",
        "Step time, of full fine-tuning",
    )
    return Table(heads, tuple(Row(_confirmed(c, r), r.arm.name == c.findings.recommended) for c, r in results))


def contrasts_table(found: Sequence[Contrast], decimals: int) -> Table:
    heads = ("Arm", "Studies", "In the first", "In the second", "Second − first", "p, corrected", "Shown to differ")
    rows = [
        Row(
            (
                Cell(c.title),
                Cell(c.one, c.other),
                *(change(i, decimals) for i in (c.first, c.second)),
                Cell(signed(c.mean, decimals), span(c.low, c.high, decimals, plus=True), value=c.mean),
                Cell(f"{c.p:.2g}" if c.p >= 0.001 else "< 0.001", value=c.p),
                Cell("yes" if c.p < LEVEL else "no"),
            )
        )
        for c in found
    ]
    return Table(heads, tuple(rows))


def differences_table(names: Sequence[str], found: Sequence[Difference]) -> Table:
    """Key × study, with what the key counts as; those that may change a result first."""
    ordered = sorted(found, key=lambda d: d.place in NO_CAUSE)
    rows = [Row((Cell(d.key), _value(d.place), *(_value(value) for value in d.values))) for d in ordered]
    return Table(("Key or fact", "Counts as", *names), tuple(rows))


def pairs_table(pairs: Sequence[tuple[str, str, Comparable]]) -> Table:
    """What may be compared between two and two of the studies."""
    rows = []
    for one, other, rules in pairs:
        may = [Cell("no" if why else "yes", *_lines(why)) for why in (rules.losses, rules.costs)]
        rows.append(Row((Cell(f"{one} and {other}"), _value(", ".join(rules.causes) or "nothing"), *may)))
    return Table(("Studies", "Differ in", "Losses are of one kind", "Memory and time themselves"), tuple(rows))


def write_rows(compared: Sequence[Compared], to: Path) -> None:
    """One row a study and arm that ended a confirm trial. Raises OSError where it cannot write."""
    with open(to, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(c, r) for c in compared for r in c.findings.arms)


def _recommended(c: Compared) -> tuple[Cell, ...]:
    pick, decimals = c.pick, loss_decimals(c.study.confirm.epsilon)
    reference = Cell(f"rank {c.study.confirm.reference}", f"ε = {c.study.confirm.epsilon:g}")
    ended = Cell(
        f"{c.findings.ended} of {c.findings.planned}",
        "" if c.findings.finished else "unfinished",
        value=c.findings.ended / c.findings.planned,
    )
    if pick is None:
        return Cell(c.name), *(Cell(NOTHING) for _ in range(4)), reference, ended
    against = _against(c, pick)
    return (
        Cell(c.name),
        Cell(arm_title(pick.arm, c.study.list_arms()), f"lora_alpha {pick.arm.lora_alpha:g}"),
        _rate(c, pick),
        replace(against, note="" if pick.verdict == REFERENCE else pick.verdict or ""),
        change(pick.to_full, decimals),
        reference,
        ended,
    )


def _against(c: Compared, result: ArmResult | None) -> Cell:
    if result is None:
        return Cell(NOTHING)
    decimals = loss_decimals(c.study.confirm.epsilon)
    note = "recommended: " if result.arm.name == c.findings.recommended else ""
    note += "" if result.arm.is_full else result.arm.name
    if result.verdict == REFERENCE:
        return Cell("the reference", "", note, 0.0)
    note += f", {result.verdict}" if result.verdict else ""
    return replace(change(result.to_reference, decimals), note=note)


def _confirmed(c: Compared, result: ArmResult) -> tuple[Cell, ...]:
    decimals, part, cost = loss_decimals(c.study.confirm.epsilon), shares(result, c.full_cost), result.cost
    return (
        Cell(arm_title(result.arm, c.study.list_arms()), f"{c.name}, {plural(len(result.seeds), 'seed')}"),
        Cell(
            number(result.loss_mean, decimals),
            span(result.loss_low, result.loss_high, decimals),
            value=result.loss_mean,
        ),
        Cell(
            metric(result.metric_name, result.metric_mean),
            metric_span(result.metric_name, result.metric_low, result.metric_high),
            value=result.metric_mean,
        ),
        change(result.to_full, decimals),
        _rate(c, result),
        _part(part.parameters, "" if result.trainable_params is None else f"{result.trainable_params:,}"),
        _part(part.memory, size(cost.peak_memory_bytes) if cost else ""),
        _part(part.step_time, duration(cost.step_time_s) if cost else ""),
    )


def _rate(c: Compared, result: ArmResult) -> Cell:
    edges = {edge.arm: edge.side for edge in c.findings.edges}
    edge = f"{edges[result.arm.name]} edge" if result.arm.name in edges else ""
    return Cell(rate(result.learning_rate), edge, value=result.learning_rate)


def _part(value: float | None, itself: str) -> Cell:
    """A share of full fine-tuning's cost over the cost itself."""
    return Cell(NOTHING if value is None else share(value, 1.0), itself, value=value)


def _value(text: str) -> Cell:
    """A long value in lines, so that the columns beside it stay in sight."""
    first, *more = textwrap.wrap(text.replace("/", "/ "), WIDEST) or [""]  # a path may break behind a slash
    return Cell(first.replace("/ ", "/"), *_lines(" ".join(more)))


def _lines(text: str) -> tuple[str, str]:
    """The text in the two small lines of a cell."""
    first, *more = textwrap.wrap(text, WIDEST + 6) or [""]
    return first.replace("/ ", "/"), " ".join(more).replace("/ ", "/")


def _row(c: Compared, result: ArmResult) -> dict[str, object]:
    arm, cost, part, prepared = result.arm, result.cost, shares(result, c.full_cost), c.record.prepared
    loss = Interval(len(result.seeds), result.loss_mean, result.loss_low, result.loss_high) if result.seeds else None
    row: dict[str, object] = {
        "study": c.name,
        "finished": c.findings.finished,
        "ended": c.findings.ended,
        "planned": c.findings.planned,
        "task": c.study.task,
        "reference": c.findings.reference,
        "epsilon": c.study.confirm.epsilon,
        "recommended": arm.name == c.findings.recommended,
        "arm": arm.name,
        "method": arm.method,
        "rank": arm.r or None,
        "alpha_ratio": arm.alpha_ratio or None,
        "lora_alpha": arm.lora_alpha or None,
        "target_modules": "+".join(arm.target_modules),
        "learning_rate": result.learning_rate,
        "seeds": " ".join(map(str, result.seeds)),
        "verdict": result.verdict,
        result.metric_name: result.metric_mean if result.seeds else None,
        "diverged_seeds": " ".join(map(str, result.diverged_seeds)),
        "failed_seeds": " ".join(map(str, result.failed_seeds)),
        "infeasible_seeds": " ".join(map(str, result.infeasible_seeds)),
        "trainable_params": result.trainable_params,
        "peak_memory_bytes": cost and cost.peak_memory_bytes,
        "step_time_s": cost and cost.step_time_s,
        "adapter_bytes": cost and cost.adapter_bytes,
        "share_of_full_params": part.parameters,
        "share_of_full_memory": part.memory,
        "share_of_full_step_time": part.step_time,
        "model_fingerprint": prepared and prepared.model_fingerprint,
        "data_fingerprint": prepared and prepared.data_fingerprint,
        "device": prepared and prepared.device,
        "precision": prepared and prepared.precision,
    }
    for name, found in zip(INTERVALS, (loss, result.to_reference, result.to_full), strict=True):
        if found is not None:
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_seeds": found.n}
    return row
