"""What a study will take in all, from the forecast of its arms: search with pruning, then the confirm phase. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sweep.driver.pruning import kept, steps_left
from sweep.report.words import duration, size
from sweep.study.arms import Arm
from sweep.study.finalists import finalist_groups, rates_confirmed
from sweep.study.records import Forecast, Prepared, StudyForecast
from sweep.study.schema import Study, rate_values

SECONDS_TO_PROBE, TIMES_A_RUNG = 3600.0, 10  # that a probe, and all else that trains no rung, may take before it hangs
SURELY, TIMES = 600.0, 20  # seconds, and how many times longer than forecast a pack may train before it hangs


def seconds_aside(study: Study, otherwise: float | None = None) -> float | None:
    """How long a worker may take for what is no rung: reading, calibrating, forecasting, probing."""
    given = study.resources.seconds_per_rung if study.resources else None
    return otherwise if given is None else TIMES_A_RUNG * given


@dataclass(frozen=True)
class ArmPrice:
    """Of one arm, its trials trained one by one, evaluation left out. Seconds; None where its step was not timed."""

    arm: Arm
    forecast: Forecast
    trial_s: float | None
    search_s: float | None  # its share of its rank's steps, since nobody knows who will be pruned
    confirm_s: float | None  # on all seeds, should it be a finalist


@dataclass(frozen=True)
class Effort:
    """Trial-steps and evaluations."""

    steps: int
    validations: int


def search_work(study: Study, trials: int) -> Effort:
    """Of a group of so many search trials, pruned at each rung but the last."""
    rungs, keep = study.rungs, study.search.keep
    alive, validations = trials, 0
    for rung in rungs:
        validations += alive
        alive = kept(alive, keep) if rung != rungs[-1] else alive
    return Effort(steps_left(trials, trials, rungs[0], rungs, keep), validations)


def confirm_work(study: Study, arm: Arm) -> Effort:
    """Of a finalist on all seeds, at each rate that is confirmed."""
    trials = len(study.confirm.seeds) * rates_confirmed(study, arm)
    return Effort(trials * study.train.steps, trials * len(study.rungs))


def price_arms(study: Study, forecast: StudyForecast) -> list[ArmPrice]:
    """A price an arm, in the study's order."""
    groups = Counter(arm.group for arm in study.list_arms() for _ in rate_values(study.rates(arm)))
    prices = []
    for arm in study.list_arms():
        found = forecast.of(arm.cost_key)
        assert found is not None  # a forecast has every cost_key
        n, own = groups[arm.group], len(rate_values(study.rates(arm)))
        step = found.step_time_s
        searched = search_work(study, n).steps * own / n
        confirmed = confirm_work(study, arm).steps
        seconds = [None if step is None else step * s for s in (study.train.steps, searched, confirmed)]
        prices.append(ArmPrice(arm, found, *seconds))
    return prices


def priced(study: Study, prepared: Prepared, forecast: StudyForecast) -> StudyForecast:
    """The forecast with the seconds of the whole study: training and evaluation, all in packs and all one by one.

    In packs a step of a trial takes what the calibration measured; full fine-tuning and arms that may not fit are
    trained alone. Evaluation is taken as in packs in both. Left out: arms that are not expected to fit; loading,
    checkpoints, the text of a study on forgetting, and the probes at the end. It is no bound: a pack at a late rung is
    smaller than the calibrated one, and slower a trial. Of a rank's arms the slowest stands for its finalist.
    """
    packed = alone = 0.0
    arms = [arm for arm in study.list_arms() if arm.cost_key not in forecast.doubtful]
    in_pack = packed_step(prepared)
    trials: dict[str, list[Arm]] = {}
    for arm in arms:
        trials.setdefault(arm.group, []).extend(arm for _ in rate_values(study.rates(arm)))
    for members in trials.values():
        work = search_work(study, len(members))
        times = [_step(forecast, arm) for arm in members]
        mean = sum(times) / len(times)
        packed += work.steps * (mean if in_pack is None or members[0].is_full else in_pack)
        alone += work.steps * mean
        both = work.validations * forecast.validation_s
        packed, alone = packed + both, alone + both
    for members in finalist_groups(study).values():
        times = [_step(forecast, arm) for arm in members if arm in arms]
        if not times:
            continue
        work = confirm_work(study, members[0])
        packed += work.steps * (max(times) if in_pack is None or members[0].is_full else in_pack)
        alone += work.steps * max(times)
        both = work.validations * forecast.validation_s + work.steps / study.train.steps * forecast.test_s
        packed, alone = packed + both, alone + both
    return replace(forecast, packed_s=packed, alone_s=alone)


def allowed_seconds(forecast: StudyForecast | None, arms: Sequence[Arm], steps: int, test: bool) -> float | None:
    """How long a pack of these arms may train before it is taken for hung; None where its time was not forecast.

    Ample: the forecast is of each arm alone, and a worker starts and loads the base first.
    """
    found = [forecast.of(arm.cost_key) for arm in arms] if forecast else []
    times = [one.step_time_s for one in found if one is not None and one.step_time_s is not None]
    if forecast is None or len(times) < len(arms):
        return None
    evaluation = len(arms) * (forecast.validation_s + (forecast.test_s if test else 0.0))
    return SURELY + TIMES * (steps * sum(times) + evaluation)


def forecast_lines(forecast: StudyForecast) -> list[str]:
    """What the log says of it."""
    lines = []
    if forecast.packed_s is not None and forecast.alone_s is not None:
        lines.append(
            f"forecast: training and evaluation {duration(forecast.packed_s)} in packs as calibrated; "
            f"{duration(forecast.alone_s)} one by one"
        )
    for arm in forecast.arms:
        if not arm.fits:
            lines.append(
                f"forecast: {arm.cost_key} is not expected to fit ({shortage(forecast, arm)}); it is tried last"
            )
    return lines


def shortage(forecast: StudyForecast, arm: Forecast) -> str:
    """Why an arm is not expected to fit."""
    there = f"{size(arm.peak_memory_bytes)} of {size(forecast.memory_limit_bytes)}"
    return f"{there}; {arm.note}" if arm.note else there


def packed_step(prepared: Prepared) -> float | None:
    """Seconds of a trial's step in a pack as chosen, by the calibration; None without one."""
    chosen = (prepared.precision, prepared.attention, prepared.pack_size)
    times = [
        f["ms_per_trial_step"]
        for f in prepared.calibration
        if "ms_per_trial_step" in f and (f["precision"], f["attention"], f["pack_size"]) == chosen
    ]
    return min(times) / 1000 if times else None


def _step(forecast: StudyForecast, arm: Arm) -> float:
    found = forecast.of(arm.cost_key)
    assert found is not None and found.step_time_s is not None  # doubtful arms were left out
    return found.step_time_s
