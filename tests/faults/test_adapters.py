"""An exported adapter that is damaged on disk: nobody reads it, and it is written anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import sweep
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
    case="the adapter of a finished study is truncated, or a byte of its tensors or configuration flips",
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
    adapter = Path(published.adapter)
    tensors, config, mark = (adapter / n for n in ("adapter_model.safetensors", "adapter_config.json", "sweep.json"))
    whole, settings, written = tensors.read_bytes(), config.read_bytes(), tensors.stat().st_ino
    assert publish(study, home) == published and tensors.stat().st_ino == written, "it is whole, and left alone"

    digit = settings.index(b'"lora_alpha": ') + len(b'"lora_alpha": ')
    for file, damaged in (
        (tensors, flipped(whole, len(whole) - 9)),
        (tensors, whole[: len(whole) // 2]),
        (config, flipped(settings, digit)),
        (config, settings[: len(settings) // 2]),
    ):
        file.write_bytes(damaged)
        with pytest.raises(FieldError) as caught:
            read_adapter(adapter)
        (line,), code = explain(caught.value)
        assert code == 2 and line.startswith(f"{file}: is not what sweep wrote")
        assert publish(study, home) == published
        assert (tensors.read_bytes(), config.read_bytes()) == (whole, settings) and read_adapter(adapter).ranks

    tensors.write_bytes(flipped(whole, len(whole) - 9))
    for words in (["adapters", str(adapter), "--text", "x"], ["mix", str(adapter)], ["compress", str(adapter)]):
        more = {"mix": ["--to", "b"], "compress": ["--rank", "1", "--to", "b"]}.get(words[0], [])
        said = sweep(*words, *more, cwd=tmp_path, HF_HUB_OFFLINE="1")
        (line,) = said.stderr.strip().splitlines()
        assert said.returncode == 2 and f"{tensors}: is not what sweep wrote" in line

    mark.write_bytes(mark.read_bytes()[:-9])  # nothing tells any more which files there are ours
    (adapter / "notes.txt").write_text("mine")
    said = sweep("run", "tiny.yaml", "--home", "home", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert said.returncode == 0, said.stderr
    assert tensors.read_bytes() == whole and read_adapter(adapter).ranks
    (aside,) = adapter.parent.glob("adapter-damaged-*")
    assert (aside / "notes.txt").read_text() == "mine"


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def publish(study: Study, home: Home) -> Places:
    """As the command does at its end, without MLflow."""
    projector: Any = SimpleNamespace(finish=lambda *what: "", lost_models=list)
    return publishing.publish(study, home.study(study.name), projector, home.cache, print)
