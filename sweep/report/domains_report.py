"""The report across domains: one self-contained HTML file, its Markdown twin, the losses as CSV and the figures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from sweep.report.domains import (
    COLUMNS,
    MIXED,
    Found,
    bits_per_byte,
    by_distance,
    changes,
    gain_differences,
    kept,
    loss_rows,
    over_seeds,
    rank_gain,
    rank_gain_bits,
    ranks,
    side,
)
from sweep.report.domains_figures import domain_losses, gain_by_distance
from sweep.report.drawing import draw
from sweep.report.intervals import Interval
from sweep.report.provenance import provenance_facts
from sweep.report.report import page
from sweep.report.search import edge_warnings, find_edges, search_rows
from sweep.report.sections import Section
from sweep.report.tables import Cell, Row, Table, change
from sweep.report.words import join, number, plural, signed, span
from sweep.study.domains import domain_studies
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

DECIMALS = 3


def write_domains_report(study: Study, found: Found, records: Mapping[str, StudyRecord], to: Path) -> tuple[str, ...]:
    """Write report.html, report.md, losses.csv and figures/ into `to`; returns the leading sentences.

    records: of the parts, by domain. Raises OSError where it cannot write.
    """
    figures = to / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    mixed = any(row["adapter"] == MIXED for row in found["losses"])
    losses, gains = draw(domain_losses, figures, found), draw(gain_by_distance, figures, found)
    sections = [
        Section(
            "What each adapter does on each domain's text",
            (_gains(found), _off(found)),
            (("Change of test loss with an adapter on (nats a token): means with 95 % intervals", _matrix(found)),),
            (losses,) if losses else (),
        ),
        Section(f"What the control, {found['domains'][0]}, pays", (_control(found),)),
        Section(
            "Adapters mixed", (_mixing(found),), (("What the mixture keeps", _kept_table(found)),) if mixed else ()
        ),
    ]
    if len(ranks(found)) > 1:
        caption = "Gain of the largest rank over the smallest: means with 95 % intervals, paired by seed"
        sections.append(
            Section(
                "Does a larger rank gain more, the further the domain?",
                (_distance(found), _literature(found)),
                ((caption, _gain_table(found)),),
                (gains,) if gains else (),
            )
        )
    lead = lead_sentences(found)
    page(
        "domains",
        to,
        {
            "study": study,
            "title": study.question or f"The study {study.name}",
            "lead": lead,
            "sections": sections,
            "warnings": _warnings(study, records),
            "parts": [part.name for part in domain_studies(study).values()],
            "limits": _limits(study, found),
            "provenance": provenance_facts(study, list(records.values())),
        },
        study,
    )
    with open(to / "losses.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(loss_rows(found))
    return lead


def lead_sentences(found: Found) -> tuple[str, str]:
    """What was found, first of all."""
    return _gains(found), _control(found)


def _gains(found: Found) -> str:
    """Whether each domain's own adapter helps there, at the largest rank."""
    rank = ranks(found)[-1]
    at = {d: over_seeds(changes(found, d, rank, d)) for d in found["domains"]}
    parts = [f"{domain} {_interval(interval)}" for domain, interval in at.items()]
    shown = [domain for domain, interval in at.items() if side(interval) < 0]
    opening = (
        "Every domain's own adapter is shown to lower its test loss"
        if len(shown) == len(at)
        else f"Its own adapter is shown to lower the test loss of {join(shown) if shown else 'no domain'} alone"
    )
    return f"{opening} (rank {rank}, nats a token, 95 % intervals over seeds): {'; '.join(parts)}."


def _off(found: Found) -> str:
    rows = sum(found["checked_rows"].values())
    if found["off_equals_base"]:
        return (
            "With every adapter off the model is the base, bit for bit: after all had been on, its test losses on "
            f"all domains equal those before, and its logits on {plural(rows, 'row')} those of a base just loaded."
        )
    return (
        "With every adapter off the model is NOT the base bit for bit: its losses or its logits differ from those "
        "before any adapter was on. That is an error of the program, and puts all numbers here in doubt."
    )


def _control(found: Found) -> str:
    """What other domains' adapters, and the mixture, change on the control's text."""
    control, rank = found["domains"][0], ranks(found)[-1]
    words = {1: "shown to cost", -1: "shown to help", 0: "not shown to cost or to help"}
    at = {a: over_seeds(changes(found, a, rank, control)) for a in [*found["domains"][1:], MIXED]}
    parts = [f"{a} is {words[side(interval)]} ({_interval(interval)})" for a, interval in at.items() if interval]
    if not parts:
        return f"No other adapter was measured on {control}."
    return (
        f"With an adapter of another domain on, the loss on {control} text changes (rank {rank}, nats a token, 95 % "
        f"intervals over seeds): {'; '.join(parts)}. A rise is forgetting"
        + (
            f"; one that helps also learned what its text shares with {control}, as translations share their subject, "
            "and that hides what was forgotten."
            if any(side(interval) < 0 for interval in at.values())
            else "."
        )
    )


def _mixing(found: Found) -> str:
    others = found["domains"][1:]
    if len(others) < 2:
        return f"Beside the control there is {others[0]} alone, so nothing was mixed."
    if not any(row["adapter"] == MIXED for row in found["losses"]):
        return "There is no rank and seed at which every domain has an adapter, so nothing was mixed."
    rank = ranks(found)[-1]
    parts = []
    for domain in others:
        share = kept(found, rank, domain)
        if share is None:
            parts.append(f"on {domain} there was no gain to keep on every seed")
        else:
            ends = f" ({_percent(share.low)} to {_percent(share.high)})" if share.low is not None else " (one seed)"
            parts.append(f"{_percent(share.mean)} of the gain on {domain}{ends}")
    return (
        f"The adapters of {join(others)} of one rank and seed, summed with weights of 1/{len(others)} each (exactly: "
        f"their ranks are concatenated), keep at rank {rank}: {'; '.join(parts)} (95 % intervals over seeds). "
        "Weights of 1 each were not tried."
    )


