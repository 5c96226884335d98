"""An exported adapter that is damaged on disk: nobody reads it, and it is written anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from driving import run
from fakes import forecast, probe
from tiny_texts import save_tiny_llama, write_lines

from sweep import publishing
from sweep.adapters.peft_format import read_adapter
from sweep.execution.worker import Work
from sweep.exits import explain
from sweep.publishing import Places
from sweep.study.errors import FieldError
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.study.schema import Study

STUDY = """
name: tiny
model: {folder}/llama
task: causal-lm
data: {{source: {folder}/texts.txt, max_length: 12, validation: 0.2, test: 0.2}}
arms: {{rank: [2], alpha_ratio: [1], target_modules: [[q_proj]], full_finetuning: false}}
tune: {{learning_rate: [1.0e-3]}}
train: {{steps: 2, batch_size: 2, precision: float32}}
confirm: {{seeds: [1, 2], reference: 2, epsilon: 0.05}}
"""


@pytest.mark.slow
@pytest.mark.fault(
    case="the adapter of a finished study is truncated, or a byte of it flips",
    happens="found by its hash: every command that reads adapters refuses it in one line, exit 2; sweep run writes it "
    "anew from the trial's checkpoint",
    lost="nothing",
)
def test_a_damaged_adapter_is_refused_and_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "llama")
    write_lines(tmp_path / "texts.txt", 60, 0)
    (tmp_path / "tiny.yaml").write_text(STUDY.format(folder=tmp_path))
    study, home = read_study(tmp_path / "tiny.yaml").study, Home(tmp_path / "home")
    run(home, study, replace(Work(), forecast=forecast, probe=probe))
    published = publish(study, home)
    assert published.adapter is not None
    tensors = Path(published.adapter, "adapter_model.safetensors")
    whole, written = tensors.read_bytes(), tensors.stat().st_ino
    assert publish(study, home) == published and tensors.stat().st_ino == written, "it is whole, and left alone"
    for damaged in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole[: len(whole) // 2]):
        tensors.write_bytes(damaged)
        with pytest.raises(FieldError) as caught:
            read_adapter(tensors.parent)
        (line,), code = explain(caught.value)
        assert code == 2 and line.startswith(f"{tensors}: is not what sweep wrote")
    assert publish(study, home) == published
    assert tensors.read_bytes() == whole and read_adapter(tensors.parent).ranks


def publish(study: Study, home: Home) -> Places:
    """As the command does at its end, without MLflow."""
    projector: Any = SimpleNamespace(finish=lambda *what: "")
    return publishing.publish(study, home.study(study.name), projector, home.cache)
