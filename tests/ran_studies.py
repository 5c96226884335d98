"""Studies with made-up losses in a home, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import quickstart, write_study

from sweep.driver.question import write_question
from sweep.study.arms import Arm
from sweep.study.home import Home
from sweep.study.records import to_json
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, append, read_study_record

Made = tuple[Study, StudyRecord]
SMALL = ["confirm.epsilon=0.1", "arms.alpha_ratio=[1]"]
OTHER_MODEL = {"model_fingerprint": "other"}
OTHER_DATA = {"data_fingerprint": "other"}
GPU = {"device": "NVIDIA H100", "precision": "bfloat16", "attention": "eager", "pack_size": 32}
BY_RANK = {2: 0.31, 4: 0.24, 8: 0.21, 16: 0.2, 64: 0.2, 0: 0.19}


def losses(seed: int, of: dict[int, float] = BY_RANK, spread: float = 0.01) -> Callable[[Arm, int], float]:
    """Test losses about a mean by rank."""
    rng = np.random.default_rng(seed)
    return lambda arm, _: of[arm.r] + float(rng.normal(0, spread))


def made(
    root: Path, name: str, *overrides: str, found: dict[str, Any] | None = None, seed: int = 0, **values: Any
) -> Made:
    """A study that has run in the home `root`, with made-up losses; `found` changes what was prepared."""
    study, folder = quickstart(f"name={name}", *SMALL, *overrides), Home(root).study(name)
    record = write_study(folder.path, study, **{"final_loss": losses(seed), "ends": {}, **values})
    write_question(study, folder)
    if found and record.prepared:
        append(folder.journal, "prepared", prepared=to_json(replace(record.prepared, **found)))
        record = read_study_record(folder)
    return study, record
