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
    told += _accuracy_against_loss(study, results, pick)
    reference = next((r for r in results if r.seeds and r.verdict == REFERENCE), None)
    if reference is not None and is_worst_rank(reference, results):
        ends = span(reference.loss_low, reference.loss_high, decimals)
        sure = f"95 % interval {ends}" if ends else "one seed: no interval"
        told.append(
            f"the reference, rank {reference.arm.r}, has the highest loss of all ranks "
            f"({number(reference.loss_mean, decimals)}, {sure}): it may be badly tuned, and being non-inferior to it "
            "says little."
        )
    return told


def is_worst_rank(reference: ArmResult, results: Sequence[ArmResult]) -> bool:
    """Whether all confirmed arms of other ranks have a lower mean loss."""
    others = [r.loss_mean for r in results if r.seeds and r.arm.r and r.arm.r != reference.arm.r]
    return bool(others) and reference.loss_mean > max(others)


def _accuracy_against_loss(study: Study, results: Sequence[ArmResult], pick: ArmResult | None) -> list[str]:
    """Where the recommended arm has the lower loss and is shown to have the lower accuracy, or the other way round."""
    told = []
    for other in results:
        if (
            pick is None
            or other is pick
            or pick.metric_name != "accuracy"
            or not (other.arm.is_full or other.verdict == REFERENCE)
        ):
            continue
        theirs = {s: (loss, hit) for s, loss, hit in zip(other.seeds, other.test_losses, other.metrics, strict=True)}
        pairs = [
            (loss, hit, *theirs[s])
            for s, loss, hit in zip(pick.seeds, pick.test_losses, pick.metrics, strict=True)
            if s in theirs
        ]
        if len(pairs) < 2:
            continue
        loss, hits = t_interval([p[0] - p[2] for p in pairs]), t_interval([100 * (p[1] - p[3]) for p in pairs])
        assert hits.low is not None and hits.high is not None
        if (hits.high < 0 and loss.mean < 0) or (hits.low > 0 and loss.mean > 0):
            ends = ("lower" if found.mean < 0 else "higher" for found in (loss, hits))
            told.append(
                f"loss and accuracy disagree: against {_called(study, other)} the recommended arm's loss is "
                f"{next(ends)}, and its accuracy {next(ends)} by "
                f"{number(abs(hits.mean), 1)} points (95 % interval {span(hits.low, hits.high, 1, plus=True)}, "
                f"{plural(hits.n, 'paired seed')}). The verdicts are about loss."
            )
    return told


def _called(study: Study, result: ArmResult) -> str:
    if result.arm.is_full:
        return "full fine-tuning"
    return result.arm.group if study.confirm.finalists == "rank" else result.arm.name
