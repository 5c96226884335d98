"""From a study's records to what may be claimed. Only confirm trials make claims; the unit is the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sweep.report.alpha import alpha_fits, alpha_sentences
from sweep.report.cautions import cautions, first_unlearned
from sweep.report.confirmed import confirm_trials
from sweep.report.costs import cost_warnings
from sweep.report.forgetting import at_the_end
from sweep.report.infeasible import infeasible_warnings
from sweep.report.intervals import INFERIOR, NON_INFERIOR, REFERENCE, Interval, judge, t_interval
from sweep.report.power import power
from sweep.report.results import ArmResult, Findings
from sweep.report.search import SearchRow, edge_warnings, find_edges, search_rows
from sweep.report.sentences import recommendation
from sweep.report.test_rows import read_test_rows
from sweep.report.traps import (
    few_seeds,
    pruned_while_catching_up,
    same_effective_rate,
    small_test_set,
    still_falling,
)
from sweep.report.truncation import truncation_warnings
from sweep.report.words import join, plural, rate, without_paths
from sweep.study.arms import Arm, arms_of_ranks
from sweep.study.errors import Damaged
from sweep.study.finalists import count_confirm_trials, count_search_trials
from sweep.study.records import COMPLETE, CONFIRM, DIVERGED, FAILED, INFEASIBLE
from sweep.study.schema import Study, rate_values
from sweep.tracking.journal import StudyRecord

__all__ = ["ArmResult", "Findings", "find"]

FEW_SEEDS = 3


def find(study: Study, record: StudyRecord) -> Findings:
    """All that the records allow to be said, of finished and unfinished studies. The same records, the same words.

    Differences are paired by seed (seed s sees the same batches in every arm). `intervals.judge` tells how verdicts
    are reached. The recommendation is the smallest rank shown non-inferior to the reference, or else the reference;
    nothing, when either is not shown to be better than always answering by the labels' frequencies.
    """
    rows, epsilon = search_rows(study, record), study.confirm.epsilon
    results = _compare(
        [_result(study, record, arm) for arm in study.list_arms() if _in_confirm(record, arm)], study, rows
    )
    reference = next((r for r in results if r.verdict == REFERENCE), None)
    recommended = _recommend(results, study, rows)
    prepared = record.prepared
    chance_loss = prepared.chance_loss if prepared else None
    unlearned = first_unlearned([reference, recommended], chance_loss)
    if unlearned is not None:
        recommended = None
    edges = find_edges(study, rows)
    ended = sum(t.state is not None for t in record.trials)
    planned = count_search_trials(study) + count_confirm_trials(study, len(record.finalists))
    lora = [r for r in results if r is not reference and not r.arm.is_full]
    held = [r for r in lora if r.in_sequence] or lora
    found = power([_paired(r, reference) for r in held if reference], epsilon)
    full = next((r for r in results if r.arm.is_full), None)
    to_full = power([_paired(r, full) for r in results if full and not r.arm.is_full], epsilon)
    trials = {r.arm.name: confirm_trials(record, r.arm) for r in results}
    test_rows, unread = _test_rows(record, results)
    findings = Findings(
        arms=tuple(results),
        search=rows,
        edges=edges,
        reference=reference.arm.name if reference else None,
        chance_loss=chance_loss,
        chance_accuracy=prepared.chance_accuracy if prepared else None,
        unlearned=unlearned,
        recommended=recommended.arm.name if recommended else None,
        recommended_trial=_best_trial(record, recommended.arm) if recommended else None,
        power=found,
        power_to_full=to_full,
        sentences=(),
        warnings=(
            *cautions(study, results, recommended, {r.arm.name: paired_interval(r, recommended) for r in results}),
            *few_seeds(study, found),
            *small_test_set(study, results, reference, test_rows),
            *unread,
            *edge_warnings(edges),
            *same_effective_rate(rows),
            *still_falling(study, results, trials),
            *pruned_while_catching_up(study, record),
            *_warnings(study, record, results, rows),
            *cost_warnings(study, record),
        ),
        finished=record.finished_at is not None,
        ended=ended,
        planned=max(planned, ended),
    )
    first, *rest = recommendation(study, findings)
    of_alpha = alpha_sentences(alpha_fits(study, record)) if findings.recommended and findings.finished else []
    return replace(findings, sentences=(first, *of_alpha, *rest))


def confirmed_of_ranks(study: Study, record: StudyRecord) -> dict[int, Arm]:
    """The confirmed arm of each rank, smallest first; the one that search chose where there are several."""
    results = [_result(study, record, arm) for arm in study.list_arms() if _in_confirm(record, arm)]
    chosen = _chosen_of_ranks(results, study, search_rows(study, record))
    return {r: chosen[r].arm for r in sorted(chosen)}


def _in_confirm(record: StudyRecord, arm: Arm) -> bool:
    return any(t.state is not None for t in confirm_trials(record, arm))


def _result(study: Study, record: StudyRecord, arm: Arm) -> ArmResult:
    trials = sorted(confirm_trials(record, arm), key=lambda t: t.spec.seed)
    done = [t for t in trials if t.state == COMPLETE and t.last is not None and "test_loss" in t.last.test_metrics]
    tests = [t.last.test_metrics for t in done if t.last is not None]
    metric_name = "perplexity" if study.task == "causal-lm" else "accuracy"
    losses = tuple(test["test_loss"] for test in tests)
    metrics = tuple(test.get(f"test_{metric_name}", math.nan) for test in tests)
    none = Interval(0, math.nan)
    loss = t_interval(losses) if losses else none
    metric = t_interval(metrics) if metrics else none
    if metric_name == "accuracy" and metric.low is not None and metric.high is not None:
        metric = replace(metric, low=max(0.0, metric.low), high=min(1.0, metric.high))  # it can be nothing else
    cost = record.costs.get(arm.cost_key)
    known = record.prepared.trainable_params.get(arm.name) if record.prepared else None
    return ArmResult(
        arm=arm,
        learning_rate=trials[0].spec.learning_rate,
        seeds=tuple(t.spec.seed for t in done),
        test_losses=losses,
        metric_name=metric_name,
        metrics=metrics,
        loss_mean=loss.mean,
        loss_low=loss.low,
        loss_high=loss.high,
        metric_mean=metric.mean,
        metric_low=metric.low,
        metric_high=metric.high,
        to_full=None,
        to_reference=None,
        verdict=None,
        in_sequence=False,
        note="",
        full_verdict=None,
        full_note="",
        diverged_seeds=tuple(t.spec.seed for t in trials if t.state == DIVERGED),
        failed_seeds=tuple(t.spec.seed for t in trials if t.state == FAILED),
        infeasible_seeds=tuple(t.spec.seed for t in trials if t.state == INFEASIBLE),
        trainable_params=cost.trainable_params if cost else known,
        cost=cost,
        forgetting=at_the_end(record, done),
    )


def _compare(results: Sequence[ArmResult], study: Study, rows: Sequence[SearchRow]) -> list[ArmResult]:
    """Differences to the reference and to full fine-tuning, and the verdicts, each a family of tests of its own."""
    full = next((r for r in results if r.arm.is_full), None)
    chosen = _chosen_of_ranks(results, study, rows)
    reference = chosen.get(study.confirm.reference)
    if reference is not None and not reference.seeds:
        reference = None
    sequence = _sequence(chosen, reference)
    names = [r.arm.name for r in sequence]
    judged: dict[str, tuple[str, str]] = {}
    if reference is not None:
        aside = [r for r in results if r.arm.name not in names and not r.arm.is_full]
        judged = _judge(sequence[1:], aside, reference, study.confirm.epsilon)
        judged[reference.arm.name] = (REFERENCE, "")
    to_full: dict[str, tuple[str, str]] = {}
    if full is not None and full.seeds:
        aside = [r for r in results if r.arm.name not in names and not r.arm.is_full]
        to_full = _judge(sequence, aside, full, study.confirm.epsilon)
    compared = []
    for result in results:
        verdict, note = judged.get(result.arm.name, (None, ""))
        full_verdict, full_note = to_full.get(result.arm.name, (None, ""))
        compared.append(
            replace(
                result,
                to_full=paired_interval(result, full),
                to_reference=paired_interval(result, reference),
                verdict=verdict,
                in_sequence=result.arm.name in names,
                note=note,
                full_verdict=full_verdict,
                full_note=full_note,
            )
        )
    return compared


def _judge(
    sequence: Sequence[ArmResult], aside: Sequence[ArmResult], against: ArmResult, epsilon: float
) -> dict[str, tuple[str, str]]:
    """(verdict, note) by arm name, of each arm's paired differences to `against`."""
    diverged = {i for i, r in enumerate((*sequence, *aside)) if r.diverged_seeds}
    in_order, side_by_side, stopped = judge(
        [_paired(r, against) for r in sequence], [_paired(r, against) for r in aside], epsilon, diverged
    )
    verdicts = {}
    for i, (r, v) in enumerate(zip(sequence, in_order, strict=True)):
        untested = stopped is not None and i > stopped and v != INFERIOR
        place = f"not tested: the sequence stopped at rank {sequence[stopped or 0].arm.r}" if untested else ""
        verdicts[r.arm.name] = (v, _note(place, r, v))
    outside = "outside the sequence; Holm's correction" if len(aside) > 1 else "outside the sequence"
    for r, v in zip(aside, side_by_side, strict=True):
        verdicts[r.arm.name] = (v, _note(outside, r, v))
    return verdicts


