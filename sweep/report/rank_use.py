"""The report's section on the rank that updates use."""

from __future__ import annotations

from pathlib import Path

from sweep.report.drawing import draw
from sweep.report.rank_use_figures import rank_by_layer, spectra, subspaces, truncation
from sweep.report.rank_use_numbers import Found, truncated_rows, write_numbers
from sweep.report.rank_use_sentences import sentences
from sweep.report.rank_use_tables import (
    amplification_table,
    pattern_table,
    pattern_yaml,
    rank_table,
    rule,
    similarity_table,
    truncation_table,
)
from sweep.report.sections import Section
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

TITLE = "Did it use its rank?"


def rank_use_section(study: Study, record: StudyRecord, found: Found, figures: Path) -> Section:
    """The section, its figures drawn and its numbers written beside the folder `figures`. Raises OSError."""
    write_numbers(study, record, found, figures.parent)
    cut = truncated_rows(study, record, found)
    drawn = [
        draw(spectra, figures, study, found),
        draw(rank_by_layer, figures, study, found),
        draw(subspaces, figures, study, found),
        draw(truncation, figures, study, record, found, cut),
    ]
    return Section(
        TITLE,
        rank_use_sentences(study, record, found),
        (
            ("Rank that the updates use: means over the layers", rank_table(study, found)),
            ("Directions shared, φ: means over the layers and over pairs of seeds", similarity_table(study, found)),
            (
                "How strong the update is in its directions, and W₀ was: means over the layers",
                amplification_table(study, found),
            ),
            (
                f"Rank {max(map(int, found['chosen']))} truncated, against trained at that rank",
                truncation_table(study, cut),
            ),
            ("Suggested rank patterns, not trained", pattern_table(found)),
        ),
        tuple(figure for figure in drawn if figure is not None),
        tuple((f"The pattern that {rule(s)}, for a study file", pattern_yaml(s)) for s in found["suggestions"]),
    )


def rank_use_sentences(study: Study, record: StudyRecord, found: Found) -> tuple[str, ...]:
    """The section's paragraphs alone."""
    return tuple(sentence for sentence in sentences(study, found, truncated_rows(study, record, found)) if sentence)
