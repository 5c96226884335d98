"""Nothing of ours reads a pickle: the check that keeps it so, and the files that could hold one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hostile_models import Trap, change, save_pickled_model
from tiny_texts import save_tiny_llama

from sweep.study.errors import FieldError
from sweep.study.records import DataSettings
from sweep.training import images
from sweep.training.base import load_base
from sweep.training.data import read_cache
from sweep.training.locate import ModelPlace, locate_model
from sweep.training.sources import read_rows

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("place", ["sweep/new.py", "sweep/execution/new.py"])
@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import joblib",
        "from cloudpickle import loads",
        "import dill",
        "import shelve",
        "import torch\n\ntorch.load('x')",
        "import pandas\n\npandas.read_pickle('x')",
        "import yaml\n\nyaml.load('x', yaml.UnsafeLoader)",
        "import yaml\n\nyaml.unsafe_load('x')",
        "eval('1')",
        "exec('1')",
        "import os\n\nos.system('ls')",
        "import subprocess\n\nsubprocess.run('ls', shell=True)",
        "import tempfile\n\ntempfile.mktemp()",
    ],
)
def test_make_check_refuses_what_runs_code_when_it_reads(line: str, place: str) -> None:
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--output-format=concise"]
    told = subprocess.run(
        [*ruff, "--stdin-filename", place, "-"], cwd=ROOT, input=f"{line}\n", capture_output=True, text=True
    )
    assert told.returncode == 1 and any(f" {rule}" in told.stdout for rule in ("S", "TID251")), told.stdout


def test_the_trap_is_live(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_model_of_pickled_weights_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    assert "convert" in refusal(tmp_path / "model").lower()
    assert not (tmp_path / "ran").exists()


def test_a_configuration_cannot_name_a_pickle_for_the_weights(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    save_tiny_llama(tmp_path / "whole")
    shutil.copy(tmp_path / "model" / "pytorch_model.bin", tmp_path / "whole" / "adapter_model.bin")
    change(tmp_path / "whole" / "config.json", transformers_weights="adapter_model.bin")
    assert "adapter_model.bin" in refusal(tmp_path / "whole")
    assert not (tmp_path / "ran").exists()


def test_of_a_model_with_both_the_safetensors_are_read(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    save_tiny_llama(tmp_path / "whole")
    shutil.copy(tmp_path / "model" / "pytorch_model.bin", tmp_path / "whole")
    load(locate_model(str(tmp_path / "whole")))
    assert not (tmp_path / "ran").exists()


def test_a_model_from_the_hub_s_cache_without_safetensors_is_refused_too(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    elsewhere = ModelPlace("some/model", str(tmp_path / "model"), None, local=False)
    with pytest.raises(FieldError, match="no weights in safetensors, and pickles can run code") as caught:
        load(elsewhere)
    assert caught.value.problems[0][0] == "model" and not (tmp_path / "ran").exists()


def test_an_adapter_beside_a_model_brings_no_pickle_in(tmp_path: Path) -> None:
    save_pickled_model(tmp_path / "model", tmp_path / "ran")
    save_tiny_llama(tmp_path / "whole")
    shutil.copy(tmp_path / "model" / "pytorch_model.bin", tmp_path / "whole" / "adapter_model.bin")
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], '
    config += f'"base_model_name_or_path": "{tmp_path / "whole"}"}}'
    (tmp_path / "whole" / "adapter_config.json").write_text(config)
    with pytest.raises(FieldError):
        load(locate_model(str(tmp_path / "whole")))
    assert not (tmp_path / "ran").exists()


def test_cached_tokens_and_pixels_that_hold_a_pickle_are_made_anew(tmp_path: Path) -> None:
    trapped = np.array([Trap(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "tokens.npz", **{"train.input_ids": trapped, "pad_token_id": np.int64(0)})
    np.save(tmp_path / "pixels.npy", trapped)
    assert read_cache(tmp_path / "tokens.npz", ("train",)) is None
    assert images._mapped(tmp_path / "pixels.npy", 1) is None
    assert not (tmp_path / "ran").exists()


def test_a_parquet_file_that_asks_for_a_pickled_type_is_read_without_it(tmp_path: Path) -> None:
    import pickle

    told = {"ARROW:extension:name": "arrow.py_extension_type"}
    told["ARROW:extension:metadata"] = pickle.dumps(Trap(tmp_path / "ran"), protocol=0).decode("latin-1")
    field = pyarrow.field("text", pyarrow.string(), metadata=told)
    table = pyarrow.table([["one", "two"]], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    settings = DataSettings(str(tmp_path / "rows.parquet"), 8, 0.1, 0.1)
    assert [row["text"] for row in read_rows(settings, "causal-lm")["train"]] == ["one", "two"]
    assert not (tmp_path / "ran").exists()


def test_a_data_set_s_own_script_is_not_run(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for more in ({}, {"trust_remote_code": False}):
        with pytest.raises((RuntimeError, FileNotFoundError)):
            datasets.load_dataset(str(folder), split="train", **more)
    with pytest.raises(FieldError):
        read_rows(DataSettings(str(folder), 8, 0.1, 0.1), "causal-lm")
    assert not (tmp_path / "ran").exists()


def load(place: ModelPlace) -> None:
    load_base.__wrapped__(place, "causal-lm", (), 0, "float32", "eager")


def refusal(folder: Path) -> str:
    with pytest.raises(FieldError) as caught:
        load(locate_model(str(folder)))
    ((field, message),) = caught.value.problems
    assert field == "model" and "pickle" in message
    return message
