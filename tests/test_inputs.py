"""A worker that comes later trains on what the study began with, or says that it does not have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from peft_reference import arm, trial

from sweep.study.errors import FieldError
from sweep.study.records import Prepared, Setup, Unit
from sweep.training.rung import train_rung


@pytest.mark.parametrize(
    ("was", "field"), [({"data_fingerprint": "other"}, "data.source"), ({"model_fingerprint": "other"}, "model")]
)
def test_a_worker_does_not_train_on_other_inputs(
    bbc: tuple[Setup, Prepared], tmp_path: Path, was: dict[str, str], field: str
) -> None:
    setup, prepared = bbc
    unit = Unit(setup, replace(prepared, **was), (trial(0, arm(2, 1), 1e-3, 1, tmp_path),), 0, 1, False)
    with pytest.raises(FieldError, match="is not on this worker's machine what the study began with") as caught:
        train_rung(unit)
    assert [problem for problem, _ in caught.value.problems] == [field]
    assert not (tmp_path / "0").exists()
