"""The acid test: a trial's loss curve is the same packed with any neighbours, alone, or trained with PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import STEPS, arm, curve, peft_curve, train, trial, weights_of
from transformers import get_linear_schedule_with_warmup

from sweep.lora.methods import init_head
from sweep.study.arms import Arm, full_arm
from sweep.study.records import Prepared, Setup
from sweep.training.base import load_base
from sweep.training.batches import collate, step_rows
from sweep.training.data import load_data
from sweep.training.locate import locate_model
from sweep.training.rung import base_for


def test_trial_has_the_same_loss_curve_packed_and_in_peft(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    """Ranks 2 and 64, different ratios, rates and seeds, in one pack with others: to 1e-4 in float32 at every step."""
    setup, prepared = bbc
    trials = [
        trial(0, arm(64, 2), 3e-3, 5, tmp_path),
        trial(1, arm(2, 1), 1e-2, 1, tmp_path),
        trial(2, arm(8, 1, ("all-linear",)), 1e-3, 2, tmp_path),
        trial(3, arm(8, 0.5, method="rslora"), 3e-3, 1, tmp_path),
    ]
    packed = train(setup, prepared, trials, [STEPS])
    for one in trials:
        expected, state = peft_curve(setup, prepared, one, STEPS)
        np.testing.assert_allclose(curve(packed[one.number]), expected, atol=1e-4, rtol=0)
        weights = weights_of(one, packed[one.number][-1])
        for name, value in state.items():
            ours = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            torch.testing.assert_close(weights[ours], value, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_causal_lm_trial_has_the_same_loss_curve_packed_and_in_peft(
    manual: tuple[Setup, Prepared], tmp_path: Path
) -> None:
    setup, prepared = manual
    trials = [
        trial(0, arm(2, 1, ("q_proj", "v_proj")), 3e-3, 1, tmp_path),
        trial(1, arm(64, 2, ("q_proj", "v_proj")), 1e-3, 2, tmp_path),
    ]
    packed = train(setup, prepared, trials, [4])
    for one in trials:
        expected, _ = peft_curve(setup, prepared, one, 4)
        np.testing.assert_allclose(curve(packed[one.number]), expected, atol=1e-4, rtol=0)


def test_neighbours_and_order_in_the_pack_do_not_matter(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    setup, prepared = bbc
    setup = replace(
        setup, train=replace(setup.train, dropout=0.2)
    )  # dropout draws must not depend on neighbours either
    pack = [
        trial(0, arm(8, 1), 3e-3, 1, tmp_path / "a"),
        trial(1, arm(2, 2), 1e-2, 2, tmp_path / "a"),
        trial(2, arm(64, 1), 1e-3, 3, tmp_path / "a"),
    ]
    together = train(setup, prepared, pack, [6])
    turned = train(setup, prepared, [replace(t, folder=str(tmp_path / "b" / str(t.number))) for t in pack[::-1]], [6])
    for one in pack:
        alone = train(setup, prepared, [replace(one, folder=str(tmp_path / "c" / str(one.number)))], [6])
        np.testing.assert_allclose(curve(together[one.number]), curve(alone[one.number]), atol=1e-5, rtol=0)
        np.testing.assert_allclose(curve(together[one.number]), curve(turned[one.number]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("one", [arm(8, 1), full_arm()], ids=["lora", "full"])
def test_checkpoint_and_resume_do_not_matter(bbc: tuple[Setup, Prepared], tmp_path: Path, one: Arm) -> None:
    setup, prepared = bbc
    whole = train(setup, prepared, [trial(0, one, 3e-4, 1, tmp_path / "whole")], [6])
    parts = train(setup, prepared, [trial(0, one, 3e-4, 1, tmp_path / "parts")], [2, 6])
    np.testing.assert_allclose(curve(whole[0]), curve(parts[0]), atol=1e-6, rtol=0)
    assert whole[0][-1].test_metrics["test_loss"] == pytest.approx(parts[0][-1].test_metrics["test_loss"], abs=1e-6)


def test_full_finetuning_has_the_loss_curve_of_a_plain_loop(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    setup, prepared = bbc
    one = trial(0, full_arm(), 5e-4, 3, tmp_path)
    found = train(setup, prepared, [one], [6])
    place = locate_model(setup.model)
    data = load_data(setup, place)
    base = load_base(place, setup.task, prepared.labels, data.pad_token_id, "float32", "eager")
    model = copy.deepcopy(base.model).requires_grad_(True)
    with torch.no_grad():
        for name, value in init_head({"classifier": model.classifier}, 3).items():  # type: ignore[dict-item]
            model.get_parameter(name).copy_(value)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": setup.train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=one.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, setup.train.steps)
    losses = []
    for rows in step_rows(data.train.lengths, setup.train.batch_size, one.seed, 0, 6):
        batch = collate(data.train, rows, data.pad_token_id)
        loss = model(
            input_ids=torch.from_numpy(batch.input_ids_RT),
            attention_mask=torch.from_numpy(batch.attention_mask_RT),
            labels=torch.from_numpy(batch.labels),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    np.testing.assert_allclose(curve(found[0]), losses, atol=1e-4, rtol=0)


def test_a_diverged_trial_stops_and_its_neighbour_does_not_notice(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    setup, prepared = bbc
    setup = replace(setup, train=replace(setup.train, clip=None, warmup=0.0))
    good, bad = trial(0, arm(8, 1), 3e-3, 1, tmp_path), trial(1, arm(8, 2), 1e30, 1, tmp_path)
    both = train(setup, prepared, [good, bad], [6])
    alone = train(setup, prepared, [replace(good, folder=str(tmp_path / "alone"))], [6])
    np.testing.assert_allclose(curve(both[0]), curve(alone[0]), atol=1e-5, rtol=0)
    assert both[0][0].diverged_at is None and both[0][0].eval_loss is not None
    assert both[1][0].diverged_at is not None and both[1][0].eval_loss is None and both[1][0].checkpoint == ""
    assert all(np.isfinite(both[1][0].train_loss))


def test_pack_leaves_the_base_as_it_was(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    setup, prepared = bbc
    base = base_for(setup, prepared, arm(4, 1))
    before = {name: p.clone() for name, p in base.model.state_dict().items()}
    train(setup, prepared, [trial(0, arm(4, 1), 1e-2, 1, tmp_path)], [2])
    after = base.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("one", [arm(8, 1), full_arm()], ids=["lora", "full"])
def test_the_device_batch_split_does_not_matter(bbc: tuple[Setup, Prepared], tmp_path: Path, one: Arm) -> None:
    """Three of a trial's four rows and then the last, with dropout: what is dropped goes by the row's place in all."""
    setup, prepared = bbc
    setup = replace(setup, train=replace(setup.train, dropout=0.2))
    parts = replace(setup, train=replace(setup.train, micro_batch_size=3))
    whole = train(setup, prepared, [trial(0, one, 3e-4, 1, tmp_path / "whole")], [4])
    split = train(parts, prepared, [trial(0, one, 3e-4, 1, tmp_path / "parts")], [4])
    np.testing.assert_allclose(curve(whole[0]), curve(split[0]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_token_counts_of_a_split_batch_are_the_whole_batchs(manual: tuple[Setup, Prepared], tmp_path: Path) -> None:
    """Rows have different numbers of target tokens: a mean of the parts' means would weigh them wrongly."""
    setup, prepared = manual
    parts = replace(setup, train=replace(setup.train, micro_batch_size=1))
    one = arm(8, 1, ("q_proj", "v_proj"))
    whole = train(setup, prepared, [trial(0, one, 3e-3, 1, tmp_path / "whole")], [3])
    split = train(parts, prepared, [trial(0, one, 3e-3, 1, tmp_path / "parts")], [3])
    np.testing.assert_allclose(curve(whole[0]), curve(split[0]), atol=1e-5, rtol=0)


def test_sgd_trial_has_the_same_loss_curve_after_a_resume(bbc: tuple[Setup, Prepared], tmp_path: Path) -> None:
    setup, prepared = bbc
    setup = replace(setup, train=replace(setup.train, optimizer="sgd"))
    for name, one in {"lora": arm(8, 1), "full": full_arm()}.items():
        whole = train(setup, prepared, [trial(0, one, 0.1, 1, tmp_path / name / "whole")], [6])
        parts = train(setup, prepared, [trial(0, one, 0.1, 1, tmp_path / name / "parts")], [2, 6])
        np.testing.assert_allclose(curve(whole[0]), curve(parts[0]), atol=1e-6, rtol=0)
