"""The report across studies: one self-contained HTML file, its Markdown twin, the arms as CSV and the figures.

Nothing is pooled: losses of different data are not comparable, so each study's arms are held against its own reference
and its own full fine-tuning, and only these differences, verdicts and shares of cost stand beside one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sweep.report.compare_figures import cost_by_rank, to_reference_by_rank
from sweep.report.compare_numbers import Compared, Contrast, compare, contrasts, matched
from sweep.report.compare_rules import Comparable, Difference, differences, same_sections, what_may_be_compared
from sweep.report.compare_sentences import CHANCE, lead_sentences, margins, shown_to_differ
from sweep.report.compare_tables import (
    confirmed_table,
    contrasts_table,
    differences_table,
    recommended_table,
    reference_table,
    write_rows,
)
from sweep.report.figures import draw
from sweep.report.report import render, shown_file
from sweep.report.sections import Section
from sweep.report.words import join
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord


def write_comparison(studies: Sequence[tuple[Study, StudyRecord]], to: Path) -> tuple[str, str]:
    """Write report.html, report.md, compare.csv and figures/*.png into `to`; returns the leading sentences.

    The same records give the same files. Unfinished studies are compared as far as they went. Raises OSError where it
    cannot write.
    """
    folder = to / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    compared = compare(studies)
    ran = [(c.study, c.record.prepared) for c in compared]
    found = differences(ran)
    rules = what_may_be_compared(ran, found)
    contrasted, left_out = contrasts(compared)
    sections = [
        _recommendations(compared),
        _differences(compared, found, same_sections(ran)),
        _ranks(compared, rules, folder),
        _contrasts(contrasted, left_out),
        _costs(compared, rules, folder),
    ]
    lead = lead_sentences(compared, rules, contrasted)
    view = {
        "title": f"{join([c.name for c in compared])}, side by side",
        "compared": compared,
        "unfinished": [c for c in compared if not c.findings.finished],
        "lead": lead,
        "sections": sections,
        "limits": _limits(compared),
        "command": f"sweep compare {' '.join(c.name for c in compared)}",
        "files": [(c.name, shown_file(c.study)) for c in compared],
    }
    render("compare", to, view, [drawn for section in sections for drawn in section.figures])
    write_rows(compared, to / "compare.csv")
    return lead


def _recommendations(compared: Sequence[Compared]) -> Section:
    return Section(
        "What each study recommends",
        (f"{margins(compared)} {CHANCE}",),
        (
            (
                "Each study's own recommendation, from its confirm trials: means with 95 % intervals",
                recommended_table(compared),
            ),
        ),
    )


def _differences(compared: Sequence[Compared], found: Sequence[Difference], same: Sequence[str]) -> Section:
    alike = f"The same in all of them: {join(list(same))}." if same else "No section of their study files is the same."
    if not found:
        return Section("What differs between them", (f"{alike} Nothing that was recorded differs but their names.",))
    names = [c.name for c in compared]
    return Section(
        "What differs between them", (alike,), (("What is not the same in all", differences_table(names, found)),)
    )


def _ranks(compared: Sequence[Compared], rules: Comparable, folder: Path) -> Section:
    rows = matched(compared)
    if not rows:
        return Section(
            "Ranks against each study's reference", ("No confirm trial has ended yet, so nothing is confirmed.",)
        )
    losses = (
        f"Test losses themselves are not compared across the studies: {rules.losses}. A difference to the reference is "
        "in the loss of its own study too: its sign and its verdict can be held against another study's, its size "
        "cannot."
        if rules.losses
        else "The test losses are of one kind on the same rows, so differences may be held against one another."
    )
    drawn = draw(to_reference_by_rank, folder, compared, not rules.losses)
    return Section(
        "Ranks against each study's reference",
        (losses,),
        (
            (
                "Test loss of an arm less that of the reference, paired by seed: means with 95 % intervals",
                reference_table(compared, rows),
            ),
        ),
        (drawn,) if drawn else (),
    )


def _contrasts(found: Sequence[Contrast], left_out: Sequence[str]) -> Section:
    title = "Do these differences differ between the studies?"
    reasons = (f"Left out: {' '.join(left_out)}",) if left_out else ()
    if not found:
        return Section(title, ("No two of them can be held against one another.", *reasons))
    how = (
        f"{shown_to_differ(found)} Differences are paired by seed within a study and independent across studies "
        "(Welch's t). The intervals are two-sided at 95 %, each for itself; p is corrected over all rows by Holm."
    )
    caption = "Difference to the reference in two studies, and the second less the first"
    return Section(title, (how, *reasons), ((caption, contrasts_table(found)),))


def _costs(compared: Sequence[Compared], rules: Comparable, folder: Path) -> Section:
    rows = matched(compared)
    say = (
        f"Memory and time in figures of their own (small, below the shares) are not compared across the studies: "
        f"{rules.costs}. Shares of full fine-tuning's cost in the same study are."
        if rules.costs
        else "Memory and time in figures of their own (small, below the shares) may be held against one another, as "
        "far as the records tell: either the machine and the libraries are the same, or they alone differ."
    )
    kinds = {c.record.prepared.device.split(" ")[0] == "cpu" for c in compared if c.record.prepared}
    if len(kinds) > 1:
        say += " On a CPU the peak is the process's resident memory, on a GPU what was allocated there."
    drawn = draw(cost_by_rank, folder, compared)
    tables = (("Finalists on fresh seeds, and their costs from solo probes", confirmed_table(compared, rows)),)
    return Section("What was confirmed, and what it costs", (say,), tables if rows else (), (drawn,) if drawn else ())


def _limits(compared: Sequence[Compared]) -> list[str]:
    return [
        "All claims rest on confirm trials. Learning rates are those that search chose; its scores are not shown, as "
        "they are no results.",
        "Nothing is pooled across the studies: each verdict is its own study's, at its own reference, margin, steps.",
        "Intervals tell how much seeds matter on one split of one data set, not how another would turn out.",
        "Whether two machines of one name are one machine is not recorded; nor what else ran on them.",
        "Trials trained in packs, whose time and memory are joint. Costs are from solo probes: one measurement each.",
    ]
