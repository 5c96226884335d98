"""A study's record with made-up numbers, written through the real journal and read back from disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sweep.study.arms import Arm
from sweep.study.file import read_study
from sweep.study.home import StudyFolder
from sweep.study.records import (
    COMPLETE,
    CONFIRM,
    DIVERGED,
    FAILED,
    PRUNED,
    SEARCH,
    Cost,
    Measurement,
    Prepared,
    SourceText,
    TrialSpec,
    to_json,
)
from sweep.study.schema import Study, rate_values
from sweep.tracking.journal import StudyRecord, append, append_asked, append_end, append_rung, read_study_record

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
THREE_RATES = (
    "tune.learning_rate={low: 3.0e-3, high: 3.0e-2, values: 3}",
    "tune.full_finetuning.learning_rate={low: 2.0e-4, high: 2.0e-3, values: 3}",
)
SOURCE_LOSS = 3.0  # of the base
FLOOR = {2: 0.262, 4: 0.225, 8: 0.205, 64: 0.198, 0: 0.182}  # final loss by rank; 0: full fine-tuning
SESSION = {  # as `sweep.driver.provenance` tells it
    "command": "sweep run studies/quickstart.yaml",
    "commit": "0123456789abcdef0123456789abcdef01234567 + uncommitted changes",
    "system": "Linux-6.1.0-x86_64-with-glibc2.36",
    "hardware": {"cpu": "AMD EPYC 9654", "cores": 2, "memory_bytes": 16 * 2**30, "gpus": []},
    "versions": {"python": "3.11.9", "sweep": "0.1.0", "optuna": "5.0.0"},
}
END = {  # (phase, arm, learning rate or seed) → how that trial ends other than by the plan
    (SEARCH, "r64-ratio2", 0.03): DIVERGED,
    (SEARCH, "r8-ratio1", 0.003): FAILED,
    (CONFIRM, "r2-ratio2", 4): DIVERGED,
}


def quickstart(*overrides: str) -> Study:
    """The quickstart with three rates an arm."""
    return read_study(QUICKSTART, (*THREE_RATES, *overrides)).study


def write_study(
    folder: Path,
    study: Study,
    final_loss: Callable[[Arm, int], float] | None = None,
    *,
    ends: Mapping[tuple[str, str, float], str] = END,
    costs: bool = True,
    prepared: bool = True,
    chance: tuple[float | None, float | None] = (1.604, 0.232),
    stop_after: int | None = None,
    forgets: Callable[[Arm, int, int], float] | None = None,
) -> StudyRecord:
    """Every trial of the study as a run would leave it; with `stop_after`, only the first trials and no end.

    forgets: rise of the loss on source text of (arm, seed, step), where the study asks about it.
    chance: loss and accuracy of always answering by the labels' frequencies.
    final_loss: test loss of (arm, seed) in the confirm phase; without it a plausible one with noise.
    """
    home = StudyFolder(folder)
    append(home.journal, "started", **SESSION)
    if prepared:
        append(home.journal, "prepared", prepared=to_json(_prepared(study, chance, forgets is not None)))
    rng = np.random.default_rng(7)
    noise = {s: rng.normal(0, 0.012) for s in study.confirm.seeds}  # of the seed: shared by all arms

    def plausible(arm: Arm, seed: int) -> float:
        return FLOOR.get(arm.r, 0.21) + noise[seed] + rng.normal(0, 0.008)

    plan = _plan(study, home, ends)
    for i, (spec, state, steps) in enumerate(plan):
        if stop_after is not None and i >= stop_after:
            return read_study_record(home)
        _write_trial(study, spec, state, steps, (final_loss or plausible), rng, forgets)
    if costs:
        for arm in {arm.cost_key: arm for arm in study.list_arms()}.values():
            append(home.journal, "cost", cost=to_json(_cost(arm)))
    finalists = list({(s.arm.name, s.learning_rate): None for s, _, _ in plan if s.phase == CONFIRM})
    append(home.journal, "finalists", finalists=finalists)
    append(home.journal, "finished")
    return read_study_record(home)


def _plan(
    study: Study, home: StudyFolder, ends: Mapping[tuple[str, str, float], str]
) -> list[tuple[TrialSpec, str, int]]:
    """(trial, end state, steps): one trial an arm ends the search, the others are pruned; then the finalists."""
    plan: list[tuple[TrialSpec, str, int]] = []
    best: dict[int, tuple[Arm, float]] = {}
    for arm in study.list_arms():
        rates = rate_values(study.rates(arm))
        kept = len(rates) - 1 if arm.r == 2 else min(1, len(rates) - 1)  # rank 2 wants the highest rate: an edge
        for i, rate in enumerate(rates):
            spec = TrialSpec(len(plan), arm, rate, study.search.seed, SEARCH, str(home.trial(len(plan))))
            state = COMPLETE if i == kept and arm.name != "r4-ratio1" else PRUNED
            steps = study.train.steps if state == COMPLETE else study.rungs[min(i % 2, len(study.rungs) - 1)]
            plan.append((spec, ends.get((SEARCH, arm.name, rate), state), steps))
        best[arm.r] = (arm, rates[kept])
    chosen = list(best.values())
    if study.confirm.finalists == "arm":
        chosen = [(arm, rate_values(study.rates(arm))[-1]) for arm in study.list_arms()]
    for seed in study.confirm.seeds:
        for arm, rate in chosen:
            spec = TrialSpec(len(plan), arm, rate, seed, CONFIRM, str(home.trial(len(plan))))
            plan.append((spec, ends.get((CONFIRM, arm.name, seed), COMPLETE), study.train.steps))
    return plan


def _write_trial(
    study: Study,
    spec: TrialSpec,
    state: str,
    steps: int,
    final_loss: Callable[[Arm, int], float],
    rng: np.random.Generator,
    forgets: Callable[[Arm, int, int], float] | None,
) -> None:
    append_asked(spec)
    if state == FAILED:
        append_end(spec, state, "worker died: /home/someone/.cache/model/weights is cut short")
        return
    rates = rate_values(study.rates(spec.arm))
    slow = 1 + 0.5 * abs(rates.index(spec.learning_rate) - (len(rates) - 1) / 2)
    final = final_loss(spec.arm, spec.seed) if spec.phase == CONFIRM else FLOOR.get(spec.arm.r, 0.21) * slow

    def at(step: int) -> float:
        return final + (1.6 - final) * math.exp(-5.5 * step / (study.train.steps * slow))

    start = 0
    for stop in (rung for rung in study.rungs if rung <= steps):
        last = stop == steps
        gone = state == DIVERGED and last
        train = tuple(max(0.02, at(s) * (1 + rng.normal(0, 0.12))) for s in range(start + 1, stop + 1 - 5 * gone))
        value = at(stop) if stop < study.train.steps else final
        tested = spec.phase == CONFIRM and last and not gone
        append_rung(
            spec,
            Measurement(
                spec.number,
                start,
                stop,
                train,
                None if gone else value + 0.01,
                {} if gone else {"eval_accuracy": 1 - value / 3},
                {"test_loss": value, "test_accuracy": 1 - value / 3} if tested else {},
                "",  # nothing lies on disk
                stop - 5 if gone else None,
                pack_size=4,
                pack_seconds=8.0,
                tokens=480 * (stop - start),
                **({} if forgets is None or spec.phase != CONFIRM or gone else _source(spec, start, stop, forgets)),
            ),
        )
        start = stop
    append_end(spec, state, "loss is not finite" if state == DIVERGED else "")


def _source(spec: TrialSpec, start: int, stop: int, forgets: Callable[[Arm, int, int], float]) -> dict[str, Any]:
    loss = {"forgetting_loss": SOURCE_LOSS + forgets(spec.arm, spec.seed, stop)}
    return loss if start else {**loss, "eval_loss_at_start": 1.61}


def _cost(arm: Arm) -> Cost:
    trainable = 22_713_216 if arm.is_full else 9216 * arm.r + 1925
    mib = 2**20
    memory = {
        "weights": 87 * mib + (0 if arm.is_full else 4 * trainable),
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": (118 if arm.is_full else 92) * mib,
    }
    step = 0.31 if arm.is_full else 0.18 + arm.r / 2000
    peak = int(1.04 * sum(memory.values()))
    return Cost(
        arm.cost_key, trainable, 22_713_216, peak, memory, step, (step,) * 5, 480 / step, 4 * trainable + 900, "cpu"
    )


def _prepared(study: Study, chance: tuple[float | None, float | None], source: bool) -> Prepared:
    return Prepared(
        rows={"train": 1713, "validation": 131, "test": 327},
        duplicates_removed=54,
        data_fingerprint="9f31c0a2",
        labels=("business", "entertainment", "politics", "sport", "tech"),
        model_fingerprint="51be77d0",
        total_params=22_713_216,
        trainable_params={arm.name: _cost(arm).trainable_params for arm in study.list_arms()},
        device="cpu",
        precision="float32",
        attention="sdpa",
        pack_size=8,
        calibration=(
            {"precision": "float32", "attention": "sdpa", "pack_size": 8, "ms_per_trial_step": 21.4},
            {"precision": "bfloat16", "attention": "sdpa", "pack_size": 8, "failed": "RuntimeError: no bfloat16"},
        ),
        tokens_per_step=480.0,
        chance_loss=chance[0],
        chance_accuracy=chance[1],
        versions={"python": "3.11.9", "torch": "2.13.0", "transformers": "5.0.0"},
        source_text=SourceText(200, 3650, 3, "77aa", True, SOURCE_LOSS, SOURCE_LOSS) if source else None,
    )
