"""A loss or a gradient that is no number any more ends its own trial, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import arm, curve, train, trial

from sweep.study.records import Prepared, Setup, Unit
from sweep.training.checkpoint import load_checkpoint, save_checkpoint
from sweep.training.rung import train_rung


@pytest.mark.fault(
    case="the loss of one trial of a pack becomes NaN or infinite",
    happens="that trial ends as diverged, with the losses it had; its neighbours train on",
    lost="nothing",
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_stop_their_own_trial(bbc: tuple[Setup, Prepared], tmp_path: Path, poison: float) -> None:
    """Three steps of each, then one trial's weights are poisoned and three more follow."""
    setup, prepared = bbc
    trials = [trial(k, arm(r, 1), 3e-3, k, tmp_path) for k, r in enumerate((2, 8, 64))]
    first = train(setup, prepared, trials, [3])
    saved = [first[t.number][0].saved for t in trials]
    assert all(saved)
    whole = load_checkpoint(trials[1], saved[1])  # type: ignore[arg-type]
    weights = {name: torch.full_like(tensor, poison) for name, tensor in whole.weights.items()}
    saved[1] = save_checkpoint(trials[1], replace(whole, weights=weights), {})
    found = train_rung(Unit(setup, prepared, tuple(trials), 3, 6, False, tuple(saved)))  # type: ignore[arg-type]

    calm = train(setup, prepared, [replace(t, folder=str(tmp_path / "calm" / str(t.number))) for t in trials], [3, 6])
    for one in (0, 2):
        assert found[one].diverged_at is None and found[one].saved is not None
        np.testing.assert_allclose(found[one].train_loss, curve(calm[one])[3:], atol=1e-5, rtol=0)
    assert found[1].diverged_at == 4 and found[1].train_loss == () and found[1].saved is None
    assert found[1].eval_loss is None, "what is no number is no result"
