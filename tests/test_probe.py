"""What an arm costs, against PEFT's own counts and the tensors' own sizes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from sweep.study.arms import Arm
from sweep.study.file import read_study
from sweep.study.records import Cost, Prepared, Setup, StudyForecast
from sweep.study.schema import Study
from sweep.training.base import load_base
from sweep.training.forecast import count_arms, forecast
from sweep.training.locate import locate_model
from sweep.training.prepare import prepare
from sweep.training.probe import probe


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Prepared, dict[str, Cost], StudyForecast]:
    cache = str(tmp_path_factory.mktemp("cache"))
    overrides = ["data.max_length=16", "train.batch_size=4", "arms.alpha_ratio=[1]", "train.precision=float32"]
    study = read_study(Path("studies/quickstart.yaml"), overrides).study
    arms = [arm for arm in study.list_arms() if arm.r in (0, 2, 8, 64)]
    prepared = prepare(study.setup(cache), tuple(arms))
    foretold = forecast(study.setup(cache), prepared, arms)  # before anything is measured, as in a study
    costs = {arm.name: probe(study.setup(cache), prepared, arm) for arm in arms}
    return study, prepared, costs, foretold


Found = tuple[Study, Prepared, dict[str, Cost], StudyForecast]


def test_trainable_parameters_are_pefts(found: Found) -> None:
    study, prepared, costs, _ = found
    for arm in study.list_arms():
        if arm.name in ("r2-ratio1", "r64-ratio1"):
            base = load_base(locate_model(study.model), study.task, prepared.labels, 0, "float32", "eager")
            config = LoraConfig(r=arm.r, target_modules=list(arm.target_modules), task_type=TaskType.SEQ_CLS)
            trainable, _ = get_peft_model(copy.deepcopy(base.model), config).get_nb_trainable_parameters()
            assert costs[arm.name].trainable_params == prepared.trainable_params[arm.name] == trainable
    assert costs["full"].trainable_params == costs["full"].total_params == prepared.total_params


def test_gradients_and_optimizer_state_are_those_of_peft_under_adamw(found: Found) -> None:
    study, prepared, costs, _ = found
    arm = next(arm for arm in study.list_arms() if arm.name == "r64-ratio1")
    base = load_base(locate_model(study.model), study.task, prepared.labels, 0, "float32", "eager")
    config = LoraConfig(r=arm.r, target_modules=list(arm.target_modules), task_type=TaskType.SEQ_CLS)
    model = get_peft_model(copy.deepcopy(base.model), config)  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.ones(2, 4, dtype=torch.long)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert costs[arm.name].memory["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert costs[arm.name].memory["optimizer"] == sum(t.nbytes for t in moments)


def test_full_finetuning_needs_most_memory(found: Found) -> None:
    _, _, costs, _ = found
    for cost in costs.values():
        assert cost.memory["activations"] > 0
        assert cost.step_time_s > 0 and cost.tokens_per_second > 0
    assert costs["r2-ratio1"].peak_memory_bytes < costs["full"].peak_memory_bytes
    assert costs["full"].peak_memory_bytes > 16 * costs["full"].trainable_params


def test_adapter_bytes_are_the_tensors_and_a_header(found: Found) -> None:
    _, _, costs, _ = found
    for cost in costs.values():
        assert 4 * cost.trainable_params < cost.adapter_bytes < 4 * cost.trainable_params + 50_000


def test_memory_foretold_is_near_the_memory_measured(found: Found) -> None:
    _, _, costs, foretold = found
    for cost in costs.values():
        row = foretold.of(cost.cost_key)
        assert row is not None and row.fits
        assert row.trainable_params == cost.trainable_params
        assert row.peak_memory_bytes == pytest.approx(cost.peak_memory_bytes, rel=0.2)


def test_the_ends_and_full_finetuning_are_probed_and_the_rest_is_scaled(found: Found) -> None:
    _, _, costs, foretold = found
    assert {row.cost_key for row in foretold.arms if row.probed} == {
        costs[n].cost_key for n in ("r2-ratio1", "r64-ratio1", "full")
    }
    assert foretold.validation_s > 0 and foretold.test_s > foretold.validation_s  # of more rows


def test_an_arm_larger_than_the_memory_is_not_tried_and_marked(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study, prepared, costs, _ = found
    limit = 4 * 4 * costs["full"].trainable_params - 1  # a byte too few for weights, gradients and two moments
    tried: list[str] = []

    def refuse(setup: object, prepared: object, arm: Arm, warmup: int, steps: int) -> Cost:
        tried.append(arm.name)
        raise MemoryError("no room")

    monkeypatch.setattr("sweep.training.forecast.memory_limit", lambda held: limit)
    monkeypatch.setattr("sweep.training.forecast.probe", refuse)
    arms = [arm for arm in study.list_arms() if arm.name in costs]
    foretold = forecast(study.setup(str(tmp_path)), prepared, arms)
    rows = {row.cost_key: row for row in foretold.arms}
    assert tried == ["r2-ratio1", "r64-ratio1"]
    assert foretold.doubtful == {costs[n].cost_key for n in ("r2-ratio1", "r64-ratio1", "full")}
    assert rows["full"].step_time_s is None and "not tried" in rows["full"].note
    assert "MemoryError: no room" in rows[costs["r2-ratio1"].cost_key].note
    assert rows[costs["r8-ratio1"].cost_key].fits and not rows[costs["r8-ratio1"].cost_key].probed


def killed_if_full(setup: Setup, prepared: Prepared, arm: Arm) -> tuple[float, int]:
    if arm.is_full:
        os._exit(9)  # as the kernel ends a process for want of memory: without a word
    return 0.01, 1000


def test_a_forward_pass_that_is_killed_ends_neither_the_driver_nor_the_counts_of_the_others(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study, prepared, costs, _ = found
    probed: list[str] = []

    def note(setup: object, prepared: object, arm: Arm, warmup: int, steps: int) -> Cost:
        probed.append(arm.name)
        return costs[arm.name]

    monkeypatch.setattr("sweep.training.forecast.forward_pass", killed_if_full)
    monkeypatch.setattr("sweep.training.forecast.probe", note)
    arms = sorted((arm for arm in study.list_arms() if arm.name in costs), key=lambda arm: not arm.is_full)
    rows = {row.cost_key: row for row in forecast(study.setup(str(tmp_path)), prepared, arms).arms}
    assert not rows["full"].fits and "perhaps for want of memory" in rows["full"].note
    assert [row.fits for key, row in rows.items() if key != "full"] == [True] * 3
    assert probed == ["r2-ratio1", "r64-ratio1"]


def test_no_forward_pass_of_an_arm_is_counted_in_the_drivers_process(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study, prepared, costs, _ = found

    def here(*args: object) -> None:
        raise AssertionError("this process would be killed")

    monkeypatch.setattr("sweep.training.forecast.forward_cost", here)
    (arm,) = (arm for arm in study.list_arms() if arm.name == "r8-ratio1")
    (counted,) = count_arms(study.setup(str(tmp_path)), prepared, [arm], 2**40)
    assert counted.step_time_s and counted.peak_memory_bytes == pytest.approx(
        costs[arm.name].peak_memory_bytes, rel=0.2
    )
