"""What is said of the rank that updates use: each sentence with its interval, and how it stands to the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sweep.report.intervals import Interval
from sweep.report.rank_use_numbers import (
    Found,
    Truncated,
    arms_of,
    called,
    chosen_of,
    column,
    factor_over_seeds,
    over_seeds,
    ratio,
    rows_of,
    similarity_of,
)
from sweep.report.rank_use_tables import brackets, few, percent, rule, similarity_interval, two
from sweep.report.words import count, join, loss_decimals, plural, signed, span
from sweep.study.schema import Study

PAPER = "the LoRA paper (arXiv 2106.09685, GPT-3, layer 48)"
LIT = 0.5  # φ from which the paper calls directions shared


def sentences(study: Study, found: Found, cut: Sequence[Truncated]) -> list[str]:
    """What is shown, a paragraph each."""
    return [
        _used(study, found),
        _how(found),
        _truncation(study, cut),
        _shared(study, found),
        _amplification(study, found),
        _suggestion(found),
    ]


def _how(found: Found) -> str:
    layers = len({row["layer"] for row in found["layers"]})
    return (
        f"ΔW = W′ − W₀ is what training added to a weight, looked at in {plural(layers, 'layer')} of every confirm "
        "trial whose weights were kept. Values are means over a trial's layers, intervals 95 % t-intervals over the "
        "seeds (for φ over pairs of seeds; pairs share seeds, so those may be a little narrow). The effective rank is "
        "exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007): k for k equal ones."
    )


def _used(study: Study, found: Found) -> str:
    told = []
    for arm in arms_of(study, found):
        rows = rows_of(found, arm)
        effective, kept = (over_seeds(rows, column(name)) for name in ("effective_rank", "kept_rank"))
        most = arm.r if not arm.is_full else max(min(row["shape"]) for row in rows)
        told.append(
            f"{called(study, found, arm)}: effective rank {few(effective.mean)}{brackets(effective)} of "
            f"{'at most ' if arm.is_full else ''}{most}, and {few(kept.mean)} singular values "
            f"hold {100 * found['keep']:g} % of ‖ΔW‖²"
        )
    return "; ".join(told)[0].upper() + "; ".join(told)[1:] + "."


def _shared(study: Study, found: Found) -> str:
    """Against section 7.2: r = 8 and r = 64 share their top direction, φ above 0.5, and not the others."""
    *smaller, largest = chosen_of(study, found)
    if not smaller:
        return ""
    small = smaller[-1]
    told, verdicts = [], []
    for name, of in (("A", "A"), ("ΔW's input side", "input"), ("ΔW's output side", "output")):
        entry = similarity_of(found, of, small, largest)
        if entry is not None:
            top, whole = similarity_interval(entry["top"]), similarity_interval(entry["whole"])
            kind, highest = max(entry["top_by_kind"].items(), key=lambda item: item[1])
            told.append(
                f"for {name} {two(top.mean)}{brackets(top)}, at most {two(highest)} ({kind}) by kind of layer, and "
                f"{two(whole.mean)} over all of rank {small.r}"
            )
            verdicts.append(f"for {name} {_against_lit(top)}")
    same = similarity_of(found, "A", small, largest, same_seed=True)
    start = float(np.mean(same["whole"])) if same is not None else 0.0
    alike = (
        f" Trials of one seed begin with the same random rows: rank {small.r}'s A lies in rank {largest.r}'s by "
        f"{two(start)}, which is no sign of learning, so other seeds are compared here."
        if start > LIT
        else ""
    )
    if not told:
        return f"With one confirm seed, trials of different seeds cannot be compared.{alike}"
    chance = similarity_of(found, "random input", small, largest)
    by_chance = (
        f" Chance gives {two(float(np.mean(chance['top'])))} and, over all, {two(float(np.mean(chance['whole'])))} on "
        "the input side."
        if chance is not None
        else ""
    )
    return (
        f"Top direction of ranks {small.r} and {largest.r}, trained from different seeds, by φ(1, 1): "
        f"{'; '.join(told)}.{by_chance} {PAPER[0].upper()}{PAPER[1:]} found, on A, that ranks 8 and 64 share direction "
        f"1 by more than {LIT:g} and the others hardly. Of direction 1 that is {join(verdicts)}. A begins at random, "
        "and the input side of ΔW = BA lies in A's rows, so after few steps both still tell of the start; B begins at "
        f"zero, so the output side is what was learned.{alike}"
    )


def _against_lit(top: Interval) -> str:
    if top.low is None or top.high is None:
        return "not decided (one pair)"
    if top.low > LIT:
        return "shown here too"
    return "contradicted here" if top.high < LIT else f"not decided here (the interval holds {LIT:g})"


def _amplification(study: Study, found: Found) -> str:
    """Against section 7.3: ΔW amplifies directions that W₀ has but does not emphasise, the more the smaller r is."""
    chosen = chosen_of(study, found)
    told = []
    for arm in [*chosen, *(a for a in arms_of(study, found) if a.is_full)]:
        factor = factor_over_seeds(rows_of(found, arm), column("amplification"))
        told.append(f"{called(study, found, arm)} {two(factor.mean)}{brackets(factor)}")
    rows = rows_of(found, chosen[-1])
    to_chance = factor_over_seeds(rows, ratio("in_update", "in_random"))
    to_base = factor_over_seeds(rows, ratio("in_update", "in_base"))
    if to_chance.low is None or to_chance.high is None:
        emphasis = "with one seed, that is not decided here"
    elif to_chance.low > 1 and to_base.high is not None and to_base.high < 1:
        emphasis = "here the same"
    elif to_chance.low > 1:
        emphasis = "here they are present, and it is not shown that they are not emphasised"
    elif to_chance.high < 1:
        emphasis = "here it is contradicted: W₀ is weaker in them than in random ones"
    else:
        emphasis = "here it is not shown that W₀ is stronger in them than in random ones"
    return (
        f"Amplification, ‖ΔW‖ over ‖UᵀW₀V‖ in ΔW's own directions (geometric means): {'; '.join(told)}. "
        f"{PAPER[0].upper()}{PAPER[1:]} has 21.5 at r = 4 and 1.9 at r = 64.{_amplifies(study, found)} In rank "
        f"{chosen[-1].r}'s directions W₀ is {two(to_chance.mean)} times{brackets(to_chance)} as strong as in random "
        f"ones and {two(to_base.mean)} times{brackets(to_base)} as strong as in its own; the paper found them present "
        f"in W₀ but not emphasised, {emphasis}."
    )


def _amplifies(study: Study, found: Found) -> str:
    """Whether ΔW outweighs W₀ in its directions, and whether less so at the largest rank."""
    chosen = chosen_of(study, found)
    first, last = (factor_over_seeds(rows_of(found, arm), column("amplification")) for arm in (chosen[0], chosen[-1]))
    if first.low is None or first.high is None or last.low is None or last.high is None:
        return ""
    told = ""
    if last.high < 1:
        told = f" At rank {chosen[-1].r} W₀ stays the stronger, which contradicts it."
    elif last.low > 1:
        told = f" At rank {chosen[-1].r} ΔW is the stronger, as there."
    if len(chosen) == 1:
        return told
    ranks = f"from rank {chosen[0].r} to rank {chosen[-1].r}"
    if first.low > last.high:
        return f"{told} That it falls {ranks} agrees with it."
    if first.high < last.low:
        return f"{told} That it rises {ranks} contradicts it."
    return f"{told} No change {ranks} is shown."


def _truncation(study: Study, cut: Sequence[Truncated]) -> str:
    decimals = loss_decimals(study.confirm.epsilon)
    whole = max(row.rank for row in cut) if cut else 0
    told = []
    for row in reversed(cut):
        if row.rank == whole or row.to_trained is None:
            continue
        pairs = row.to_trained
        if pairs.low is None or pairs.high is None:
            verdict = "one pair: no interval"
        elif pairs.high < 0:
            verdict = "better than training at it"
        elif pairs.low > 0:
            verdict = "worse than training at it"
        else:
            verdict = "no difference shown"
        ends = span(pairs.low, pairs.high, decimals, plus=True)
        sure = f" ({ends}, {pairs.n} paired seeds)" if ends else ""
        told.append(
            f"to rank {row.rank} it loses {percent(row.lost)} of ‖ΔW‖² and differs from adapters trained at that rank "
            f"by {signed(pairs.mean, decimals)} in test loss{sure}: {verdict}"
        )
    if not told:
        return ""
    return f"Rank {whole} truncated: {'; '.join(told)}."


def _suggestion(found: Found) -> str:
    parts, uniform = [], {}
    for s in found["suggestions"]:
        others = plural(len(s["rank_pattern"]), "layer")
        parts.append(f"one that {rule(s)} takes {count(s['parameters'])} (rank {s['rank']}, {others} with another)")
        uniform = s["parameters_of_rank"]
    ranks = join([f"{count(number)} at rank {r}" for r, number in uniform.items()])
    return (
        f"Two rank patterns follow from the spectra of rank {max(map(int, found['chosen']))}. Of adapter parameters, "
        f"{join(parts)}; one rank throughout takes {ranks}. The patterns are suggestions and have not been trained: a "
        "spectrum says where the update is large, not what the loss needs."
    )
