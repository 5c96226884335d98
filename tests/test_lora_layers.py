"""The layers that are not linear: an update and its gradients against PEFT's own layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from single_layers import draw, installed, one_layer
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

EMBEDDINGS = {
    "plain": lambda: nn.Embedding(11, 6),
    "padded": lambda: nn.Embedding(11, 6, padding_idx=3),
    "padded at the end": lambda: nn.Embedding(11, 6, padding_idx=-1),
    "scaled": lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5),
}
CONVOLUTIONS = {
    "patches": lambda: nn.Conv2d(3, 6, 4, stride=4),
    "overlapping": lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    "padded to size": lambda: nn.Conv2d(3, 6, 3, padding="same", bias=False),
    "dense": lambda: nn.Conv2d(3, 6, 1),
}


def in_peft(model: nn.Module, r: int, alpha: float, A: torch.Tensor, B: torch.Tensor) -> tuple[nn.Module, list]:
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"])  # type: ignore[arg-type]
    layer = get_peft_model(copy.deepcopy(model), config).base_model.model.layer  # type: ignore[arg-type, union-attr]
    trained = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, value in zip(trained, (A, B), strict=True):
            p.copy_(value)
    return layer, trained


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embeddings_update_and_gradients_are_pefts(kind: str) -> None:
    model = one_layer(EMBEDDINGS[kind]())
    A, B, g = draw(2, 11), draw(6, 2, seed=1), draw(3, 5, 6, seed=2)
    padding = model.layer.padding_idx
    if padding is not None:
        A[:, padding] = 0  # as it begins, and as it stays
    ids = torch.arange(15).view(3, 5) % 11
    theirs, trained = in_peft(model, 2, 3.0, A, B)
    expected = theirs(ids)
    (expected * g).sum().backward()
    pack = installed(model, [{"layer.lora_embedding_A": A, "layer.lora_embedding_B": B}], 2, 1.5, 3)
    y = model.layer(ids)
    (y * g).sum().backward()
    torch.testing.assert_close(y, expected)
    for stack, p in zip([s for flat in pack.flats for s in flat.stacks], trained, strict=True):
        torch.testing.assert_close(stack.tensor.grad[0], p.grad)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_update_and_gradients_are_pefts(kind: str) -> None:
    model = one_layer(CONVOLUTIONS[kind]())
    kernel = model.layer.kernel_size
    states = [
        {"layer.lora_A.weight": draw(2, 3, *kernel, seed=k), "layer.lora_B.weight": draw(6, 2, 1, 1, seed=9 + k)}
        for k in range(2)
    ]
    x = draw(4, 3, 8, 8).requires_grad_()
    references = [in_peft(model, 2, 3.0, *state.values()) for state in states]
    expected = torch.cat([layer(x[2 * k : 2 * k + 2]) for k, (layer, _) in enumerate(references)])
    g = draw(*expected.shape, seed=2)
    (expected * g).sum().backward()
    dx, x.grad = x.grad, None
    pack = installed(model, states, 2, 1.5, 4)
    y = model.layer(x)
    (y * g).sum().backward()
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, dx, atol=1e-5, rtol=1e-5)
    for i, stack in enumerate(s for flat in pack.flats for s in flat.stacks):
        for k, (_, trained) in enumerate(references):
            torch.testing.assert_close(stack.tensor.grad[k], trained[i].grad, atol=1e-4, rtol=1e-4)


def test_a_dilated_convolutions_update_is_that_of_its_dense_kernel() -> None:
    """PEFT leaves the dilation out and raises; the merged kernel W + s·BA is the reference."""
    model, x = one_layer(nn.Conv2d(3, 6, 3, dilation=2)), draw(2, 3, 9, 9)
    A, B = draw(2, 3, 3, 3), draw(6, 2, 1, 1)
    kernel = model.layer.weight + 1.5 * (B.flatten(1) @ A.flatten(1)).view(6, 3, 3, 3)
    expected = F.conv2d(x, kernel, model.layer.bias, dilation=2)
    installed(model, [{"layer.lora_A.weight": A, "layer.lora_B.weight": B}], 2, 1.5, 2)
    torch.testing.assert_close(model.layer(x), expected, atol=1e-5, rtol=1e-5)
