"""The report across studies: one self-contained HTML file, its Markdown twin, the arms as CSV and the figures.

Nothing is pooled: losses of different data are not comparable, so each study's arms are held against its own reference
and its own full fine-tuning, and only these differences, verdicts and shares of cost stand beside one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from sweep.report.compare_figures import cost_by_rank, to_reference_by_rank
from sweep.report.compare_numbers import Compared, Contrast, compare, contrasts, matched
from sweep.report.compare_rules import Comparable, Difference, differences, may_be_compared, same_sections
from sweep.report.compare_sentences import decimals_of, lead_sentences, margins, shown_to_differ
from sweep.report.compare_tables import (
    confirmed_table,
    contrasts_table,
    differences_table,
    pairs_table,
    recommended_table,
    reference_table,
    write_rows,
)
from sweep.report.drawing import draw
from sweep.report.report import render, shown_file
from sweep.report.sections import Section
from sweep.report.words import join, plural
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord


def write_comparison(studies: Sequence[tuple[Study, StudyRecord]], to: Path) -> tuple[str, str]:
    """Write report.html, report.md, compare.csv and figures/*.png into `to`; returns the leading sentences.

    The same records give the same files. Unfinished studies are compared as far as they went. Raises OSError where it
    cannot write.
    """
    folder = to / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    compared = compare(studies)
    found = differences([c.ran for c in compared])
    rules = may_be_compared([c.ran for c in compared])
    contrasted, left_out = contrasts(compared)
    sections = [
        _recommendations(compared),
        _differences(compared, found, rules),
        _ranks(compared, rules, folder),
        _contrasts(contrasted, left_out, decimals_of(compared)),
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
    render("compare", to, view)
    write_rows(compared, to / "compare.csv")
    return lead


def _recommendations(compared: Sequence[Compared]) -> Section:
    return Section(
        "What each study recommends",
        (margins(compared),),
        (
            (
                "Each study's own recommendation, from its confirm trials: means with 95 % intervals",
                recommended_table(compared),
            ),
        ),
    )


def _differences(compared: Sequence[Compared], found: Sequence[Difference], rules: Comparable) -> Section:
    title, names = "What differs between them", [c.name for c in compared]
    same = same_sections([c.ran for c in compared])
    alike = f"The same in all of them: {join(same)}." if same else "No section of their study files is the same."
    if not found:
        return Section(title, (f"{alike} Nothing that was recorded differs but their names.",))
    causes = (
        f"What may change an arm's result or cost comes first and counts as {plural(len(rules.causes), 'difference')}: "
        f"{join(list(rules.causes))}."
        if rules.causes
        else "Nothing of it may change an arm's result or cost."
    )
    tables = [("What is not the same in all", differences_table(names, found))]
    if len(compared) > 2:
        pairs = [(a.name, b.name, may_be_compared([a.ran, b.ran])) for a, b in combinations(compared, 2)]
        tables.append(("What may be compared, two by two", pairs_table(pairs)))
    return Section(title, (f"{alike} {causes}",), tuple(tables))


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
        (
            f"{losses} Verdicts are each study's own: non-inferior where the difference is shown to lie below its ε, "
            "inferior where it is shown to lie above.",
        ),
        (
            (
                "Test loss of an arm less that of the reference, paired by seed: means with 95 % intervals",
                reference_table(compared, rows),
            ),
        ),
        (drawn,) if drawn else (),
    )


def _contrasts(found: Sequence[Contrast], left_out: Sequence[str], decimals: int) -> Section:
    title = "Do these differences differ between the studies?"
    reasons = (f"Left out: {' '.join(left_out)}",) if left_out else ()
    if not found:
        return Section(title, ("No two of them can be held against one another.", *reasons))
    how = (
        f"{shown_to_differ(found, decimals)} Differences are paired by seed within a study and treated as "
        "independent across studies (Welch's t). Intervals are two-sided at 95 %, each for itself; p is corrected over "
        "all rows by Holm."
    )
    caption = "Difference to the reference in two studies, and the second less the first"
    return Section(title, (how, *reasons), ((caption, contrasts_table(found, decimals)),))


def _costs(compared: Sequence[Compared], rules: Comparable, folder: Path) -> Section:
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
    without = [c.name for c in compared if c.full_cost is None]
    if without:
        say += f" There is no probe of full fine-tuning in {join(without)}, and so no share."
    drawn = draw(cost_by_rank, folder, compared)
    tables = (("Finalists on fresh seeds, and their costs from solo probes", confirmed_table(compared)),)
    return Section(
        "What was confirmed, and what it costs",
        (say,),
        tables if any(c.findings.arms for c in compared) else (),
        (drawn,) if drawn else (),
    )


def _limits(compared: Sequence[Compared]) -> list[str]:
    return [
        "All claims rest on confirm trials. Learning rates are those that search chose; its scores are not shown, as "
        "they are no results.",
        "Nothing is pooled across the studies: each verdict is its own study's, at its own reference, margin, steps.",
        "Intervals tell how much seeds matter on one split of one data set, not how another would turn out.",
        "Whether two machines of one name are one machine is not recorded; nor what else ran on them.",
        "Trials trained in packs, whose time and memory are joint. Costs are from solo probes: one measurement each.",
    ]
