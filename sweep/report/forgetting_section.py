"""The report's part on forgetting: the course of learning and forgetting, and arms at a target loss all reached."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sweep.report.confirmed import confirm_trials
from sweep.report.drawing import Drawn, Numbers, draw
from sweep.report.forgetting import Matched, course, match
from sweep.report.intervals import Interval
from sweep.report.results import Findings
from sweep.report.sections import Section
from sweep.report.style import FAINT, SERIES, SOFT, WHITE, legend_above, new_figure, wrapped
from sweep.report.tables import Cell, Row, Table, change
from sweep.report.words import arm_title, join, loss_decimals, number, plural, signed, span, without_paths
from sweep.study.arms import Arm
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

PAPER = '"LoRA Learns Less and Forgets Less" (Biderman et al., arXiv 2405.09673)'


def forgetting_section(study: Study, record: StudyRecord, findings: Findings, figures: Path) -> Section | None:
    """None where the study does not ask about forgetting, or no confirm trial has been measured."""
    if study.forgetting is None or not any(r.forgetting for r in findings.arms):
        return None
    full = next((r.arm.name for r in findings.arms if r.arm.is_full and r.forgetting), None)
    baseline = full or findings.reference
    matched = match(study, record, baseline)
    drawn = draw(learning_forgetting, figures, study, record, findings)
    held_against = next((m.arm for m in matched if m.arm.name == baseline), None)
    return Section(
        "What was forgotten",
        (
            _what(study, record) + _none_forgot(study, findings),
            _matched_sentence(study, matched, held_against),
            *_literature(study, findings, matched, held_against),
        ),
        ((_caption(study, held_against), _table(study, findings, matched, held_against)),),
        (drawn,) if drawn else (),
    )


def learning_forgetting(study: Study, record: StudyRecord, findings: Findings) -> tuple[Figure, Drawn] | None:
    shown = [r.arm for r in findings.arms if r.forgetting is not None]
    if not shown:
        return None
    figure = new_figure(3.9)
    axes = figure.subplots()
    axes.axhline(0, color=FAINT, lw=1.2)
    arms = study.list_arms()
    numbers: list[tuple[object, ...]] = []
    for i, arm in enumerate(shown):
        colour = SOFT if arm.is_full else SERIES[i % len(SERIES)]
        at: dict[int, list[tuple[float, float]]] = defaultdict(list)
        name = arm_title(arm, arms)
        for trial in confirm_trials(record, arm):
            for point in course(record, trial):
                at[point.step].append((point.target_loss, point.forgetting))
                numbers.append((name, f"seed {trial.spec.seed}", point.step, *at[point.step][-1]))
        for points in at.values():
            axes.plot(*np.transpose(points), "o", color=colour, ms=3.5, mew=0, alpha=0.35)
        means = np.array([np.mean(at[step], axis=0) for step in sorted(at)])
        axes.plot(means[:, 0], means[:, 1], "o-", color=colour, ms=6, lw=1.8, mec=WHITE, label=name)
        numbers += [(name, "mean", step, *mean) for step, mean in zip(sorted(at), means.tolist(), strict=True)]
    axes.invert_xaxis()
    axes.set_xlabel(wrapped("validation loss on the target (nats): further right has learned more"))
    axes.set_ylabel("rise of the loss on source text (nats)")
    legend_above(figure, axes.get_legend_handles_labels()[0], 3)
    return figure, Drawn(
        "learning-forgetting",
        "Learning and forgetting",
        "Each arm on its way, from before the first step through the rungs of the confirm phase: the mean over the "
        "seeds, and each seed as a point. Above 0 the arm has forgotten.",
        "Rise of the loss on source text against validation loss on the target, one line for each of: "
        + ", ".join(arm_title(arm, arms) for arm in shown)
        + ".",
        Numbers(
            ("arm", "what", "step", "validation loss on the target (nats)", "rise of the loss on source text (nats)"),
            numbers,
        ),
    )


def _what(study: Study, record: StudyRecord) -> str:
    text = record.prepared.source_text if record.prepared else None
    assert text is not None and study.forgetting is not None  # or no trial would have been measured
    how = (
        "that its own masked-language-model head has on tokens hidden once for all"
        if text.masked
        else "of each next token"
        if study.task == "causal-lm"
        else "of each next token by its own language-model head"
    )
    removed = f" ({plural(text.removed, 'row')} that the study's data holds too left out)" if text.removed else ""
    return (
        f"Before any training the base had a loss of {number(text.loss, loss_decimals(study.confirm.epsilon))} on "
        f"{plural(text.rows, 'row')} of {without_paths(study.forgetting.source)}{removed}, text that no trial trains "
        f"on: the loss {how}, over {text.targets:,} tokens. Forgetting is the rise above that loss; below 0 an arm "
        "reads that text better than the base did."
    )


def _none_forgot(study: Study, findings: Findings) -> str:
    """Where an arm reads the source text better than the base did, which forgets less is not the whole question."""
    measured = [r for r in findings.arms if r.forgetting is not None]
    better = [r for r in measured if r.forgetting and r.forgetting.high is not None and r.forgetting.high < 0]
    if not better:
        return ""
    if len(better) == len(measured):
        return (
            " Here no arm forgot: each ended with a loss on that text shown to be lower than the base's. What training "
            "taught helped there too, and differences between arms below are of that gain as much as of forgetting."
        )
    names = join([arm_title(r.arm, study.list_arms()) for r in better])
    return f" Shown to read it better at the end than the base did, so not to have forgotten: {names}."


def _matched_sentence(study: Study, matched: list[Matched], baseline: Arm | None) -> str:
    opening = (
        "An arm that learns more goes further from the base, so the arms are also compared at one target loss: for "
        "each seed the highest of their final validation losses, which every other arm passed on its way, with "
        "forgetting interpolated between the rungs around it. "
    )
    never = [
        f"{arm_title(m.arm, study.list_arms())} never reached it on {plural(len(m.never), 'seed')}"
        for m in matched
        if m.never
    ]
    closing = f" {'; '.join(never)}: left out there." if never else ""
    idle = sorted({seed for m in matched for seed in m.at_start})
    if idle:
        closing += (
            f" On {plural(len(idle), 'seed')} ({', '.join(map(str, idle))}) some arm was at that loss before any step, "
            "because the worst one hardly learned: there the comparison says little."
        )
    sorted_out = _sides(matched)
    if baseline is None or not any(sorted_out.values()):
        return f"{opening}There is no arm that the others could be held against.{closing}"
    than = arm_title(baseline, study.list_arms())
    decimals = loss_decimals(study.confirm.epsilon)
    parts = []
    for word, side in (("less", "less"), ("more", "more")):
        if sorted_out[side]:
            parts.append(f"shown to forget {word} than {than}: {_listed(study, sorted_out[side], decimals)}")
    if sorted_out["open"]:
        parts.append(f"not shown to forget less or more: {_listed(study, sorted_out['open'], decimals)}")
    text = "; ".join(parts)
    return f"{opening}At that loss, {text} (95 % intervals, paired by seed, each for itself).{closing}"


def _literature(study: Study, findings: Findings, matched: list[Matched], baseline: Arm | None) -> list[str]:
    """What the best-known study found, and whether this one agrees."""
    if baseline is None or not baseline.is_full:
        return [f"Full fine-tuning was not confirmed, so nothing is said about the finding of {PAPER}."]
    sides = _sides(matched)
    if sides["more"]:
        names = join([arm_title(m.arm, study.list_arms()) for m in sides["more"]])
        forgets = f"Here the contrary is shown of {names}: forgetting more than full fine-tuning at the same loss"
    elif sides["less"] and not sides["open"]:
        forgets = "That LoRA forgets less is shown here too, at the same target loss and of every arm"
    elif sides["less"]:
        forgets = f"That LoRA forgets less is shown here of {len(sides['less'])} of {len(matched) - 1} arms"
    else:
        forgets = "That LoRA forgets less is not shown here, nor the contrary"
    pairs = [r.to_full for r in findings.arms if r.to_full is not None and r.to_full.low is not None]
    less = sum(p.low is not None and p.low > 0 for p in pairs)
    more = sum(p.high is not None and p.high < 0 for p in pairs)
    of = f"of {plural(len(pairs), 'LoRA arm')}"
    learns = (
        f"{of}, {less} ended with a test loss shown to be higher than full fine-tuning's (learned less) and {more} "
        f"with one shown to be lower{', which contradicts it' if more else ''}"
    )
    return [
        f"{PAPER} trained models of 7 billion parameters on code and maths: after code, the source-domain score was "
        f"0.509 with LoRA of rank 64 and 0.414 with full fine-tuning, and LoRA learned less. {forgets}; {learns}. "
        "Models, data and number of steps are others here, so neither agreement nor contradiction settles the question."
    ]


def _sides(matched: list[Matched]) -> dict[str, list[Matched]]:
    """Arms by what their difference to the baseline shows."""
    sides: dict[str, list[Matched]] = {"less": [], "more": [], "open": []}
    for m in matched:
        pairs = m.to_baseline
        if pairs is None:
            continue
        if pairs.high is not None and pairs.high < 0:
            sides["less"].append(m)
        elif pairs.low is not None and pairs.low > 0:
            sides["more"].append(m)
        else:
            sides["open"].append(m)
    return sides


def _listed(study: Study, matched: list[Matched], decimals: int) -> str:
    return join([f"{arm_title(m.arm, study.list_arms())} ({_interval(m.to_baseline, decimals)})" for m in matched])


def _interval(found: Interval | None, decimals: int) -> str:
    if found is None:
        return "–"
    ends = span(found.low, found.high, decimals, plus=True)
    return f"{signed(found.mean, decimals)}, {ends if ends else 'one seed: no interval'}"


def _caption(study: Study, baseline: Arm | None) -> str:
    against = f", and against {arm_title(baseline, study.list_arms())}" if baseline else ""
    return f"Forgetting at the end and at the target loss that every arm reached{against}: means with 95 % intervals"


def _table(study: Study, findings: Findings, matched: list[Matched], baseline: Arm | None) -> Table:
    decimals = loss_decimals(study.confirm.epsilon)
    than = arm_title(baseline, study.list_arms()) if baseline else "the baseline"
    heads = ("Arm", "Test loss", "Forgetting at the end", "At matched target loss", f"Difference to {than}")
    rows = []
    for m in matched:
        result = findings.result(m.arm.name)
        assert result is not None  # matched arms are confirmed ones
        missing = f"never reached on {plural(len(m.never), 'seed')}" if m.never else ""
        cells = (
            Cell(arm_title(m.arm, study.list_arms()), plural(len(m.seeds), "seed"), missing),
            Cell(
                number(result.loss_mean, decimals),
                span(result.loss_low, result.loss_high, decimals),
                value=result.loss_mean,
            ),
            *(change(found, decimals) for found in (result.forgetting, m.mean, m.to_baseline)),
        )
        rows.append(Row(cells, m.arm.name == findings.recommended))
    return Table(heads, tuple(rows))
