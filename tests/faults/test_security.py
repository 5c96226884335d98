"""Files that run a program when they are read, given to the commands for real."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import sweep
from hostile_models import Trap, save_pickled_model
from mlflow.pyfunc import PythonModel, save_model
from safetensors.torch import save_file
from tiny_texts import save_tiny_llama, write_lines

STUDY = """
name: trapped
model: {model}
task: causal-lm
data: {{source: {texts}, max_length: 12, validation: 0.2, test: 0.2}}
arms: {{rank: [2], alpha_ratio: [1], target_modules: [[q_proj]], full_finetuning: false}}
tune: {{learning_rate: [1.0e-3]}}
train: {{steps: 2, batch_size: 2, precision: float32}}
confirm: {{seeds: [1], reference: 2, epsilon: 0.05}}
"""


@pytest.mark.fault(
    case="a model whose weights are a malicious pickle",
    happens="refused in one line that says how to convert it; the pickle is never read",
    lost="nothing",
)
def test_a_malicious_pickle_as_the_base_model_is_never_read(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    write_lines(tmp_path / "texts.txt", 60, 0)
    (tmp_path / "trapped.yaml").write_text(STUDY.format(model=tmp_path / "model", texts=tmp_path / "texts.txt"))
    for words in (("run", "trapped.yaml"), ("run", "trapped.yaml", "--dry-run")):
        said = sweep(*words, cwd=tmp_path, HF_HUB_OFFLINE="1")
        (line,) = said.stderr.strip().splitlines()
        assert said.returncode == 2 and line.startswith("trapped.yaml:3: model: ") and "pytorch_model.bin" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault(
    case="an adapter whose tensors are a malicious pickle",
    happens="refused in one line by every command that reads adapters; the pickle is never read",
    lost="nothing",
)
def test_a_malicious_pickle_as_an_adapter_is_never_read(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(tmp_path / "model" / "pytorch_model.bin", adapter / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(tmp_path / "model")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for words in (("adapters", "adapter", "--text", "x"), ("mix", "adapter", "--to", "b"), ("compress", "adapter")):
        more = ("--rank", "1", "--to", "b") if words[0] == "compress" else ()
        said = sweep(*words, *more, cwd=tmp_path, HF_HUB_OFFLINE="1")
        (line,) = said.stderr.strip().splitlines()
        assert said.returncode == 2 and "adapter_model.bin: is a pickle" in line
    assert not (tmp_path / "ran").exists()


class Plain(PythonModel):
    def predict(self, context: object, model_input: list[str]) -> list[str]:
        return model_input


@pytest.mark.slow
@pytest.mark.fault(
    case="a pickled model in MLflow's registry where the adapter was put",
    happens="the check that loads it back fails and says so; the pickle is never read",
    lost="nothing",
)
def test_a_pickled_model_in_the_registry_is_never_read(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    save_model(str(tmp_path / "registered"), python_model=Plain(), pip_requirements=[])
    (tmp_path / "registered" / "python_model.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    save_file({}, tmp_path / "expected.safetensors")
    question = {"registered": str(tmp_path / "registered"), "task": "causal-lm", "trust_remote_code": False}
    said = subprocess.run(
        [sys.executable, "-m", "sweep.adapters.verify"],
        input=json.dumps({**question, "expected": str(tmp_path / "expected.safetensors")}),
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
    )
    assert not (tmp_path / "ran").exists()
    assert said.returncode != 0 and "Deserializing model using pickle is disallowed" in said.stderr
