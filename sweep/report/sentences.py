"""The recommendation in three sentences: what to use and why, what it saves and loses, and what is not known."""

from __future__ import annotations

from sweep.report.cautions import is_worst_rank
from sweep.report.intervals import INCONCLUSIVE, NON_INFERIOR, Interval
from sweep.report.results import ArmResult, Findings
from sweep.report.words import apart, arm_title, join, loss_decimals, number, plural, rate, share, signed, span
from sweep.study.schema import Study


def recommendation(study: Study, findings: Findings) -> tuple[str, ...]:
    """Sentences made of the findings alone, so that the same data always give the same words."""
    pick = findings.result(findings.recommended)
    so_far = "" if findings.finished else f"Not final, {findings.ended} of {findings.planned} trials: "
    unlearned = findings.result(findings.unlearned)
    if unlearned is not None and findings.chance_loss is not None:
        first, second = _learned_nothing(study, findings, unlearned, findings.chance_loss)
        return so_far + (_lower(first) if so_far else first), second
    if pick is None:
        return _nothing_yet(study, findings)
    if pick.arm.r == study.confirm.reference:
        first = _stay(study, findings, pick)
    else:
        first = _go_smaller(study, pick)
    first = so_far + (_lower(first) if so_far else first)
    return first, _saves_and_loses(study, findings, pick), _not_known(study, findings, pick)


def _nothing_yet(study: Study, findings: Findings) -> tuple[str, str]:
    if findings.arms:
        first = f"No recommendation yet: the reference, rank {study.confirm.reference}, has no confirmed loss."
    else:
        first = "No recommendation yet: no confirm trial has ended, and search scores choose but are not results."
    n = f"{findings.ended} of {plural(findings.planned, 'trial')} {'has' if findings.ended == 1 else 'have'} ended"
    return first, f"So far {n}." if not findings.finished else f"{n}, and the study is over."


def _learned_nothing(study: Study, findings: Findings, result: ArmResult, chance_loss: float) -> tuple[str, str]:
    decimals, reference = loss_decimals(study.confirm.epsilon), study.confirm.reference
    first = (
        f"Nothing can be concluded: rank {result.arm.r} was not shown to have learned anything, its test loss "
        f"{number(result.loss_mean, decimals)} against {number(chance_loss, decimals)} for always answering by the "
        "labels' frequencies; train longer or at other learning rates."
    )
    if result.arm.name == findings.reference:
        return first, f"The verdicts are against rank {reference} and so say nothing; no arm is recommended."
    return first, (
        f"That it is non-inferior to rank {reference} says only that ε = {study.confirm.epsilon:g} is wide; "
        "no arm is recommended."
    )


def _go_smaller(study: Study, pick: ArmResult) -> str:
    pairs = pick.to_reference
    assert pairs is not None  # a verdict needs pairs
    decimals, reference = loss_decimals(study.confirm.epsilon), study.confirm.reference
    assert pairs.upper is not None  # nor from one pair
    bound = (
        f"at least {number(-pairs.upper, decimals)} lower"
        if pairs.upper < 0
        else (f"at most {number(pairs.upper, decimals)} higher")
    )
    return (
        f"Use {_setting(study, pick)}: it is the smallest rank shown non-inferior to rank {reference}, its test "
        f"loss {bound} (one-sided 95 % bound, {pairs.n} paired seeds), where an ε of {study.confirm.epsilon:g} "
        "was declared."
    )


def _stay(study: Study, findings: Findings, pick: ArmResult) -> str:
    smaller = [r for r in findings.arms if r.in_sequence and r.arm.r < pick.arm.r]
    if all(arm.r >= pick.arm.r for arm in study.list_arms() if arm.r):
        decimals = loss_decimals(study.confirm.epsilon)
        ends = span(pick.loss_low, pick.loss_high, decimals)
        sure = f"95 % interval {ends}, {plural(len(pick.seeds), 'seed')}" if ends else "one seed: no interval"
        return (
            f"Use {_setting(study, pick)}: search chose it, no smaller rank was part of this study, and its confirmed "
            f"test loss is {number(pick.loss_mean, decimals)} ({sure})."
        )
    opening = f"Stay with the reference, {_setting(study, pick)}"
    if not smaller:
        return f"{opening}: no smaller rank was confirmed."
    seeds = max(len(r.seeds) for r in findings.arms)
    if seeds < 2:
        return f"{opening}: with one confirm seed there is no interval, so no smaller rank can be shown non-inferior."
    decimals = loss_decimals(study.confirm.epsilon)
    nearest = max(smaller, key=lambda r: r.arm.r)  # the sequence stopped there, or a smaller rank were the pick
    pairs, reason = nearest.to_reference, ""
    if nearest.diverged_seeds:
        reason = f"; rank {nearest.arm.r} diverged on {plural(len(nearest.diverged_seeds), 'seed')}"
    elif pairs is not None and pairs.upper is not None:
        reason = (
            f"; the loss of rank {nearest.arm.r} may differ by up to {signed(pairs.upper, decimals)} "
            f"(one-sided 95 % bound over {plural(pairs.n, 'paired seed')})"
        )
    # Arms that search did not choose may be shown so outside the sequence; they are not recommended.
    ranks = "rank" if study.confirm.finalists == "rank" else "arm of the sequence"
    epsilon = f"{study.confirm.epsilon:g}"
    return f"{opening}: no smaller {ranks} was shown non-inferior to it within the declared ε of {epsilon}{reason}."


