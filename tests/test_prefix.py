"""Prefix tuning: a trial trains as in PEFT's prompt tuning, whatever shares its pack; and models that cannot have it.

Where a trial has LoRA too, the reference is PEFT's LoRA layers inside a model of PEFT's prompt tuning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from driving import records_of, run, trials_of
from fakes import make_study
from random_models import CLASSES, FAMILIES, HIDDEN, VOCAB, Family, frozen_model
from random_packs import (
    STEPS,
    Run,
    Trained,
    Trial,
    initial_state,
    one_thread,  # noqa: F401 (a fixture of the module)
    prefixed_pack,
    train_pack,
)
from random_packs_in_peft import assert_same, assert_trained_as_in_peft
from scipy import stats
from synthetic import quickstart, write_study
from test_parity_packs import assert_untouched
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from sweep.lora.prefix import PROMPT, init_prefix, prefix_refusal
from sweep.report.prefix_section import prefix_section
from sweep.report.report import write_report
from sweep.report.statistics import find
from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.home import Home
from sweep.training.base import Base, check_arm

WITH_TOKENS = [FAMILIES[name] for name in ("bert", "llama", "gpt2")]
EVERY_FAMILY = pytest.mark.parametrize("family", WITH_TOKENS, ids=lambda family: family.name)
ONLY = Trial(0, 0.0, "prefix", (), prefix=4)


@EVERY_FAMILY
@pytest.mark.parametrize(
    "run",
    [Run(plain_head=True), Run(dropout=0.2), Run("sgd", 0.2, micro=3)],
    ids=["adamw", "dropout", "sgd-dropout-split"],
)
def test_every_trial_of_a_mixed_pack_trains_as_in_pefts_prompt_tuning(family: Family, run: Run) -> None:
    assert_trained_as_in_peft(family, prefixed_pack(family, 10.0 if run.optimizer == "sgd" else 1.0), run)


def test_a_classifier_that_reads_the_first_position_reads_the_prefix() -> None:
    """Also where the encoder's top is computed there alone."""
    family = FAMILIES["bert"]
    assert_trained_as_in_peft(family, prefixed_pack(family), Run(dropout=0.2, first_position=True))


@EVERY_FAMILY
def test_neighbours_and_order_in_the_pack_do_not_matter(family: Family) -> None:
    trials, run = prefixed_pack(family), Run(dropout=0.2)
    together = train_pack(family, trials, run)
    turned = train_pack(family, trials[::-1], run)[::-1]
    for trial, ours, theirs in zip(trials, together, turned, strict=True):
        assert_same(ours, theirs, STEPS, trial, 2e-5)
        assert_same(ours, train_pack(family, [trial], run)[0], STEPS, trial, 2e-5)


@EVERY_FAMILY
def test_checkpoint_and_resume_do_not_matter(family: Family) -> None:
    trials, run = prefixed_pack(family), Run(dropout=0.2)
    whole = train_pack(family, trials, run)
    half = train_pack(family, trials, run, 0, 2)
    order = [7, 2, 0, 1]
    rest = train_pack(family, [trials[k] for k in order], run, 2, STEPS, [half[k] for k in order])
    for k, resumed in zip(order, rest, strict=True):
        joined = Trained(half[k].losses + resumed.losses, resumed.weights, resumed.moments)
        assert_same(joined, whole[k], STEPS, trials[k], 2e-6)


