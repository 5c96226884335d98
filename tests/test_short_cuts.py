"""What is not computed is not missed: the last block at one position, the language-model head at target positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sweep.lora.adapter import Adapter, install, linear_modules, remove
from sweep.lora.methods import init_adapter, init_head
from sweep.lora.readout import read_first_position, reads_first_position
from sweep.training import tasks
from sweep.training.base import has_plain_head
from sweep.training.batches import Batch
from sweep.training.tasks import score

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL, attn_implementation="eager")).eval()


def padded_batch(labels: np.ndarray) -> Batch:
    rng = np.random.default_rng(0)
    mask = np.ones((4, 7), dtype=np.int64)
    mask[1, 5:] = mask[3, 3:] = 0
    return Batch(rng.integers(1, 61, (4, 7)), mask, labels, np.arange(4))


def test_last_block_at_the_first_position_gives_the_same_loss_and_gradients() -> None:
    model = bert()
    batch = padded_batch(np.array([0, 1, 1, 0]))
    behind = reads_first_position(model)
    assert behind == "bert.encoder.layer.1.attention.output"
    seen: list[torch.Size] = []
    model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda m, args, y: seen.append(y.shape))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        score(model, batch, "sequence-classification", 2).loss_K.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradients()
    read_first_position(model, behind)
    for ours, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert [shape[1] for shape in seen] == [7, 1]


def test_classifier_that_reads_every_position_is_left_alone() -> None:
    class MeanPooler(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.mean(1)

    model = bert()
    model.bert.pooler = MeanPooler()
    assert reads_first_position(model) is None
    assert not model.bert.encoder.layer[1].attention.output._forward_pre_hooks


@pytest.mark.parametrize("chunk_logits", [1, 61 * 5, 2**23])
def test_head_at_target_positions_in_chunks_gives_the_models_own_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int
) -> None:
    """The gradient is taken where an adapter would: at the embeddings, through all that is frozen."""
    monkeypatch.setattr(tasks, "CHUNK_LOGITS", chunk_logits)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="eager")).eval().requires_grad_(False)
    assert has_plain_head(model)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    batch = padded_batch(np.random.default_rng(1).random((4, 7)) < 0.6)
    found = []
    for plain in (False, True):
        scores = score(model, batch, "causal-lm", 2, plain_head=plain)
        (scores.loss_K * torch.tensor([0.3, 2.0])).sum().backward()
        found.append((scores, embeddings.grad))
        embeddings.grad = None
    (theirs, their_gradient), (ours, our_gradient) = found
    torch.testing.assert_close(ours.loss_K, theirs.loss_K)
    assert torch.equal(ours.correct_K, theirs.correct_K) and torch.equal(ours.count_K, theirs.count_K)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=1e-4)


def test_logits_that_are_capped_go_through_the_models_own_head() -> None:
    config = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0)
    assert not has_plain_head(Gemma2ForCausalLM(config).eval())


def test_trunk_of_blocks_that_come_round_again_is_left_at_the_first_adapted_one() -> None:
    """ALBERT runs its groups of blocks several times: the second time round, rows differ by trial."""
    config = AlbertConfig(**SMALL | {"num_hidden_layers": 4}, embedding_size=8, num_hidden_groups=2)
    model = AlbertForSequenceClassification(config).eval().requires_grad_(False)
    layers = linear_modules(model)
    name, head = (
        "albert.encoder.albert_layer_groups.1.albert_layers.0.attention.query",
        {"classifier": model.classifier},
    )
    adapters = []
    for seed in range(3):
        state = {**init_adapter({name: layers[name]}, "lora", 2, 1.0, seed), **init_head(head, seed)}
        state[f"{name}.lora_B.weight"] = torch.randn(16, 2)
        adapters.append(Adapter(2, 1.0, (name,), state, seed))
    ids = torch.randint(1, 61, (2, 5)).repeat(3, 1)
    pack = install(model, adapters, ["classifier"])
    try:
        pack.forward_pass.rows = 6
        apart = model(input_ids=ids).logits
        pack.forward_pass.distinct_U, pack.forward_pass.place_R = torch.arange(2), torch.arange(2).repeat(3)
        shared = model(input_ids=ids).logits
    finally:
        remove(model, pack)
    assert pack.forward_pass.widened, "nothing was shared: the test would be blind"
    torch.testing.assert_close(shared, apart, atol=1e-6, rtol=1e-5)
