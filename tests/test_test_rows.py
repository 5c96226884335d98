"""The losses of test rows that a trial leaves: the numbers its test loss is made of, in one order for all trials."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import cross_entropy

from sweep.study.arms import lora_arms
from sweep.study.records import CONFIRM, Prepared, Setup, TrialSpec, Unit
from sweep.training.base import load_base
from sweep.training.rung import located, tokenised, train_rung


def rows_of(setup: Setup, prepared: Prepared, folder: Path, ranks: list[int]) -> list[dict[str, np.ndarray]]:
    modules = ("query", "value") if setup.task == "sequence-classification" else ("q_proj", "v_proj")
    arms = lora_arms(ranks, [1.0], ["lora"], [modules])
    trials = [TrialSpec(i, arm, 1e-3, 1, CONFIRM, str(folder / arm.name)) for i, arm in enumerate(arms)]
    found = train_rung(Unit(setup, prepared, tuple(trials), 0, setup.train.steps, test=True))
    rows = [load_file(Path(t.folder) / m.test_rows) for t, m in zip(trials, found, strict=True)]
    for row, measurement in zip(rows, found, strict=True):
        loss = row["loss"].sum(dtype=np.float64) / row["targets"].sum(dtype=np.float64)
        assert loss == pytest.approx(measurement.test_metrics["test_loss"], rel=1e-5)
    return rows


def test_rows_of_classification_add_up_to_the_test_loss(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    setup, prepared = bbc
    for row in rows_of(setup, prepared, tmp_path, [2, 8]):
        assert row["loss"].shape == row["targets"].shape == (prepared.rows["test"],)
        assert (row["targets"] == 1).all()


def test_rows_are_the_same_packed_and_alone(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    packed = rows_of(*bbc, tmp_path / "packed", [2, 8, 64])
    (alone,) = rows_of(*bbc, tmp_path / "alone", [8])
    np.testing.assert_allclose(packed[1]["loss"], alone["loss"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_rows_of_a_language_model_are_sums_over_their_tokens(manual: tuple[Setup, Prepared], tmp_path: Path) -> None:
    """At a rate of nearly zero the rows are those of the base, computed here one row at a time."""
    setup, prepared = manual
    arm = lora_arms([2], [1.0], ["lora"], [("q_proj", "v_proj")])[0]
    trial = TrialSpec(0, arm, 1e-12, 1, CONFIRM, str(tmp_path))
    (found,) = train_rung(Unit(setup, prepared, (trial,), 0, setup.train.steps, test=True))
    rows = load_file(tmp_path / found.test_rows)
    data = tokenised(setup)
    base = load_base(
        located(setup), setup.task, prepared.labels, data.pad_token_id, prepared.precision, prepared.attention
    )
    order = np.argsort(data.test.lengths, kind="stable")
    for place in (0, len(order) // 2, len(order) - 1):
        begin, end = data.test.offsets[order[place]], data.test.offsets[order[place] + 1]
        ids = torch.from_numpy(data.test.input_ids[begin:end].astype(np.int64))
        with torch.no_grad():
            logits = base.model(input_ids=ids[None]).logits[0, :-1].float()
        assert rows["targets"][place] == len(ids) - 1
        assert rows["loss"][place] == pytest.approx(float(cross_entropy(logits, ids[1:], reduction="sum")), rel=1e-3)
