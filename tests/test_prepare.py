"""Bad input that shows only with model and data at hand: one line each, with the field, before any trial is made."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from sweep.study.errors import FieldError
from sweep.study.file import StudyFile, read_study
from sweep.training.base import load_base
from sweep.training.locate import locate_model
from sweep.training.prepare import prepare

SMALL = ["data.max_length=16", "train.batch_size=4", "train.precision=float32"]


def quickstart(*overrides: str) -> StudyFile:
    return read_study(Path("studies/quickstart.yaml"), [*SMALL, *overrides])


def problems(tmp_path: Path, *overrides: str) -> dict[str, str]:
    source = quickstart(*overrides)
    with pytest.raises(FieldError) as caught:
        prepare(source.study.setup(str(tmp_path)), source.study.list_arms())
    assert all("\n" not in line for line in source.error(*caught.value.problems).lines())
    return dict(caught.value.problems)


def test_rank_larger_than_a_layer_is_refused_with_the_layer(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.rank=[2,64,400]")
    assert "rank 400" in found["arms.rank"] and "384×384" in found["arms.rank"] and "at most 384" in found["arms.rank"]


def test_problem_found_with_the_model_at_hand_names_file_line_and_field(tmp_path: Path) -> None:
    text = Path("studies/quickstart.yaml").read_text().replace("rank: [2, 4, 8, 64]", "rank: [2, 64, 400]")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    source = read_study(path, SMALL)
    with pytest.raises(FieldError) as caught:
        prepare(source.study.setup(str(tmp_path)), source.study.list_arms())
    line = next(i for i, text in enumerate(text.splitlines(), 1) if "rank: [" in text)
    assert source.error(*caught.value.problems).lines()[0].startswith(f"{path}:{line}: arms.rank: rank 400")


def test_unknown_module_is_refused_with_the_nearest_that_exist(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.target_modules=[[querry,value]]")
    assert "'querry'" in found["arms.target_modules"] and "did you mean query" in found["arms.target_modules"]


def test_wrong_rank_and_wrong_module_are_told_together(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.rank=[64,400]", "arms.target_modules=[[query],[key_proj]]")
    assert set(found) == {"arms.rank", "arms.target_modules"}


def test_more_rows_in_a_batch_than_there_are_is_refused(tmp_path: Path) -> None:
    assert "training rows" in problems(tmp_path, "train.batch_size=5000")["train.batch_size"]


def test_gguf_file_of_an_architecture_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "strangelove")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FieldError) as caught:
        load_base(locate_model(str(path)), "causal-lm", (), 0, "float32", "eager")
    ((field, message),) = caught.value.problems
    assert field == "model" and "strangelove" in message and "\n" not in message
