"""A loss or a gradient that is no number any more ends its own trial, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_reference import arm, curve, train, trial
from torch import Tensor

from sweep.study.arms import Arm, full_arm
from sweep.study.records import Measurement, Prepared, Setup, TrialSpec, Unit
from sweep.training import rung
from sweep.training.checkpoint import load_checkpoint, save_checkpoint
from sweep.training.rung import train_rung

Weights = dict[str, Tensor]
ENDS_ALONE = pytest.mark.fault(
    case="the loss of one trial of a pack becomes NaN or infinite",
    happens="that trial ends as diverged, with the losses it had; its neighbours train on",
    lost="nothing",
)


def pack_of(*arms: Arm, folder: Path) -> list[TrialSpec]:
    return [trial(k, one, 3e-3, k, folder) for k, one in enumerate(arms)]


def three(folder: Path) -> list[TrialSpec]:
    return pack_of(arm(2, 1), arm(8, 1), arm(64, 1), folder=folder)


def train_with_changed(
    setup: Setup, prepared: Prepared, trials: list[TrialSpec], which: int, changed: Callable[[Weights], Weights]
) -> dict[int, Measurement]:
    """Three steps of each, then one trial's weights are changed and three more follow; what those found, by number."""
    first = train(setup, prepared, trials, [3])
    saved = [first[t.number][0].saved for t in trials]
    assert all(saved)
    whole = load_checkpoint(trials[which], saved[which])  # type: ignore[arg-type]
    saved[which] = save_checkpoint(trials[which], replace(whole, weights=changed(whole.weights)), {})
    found = train_rung(Unit(setup, prepared, tuple(trials), 3, 6, False, tuple(saved)))  # type: ignore[arg-type]
    return {measurement.number: measurement for measurement in found}


@pytest.fixture(scope="module")
def calm(bbc: tuple[Setup, Prepared], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """The losses of three trials that are all well."""
    found = train(*bbc, three(tmp_path_factory.mktemp("calm")), [3, 6])
    return {number: curve(measurements) for number, measurements in found.items()}


def check_neighbours(found: dict[int, Measurement], calm: dict[int, list[float]]) -> None:
    """The first and the last of three trained as they do where the second is well."""
    for one in (0, 2):
        assert found[one].diverged_at is None and found[one].saved is not None
        np.testing.assert_allclose(found[one].train_loss, calm[one][3:], atol=1e-5, rtol=0)


def biased(*bias: float) -> Callable[[Weights], Weights]:
    """Finite weights with which the classes' logits are these, whatever the row; the last one stands for the rest."""

    def changed(weights: Weights) -> Weights:
        (name,) = (name for name in weights if name.endswith("classifier.bias"))
        classes, matrix = len(weights[name]), name.replace(".bias", ".weight")
        values = torch.tensor([*bias, *bias[-1:] * (classes - len(bias))])
        assert values.isfinite().all()
        return {**weights, matrix: torch.zeros_like(weights[matrix]), name: values}

    return changed


def heard(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What the engine's function of that name returns from now on."""
    real, returned = getattr(rung, name), []

    def hearing(*args: Any) -> Any:
        returned.append(real(*args))
        return returned[-1]

    monkeypatch.setattr(rung, name, hearing)
    return returned


def check_one_infinite(losses: Tensor) -> None:
    assert (losses == torch.inf).sum() == 1 and not losses.isnan().any(), losses


@ENDS_ALONE
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_stop_their_own_trial(
    bbc: tuple[Setup, Prepared], calm: dict[int, list[float]], tmp_path: Path, poison: float
) -> None:
    """In all of the trial's tensors: whichever they are, its loss is NaN."""

    def poisoned(weights: Weights) -> Weights:
        return {name: torch.full_like(tensor, poison) for name, tensor in weights.items()}

    found = train_with_changed(*bbc, three(tmp_path), 1, poisoned)
    check_neighbours(found, calm)
    assert found[1].diverged_at == 4 and found[1].train_loss == () and found[1].saved is None
    assert found[1].eval_loss is None, "what is no number is no result"


@ENDS_ALONE
def test_a_loss_that_overflows_stops_its_own_trial(
    bbc: tuple[Setup, Prepared],
    calm: dict[int, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights and gradients are finite, the loss of a row outside the first class is 6e38: infinite, and not NaN."""
    losses = heard(monkeypatch, "train_step")
    found = train_with_changed(*bbc, three(tmp_path), 1, biased(3e38, -3e38))
    check_one_infinite(losses[3])
    check_neighbours(found, calm)
    assert found[1].diverged_at == 4 and found[1].train_loss == () and found[1].saved is None
    assert found[1].eval_loss is None


@ENDS_ALONE
def test_a_held_out_loss_that_overflows_is_no_result(
    bbc: tuple[Setup, Prepared],
    calm: dict[int, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row outside the first class costs 5e37: four rows of a batch add up to a number, all held-out ones do not."""
    held_out = heard(monkeypatch, "held_out_scores")
    found = train_with_changed(*bbc, three(tmp_path), 1, biased(5e37, 0.0))
    check_one_infinite(torch.tensor([scores["loss"] for scores in held_out[1]]))
    check_neighbours(found, calm)
    assert len(found[1].train_loss) == 3 and np.isfinite(found[1].train_loss).all()
    assert found[1].diverged_at == 6 and found[1].saved is None and found[1].eval_loss is None


def test_full_finetuning_whose_loss_overflows_stops(
    bbc: tuple[Setup, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = heard(monkeypatch, "train_step")
    found = train_with_changed(*bbc, pack_of(full_arm(), folder=tmp_path), 0, biased(3e38, -3e38))
    check_one_infinite(losses[3])
    assert found[0].diverged_at == 4 and found[0].train_loss == () and found[0].saved is None
