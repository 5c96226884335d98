"""What speaks against a recommendation: arms that learned nothing, better finalists, a reference that looks bad."""

from __future__ import annotations

from collections.abc import Sequence

from sweep.report.intervals import REFERENCE, Interval, t_interval
from sweep.report.results import ArmResult
from sweep.report.words import loss_decimals, number, plural, span
from sweep.study.schema import Study


def beats_chance(result: ArmResult, chance_loss: float) -> bool:
    """Whether its mean test loss is shown to be lower: by its one-sided 95 % bound, or with one seed by that alone."""
    interval = t_interval(result.test_losses)
    return (interval.mean if interval.upper is None else interval.upper) < chance_loss


def first_unlearned(results: Sequence[ArmResult | None], chance_loss: float | None) -> str | None:
    """The first arm that is not shown to be better than chance; None where chance is not known."""
    if chance_loss is None:
        return None
    return next((r.arm.name for r in results if r is not None and not beats_chance(r, chance_loss)), None)


def cautions(
    study: Study, results: Sequence[ArmResult], pick: ArmResult | None, to_pick: dict[str, Interval | None]
) -> list[str]:
    """Warnings about what was confirmed. to_pick: the paired differences arm − recommended arm, by arm name."""
    epsilon, decimals = study.confirm.epsilon, loss_decimals(study.confirm.epsilon)
    told = []
    for result in results:
        pairs = to_pick.get(result.arm.name)
        if pick is None or pairs is None or pairs.mean >= -epsilon:
            continue
        ends = span(pairs.low, pairs.high, decimals, plus=True)
        sure = f"95 % interval {ends}, {plural(pairs.n, 'paired seed')}" if ends else "one paired seed: no interval"
        told.append(
            f"{_called(study, result)}'s test loss is {number(-pairs.mean, decimals)} lower than that of the "
            f"recommended arm ({sure}), more than ε = {epsilon:g}."
        )
    lora = [r for r in results if r.seeds and r.arm.r]
    reference = next((r for r in lora if r.verdict == REFERENCE), None)
    others = [r.loss_mean for r in lora if reference is not None and r.arm.r != reference.arm.r]
    if reference is not None and others and reference.loss_mean > max(others):
        ends = span(reference.loss_low, reference.loss_high, decimals)
        sure = f"95 % interval {ends}" if ends else "one seed: no interval"
        told.append(
            f"the reference, rank {reference.arm.r}, has the highest loss of all ranks "
            f"({number(reference.loss_mean, decimals)}, {sure}): it may be badly tuned, and being non-inferior to it "
            "says little."
        )
    return told


def _called(study: Study, result: ArmResult) -> str:
    if result.arm.is_full:
        return "full fine-tuning"
    return result.arm.group if study.confirm.finalists == "rank" else result.arm.name
