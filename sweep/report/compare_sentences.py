"""What a comparison of studies says in words: which arms they recommend, whether they agree, what stands apart."""

from __future__ import annotations

from collections.abc import Sequence

from sweep.report.compare_numbers import Compared, Contrast
from sweep.report.compare_rules import Comparable
from sweep.report.intervals import LEVEL, REFERENCE
from sweep.report.words import arm_title, join, loss_decimals, number, plural, span


def lead_sentences(compared: Sequence[Compared], rules: Comparable, found: Sequence[Contrast]) -> tuple[str, str]:
    """Whether the studies recommend the same; then what differs between them, and what is shown to."""
    second = rules.cause
    if found:
        second += f" {shown_to_differ(found, decimals_of(compared))}"
    return agreement(compared), second


def agreement(compared: Sequence[Compared]) -> str:
    """Which rank each study recommends. Made of the studies' own recommendations: nothing is pooled.

    That one study shows what another does not show is no difference that was shown (Gelman & Stern, The American
    Statistician 60, 2006): it is said so, and `contrasts` tests the differences themselves.
    """
    picks = [(c, c.pick) for c in compared]
    ranks: dict[str, list[Compared]] = {}
    for c, pick in picks:
        if pick is not None:
            ranks.setdefault(pick.arm.group, []).append(c)
    none = [c for c, pick in picks if pick is None]
    unfinished = [c for c in compared if not c.findings.finished]
    so_far = ""
    if unfinished:
        far = [f"{c.name} has ended {c.findings.ended} of {plural(c.findings.planned, 'trial')}" for c in unfinished]
        so_far = f" This is not final: {join(far)}."
    if not ranks:
        return f"No study recommends an arm: {join([_no_pick(c) for c in none])}.{so_far}"
    if len(ranks) == 1:
        ((rank, agreed),) = ranks.items()
        everywhere = "both studies" if len(compared) == 2 else f"all {len(compared)} studies"
        where = everywhere if not none else join([c.name for c in agreed])
        text = f"{rank[0].upper()}{rank[1:]} is recommended in {where}{_settings(agreed)}"
        text += f"; {join([_no_pick(c) for c in none])}." if none else "."
    else:
        parts = [f"{join([_name_and_why(c) for c in cs])} {_recommend(cs)} {rank}" for rank, cs in ranks.items()]
        text = (
            f"The studies disagree: {join([*parts, *map(_no_pick, none)])}. That alone shows no difference between "
            "them: a study with wider intervals shows less."
        )
    return text + so_far


def margins(compared: Sequence[Compared]) -> str:
    """What each study holds its arms against."""
    parts = {c.name: f"rank {c.study.confirm.reference} within ε = {c.study.confirm.epsilon:g}" for c in compared}
    if len(set(parts.values())) == 1:
        return (
            f"All of them hold their arms against {next(iter(parts.values()))}, which stood in the file before the run."
        )
    told = join([f"{name} against {part}" for name, part in parts.items()])
    return f"Each has a reference and a margin of its own, which stood in the file before the run: {told}."


def decimals_of(compared: Sequence[Compared]) -> int:
    """Of differences between studies: enough for the smallest of their margins."""
    return max(loss_decimals(c.study.confirm.epsilon) for c in compared)


def shown_to_differ(found: Sequence[Contrast], decimals: int) -> str:
    """The contrasts that stay below 5 % with Holm's correction."""
    shown = [c for c in found if c.p < LEVEL]
    if not shown:
        n, corrected = len(found), ", with Holm's correction" if len(found) > 1 else ""
        return (
            "No arm's difference to the reference is shown to differ between the studies "
            f"({plural(n, 'Welch t test')} at 5 %{corrected})."
        )
    parts = [
        f"that of {c.title} is {number(abs(c.mean), decimals)} {'higher' if c.mean > 0 else 'lower'} in {c.other} "
        f"than in {c.one} (95 % interval {span(c.low, c.high, decimals, plus=True)})"
        for c in shown
    ]
    return f"Of the differences to the reference, these are shown to differ between the studies: {'; '.join(parts)}."


def _recommend(agreed: Sequence[Compared]) -> str:
    return "recommends" if len(agreed) == 1 else "recommend"


def _name_and_why(c: Compared) -> str:
    pick = c.pick
    stays = pick is not None and pick.verdict == REFERENCE
    return f"{c.name}{', which shows no smaller rank non-inferior to its reference,' if stays else ''}"


def _settings(agreed: Sequence[Compared]) -> str:
    """The arms behind one rank, and whose reference it is, which needs no showing."""
    # Titles without the rank, which is the same:
    apart = {c.name: arm_title(c.pick.arm, c.study.list_arms()).partition(", ")[2] for c in agreed if c.pick}
    told = set(apart.values())
    if len(told) == 1:
        text = f", with {told.pop()}" if any(told) else ""
    else:
        text = f" ({'; '.join(f'{name}: {words}' for name, words in apart.items())})"
    stays = [c.name for c in agreed if c.pick is not None and c.pick.verdict == REFERENCE]
    if len(stays) == len(agreed):
        text += ": it is the reference, and no smaller rank was shown non-inferior to it"
    elif stays:
        text += f"; in {join(stays)} it is the reference, and no smaller rank was shown non-inferior to it"
    return text


def _no_pick(c: Compared) -> str:
    if c.findings.unlearned is not None:
        return f"{c.name} recommends none, as {c.findings.unlearned} is not shown to have learned anything"
    return f"{c.name} recommends none, as its reference, rank {c.study.confirm.reference}, has no confirmed loss"
