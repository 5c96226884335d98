"""What `data.max_length` took from the rows, in words: a line of the log, a fact of the report, and its warnings."""

from __future__ import annotations

from sweep.report.words import join, plural
from sweep.study.records import Prepared, Truncation

CLASSIFICATION = "sequence-classification"
# Above these shares of a split's rows the report warns. A conversation that is cut misses what was meant; a text to be
# classified mostly shows its class in its beginning.
MANY, MANY_TEXTS = 0.1, 0.5


def truncation_lines(prepared: Prepared, task: str) -> list[str]:
    """One line for each split that lost something: nothing to say of the others, and of running text."""
    unit = "characters" if task == CLASSIFICATION else "tokens"
    return [f"{split}: {_what(t, unit)}" for split, t in prepared.truncation.items() if t.cut or t.dropped]


def truncation_warnings(prepared: Prepared, task: str, max_length: int) -> list[str]:
    """For the splits of which more rows than the shares above are cut, or dropped."""
    limit = MANY_TEXTS if task == CLASSIFICATION else MANY
    cut, dropped = (
        [
            f"{_percent(getattr(t, kind), t.rows)} of {split}"
            for split, t in prepared.truncation.items()
            if t.rows and getattr(t, kind) / t.rows > limit
        ]
        for kind in ("cut", "dropped")
    )
    after = (
        "the arms were compared on the beginnings of these texts"
        if task == CLASSIFICATION
        else "what was cut was neither learnt nor measured; a larger data.max_length keeps more of it"
    )
    warnings = [f"{join(cut)} is longer than data.max_length ({max_length:,} tokens): {after}."] if cut else []
    return warnings + ([f"{join(dropped)} had no answer to learn and was dropped."] if dropped else [])


def _what(t: Truncation, unit: str) -> str:
    parts = []
    if t.cut:
        parts.append(f"{t.cut:,} of {plural(t.rows, 'row')} cut at data.max_length ({_percent(t.cut, t.rows)})")
        parts.append(f"{_percent(t.lost, t.whole)} of all {unit} lost")
    if t.answers_cut:
        parts.append(f"in {plural(t.answers_cut, 'row')} an answer lost a part")
    if t.dropped:
        parts.append(f"{plural(t.dropped, 'row')} without an answer to learn dropped")
    return ", ".join(parts)


def _percent(part: int, whole: int) -> str:
    percent = 100 * part / max(whole, 1)
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
