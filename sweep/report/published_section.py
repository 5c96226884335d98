"""The report's part that sets a study's figures beside those that others published."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from sweep.report.results import ArmResult, Findings
from sweep.report.sections import Section
from sweep.report.tables import Cell, Row, Table
from sweep.report.words import join, loss_decimals, number, rate, signed, span
from sweep.study.published import Published
from sweep.study.schema import Study

WARNING = (
    "Quoted from the sources named, and set beside what this study found. Their models, data and budgets are others, "
    "so that a value says nothing about ours; whether loss and rank, or alpha, go together in the same way can be "
    "compared."
)


def published_section(study: Study, findings: Findings) -> Section | None:
    """None where the study file names no figures, or nothing is confirmed yet."""
    if not study.published or not findings.arms:
        return None
    paragraphs = [WARNING]
    tables = []
    for entry in study.published:
        if entry.says:
            paragraphs.append(f"{entry.source}: {entry.says}")
        if entry.best_rate_over_full:
            paragraphs.append(_rates(findings, entry, entry.best_rate_over_full))
        for what, values in (("rank", entry.rank), ("alpha ratio", entry.alpha_ratio)):
            if values:
                by = f", by {what}" if entry.rank and entry.alpha_ratio else ""  # no two captions are alike
                tables.append((f"{entry.source}, beside this study{by}", _table(study, findings, entry, what, values)))
    return Section("Beside published figures", tuple(paragraphs), tuple(tables))


def _table(
    study: Study, findings: Findings, entry: Published, what: str, values: Mapping[int, float] | Mapping[float, float]
) -> Table:
    """A row a rank or ratio of either side: their value and how far it is from that at the reference, and ours."""
    decimals = loss_decimals(study.confirm.epsilon)
    reference = findings.result(findings.reference)
    ours = _ours(study, findings, what)
    theirs = {float(key): value for key, value in values.items()}
    at = _key(reference, what) if reference is not None else None
    base = theirs.get(at) if at is not None else None
    places = max(_places(value) for value in theirs.values())
    sign = 1 if entry.better == "lower" else -1
    rows = []
    for key in sorted({*theirs, *ours}):
        value, result = theirs.get(key), ours.get(key)
        worse = None if value is None or base is None else sign * (value - base)
        pairs = result.to_reference if result is not None else None
        is_reference = result is not None and reference is not None and result.arm.name == reference.arm.name
        rows.append(
            Row(
                (
                    Cell(f"{what} {key:g}", value=key),
                    Cell(number(value, places), value=value),
                    Cell("reference" if worse is not None and key == at else signed(worse, places), value=worse),
                    Cell(
                        number(result.loss_mean if result else None, decimals),
                        span(result.loss_low, result.loss_high, decimals) if result else "",
                        value=result.loss_mean if result else None,
                    ),
                    Cell(
                        "reference" if is_reference else signed(pairs.mean if pairs else None, decimals),
                        span(pairs.low, pairs.high, decimals, plus=True) if pairs else "",
                        value=0.0 if is_reference else pairs.mean if pairs else None,
                    ),
                ),
                is_reference,
            )
        )
    named = f"{what} {at:g}" if at is not None else "the reference"
    heads = (what.capitalize(), "Published", f"Worse than {named} by", "Our test loss", f"Worse than {named} by")
    return Table(heads, tuple(rows))


def _ours(study: Study, findings: Findings, what: str) -> dict[float, ArmResult]:
    """The confirmed arm of each rank, that of the sequence where there are several; or the arms of each ratio."""
    if what == "rank":
        found = {float(r.arm.r): r for r in findings.arms if r.seeds and r.arm.r and not r.in_sequence}
        return found | {float(r.arm.r): r for r in findings.arms if r.seeds and r.in_sequence}
    return {r.arm.alpha_ratio: r for r in findings.arms if r.seeds and r.arm.r == study.confirm.reference}


def _key(result: ArmResult, what: str) -> float:
    return float(result.arm.r) if what == "rank" else result.arm.alpha_ratio


def _rates(findings: Findings, entry: Published, published: float) -> str:
    full = next((r for r in findings.arms if r.arm.is_full), None)
    lora = [r for r in findings.arms if r.arm.r and r.seeds]
    said = f"{entry.source}: the best learning rate of LoRA was {published:g} times that of full fine-tuning"
    if full is None or not lora:
        return f"{said}. This study has no confirmed full fine-tuning to hold that against."
    names = {full.arm.name, *(r.arm.name for r in lora)}
    tried = [row.rates for row in findings.search if row.arm.name in names]
    steps = [high / low for rates in tried for low, high in pairwise(rates)]
    edges = [edge.arm for edge in findings.edges if edge.arm in names]
    bounds = f" On the edge of their grids, and so only bounds: {join(edges)}." if edges else ""
    shares = sorted({r.learning_rate / full.learning_rate for r in lora})
    ours = f"{shares[0]:.3g}" if len(shares) == 1 else f"{shares[0]:.3g} to {shares[-1]:.3g}"
    coarse = f" The rates that were tried lie {max(steps):.2g} times apart, and no more is known." if steps else ""
    return (
        f"{said}; here it was {ours} times {rate(full.learning_rate)} over the "
        f"confirmed arms, as search chose the rates on one seed.{coarse}{bounds}"
    )


def _places(value: float) -> int:
    return len(f"{value:g}".partition(".")[2])