@EVERY_FAMILY
def test_removing_a_pack_gives_back_the_base_bit_for_bit(family: Family) -> None:
    model = frozen_model(family)
    modules = dict(model.named_modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_pack(family, prefixed_pack(family), Run(dropout=0.2))
    assert_untouched(model, modules, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_prefix_begins_with_entries_of_the_vocabulary_drawn_by_the_seed() -> None:
    embedding = nn.Embedding(50, 8)
    first, same, other = (init_prefix(embedding, 6, seed)[PROMPT] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert all((embedding.weight == row).all(1).any() for row in first)


def test_parameters_are_the_prefix_and_the_head() -> None:
    base = Base(frozen_model(FAMILIES["bert"]), ("classifier",))
    assert check_arm(base, ONLY.arm) == 4 * HIDDEN + CLASSES * HIDDEN + CLASSES
    assert set(initial_state(FAMILIES["bert"], ONLY)) == {PROMPT, "classifier.weight", "classifier.bias"}
    alone, both = (Trial(2, 1, m, ("query",), prefix=p).arm for m, p in (("lora", 0), ("lora+prefix", 4)))
    assert check_arm(base, both) == check_arm(base, alone) + 4 * HIDDEN


class NoEmbeddings(nn.Module):
    """A model whose forward takes tokens alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model, self.model, self.config = model.bert, model, model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()  # type: ignore[operator, no-any-return]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_models_that_cannot_have_a_prefix_are_refused_with_the_reason() -> None:
    with pytest.raises(FieldError, match="prefix: the model reads no tokens") as caught:
        check_arm(Base(frozen_model(FAMILIES["vit"]), ("vit.classifier",)), ONLY.arm)
    assert [field for field, _ in caught.value.problems] == ["arms.method"]
    assert "takes no inputs_embeds" in (prefix_refusal(NoEmbeddings(frozen_model(FAMILIES["bert"]))) or "")
    decoder = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    assert "classify at the last token" in (prefix_refusal(LlamaForSequenceClassification(decoder).eval()) or "")
    for family in WITH_TOKENS:
        assert prefix_refusal(frozen_model(family)) is None


PREFIXED = (
    "arms.rank=[2,64]",
    "arms.alpha_ratio=[1,2]",
    "arms.method=[lora,prefix,lora+prefix]",
    "arms.prefix_length=[16,4]",
    "tune.prefix={learning_rate: [0.03, 0.1, 0.3]}",
    "confirm.finalists=arm",
)


def test_lengths_are_arms_and_alpha_ratios_do_not_multiply_prefixes_alone() -> None:
    study = quickstart(*PREFIXED)
    arms = {arm.name: arm for arm in study.list_arms()}
    assert len(arms) == 2 * 2 * 3 + 2 + 1
    assert {name for name, arm in arms.items() if not arm.r} == {"prefix-p4", "prefix-p16", "full"}
    alone, both = arms["prefix-p4"], arms["r2-ratio1-lora+prefix-p16"]
    assert not alone.is_full and (alone.lora_alpha, alone.scaling, alone.target_modules) == (0, 0, ())
    assert (both.r, both.prefix_length, both.scaling) == (2, 16, 1)
    assert study.rates(alone) == [0.03, 0.1, 0.3] and study.rates(both) == study.tune.learning_rate
    assert len({arm.group for arm in arms.values()}) == 2 + 2 * 2 + 2 + 1


def test_prefixes_are_held_against_reference_and_full_outside_the_sequence_of_ranks(tmp_path: Path) -> None:
    study = quickstart(*PREFIXED)

    def loss(arm: Arm, seed: int) -> float:
        return 0.2 + 0.01 * seed + (0.3 + 0.001 * seed if arm.method == "prefix" else 0.0)

    record = write_study(tmp_path / "study", study, loss, ends={})
    found = find(study, record)
    assert found.recommended == "r2-ratio1-lora"  # of equal search scores the first
    assert {r.arm.method for r in found.arms if r.in_sequence} == {"lora"}
    for result in found.arms:
        if result.arm.prefix_length:
            assert result.to_full is not None and result.to_reference is not None
            assert result.verdict == ("inferior" if result.arm.method == "prefix" else "non-inferior")
            assert result.note == "outside the sequence; Holm's correction"
    write_report(study, record, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "prefix 16" in text and "rank 0" not in text and "alpha ratio 0" not in text


def test_lora_a_prefix_and_both_are_held_against_one_another_seed_by_seed(tmp_path: Path) -> None:
    study = quickstart(*PREFIXED, "arms.alpha_ratio=[1]")
    rng = np.random.default_rng(3)
    gain = {"lora": 0.0, "prefix": 0.2, "lora+prefix": -0.1, "full": 0.0}
    losses: dict[tuple[str, int], float] = {}

    def loss(arm: Arm, seed: int) -> float:
        return losses.setdefault((arm.name, seed), 0.5 + 0.05 * seed + gain[arm.method] + rng.normal(0, 0.01))

    findings = write_report(study, write_study(tmp_path / "study", study, loss, ends={}), tmp_path / "report")
    section = prefix_section(study, findings, tmp_path)
    assert section is not None
    names = [row.cells[0].text for row in section.tables[0][1].rows]
    assert names == [f"rank {r}, prefix {length}" for r in (2, 64) for length in (4, 16)]
    one, other = "r64-ratio1-lora+prefix-p16", "prefix-p16"
    pairs = [losses[one, seed] - losses[other, seed] for seed in study.confirm.seeds]
    low, high = stats.t.interval(0.95, len(pairs) - 1, np.mean(pairs), stats.sem(pairs))
    cell = section.tables[0][1].rows[3].cells[2]
    assert (cell.text, cell.below) == (f"−{-np.mean(pairs):.3f}", f"−{-low:.3f} to −{-high:.3f}")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "both together were shown better than LoRA alone at 4 and worse at 0" in text
    assert "the prefix alone was shown better than LoRA alone at 0 and worse at 4" in text
    assert "That the prefix is worse is shown here too; that both together can gain on LoRA is shown too" in text

    gain.update({"prefix": -0.2, "lora+prefix": 0.1})
    losses.clear()
    findings = write_report(study, write_study(tmp_path / "other", study, loss, ends={}), tmp_path / "contrary")
    text = (tmp_path / "contrary" / "report.md").read_text()
    assert "for their number, speaks against that; that both together gain on LoRA is contradicted" in text
    plain = quickstart()
    write_report(plain, write_study(tmp_path / "plain", plain, ends={}), tmp_path / "without")
    assert "a prefix, or both" not in (tmp_path / "without" / "report.md").read_text()


def test_the_driver_judges_prefixes_by_their_length_and_optuna_knows_it(tmp_path: Path) -> None:
    arms = {"rank": [2, 8], "alpha_ratio": [1.0], "method": ["lora", "prefix"], "prefix_length": [4, 16]}
    study, home = make_study(arms=arms), Home(tmp_path)
    run(home, study)
    finalists = [name for name, _ in records_of(home, study).finalists]
    assert sorted(finalists) == ["full", "prefix-p16", "prefix-p4", "r2-ratio1-lora", "r8-ratio1-lora"]
    trials = trials_of(home, study)
    assert {t.params["prefix_length"] for t in trials if t.user_attrs["arm"].startswith("prefix")} == {4, 16}
    pruned = [t for t in trials if t.state.name == "PRUNED" and t.user_attrs["arm"] == "prefix-p4"]
    assert pruned and all("others of prefix 4" in t.user_attrs["reason"] for t in pruned)
