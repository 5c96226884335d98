"""Whatever shares its pack, a trial trains as it does alone in PEFT: random packs on random BERT, Llama, GPT-2 and ViT.

Everything is float32. Losses agree to 2e-5 at every step, trained tensors to 5e-5 (root mean square) after the last.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft.optimizers import create_loraplus_optimizer
from random_models import FAMILIES, HIDDEN, PAD, Family, frozen_model, frozen_rows
from random_packs import (
    EVERY_FAMILY,
    LINEAR_ONLY,
    ROWS,
    STEPS,
    Run,
    Trained,
    Trial,
    initial_state,
    mixed_pack,
    one_thread,  # noqa: F401 (a fixture of the module)
    train_pack,
)
from random_packs_in_peft import (
    assert_same,
    assert_trained_as_in_peft,
    peft_model,
    peft_name,
    tensors,
    trained_parameters,
)

from sweep.lora.methods import init_adapter, matrix_shape
from sweep.study.arms import ALL_LINEAR
from sweep.study.errors import FieldError
from sweep.training.base import Base, check_arm, target_layers
from sweep.training.batches import collate, step_rows

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "5"))  # of each family
METHODS = ("lora", "rslora", "lora+", "dora", "pissa")


def draw_trial(draw: st.DrawFn, family: Family, optimizer: str) -> Trial:
    method = draw(st.sampled_from(METHODS))
    known = family.linear if method in LINEAR_ONLY else (*family.linear, *family.others)
    some = st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True).map(tuple)
    endings = draw(st.one_of(st.just((ALL_LINEAR,)), some))
    layers = target_layers(frozen_model(family), family.head, endings).values()
    limit = min(min(matrix_shape(layer)) for layer in layers)
    keys = st.sampled_from([*known, rf".*\.1\..*{family.linear[0]}"])
    rates = (1e-3, 1e-2, 3e-2) if optimizer == "adamw" else (0.03, 0.1, 0.3)
    return Trial(
        r=draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, limit])),
        ratio=draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])),
        method=method,
        endings=endings,
        seed=draw(st.integers(0, 5)),
        init=draw(st.sampled_from(["kaiming", "gaussian"])),
        rate=draw(st.sampled_from(rates)),
        steps=draw(st.integers(2, STEPS + 3)),
        schedule=draw(st.sampled_from(["linear", "cosine", "constant"])),
        warmup=draw(st.sampled_from([0.0, 0.1, 0.5])),
        decay=draw(st.sampled_from([0.0, 0.01, 0.3])),
        clip=draw(st.sampled_from([None, 0.05, 0.5])),
        betas=draw(st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)])),
        lr_ratio=draw(st.sampled_from([2.0, 8.0])),
        ranks=tuple(draw(st.dictionaries(keys, st.integers(1, min(8, limit)), max_size=2)).items()),
        alphas=tuple(draw(st.dictionaries(keys, st.sampled_from([0.5, 1.0, 6.0]), max_size=2)).items()),
    )


@st.composite
def packs(draw: st.DrawFn, family: Family) -> tuple[list[Trial], Run]:
    run = Run(
        optimizer=draw(st.sampled_from(["adamw", "sgd"])),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        micro=draw(st.sampled_from([None, 1, 3])),
        plain_head=draw(st.booleans()),
    )
    trials = [draw_trial(draw, family, run.optimizer) for _ in range(draw(st.integers(1, 12)))]
    if family.name != "vit" and draw(st.booleans()):
        trials = [draw_prefix(draw, trial) for trial in trials]
    return trials, run


def draw_prefix(draw: st.DrawFn, trial: Trial) -> Trial:
    """The trial as it is, or with a prefix where its method is LoRA's, or with that alone."""
    prefix = draw(st.sampled_from([0, 1, 2, 3, 6]))
    if prefix == 0 or trial.method not in ("lora", "dora"):
        return trial
    if trial.method == "lora":
        return replace(trial, method="lora+prefix", prefix=prefix)
    return replace(trial, method="prefix", prefix=prefix, r=0, ratio=0.0, endings=(), ranks=(), alphas=())


# No shrinking: an example takes a second, and the trial that differs is named.
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@EVERY_FAMILY
@given(data=st.data())
def test_every_trial_of_a_random_pack_trains_as_alone_in_peft(family: Family, data: st.DataObject) -> None:
    trials, run = data.draw(packs(family))
    assert_trained_as_in_peft(family, trials, run)


@EVERY_FAMILY
@pytest.mark.parametrize(
    "run",
    [Run(plain_head=True), Run(dropout=0.2), Run("sgd", 0.2, micro=3)],
    ids=["adamw", "dropout", "sgd-dropout-split"],
)
def test_every_trial_of_a_mixed_pack_trains_as_alone_in_peft(family: Family, run: Run) -> None:
    assert_trained_as_in_peft(family, mixed_pack(family, 10.0 if run.optimizer == "sgd" else 1.0), run)