def _sequence(chosen: Mapping[int, ArmResult], reference: ArmResult | None) -> list[ArmResult]:
    """The reference and the arms that are tested after it, in that order."""
    if reference is None:
        return []
    return [reference, *(chosen[r] for r in sorted(chosen, reverse=True) if r < reference.arm.r)]


def _note(place: str, result: ArmResult, verdict: str) -> str:
    seeds = result.diverged_seeds if verdict != INFERIOR else ()
    barred = f"diverged on {_seeds(seeds)}, so not shown non-inferior" if seeds else ""
    return "; ".join(part for part in (place, barred) if part)


def _chosen_of_ranks(results: Sequence[ArmResult], study: Study, rows: Sequence[SearchRow]) -> dict[int, ArmResult]:
    """The confirmed arm of each rank, chosen by search where there are several: test losses must not choose."""
    scores = {row.arm.name: row.best_loss for row in rows}
    stand_for_ranks = {arm.name for arm in arms_of_ranks(study.list_arms())}
    chosen: dict[int, ArmResult] = {}
    for result in results:
        rival = chosen.get(result.arm.r)
        if result.arm.name in stand_for_ranks and (rival is None or _score(scores, result) < _score(scores, rival)):
            chosen[result.arm.r] = result
    return chosen


def _score(scores: Mapping[str, float | None], result: ArmResult) -> float:
    score = scores.get(result.arm.name)
    return math.inf if score is None else score