def _distance(found: Found) -> str:
    low, *_, high = ranks(found)
    order = by_distance(found)
    base = ", ".join(f"{d} {number(bits_per_byte(found, d, found['base'][d]), DECIMALS)}" for d in order)
    words = {1: "shown to gain more than", -1: "shown to gain less than", 0: "not shown to gain more or less than"}
    pairs = [f"{far} is {words[side(at)]} {near} ({_interval(at)})" for far, near, at in gain_differences(found)]
    few = len(order) < 6
    return (
        "How far a domain is from what the base knows is told by the base's own loss in bits a byte, which does not "
        f"depend on how many tokens a language is cut into: {base}. "
        + (f"With {len(order)} domains no trend can be claimed, so they are compared two by two. " if few else "")
        + f"By what rank {high} gains over rank {low} (bits a byte, paired by seed, each 95 % interval for itself): "
        + ("; ".join(pairs) if pairs else "nothing is known")
        + "."
    )


def _literature(found: Found) -> str:
    sides = [side(at) for _, _, at in gain_differences(found)]
    if any(s > 0 for s in sides) and not any(s < 0 for s in sides):
        verdict = "Where anything is shown here, it agrees: the further domain gains more from rank"
    elif any(s < 0 for s in sides):
        verdict = "Here a further domain is shown to gain less from rank than a nearer one, which contradicts it"
    else:
        verdict = "Nothing of the kind is shown here, nor the contrary"
    return (
        "The LoRA paper (Hu et al. 2021, arXiv 2106.09685, footnote 6 of section 7) expects that a task in another "
        f"language than that of pretraining may need a larger rank, and gives no figures. {verdict}."
    )


def _warnings(study: Study, records: Mapping[str, StudyRecord]) -> list[str]:
    """What casts doubt on how the parts chose their adapters' learning rates."""
    return [
        f"{part.name}: {warning}"
        for domain, part in domain_studies(study).items()
        for warning in edge_warnings(find_edges(part, search_rows(part, records[domain])))
    ]


def _limits(study: Study, found: Found) -> list[str]:
    texts = ", ".join(f"{plural(found['text'][d]['rows'], 'row')} of {d}" for d in found["domains"])
    return [
        f"Test losses come from {texts}: the intervals tell how much seeds matter, not how other rows would turn out.",
        f"All were measured on one base in {found['precision']} on {found['device']}; losses in nats a token are not "
        "comparable across domains, bits a byte are.",
        "Where the domains' texts are translations of one another, an adapter also learns what they are about, which "
        "helps on all of them; that hides forgetting.",
        f"At {plural(study.train.steps, 'step')} little is learned; with more, ranks and forgetting may differ.",
        "A rank's alpha ratio and learning rate are those that the domain's own search chose.",
    ]


def _matrix(found: Found) -> Table:
    heads = ("Adapter", *(f"On {domain} text" for domain in found["domains"]))
    base = []
    for domain in found["domains"]:
        loss, text = found["base"][domain], found["text"][domain]
        bits, bytes_a_token = bits_per_byte(found, domain, loss), text["bytes"] / text["tokens"]
        below = f"{number(bits, DECIMALS)} bits a byte"
        # Sorted among changes, where the base's own is none.
        base.append(Cell(number(loss, DECIMALS), below, f"{bytes_a_token:.2f} bytes a token", 0.0))
    rows = [Row((Cell("none: the base's loss"), *base))]
    for adapter in [*found["domains"], MIXED]:
        for rank in ranks(found):
            at = [over_seeds(changes(found, adapter, rank, domain)) for domain in found["domains"]]
            if any(at):
                seeds = plural(max(i.n for i in at if i is not None), "seed")
                rows.append(Row((Cell(f"{adapter}, rank {rank}", seeds), *(change(i, DECIMALS) for i in at))))
    return Table(heads, tuple(rows))


def _kept_table(found: Found) -> Table:
    others = found["domains"][1:]
    rows = []
    for rank in ranks(found):
        cells = []
        for domain in others:
            share = kept(found, rank, domain)
            ends = f"{_percent(share.low)} to {_percent(share.high)}" if share and share.low is not None else ""
            cells.append(Cell(_percent(share.mean), ends, value=share.mean) if share else Cell("–"))
        rows.append(Row((Cell(f"rank {rank}"), *cells)))
    return Table(("Mixture", *(f"Of the gain on {domain}" for domain in others)), tuple(rows))


def _gain_table(found: Found) -> Table:
    low, *_, high = ranks(found)
    heads = (
        "Domain",
        "Loss of the base (bits a byte)",
        f"Rank {low} − rank {high} (bits a byte)",
        "The same, nats a token",
    )
    rows = []
    for domain in by_distance(found):
        bits = bits_per_byte(found, domain, found["base"][domain])
        gains = (over_seeds(rank_gain_bits(found, domain)), over_seeds(rank_gain(found, domain)))
        base = Cell(number(bits, DECIMALS), value=bits)
        rows.append(Row((Cell(domain), base, *(change(gain, DECIMALS + 1) for gain in gains))))
    return Table(heads, tuple(rows))


def _interval(at: Interval | None) -> str:
    if at is None:
        return "not measured"
    ends = span(at.low, at.high, DECIMALS, plus=True)
    return f"{signed(at.mean, DECIMALS)}, {ends if ends else 'one seed: no interval'}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share, 0)} %"
