"""The commands on adapters, on tiny models on disk; what they print is held against PEFT's own outputs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft_folders import WORDS, in_peft, logits_in_peft, on_disk

from sweep import cli

TEXTS = ["w3 w9 w27 w4", "w11 w5"]


def here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds: dict[str, dict[str, object]] = {
        "a": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "b": {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 3}},
    }
    return on_disk("llama", tmp_path_factory.mktemp("language"), **kinds)


def in_words(text: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[WORDS[word] for word in text.split()]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_every_text_is_answered_by_the_base_and_every_adapter_as_in_peft(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.txt").write_text("\n".join([TEXTS[1], "", ""]))
    words = ["adapters", f"one={language['a']}", str(language["b"]), "--text", TEXTS[0]]
    assert here(monkeypatch, *words, "--file", str(tmp_path / "rows.txt")) == 0
    out = capsys.readouterr().out
    assert re.search(r"one +lora +2 +4: q_proj, v_proj", out) and re.search(
        r"b +lora +3 to 4 +4: down_proj, q_proj", out
    )
    model = in_peft("llama", one=language["a"], b=language["b"])
    expected = []
    for text in TEXTS:
        for name in ("base", "one", "b"):
            inputs = in_words(text)
            if name == "base":
                with model.disable_adapter():
                    logits = logits_in_peft(model, inputs)[0]
            else:
                logits = logits_in_peft(model, inputs, name)[0]
            loss = float(torch.nn.functional.cross_entropy(logits[:-1], inputs["input_ids"][0, 1:]))
            best = int(logits[-1].argmax())
            expected.append(
                (name, f"'w{best}'" if best else "'<pad>'", f"{float(logits[-1].softmax(-1)[best]):.3f}", f"{loss:.4f}")
            )
    found = [tuple(line.split()[-4:]) for line in out.splitlines() if re.search(r"\d\.\d{4} *$", line)]
    assert found == expected


def test_rows_of_different_adapters_are_one_batch(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(language["a"]), str(language["b"])]
    asked = [word for text in TEXTS for word in ("--text", text)]
    assert here(monkeypatch, "adapters", *folders, *asked) == 0
    alone = [line.split()[-4:] for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d{4} *$", line)]
    assert here(monkeypatch, "adapters", *folders, *asked, "--rows", "b,base") == 0
    mixed = [line.split()[-4:] for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d{4} *$", line)]
    assert mixed == [alone[2], alone[3]]
    for rows, message in (("a", "names 1 adapters for 2 texts"), ("a,c", "there is no adapter 'c'")):
        assert here(monkeypatch, "adapters", *folders, *asked, "--rows", rows) == 2
        assert message in capsys.readouterr().err


def test_classes_go_by_the_names_that_the_folder_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = on_disk("bert", tmp_path, a={"r": 2, "target_modules": ["query"]})
    names = ["dogs", "cats", "birds"]
    (folders["a"] / "sweep.json").write_text(json.dumps({"labels": names}))
    assert here(monkeypatch, "adapters", str(folders["a"]), "--text", TEXTS[0]) == 0
    logits = logits_in_peft(in_peft("bert", a=folders["a"]), in_words(TEXTS[0]))[0]
    answer = f"{names[int(logits.argmax())]} +{float(logits.softmax(-1).max()):.3f}"
    assert re.search(rf"a +{answer}", capsys.readouterr().out)


def test_mix_and_compress_write_adapters_that_peft_loads_and_say_what_is_lost(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert here(monkeypatch, "mix", f"{language['a']}:0.7", str(language["b"]), "--to", "sum") == 0
    assert "adapter: sum (rank 2 to 5, 6 modules)" in capsys.readouterr().out
    model = in_peft("llama", a=language["a"], b=language["b"], sum=tmp_path / "sum")
    model.add_weighted_adapter(["a", "b"], [0.7, 1.0], "theirs", combination_type="cat")
    inputs = in_words(TEXTS[0])
    expected = logits_in_peft(model, inputs, "theirs")
    torch.testing.assert_close(logits_in_peft(model, inputs, "sum"), expected, atol=3e-5, rtol=1e-5)
    assert here(monkeypatch, "compress", "sum", "--rank", "2", "--to", "small") == 0
    out = capsys.readouterr().out
    assert re.search(r"rank 1: [\d.]+%, rank 2: [\d.]+%, rank 4: [\d.]+%", out) and "adapter: small (rank 2" in out
    assert in_peft("llama", small=tmp_path / "small")
    assert here(monkeypatch, "mix", str(language["a"]), "nowhere:2", "--to", "sum") == 2
    assert "nowhere/adapter_config.json: there is no such file" in capsys.readouterr().err
    for words in (["mix", "sum:2", str(language["a"])], ["compress", "./sum", "--rank", "1"]):
        assert here(monkeypatch, *words, "--to", "sum") == 2
        assert "--to: sum is read as well" in capsys.readouterr().err
    torch.testing.assert_close(logits_in_peft(in_peft("llama", sum=tmp_path / "sum"), inputs), expected)


def test_a_weight_that_is_no_number_or_0_and_a_rank_that_compresses_nothing_are_told(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for weight, says in {
        "abc": "the weight 'abc' is no number",
        "": "the weight '' is no number",
        "0": "other than 0",
    }.items():
        assert here(monkeypatch, "mix", f"{language['a']}:{weight}", str(language["b"]), "--to", "sum") == 2
        assert says in capsys.readouterr().err and not Path("sum").exists()
    assert here(monkeypatch, "compress", str(language["a"]), "--rank", "64", "--to", "same") == 0
    assert "so rank 64 compresses nothing" in capsys.readouterr().out


def test_an_adapter_that_lies_in_the_folder_to_be_written_is_kept(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert here(monkeypatch, "mix", str(language["a"]), "--to", "mm") == 0
    shutil.copytree(language["a"], "mm/inner")
    Path("link").symlink_to("mm/inner")
    for given in ("mm/inner", "link"):
        assert here(monkeypatch, "mix", given, str(language["b"]), "--to", "mm") == 2
        assert f"--to: {given} is read as well" in capsys.readouterr().err
    assert here(monkeypatch, "mix", str(language["b"]), "--to", "mm") == 2
    assert capsys.readouterr().err == "--to: mm holds inner, which sweep did not write; choose another folder\n"
    assert Path("mm/inner/adapter_model.safetensors").exists()


def test_a_place_that_cannot_be_written_is_told_in_one_line_that_names_the_option(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for to, why in (
        (".", "is the folder that you are in"),
        ("../broken", "holds a sweep.json that does not say which files sweep wrote"),
        ("../file", "is a file"),
        ("../file/below", "cannot be written (Not a directory)"),
        ("../loop", "cannot be written ("),
    ):
        assert here(monkeypatch, "mix", str(language["a"]), "--to", to) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"--to: {to} {why}") and line.endswith("; choose another folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "file", "loop"]


def test_a_link_to_a_folder_stays_and_the_folder_is_written(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        assert here(monkeypatch, "mix", str(language["a"]), "--to", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "adapter_model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_an_empty_text_is_refused_before_anything_is_answered(
    language: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(monkeypatch, "adapters", str(language["a"]), "--text", TEXTS[0], "--text", "") == 2
    assert "--text: one is empty" in capsys.readouterr().err


def test_a_base_that_came_with_its_adapter_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = on_disk("llama", tmp_path, a={"r": 2, "target_modules": ["q_proj"]})
    config = folders["a"] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))
    shutil.copytree(tmp_path / "base", folders["a"] / "base")
    shutil.rmtree(tmp_path / "base")
    assert here(monkeypatch, "adapters", str(folders["a"]), "--text", TEXTS[0]) == 0
    best = int(logits_in_peft(in_peft("llama", a=folders["a"]), in_words(TEXTS[0]))[0, -1].argmax())
    assert re.search(rf"a +'w{best}' ", capsys.readouterr().out)