def _paired(result: ArmResult, other: ArmResult) -> list[float]:
    theirs = dict(zip(other.seeds, other.test_losses, strict=True))
    return [loss - theirs[s] for s, loss in zip(result.seeds, result.test_losses, strict=True) if s in theirs]


def paired_interval(result: ArmResult, other: ArmResult | None) -> Interval | None:
    """Of the differences of test loss, result − other, over the seeds that both completed."""
    if other is None or other.arm.name == result.arm.name:
        return None
    differences = _paired(result, other)
    return t_interval(differences) if differences else None


def _recommend(results: Sequence[ArmResult], study: Study, rows: Sequence[SearchRow]) -> ArmResult | None:
    """Smallest rank of the sequence that is non-inferior, else the reference; None while that has no loss."""
    chosen = _chosen_of_ranks(results, study, rows)
    for r in sorted(chosen):
        if chosen[r].verdict == REFERENCE or (r < study.confirm.reference and chosen[r].verdict == NON_INFERIOR):
            return chosen[r]
    return None


def _test_rows(
    record: StudyRecord, results: Sequence[ArmResult]
) -> tuple[dict[str, list[dict[str, np.ndarray]]], list[str]]:
    """By arm, one for each of its seeds in their order; and a warning for each arm whose rows cannot be read."""
    found, warnings = {}, []
    for result in results:
        by_seed = {t.spec.seed: t for t in confirm_trials(record, result.arm)}
        try:
            found[result.arm.name] = read_test_rows([by_seed[seed] for seed in result.seeds])
        except (Damaged, OSError) as error:
            found[result.arm.name] = []
            why = f"{result.arm.name}: whether the test set is large enough cannot be told: {error}"
            warnings.append(without_paths(why))
    return found, warnings


