"""What must not matter to a trial: its neighbours, their order, a resume, a split, another's end; on random models."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from random_models import FAMILIES, Family, frozen_model, frozen_rows
from random_packs import (
    EVERY_FAMILY,
    ROWS,
    STEPS,
    Run,
    Trained,
    Trial,
    mixed_pack,
    one_thread,  # noqa: F401 (a fixture of the module)
    start_pack,
    train_pack,
)
from random_packs_in_peft import assert_same, train_in_peft
from torch import nn

from sweep.lora import adapter as packing
from sweep.lora.adapter import remove
from sweep.study.arms import ALL_LINEAR
from sweep.training.batches import step_rows
from sweep.training.rung import PackTrainee

LAST_BLOCK = {
    "bert": ("layer.1.attention.self.query", "layer.1.output.dense"),
    "llama": ("1.self_attn.q_proj", "1.mlp.up_proj"),
    "gpt2": ("h.1.attn.c_attn", "h.1.mlp.c_fc"),
    "vit": ("1.attention.q_proj", "1.mlp.fc1"),
}


@EVERY_FAMILY
def test_neighbours_do_not_matter(family: Family) -> None:
    trials, run = mixed_pack(family), Run(dropout=0.2)
    for trial, together in zip(trials, train_pack(family, trials, run), strict=True):
        assert_same(together, train_pack(family, [trial], run)[0], STEPS, trial, 2e-5)


@EVERY_FAMILY
def test_the_order_in_the_pack_does_not_matter(family: Family) -> None:
    trials, run = mixed_pack(family), Run(dropout=0.2)
    expected = train_pack(family, trials, run)
    for order in (range(len(trials))[::-1], [3, 0, 8, 6, 1, 4, 9, 7, 2, 5]):
        turned = train_pack(family, [trials[k] for k in order], run)
        for k, found in zip(order, turned, strict=True):
            assert_same(found, expected[k], STEPS, trials[k], 2e-5)


@EVERY_FAMILY
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_checkpoint_and_resume_do_not_matter(family: Family, optimizer: str) -> None:
    """Trials go on from their tensors, moments and step alone, in a smaller pack and another order."""
    trials, run = mixed_pack(family, 10.0 if optimizer == "sgd" else 1.0), Run(optimizer, 0.2)
    whole = train_pack(family, trials, run)
    half = train_pack(family, trials, run, 0, 2)
    order = [7, 5, 3, 4, 0, 9, 2]
    rest = train_pack(family, [trials[k] for k in order], run, 2, STEPS, [half[k] for k in order])
    for k, resumed in zip(order, rest, strict=True):
        joined = Trained(half[k].losses + resumed.losses, resumed.weights, resumed.moments)
        assert_same(joined, whole[k], STEPS, trials[k], 2e-6)
        assert set(resumed.moments) == set(whole[k].moments)
        for name, moment in whole[k].moments.items():
            torch.testing.assert_close(resumed.moments[name], moment, atol=1e-6, rtol=1e-4)


@EVERY_FAMILY
@pytest.mark.parametrize("micro", [1, 3])
def test_the_device_batch_split_does_not_matter(family: Family, micro: int) -> None:
    trials = mixed_pack(family)
    whole = train_pack(family, trials, Run(dropout=0.2))
    split = train_pack(family, trials, Run(dropout=0.2, micro=micro))
    for trial, ours, theirs in zip(trials, split, whole, strict=True):
        assert_same(ours, theirs, STEPS, trial, 2e-5)


def test_dropout_depends_on_the_seed_the_step_and_the_layer() -> None:
    """PEFT is given the engine's own masks elsewhere; here those masks themselves are looked at."""
    family = FAMILIES["llama"]
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...], name: str) -> None:
        for k, kept in enumerate(layer.keep(layer.by_trial(args[0]))):  # type: ignore[operator]
            seen.setdefault((k, name), []).append(kept)

    def watch(trainee: PackTrainee) -> None:
        for name in ("q_proj", "v_proj"):  # of one input and one shape
            layer = trainee.model.get_submodule(f"model.layers.0.self_attn.{name}")
            layer.register_forward_pre_hook(partial(note, name=name))

    trials = [Trial(endings=("q_proj", "v_proj"), seed=seed) for seed in (1, 2, 1)]
    train_pack(family, trials, Run(dropout=0.2), watch=watch)
    first, other, same = (seen[k, "q_proj"] for k in range(3))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, seen[0, "v_proj"], strict=True))
    length = min(kept.shape[1] for kept in first)
    masks = [kept[:, :length] for kept in first]
    assert not any(torch.equal(masks[i], masks[j]) for i in range(STEPS) for j in range(i))
    values = torch.cat([kept.flatten() for kept in [*first, *other]])
    assert set(values.unique().tolist()) == {0.0, 1.25}
    assert 0.15 < (values == 0).float().mean() < 0.25


