"""Drawing a learning rate with one of Optuna's samplers, from what is known of the arm alone."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from sweep.study.schema import Range

RATE = "learning_rate"
LEARNING = ("tpe", "gp", "nsga2")  # samplers that look at the losses of earlier rates


def draw_rate(sampler: str, seed: int, rates: Range, earlier: Sequence[tuple[float, float | None]]) -> float:
    """The arm's next learning rate, to four significant digits.

    earlier: (rate, loss at the first rung) of the arm's trials so far, in order; the loss is None where there is none.
    A function of its arguments: every arm starts from the same draws, and no arm learns from another's trials.
    """
    space = FloatDistribution(rates.low, rates.high, log=rates.log)
    study = optuna.create_study(sampler=_make_sampler(sampler, seed, len(earlier), rates.values))
    for rate, loss in earlier:
        if loss is None and sampler != "qmc":
            continue
        # A sequence looks at no loss, only at whether there was a trial before.
        study.add_trial(optuna.trial.create_trial(params={RATE: rate}, distributions={RATE: space}, value=loss or 0.0))
    if sampler == "qmc":
        for _ in earlier[1:]:  # its place in the sequence; the very first rate is not part of it
            study.ask({RATE: space})
    drawn = study.ask({RATE: space}).params[RATE]
    return min(max(float(f"{drawn:.4g}"), rates.low), rates.high)


def _make_sampler(name: str, seed: int, draw: int, values: int) -> BaseSampler:
    own = zlib.crc32(f"{seed}/{draw}".encode())
    exploring = (values + 1) // 2  # with an arm's few trials the samplers' own default (10) would never end
    if name == "tpe":
        return TPESampler(seed=own, n_startup_trials=exploring)
    if name == "gp":
        return GPSampler(seed=own, n_startup_trials=exploring)
    if name == "qmc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # since Optuna 3.0; nothing the user could do about it
            return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
    if name == "nsga2":
        return NSGAIISampler(seed=own, population_size=max(2, exploring))
    return RandomSampler(seed=own)