def _best_trial(record: StudyRecord, arm: Arm) -> int | None:
    """Chosen by validation loss: the test split reports and never chooses."""
    scored = [
        (t.last.eval_loss, t.spec.number)
        for t in confirm_trials(record, arm)
        if t.state == COMPLETE and t.last is not None and t.last.eval_loss is not None
    ]
    return min(scored)[1] if scored else None


def _warnings(study: Study, record: StudyRecord, results: Sequence[ArmResult], rows: Sequence[SearchRow]) -> list[str]:
    warnings = []
    for result in results:
        barred = "" if result.verdict in (None, REFERENCE) else " An arm that diverged is not called non-inferior."
        gone = ((result.diverged_seeds, "diverged", barred), (result.failed_seeds, "failed", ""))
        for seeds, what, so in (*gone, (result.infeasible_seeds, "found no memory", "")):
            if seeds:
                left_out = f"{_seeds(seeds)} {what} and {_left(seeds)} left out of its means."
                warnings.append(f"{result.arm.name}: {left_out}{so}")
    for (arm, at, state), lost in _lost_elsewhere(record).items():
        warnings.append(f"{arm} at {rate(at)}: {_seeds(lost)} {state} and {_left(lost)} left out there.")
    seeds_done = max((len(r.seeds) for r in results), default=0)
    if seeds_done and len(study.confirm.seeds) < FEW_SEEDS:
        n = plural(len(study.confirm.seeds), "confirm seed")
        warnings.append(
            f"{n}: too few to show much. With one there is no interval, with two it is 12.7 standard errors."
        )
    for row in rows:
        if row.failed:
            warnings.append(
                f"{row.arm.name}: {row.failed} of {plural(row.trials, 'search trial')} failed, "
                "so it was tuned on fewer learning rates than the others."
            )
        ended_badly = row.trials > row.infeasible and not row.complete and not row.pruned
        if ended_badly and record.finished_at is not None:
            warnings.append(f"{row.arm.name}: all of its search trials diverged or failed; nothing is known of it.")
    warnings += infeasible_warnings(study, record)
    if len(rate_values(study.tune.learning_rate)) == 1:
        warnings.append("The learning rate was not tuned: each arm had one value, which may suit some arms better.")
    if record.prepared is not None and study.data.max_length is not None:
        warnings += truncation_warnings(record.prepared, study.task, study.data.max_length)
    return [*warnings, *(without_paths(w) for w in record.warnings)]


def _lost_elsewhere(record: StudyRecord) -> dict[tuple[str, float, str], list[int]]:
    """Seeds that did not complete at rates other than the arm's own, where every rate is confirmed."""
    own = {
        arm.name: {t.spec.number for t in confirm_trials(record, arm)} for arm in {t.spec.arm for t in record.trials}
    }
    lost: dict[tuple[str, float, str], list[int]] = {}
    for trial in record.trials:
        spec, ended = trial.spec, trial.state
        if spec.phase == CONFIRM and spec.number not in own[spec.arm.name] and ended not in (None, COMPLETE):
            lost.setdefault((spec.arm.name, spec.learning_rate, str(ended)), []).append(spec.seed)
    return lost


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {join([str(s) for s in seeds])}"


def _left(seeds: Sequence[int]) -> str:
    return "are" if len(seeds) > 1 else "is"