def test_an_encoders_top_at_the_first_position_alone_trains_as_all_of_it_in_peft() -> None:
    family = FAMILIES["bert"]
    assert_trained_as_in_peft(family, mixed_pack(family), Run(dropout=0.2, first_position=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapted_output_layer_trains_as_in_peft_tied_or_not(name: str) -> None:
    family = FAMILIES[name]
    output = frozen_model(family).get_output_embeddings()  # type: ignore[operator]
    assert (output.weight is frozen_model(family).get_input_embeddings().weight) == (name == "gpt2")  # type: ignore[operator]
    trials = [
        Trial(3, 2, "lora", ("lm_head",), seed=1),
        Trial(2, 1, "rslora", ("lm_head", family.others[0]), seed=2),
        Trial(2, 1, "dora", (ALL_LINEAR,), seed=3),
    ]
    assert_trained_as_in_peft(family, trials, Run(plain_head=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_plus_is_pefts_own_optimizer(name: str) -> None:
    family = FAMILIES[name]
    trial = Trial(4, 1, "lora+", seed=3, schedule="constant", decay=0.2, lr_ratio=8.0)
    model = peft_model(family, trial)
    trained = trained_parameters(family, trial, model)
    optimizer = create_loraplus_optimizer(
        model,  # type: ignore[arg-type]
        torch.optim.AdamW,
        lr=trial.rate,
        loraplus_lr_ratio=trial.lr_ratio,
        loraplus_weight_decay=trial.decay,
    )
    losses = []
    for rows in step_rows(frozen_rows(family).lengths, ROWS, trial.seed, 0, STEPS):
        loss = model(**tensors(family, collate(frozen_rows(family), rows, PAD))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    (ours,) = train_pack(family, [trial])
    assert_same(ours, Trained(losses, {n: p.detach() for n, p in trained.items()}), STEPS, trial)


@EVERY_FAMILY
def test_pissa_begins_where_pefts_own_does(family: Family) -> None:
    """Singular vectors are known up to their sign, so the product is compared, and what it leaves of the base."""
    trial = Trial(3, 2, "pissa", seed=1)
    model, state = peft_model(family, trial, init="pissa"), initial_state(family, trial)
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    assert names
    for name in names:
        layer = model.get_submodule(f"base_model.model.{name}")
        ours = trial.arm.scaling * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        theirs = layer.get_delta_weight("default")  # type: ignore[operator]
        ours = ours if ours.shape == theirs.shape and family.name != "gpt2" else ours.T
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        base = frozen_model(family).get_submodule(name).weight
        torch.testing.assert_close(base - ours, layer.get_base_layer().weight, atol=1e-5, rtol=1e-5)  # type: ignore[operator]


@EVERY_FAMILY
def test_dora_begins_with_pefts_own_magnitudes(family: Family) -> None:
    trial = Trial(3, 2, "dora", seed=1)
    theirs = dict(peft_model(family, trial).named_parameters())
    ours = {n: value for n, value in initial_state(family, trial).items() if n.endswith("lora_magnitude_vector")}
    assert ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[peft_name(name)].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dora", "pissa"])
@pytest.mark.parametrize(("name", "ending"), [("gpt2", "wte"), ("gpt2", "wpe"), ("vit", "projection")])
def test_dora_and_pissa_refuse_embeddings_and_convolutions(method: str, name: str, ending: str) -> None:
    family, model = FAMILIES[name], frozen_model(FAMILIES[name])
    trial = Trial(2, 1, method, (family.linear[0], ending))
    said = f"{ending}: method {method} adapts linear layers, not (Embedding|Conv2d); use lora or rslora there"
    with pytest.raises(ValueError, match=said):
        init_adapter(target_layers(model, family.head, trial.endings), method, 2, 1.0, 0)
    with pytest.raises(FieldError, match=said):
        check_arm(Base(model, family.head), trial.arm)


@EVERY_FAMILY
def test_a_rank_at_a_layers_limit_is_trained_and_one_above_it_is_refused(family: Family) -> None:
    layers = target_layers(frozen_model(family), family.head, (ALL_LINEAR,))
    limit = min(min(matrix_shape(layer)) for layer in layers.values())
    assert limit == (8 if family.name == "llama" else HIDDEN)
    trials = [Trial(limit, 1, method, seed=1) for method in METHODS]
    assert_trained_as_in_peft(family, trials, Run())
    for trial in trials:
        with pytest.raises(FieldError, match="at most"):
            check_arm(Base(frozen_model(family), family.head), replace(trial, r=limit + 1).arm)