@EVERY_FAMILY
def test_a_trial_whose_loss_is_not_finite_stops_alone(family: Family) -> None:
    good = mixed_pack(family)[:4]
    bad = Trial(2, 2, "lora", seed=3, rate=1e30, schedule="constant")
    together = train_pack(family, [*good[:2], bad, *good[2:]])
    for trial, ours, theirs in zip(good, [*together[:2], *together[3:]], train_pack(family, good), strict=True):
        assert ours.alive
        assert_same(ours, theirs, STEPS, trial, 2e-5)
    stopped = together[2]
    assert not stopped.alive and np.isfinite(stopped.losses[0]) and not np.isfinite(stopped.losses[-1])
    (lived,) = train_pack(family, [bad], stop=1)
    assert lived.alive
    for name, value in lived.weights.items():
        assert torch.isfinite(stopped.weights[name]).all()
        torch.testing.assert_close(stopped.weights[name], value, atol=0, rtol=1e-5)


def test_an_infinite_loss_stops_its_trial_though_every_gradient_is_finite() -> None:
    """As where a row's logits lie so far apart that their difference is no float32: the slope there is 1."""
    family = FAMILIES["bert"]
    trials = mixed_pack(family)[:4]
    trainee = start_pack(family, trials, Run())
    try:
        trainee.step(torch.tensor([1.0, math.inf, 1.0, -math.inf]))
        assert trainee.alive_K.tolist() == [True, False, True, False]
    finally:
        trainee.close()


@EVERY_FAMILY
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_trial_ends_at_its_own_step(family: Family, optimizer: str) -> None:
    short = Trial(2, 1, "lora", seed=1, steps=2, schedule="constant", decay=0.1)
    run = Run(optimizer)
    ended, longer = train_pack(family, [short, replace(short, seed=2, steps=STEPS)], run)
    (expected,) = train_pack(family, [short], run, stop=2)
    assert_same(ended, expected, 2, short, 1e-6)
    (alone,) = train_pack(family, [replace(short, seed=2, steps=STEPS)], run)
    assert_same(longer, alone, STEPS, short, 2e-5)


@EVERY_FAMILY
def test_the_shared_trunk_does_not_matter(family: Family) -> None:
    """Adapters in the last block: rows that repeat over the trials go through the first block once, or each time."""
    last = LAST_BLOCK[family.name]
    trials = [
        replace(trial, endings=last, seed=k % 3)
        for k, trial in enumerate(mixed_pack(family))
        if trial.endings != (ALL_LINEAR,)
    ]
    run = Run(dropout=0.2)
    shared = train_pack(family, trials, run)
    apart = train_pack(family, trials, replace(run, repeats_known=False))
    for trial, ours, theirs in zip(trials, shared, apart, strict=True):
        assert_same(ours, theirs, STEPS, trial, 2e-5)
        assert_same(ours, train_in_peft(family, trial, run), trial.lives, trial)


@EVERY_FAMILY
def test_the_first_block_sees_each_row_once_where_nothing_in_it_is_adapted(family: Family) -> None:
    def rows_seen(endings: tuple[str, ...], repeats_known: bool) -> list[list[int]]:
        seen: list[list[int]] = [[], []]

        def watch(trainee: PackTrainee) -> None:
            for i in range(2):
                block = trainee.model.get_submodule(f"{family.blocks}.{i}")
                trainee.pack.hooks.append(
                    block.register_forward_hook(lambda _, __, out, i=i: seen[i].append(len(_first(out))))
                )

        trials = [Trial(endings=endings, seed=seed) for seed in (1, 1, 2, 1)]
        train_pack(family, trials, Run(repeats_known=repeats_known), watch=watch)
        return seen

    lengths = frozen_rows(family).lengths
    ones, twos = (list(step_rows(lengths, ROWS, seed, 0, STEPS)) for seed in (1, 2))
    distinct = [len(set(a.tolist()) | set(b.tolist())) for a, b in zip(ones, twos, strict=True)]
    everything = [4 * ROWS] * STEPS
    assert rows_seen(LAST_BLOCK[family.name], True) == [distinct, everything]
    assert rows_seen(LAST_BLOCK[family.name], False) == [everything, everything]
    assert rows_seen((family.linear[0],), True) == [everything, everything]


def _first(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


@EVERY_FAMILY
def test_removing_a_pack_gives_back_the_base_bit_for_bit(family: Family) -> None:
    model = frozen_model(family)
    modules = dict(model.named_modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_pack(family, mixed_pack(family), Run(dropout=0.2))
    assert_untouched(model, modules, before)


@EVERY_FAMILY
def test_a_pack_that_cannot_be_put_on_leaves_the_base_as_it_was(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen_model(family)
    modules = dict(model.named_modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(packing, "share_trunk", full)
    with pytest.raises(MemoryError):
        start_pack(family, mixed_pack(family), Run())
    assert_untouched(model, modules, before)


def assert_untouched(model: nn.Module, modules: dict[str, nn.Module], before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    now = dict(model.named_modules())
    assert list(now) == list(modules) and all(now[name] is module for name, module in modules.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_pack_is_exact_on_a_model_that_was_packed_before() -> None:
    """What an earlier pack of other trials leaves behind would show here: hooks, layers, caches of a base's parts."""
    family, run = FAMILIES["gpt2"], Run(dropout=0.2)
    trials = [Trial(2, 1, "pissa", ("c_attn",), seed=1), Trial(8, 1, "pissa", ("c_attn",), seed=2)]
    first = train_pack(family, trials, run)
    trainee = start_pack(family, mixed_pack(family), run)
    remove(trainee.model, trainee.pack)
    for trial, ours, theirs in zip(trials, train_pack(family, trials, run), first, strict=True):
        assert_same(ours, theirs, STEPS, trial, 1e-7)
