"""The formulas of the methods, one by one: against NumPy, by hand, or against torch and transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from random_packs_in_peft import SCHEDULES
from single_layers import draw, installed, one_layer
from torch import nn
from torch.nn import functional as F

from sweep.lora.adapter import Adapter, install, trial_state
from sweep.lora.dora import row_norms
from sweep.lora.methods import generator_for, init_adapter, init_head, matrix_shape, pissa, trained_numbers
from sweep.lora.optim import Recipe, lr_factor, optimizer_state, start_optimizer
from sweep.study.arms import Arm


def test_scaling_is_alpha_over_r_and_over_its_root_for_rslora() -> None:
    assert Arm("", "lora", 16, 2.0, ()).lora_alpha == 32.0
    for method in ("lora", "lora+", "dora", "pissa"):
        assert Arm("", method, 16, 2.0, ()).scaling == 2.0
    assert Arm("", "rslora", 16, 2.0, ()).scaling == 8.0  # 32 / 4
    assert Arm("", "rslora", 2, 0.5, ()).scaling == pytest.approx(1 / math.sqrt(2))


def test_the_update_is_scaling_times_BA_and_zero_at_the_start() -> None:
    model, x = one_layer(nn.Linear(6, 5)), draw(8, 6)
    expected = model.layer(x)
    fresh = init_adapter({"layer": model.layer}, "lora", 3, 1.5, seed=1)
    A, B = draw(3, 6, seed=1), draw(5, 3, seed=2)
    moved = {"layer.lora_A.weight": A, "layer.lora_B.weight": B}
    installed(model, [fresh, moved], 3, 1.5, 8)
    y = model.layer(x)
    torch.testing.assert_close(y[:4], expected[:4])
    torch.testing.assert_close(y[4:], expected[4:] + 1.5 * x[4:] @ A.T @ B.T)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora+", "dora", "pissa"])
def test_every_method_begins_as_the_base(method: str) -> None:
    model, x = one_layer(nn.Linear(12, 9)), draw(4, 12)
    expected = model.layer(x)
    state = init_adapter({"layer": model.layer}, method, 3, 2.0, seed=1)
    pack = install(model, [Adapter(3, 2.0, ("layer",), state, method=method)], head=())
    pack.forward_pass.rows = 4
    torch.testing.assert_close(model.layer(x), expected, atol=1e-6, rtol=1e-5)


def test_the_factors_gradients_are_those_of_the_dense_matrix() -> None:
    """Of the loss Σ g·y: dA = s·Bᵀ gᵀx, dB = s·gᵀx Aᵀ, dx = g·(W + s·BA)."""
    model, x, g = one_layer(nn.Linear(6, 5)), draw(4, 6).requires_grad_(), draw(4, 5, seed=3)
    A, B, s = draw(3, 6, seed=1), draw(5, 3, seed=2), 0.7
    pack = installed(model, [{"layer.lora_A.weight": A, "layer.lora_B.weight": B}], 3, s, 4)
    (model.layer(x) * g).sum().backward()
    gradients = {stack.name: stack.tensor.grad[0] for flat in pack.flats for stack in flat.stacks}
    gx = g.T @ x.detach()
    torch.testing.assert_close(gradients["layer.lora_A.weight"], s * B.T @ gx)
    torch.testing.assert_close(gradients["layer.lora_B.weight"], s * gx @ A.T)
    torch.testing.assert_close(x.grad, g @ (model.layer.weight + s * B @ A))


def test_kaiming_A_is_uniform_within_one_over_the_root_of_its_inputs() -> None:
    layer = nn.Linear(400, 30)
    state = init_adapter({"layer": layer}, "lora", 8, 1.0, seed=3)
    A = state["layer.lora_A.weight"]
    bound = 1 / math.sqrt(400)
    theirs = nn.init.kaiming_uniform_(torch.empty(8, 400), a=math.sqrt(5))
    assert bound * 0.99 < theirs.abs().max() <= bound and bound * 0.99 < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03) and abs(A.mean().item()) < bound * 0.05
    assert not state["layer.lora_B.weight"].any()
    kernel = init_adapter({"layer": nn.Conv2d(9, 30, 7)}, "lora", 8, 1.0, seed=3)["layer.lora_A.weight"]
    assert kernel.shape == (8, 9, 7, 7) and 0.99 / 21 < kernel.abs().max() <= 1 / 21


def test_gaussian_A_has_standard_deviation_one_over_r() -> None:
    state = init_adapter({"layer": nn.Linear(2000, 30)}, "lora", 8, 1.0, seed=3, init="gaussian")
    A = state["layer.lora_A.weight"]
    assert A.std().item() == pytest.approx(1 / 8, rel=0.02) and A.abs().max() > 2.5 / 8
    assert not state["layer.lora_B.weight"].any()


def test_an_embedding_begins_with_A_zero_and_B_standard_normal() -> None:
    state = init_adapter({"layer": nn.Embedding(50, 300)}, "lora", 8, 1.0, seed=3)
    A, B = state["layer.lora_embedding_A"], state["layer.lora_embedding_B"]
    assert A.shape == (8, 50) and not A.any()
    assert B.shape == (300, 8) and B.std().item() == pytest.approx(1, rel=0.05)


def test_a_head_begins_small_and_the_same_whatever_the_arm() -> None:
    head = {"classifier": nn.Linear(300, 10)}
    state = init_head(head, 1)
    assert state["classifier.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not state["classifier.bias"].any()
    assert torch.equal(init_head(head, 1)["classifier.weight"], state["classifier.weight"])
    assert not torch.equal(init_head(head, 2)["classifier.weight"], state["classifier.weight"])


def test_a_layers_draw_depends_on_seed_and_name_alone() -> None:
    layers = {"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)}
    both, only = (init_adapter(some, "lora", 3, 1.0, 7) for some in (layers, {"b": layers["b"]}))
    assert torch.equal(both["b.lora_A.weight"], only["b.lora_A.weight"])
    assert not torch.equal(both["a.lora_A.weight"], both["b.lora_A.weight"])
    other = init_adapter(layers, "lora", 3, 1.0, 8)
    assert not torch.equal(both["a.lora_A.weight"], other["a.lora_A.weight"])
    first = torch.rand(3, generator=generator_for(7, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator_for(7, "a")))


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Embedding(7, 5), nn.Conv2d(2, 5, (3, 2))])
def test_trained_numbers_are_those_that_the_state_holds(layer: nn.Module) -> None:
    for method in ("lora", "dora") if isinstance(layer, nn.Linear) else ("lora",):
        state = init_adapter({"layer": layer}, method, 3, 1.0, 0)
        assert trained_numbers(layer, 3, method) == sum(tensor.numel() for tensor in state.values())
    assert matrix_shape(layer) == ((5, 12) if isinstance(layer, nn.Conv2d) else (5, 7))


def test_doras_row_norms_are_those_of_the_dense_matrix() -> None:
    W, A, B = draw(9, 12), draw(2, 4, 12, seed=1), draw(2, 9, 4, seed=2)
    scaling = torch.tensor([0.5, 3.0])
    dense = W + scaling[:, None, None] * B @ A
    norms = np.linalg.norm(dense.double().numpy(), axis=2)
    np.testing.assert_allclose(row_norms(W, A, B, scaling.view(-1, 1, 1)).numpy(), norms, rtol=1e-5)


def test_doras_row_norm_survives_an_update_that_undoes_the_base() -> None:
    """Then rounding could make its square negative."""
    W = draw(4, 6)
    norms = row_norms(W, torch.eye(6)[None], -W[None], torch.ones(1, 1, 1))
    assert torch.isfinite(norms).all() and norms.max() < 1e-2


def test_doras_norm_is_a_constant_to_the_gradient() -> None:
    """Section 4.3: with c = m / ‖W + sBA‖ held, dB = s·(c·g)ᵀx Aᵀ, and dm = Σ g·(Wx + sBAx) / ‖W + sBA‖."""
    model, x, g = one_layer(nn.Linear(6, 5, bias=False)), draw(4, 6), draw(4, 5, seed=3)
    A, B, m, s = draw(3, 6, seed=1), draw(5, 3, seed=2), draw(5, seed=4).abs() + 1, 0.7
    state = {"layer.lora_A.weight": A, "layer.lora_B.weight": B, "layer.lora_magnitude_vector": m}
    dense = model.layer.weight + s * B @ A
    norm = dense.norm(dim=1)
    pack = install(model, [Adapter(3, s, ("layer",), state, method="dora")], head=())
    pack.forward_pass.rows = 4
    y = model.layer(x)
    torch.testing.assert_close(y, x @ dense.T * (m / norm), atol=1e-5, rtol=1e-5)
    (y * g).sum().backward()
    gradients = {stack.name: stack.tensor.grad[0] for flat in pack.flats for stack in flat.stacks}
    torch.testing.assert_close(gradients["layer.lora_B.weight"], s * (g * (m / norm)).T @ x @ A.T)
    torch.testing.assert_close(gradients["layer.lora_magnitude_vector"], (g * (x @ dense.T)).sum(0) / norm)


def test_pissas_factors_are_the_leading_singular_parts() -> None:
    layer = nn.Linear(12, 9)
    W = layer.weight.detach().double().numpy()
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    for r, scaling in [(6, 2.0), (1, 0.5), (9, 1.0)]:  # a smaller rank after a larger one, and the full rank last
        A, B = pissa(layer, r, scaling)
        assert A.shape == (r, 12) and B.shape == (9, r)
        np.testing.assert_allclose(scaling * (B @ A).numpy(), U[:, :r] * S[:r] @ Vh[:r], atol=1e-5)
        np.testing.assert_allclose(A.norm(dim=1).numpy(), np.sqrt(S[:r] / scaling), rtol=1e-4)  # A and B share S alike
        np.testing.assert_allclose(B.norm(dim=0).numpy(), np.sqrt(S[:r] / scaling), rtol=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_lora_plus_moves_B_ratio_times_as_far_and_A_as_before(kind: str) -> None:
    moved = {}
    layer = nn.Linear(6, 5)
    for ratio in (1.0, 16.0):
        model = one_layer(layer)
        state = {"layer.lora_A.weight": draw(3, 6, seed=1), "layer.lora_B.weight": draw(5, 3, seed=2)}
        pack = installed(model, [state], 3, 1.0, 4)
        optimizer = start_optimizer(pack, [Recipe(1e-3, 5, "constant", betas=(0.0, 0.9), lr_ratio=ratio)], kind)
        loss = model.layer(draw(4, 6, seed=3)).square().sum()
        loss.backward()
        optimizer.step(loss.detach()[None])
        moved[ratio] = {name: tensor - state[name] for name, tensor in trial_state(pack, 0).items()}
    torch.testing.assert_close(moved[16.0]["layer.lora_A.weight"], moved[1.0]["layer.lora_A.weight"])
    B = "layer.lora_B.weight"
    torch.testing.assert_close(moved[16.0][B], 16 * moved[1.0][B], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_weight_decay_is_on_matrices_and_not_on_biases(kind: str) -> None:
    """Of a loss without gradient, decay alone moves a tensor: by rate × decay of itself."""
    model = nn.Module()
    model.layer, model.head = nn.Linear(6, 5), nn.Linear(5, 3)
    model.requires_grad_(False)
    state = {
        "layer.lora_A.weight": draw(2, 6),
        "layer.lora_B.weight": draw(5, 2),
        "head.weight": draw(3, 5),
        "head.bias": draw(3),
    }
    pack = install(model, [Adapter(2, 1.0, ("layer",), state)], head=("head",))
    pack.forward_pass.rows = 4
    optimizer = start_optimizer(pack, [Recipe(0.1, 3, "constant", weight_decay=0.5)], kind)
    (model.head(model.layer(draw(4, 6))).sum() * 0).backward()
    optimizer.step(torch.zeros(1))
    after = trial_state(pack, 0)
    for name, value in state.items():
        torch.testing.assert_close(after[name], value if name == "head.bias" else value * 0.95)


def test_clipping_is_by_the_norm_of_all_that_a_trial_trains_and_of_nothing_else() -> None:
    model = nn.Module()
    model.layer, model.head = nn.Linear(6, 5), nn.Linear(5, 3)
    model.requires_grad_(False)
    states = [
        {
            "layer.lora_A.weight": draw(2, 6, seed=k),
            "layer.lora_B.weight": draw(5, 2, seed=k),
            "head.weight": draw(3, 5),
        }
        for k in range(3)
    ]
    for state in states:
        state["head.bias"] = torch.zeros(3)
    pack = install(model, [Adapter(2, 1.0, ("layer",), state) for state in states], head=("head",))
    pack.forward_pass.rows = 12
    limits = (None, 0.5, 1e9)
    recipes = [Recipe(1.0, 3, "constant", clip=clip, betas=(0.0, 0.9)) for clip in limits]
    optimizer = start_optimizer(pack, recipes, "sgd")
    loss_K = model.head(model.layer(draw(12, 6))).square().view(3, -1).sum(1)
    loss_K.sum().backward()
    stacks = [stack for flat in pack.flats for stack in flat.stacks]
    gradients = [{stack.name: stack.tensor.grad[k].clone() for stack in stacks} for k in range(3)]
    norm_K = optimizer.step(loss_K.detach())
    for k, limit in enumerate(limits):
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients[k].values()))
        assert norm_K[k].item() == pytest.approx(norm, rel=1e-4) and norm > 1
        factor = 1.0 if limit is None else min(1.0, limit / norm)
        after = trial_state(pack, k)
        for name, gradient in gradients[k].items():
            torch.testing.assert_close(states[k][name] - after[name], gradient * factor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (7, 0.0), (7, 0.3), (10, 0.1), (10, 1.0), (60, 0.1)])
def test_learning_rate_factors_are_those_of_transformers_schedules(schedule: str, steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = SCHEDULES[schedule](optimizer, math.ceil(warmup * steps), steps)
    for step in range(steps):
        assert lr_factor(schedule, step, steps, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="not linear, cosine or constant"):
        lr_factor("polynomial", 3, 10, 0.0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_moments_are_torchs_own(kind: str) -> None:
    """Two steps on one matrix: what optimizer_state gives is what torch's optimizer holds for the same gradients."""
    model = one_layer(nn.Linear(6, 5))
    state = {"layer.lora_A.weight": draw(3, 6, seed=1), "layer.lora_B.weight": draw(5, 3, seed=2)}
    pack = installed(model, [state], 3, 1.0, 4)
    optimizer = start_optimizer(pack, [Recipe(1e-2, 9, "constant", betas=(0.7, 0.9))], kind)
    A, B = (nn.Parameter(value.clone()) for value in state.values())
    if kind == "adamw":
        theirs: torch.optim.Optimizer = torch.optim.AdamW([A, B], lr=1e-2, betas=(0.7, 0.9), weight_decay=0.0)
    else:
        theirs = torch.optim.SGD([A, B], lr=1e-2, momentum=0.7)
    W, bias = model.layer.base.weight, model.layer.base.bias
    for step in range(2):
        x = draw(4, 6, seed=step)
        loss = model.layer(x).square().sum()
        loss.backward()
        optimizer.step(loss.detach()[None])
        theirs.zero_grad()
        F.linear(x, W + B @ A, bias).square().sum().backward()
        theirs.step()
    found = optimizer_state(optimizer, 0)
    names = {"adamw": {"mean": "exp_avg", "square": "exp_avg_sq"}, "sgd": {"mean": "momentum_buffer"}}[kind]
    assert set(found) == {f"{ours}.{name}" for ours in names for name in state}
    for p, name in ((A, "layer.lora_A.weight"), (B, "layer.lora_B.weight")):
        for ours, attribute in names.items():
            torch.testing.assert_close(found[f"{ours}.{name}"], theirs.state[p][attribute], atol=1e-4, rtol=1e-4)