def _saves_and_loses(study: Study, findings: Findings, pick: ArmResult) -> str:
    reference = findings.result(findings.reference)
    full = next((r for r in findings.arms if r.arm.is_full and r.seeds), None)
    parts = []
    if reference is not None and reference.arm.name != pick.arm.name:
        needs = _needs(pick, reference)
        if needs:
            parts.append(f"against rank {reference.arm.r} it needs {needs}")
    if full is not None and pick.to_full is not None:
        needs, loses = _needs(pick, full), _loses(study, pick, pick.to_full)
        parts.append(f"against full fine-tuning {f'it needs {needs}, and ' if needs else ''}{loses}")
    elif full is None:
        missing = "has no confirmed loss" if study.arms.full_finetuning else "was not part of this study"
        parts.append(f"full fine-tuning {missing}, so what is given up against it is unknown")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "Its cost has not been measured."


def _needs(ours: ArmResult, theirs: ArmResult) -> str:
    """Shares of the other arm's cost, from the solo probes; of its time only where the steps of both were even."""
    parts = []
    if ours.trainable_params and theirs.trainable_params:
        parts.append(f"{share(ours.trainable_params, theirs.trainable_params)} of the trainable parameters")
    if ours.cost and theirs.cost and theirs.cost.peak_memory_bytes:
        parts.append(f"{share(ours.cost.peak_memory_bytes, theirs.cost.peak_memory_bytes)} of the peak memory")
    if ours.cost and theirs.cost and theirs.cost.step_time_s and not (ours.cost.uneven or theirs.cost.uneven):
        parts.append(f"{share(ours.cost.step_time_s, theirs.cost.step_time_s)} of the time a step")
    if ours.cost and theirs.cost and theirs.cost.adapter_bytes:
        parts.append(f"{share(ours.cost.adapter_bytes, theirs.cost.adapter_bytes)} of the disk space")
    uneven = any(r.cost is not None and r.cost.uneven for r in (ours, theirs))
    return (join(parts) if parts else "") + (" (its time was measured too unevenly to say)" if uneven and parts else "")


def _loses(study: Study, pick: ArmResult, pairs: Interval) -> str:
    decimals = loss_decimals(study.confirm.epsilon)
    ends = span(pairs.low, pairs.high, decimals, plus=True)
    sure = f"95 % interval {ends}, {pairs.n} paired seeds" if ends else "one paired seed: no interval"
    side = "higher" if pairs.mean >= 0 else "lower"
    verdict = f"{pick.full_verdict} within ε" if pick.full_verdict == NON_INFERIOR else f"{pick.full_verdict}"
    return f"its test loss is {number(abs(pairs.mean), decimals)} {side} ({sure}): {verdict}"


def _not_known(study: Study, findings: Findings, pick: ArmResult) -> str:
    """What the evidence leaves open, of this recommendation."""
    unknown = []
    rivals = [arm for arm in study.list_arms() if arm.group == pick.arm.group and arm.name != pick.arm.name]
    if rivals and study.confirm.finalists == "rank":
        rest = f"{arm_title(pick.arm, study.list_arms())} beats {join([apart(a, study.list_arms()) for a in rivals])}"
        unknown.append(f"whether {rest}, since search chose between them on one seed")
    reference = findings.result(findings.reference)
    ranks = [r for r in findings.arms if r.arm.r and r.seeds]
    if reference is not None and is_worst_rank(reference, findings.arms):
        unknown.append("whether the reference is well tuned, as it has the highest loss of all ranks")
    smaller = sorted({r.arm.r for r in ranks if r.in_sequence and r.arm.r < pick.arm.r and r.verdict == INCONCLUSIVE})
    if smaller:
        stop = next(r for r in ranks if r.in_sequence and r.arm.r == smaller[-1])
        bound = stop.to_reference.upper if stop.to_reference else None
        decimals = loss_decimals(study.confirm.epsilon) + 1  # what stopped it may be close
        at = "" if bound is None else f", whose one-sided bound is {signed(bound, decimals)}"
        lower = f", so that {_ranks_were(smaller[:-1])} not tested" if smaller[:-1] else ""
        unknown.append(f"whether a smaller rank would do: the sequence stopped at rank {stop.arm.r}{at}{lower}")
    unsure = [r.arm for r in findings.arms if r.arm in rivals and r.verdict == INCONCLUSIVE]
    if unsure:
        unknown.append(f"whether {join([apart(a, study.list_arms()) for a in unsure])} would do as well within ε")
    edge = next((e for e in findings.edges if e.arm == pick.arm.name), None)
    if edge is not None:
        beyond = "above" if edge.side == "upper" else "below"
        unknown.append(f"whether a learning rate {beyond} {rate(edge.learning_rate)}, the edge of its grid, is better")
    if pick.full_verdict == INCONCLUSIVE:
        unknown.append("whether full fine-tuning is better by more than ε")
    unknown.append(f"how it is beyond {study.train.steps} steps, or with another split, data set or model")
    return f"Not known: {'; '.join(unknown)}."


def _ranks_were(ranks: list[int]) -> str:
    """ "ranks 1 and 2 were", "rank 2 was"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {join([str(r) for r in ranks])} {'were' if len(ranks) > 1 else 'was'}"


def _setting(study: Study, result: ArmResult) -> str:
    title = arm_title(result.arm, study.list_arms())
    return f"{title} (lora_alpha {result.arm.lora_alpha:g}) and learning rate {rate(result.learning_rate)}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
