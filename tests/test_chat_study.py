"""studies/chat.yaml, small: conversations, by the command that users type, to an adapter that PEFT loads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import peft
import pytest
import torch
import transformers
from chat_tokenizers import PLAIN, small_tokenizer
from commands import SWEEP
from test_kill import environment

from sweep.study.home import Home
from sweep.tracking.journal import read_study_record

MAX_LENGTH = 64
SMALL = [
    "data.config=null",
    f"data.max_length={MAX_LENGTH}",
    "arms.rank=[2,4]",
    "arms.alpha_ratio=[1]",
    "arms.full_finetuning=false",
    "tune.learning_rate=[1.0e-2]",
    "tune.full_finetuning=null",
    "train.steps=20",
    "train.batch_size=4",
    "train.precision=float32",
    "search.rungs=[10,20]",
    "confirm.seeds=[1,2]",
    "confirm.reference=4",
]
PLACES = {"Berlin": 21, "Paris": 24, "France": 19, "Germany": 18}


def write_model(folder: Path) -> None:
    """A random Llama with a tokenizer of its own and a chat template."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer("byte-level")
    tokenizer.chat_template = PLAIN["default system turn"]
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def conversations() -> list[list[dict[str, str]]]:
    rows = []
    for i in range(60):
        place = list(PLACES)[i % 4]
        turns = [("user", f"What of {place}, {i}?"), ("assistant", f"It is {PLACES[place]} and warm.")]
        if i % 3 == 0:
            turns += [("user", "Thank you!"), ("assistant", f"It is {place}, and sunny too. " * (1 + i % 2))]
        rows.append([{"role": role, "content": content} for role, content in turns])
    return rows


@pytest.mark.slow
def test_chat_study_runs_small_to_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rows = conversations()
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    overrides = [*SMALL, f"model={tmp_path / 'model'}", f"data.source={tmp_path / 'chat.jsonl'}"]
    words = [word for override in overrides for word in ("--set", override)]
    study = str(Path("studies/chat.yaml").absolute())
    done = subprocess.run(
        [*SWEEP, "run", study, *words, "--home", "home"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr

    record = read_study_record(Home(tmp_path / "home").study("chat"))
    assert {trial.spec.arm.name for trial in record.trials} == {"r2-ratio1", "r4-ratio1"}
    for trial in record.trials:
        assert trial.state == "complete" and trial.eval_curve[-1][1] < trial.eval_curve[0][1]

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    lengths = [len(tokenizer.apply_chat_template(row)["input_ids"]) for row in rows]
    assert record.prepared is not None
    taken = record.prepared.truncation.values()
    assert sum(t.rows for t in taken) == len(rows) and sum(t.whole for t in taken) == sum(lengths)
    assert sum(t.cut for t in taken) == sum(n > MAX_LENGTH for n in lengths) > 0
    assert sum(t.lost for t in taken) == sum(max(0, n - MAX_LENGTH) for n in lengths)
    report = (tmp_path / "reports" / "chat" / "report.md").read_text()
    assert "cut at data.max_length" in done.stdout and "**Cut short:**" in report

    adapter = tmp_path / "home" / "studies" / "chat" / "adapter"
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([tokenizer.apply_chat_template(rows[0])["input_ids"]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = peft.PeftModel.from_pretrained(base, adapter)(input_ids=ids).logits
    assert torch.isfinite(after).all() and not torch.allclose(before, after, atol=1e-3)
