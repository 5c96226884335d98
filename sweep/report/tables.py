"""The report's tables as rows of text, the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweep.report.intervals import Interval
from sweep.report.results import ArmResult, Findings
from sweep.report.truncation import truncation_lines
from sweep.report.words import (
    BITS,
    arm_title,
    count,
    duration,
    loss_decimals,
    metric,
    metric_span,
    number,
    plural,
    rate,
    signed,
    size,
    span,
    without_paths,
)
from sweep.study.arms import Arm, pattern_text
from sweep.study.records import DIVERGED, FAILED, Prepared
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

MOST_RATES = 12  # in a cell that still is read
FINALISTS = {
    "rank": "one finalist for each rank",
    "arm": "every arm at its best rate",
    "rate": "every arm at each of its rates",
}


@dataclass(frozen=True)
class Cell:
    text: str
    below: str = ""  # the interval
    note: str = ""
    value: float | None = None  # what a column of numbers is sorted by


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def confirmed_table(study: Study, findings: Findings) -> Table:
    """Arm × what was confirmed and what it costs."""
    decimals = loss_decimals(study.confirm.epsilon)
    forgets = any(r.forgetting is not None for r in findings.arms)
    heads = (
        "Arm",
        "Test loss",
        findings.arms[0].metric_name.capitalize() if findings.arms else "Metric",
        *(["Forgetting"] if forgets else []),
        *(["Against full fine-tuning"] if study.arms.full_finetuning else []),
        f"Against {findings.reference_title(study)}, ε = {study.confirm.epsilon:g}",
        "Trainable parameters",
        "Peak memory",
        "Step time",
        "Adapter size",
    )
    arms = study.list_arms()
    void = findings.unlearned is not None and findings.unlearned == findings.reference
    rows = tuple(
        Row(_confirmed(study, r, arms, decimals, forgets, void), r.arm.name == findings.recommended)
        for r in findings.arms
    )
    return Table(heads, rows)


def chance_line(study: Study, findings: Findings) -> str:
    """What an arm that learned nothing comes to; empty where it is not known."""
    if findings.chance_loss is None:
        return ""
    accuracy = findings.chance_accuracy
    return (
        f"Always answering by the labels' frequencies: loss "
        f"{number(findings.chance_loss, loss_decimals(study.confirm.epsilon))}"
        + ("." if accuracy is None else f", accuracy {metric('accuracy', accuracy)}.")
    )


def search_table(findings: Findings) -> Table:
    """Every arm of the search, with the number of its trials by how they ended."""
    unfit = any(row.infeasible for row in findings.search)
    ends = ("Complete", "Pruned", "Diverged", *(["Does not fit"] if unfit else []), "Failed")
    heads = ("Arm", "Learning rates", "Best", "Validation loss", *ends)
    edges = {edge.arm: edge.side for edge in findings.edges}
    rows = []
    for row in findings.search:
        edge = f"{edges[row.arm.name]} edge" if row.arm.name in edges else ""
        best = Cell("–" if row.best_rate is None else rate(row.best_rate), edge, value=row.best_rate)
        counts = (row.complete, row.pruned, row.diverged, *([row.infeasible] if unfit else []), row.failed)
        tried = Cell(_tried(row.rates), value=min(row.rates, default=None))
        loss = Cell(number(row.best_loss, 4), value=row.best_loss)
        cells = (Cell(row.arm.name), tried, best, loss, *(Cell(str(n), value=n) for n in counts))
        rows.append(Row(cells, row.arm.name == findings.recommended))
    return Table(heads, tuple(rows))


def _tried(rates: Sequence[float]) -> str:
    if len(rates) > MOST_RATES:
        return f"{len(rates)} from {rate(rates[0])} to {rate(rates[-1])}"
    return ", ".join(rate(x) for x in rates) or "–"


def calibration_table(prepared: Prepared | None) -> Table:
    """What was tried before the search to find precision, attention and pack size; empty where nothing was."""
    tried = prepared.calibration if prepared is not None else ()
    rows = []
    for figure in tried:
        time, pack = figure.get("ms_per_trial_step"), figure.get("pack_size")
        cells = (
            Cell(str(figure["precision"])),
            Cell(str(figure.get("attention", "–"))),
            Cell("–" if pack is None else str(pack), value=pack),
            Cell(number(time, 1), note=without_paths(str(figure.get("failed", ""))), value=time),
        )
        assert prepared is not None
        chosen = (prepared.precision, prepared.attention, prepared.pack_size)
        rows.append(Row(cells, (figure["precision"], figure.get("attention"), pack) == chosen))
    return Table(("Precision", "Attention", "Trials in the pack", "Milliseconds a trial and step"), tuple(rows))


def measured(study: Study, record: StudyRecord, findings: Findings) -> list[tuple[str, str]]:
    """How it was measured: (what, how), from what was prepared and written down."""
    images, longest = study.task == "image-classification", study.data.max_length
    facts = [
        ("Model", without_paths(study.model) + (f", held in {BITS[study.quantization]}" if study.quantization else "")),
        ("Task", study.task),
        ("Data", without_paths(study.data.source) + ("" if images else f", at most {longest} tokens an example")),
    ]
    prepared = record.prepared
    if prepared is not None:
        rows = ", ".join(f"{n:,} {split}" for split, n in prepared.rows.items())
        facts += [
            ("Rows", f"{rows}; {plural(prepared.duplicates_removed, 'duplicate')} removed across the splits"),
            *([("Cut short", "; ".join(cut))] if (cut := truncation_lines(prepared, study.task)) else []),
            *([("Base model", _pretraining(prepared.pretraining))] if prepared.pretraining else []),
            ("Parameters", f"{prepared.total_params:,} in the model"),
            ("Device", f"{prepared.device}, {prepared.precision}, {prepared.attention} attention"),
            ("Pack size", f"{plural(prepared.pack_size, 'trial')} at once over one frozen base"),
        ]
        if prepared.source_text is not None and study.forgetting is not None:
            text = prepared.source_text
            kind = "masked" if text.masked else "next"
            facts.append(
                (
                    "Source text",
                    f"{without_paths(study.forgetting.source)}: {plural(text.rows, 'row')}, {text.targets:,} {kind} "
                    f"tokens; loss of the base {text.loss:.4f}; {plural(text.removed, 'row')} removed that the data "
                    f"holds too; {text.fingerprint}",
                )
            )
        if prepared.tokens_per_step:
            many = f"{prepared.tokens_per_step:.0f}"
            facts.append(("Images a step", many) if images else ("Tokens a step", f"{many}, padding not counted"))
    train = study.train
    shared = study.list_arms()[0]
    for name, pattern in (("Rank pattern", shared.rank_pattern), ("Alpha pattern", shared.alpha_pattern)):
        if pattern and not isinstance(getattr(study.arms, name.lower().replace(" ", "_")), list):
            facts.append((name, f"{pattern_text(pattern)}, in every LoRA arm"))
    if study.arms.prefix_length:
        facts.append(
            (
                "Prefixes",
                "embeddings before the input, begun as entries of the vocabulary that the seed draws; padding and "
                "prefixes are not counted as tokens",
            )
        )
    plus = f", lora+ with B {train.loraplus_lr_ratio:g} times as fast as A" if "lora+" in study.arms.method else ""
    optimizer = "AdamW" if train.optimizer == "adamw" else f"SGD with momentum {train.betas[0]:g}"
    facts += [
        (
            "Training",
            f"{train.steps} steps of {train.batch_size} examples, {optimizer}{plus}, "
            f"{train.schedule} schedule, warm-up over "
            f"{100 * train.warmup:g} % of the steps, weight decay {train.weight_decay:g}, "
            + (f"clipping at {train.clip:g}" if train.clip else "no clipping")
            + f", dropout {train.dropout:g}",
        ),
        (
            "Search",
            f"{study.search.sampler} sampler, seed {study.search.seed}, rungs at steps "
            f"{', '.join(map(str, study.rungs))}; {100 * study.search.keep:g} % of a rank's trials go on at a rung",
        ),
        (
            "Confirm",
            f"seeds {', '.join(map(str, study.confirm.seeds))}, {FINALISTS[study.confirm.finalists]}; "
            f"reference rank {study.confirm.reference}, ε = {study.confirm.epsilon:g}, both declared before the run",
        ),
    ]
    return facts


def _confirmed(
    study: Study, result: ArmResult, arms: Sequence[Arm], decimals: int, forgets: bool, void: bool
) -> tuple[Cell, ...]:
    """void: the reference was not shown to have learned."""
    cost, name = result.cost, result.metric_name
    about = f"rate {rate(result.learning_rate)}, {plural(len(result.seeds), 'seed')}"
    gone = [(result.diverged_seeds, DIVERGED), (result.failed_seeds, FAILED)]
    gone.append((result.infeasible_seeds, "without memory"))
    about += "".join(f", {len(seeds)} {what}" for seeds, what in gone if seeds)
    to_full, against = (_difference(d, decimals) for d in (result.to_full, result.to_reference))
    unlearned = "says nothing: the reference was not shown to have learned" if void and result.to_reference else ""
    note = "; ".join(part for part in (unlearned, result.note) if part)
    means = [None if d is None else d.mean for d in (result.to_full, result.to_reference)]
    return (
        Cell(arm_title(result.arm, arms), about),
        Cell(
            number(result.loss_mean, decimals),
            span(result.loss_low, result.loss_high, decimals),
            value=result.loss_mean,
        ),
        Cell(
            metric(name, result.metric_mean),
            metric_span(name, result.metric_low, result.metric_high),
            value=result.metric_mean,
        ),
        *([change(result.forgetting, decimals)] if forgets else []),
        *(
            [Cell(result.full_verdict or "–", to_full, result.full_note, means[0])]
            if study.arms.full_finetuning
            else []
        ),
        Cell(result.verdict or "–", against, note, means[1]),
        Cell(count(result.trainable_params), value=result.trainable_params),
        Cell(size(cost.peak_memory_bytes if cost else None), value=cost.peak_memory_bytes if cost else None),
        Cell(
            duration(cost.step_time_s if cost else None),
            note="uneven steps" if cost and cost.uneven else "",
            value=cost.step_time_s if cost else None,
        ),
        Cell(size(cost.adapter_bytes if cost else None), value=cost.adapter_bytes if cost else None),
    )


def _difference(found: Interval | None, decimals: int) -> str:
    """ "−0.022 (−0.073 to +0.029)"."""
    if found is None:
        return ""
    ends = span(found.low, found.high, decimals, plus=True)
    return signed(found.mean, decimals) + (f" ({ends})" if ends else "")


def change(found: Interval | None, decimals: int) -> Cell:
    """A signed mean over its interval."""
    if found is None:
        return Cell("–")
    return Cell(signed(found.mean, decimals), span(found.low, found.high, decimals, plus=True), value=found.mean)


def _pretraining(made: Mapping[str, Any]) -> str:
    """What the study's own base is, and what it scored on rows of its own labels that it never saw."""
    return (
        f"{made['architecture']}, made by this study from random weights: {made['steps']} steps of "
        f"{made['batch_size']} of the {made['train_rows']:,} rows of the labels {', '.join(made['labels'])}; on "
        f"{made['held_out_rows']:,} held-out rows of these its loss is {made['loss']:.3f} and its accuracy "
        f"{metric('accuracy', made['accuracy'])}. The study has the rows of the other labels."
    )
