"""From rows to arrays: duplicates out, split, made into tokens or pixels once and cached by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sweep.study.errors import FieldError
from sweep.study.records import DataSettings, Setup, Truncation
from sweep.training.images import ImageSplit, image_splits
from sweep.training.locate import ModelPlace, load_tokenizer, model_fingerprint
from sweep.training.pictures import with_pixel_digests
from sweep.training.sources import Row, Rows, read_rows
from sweep.training.tokens import Split, choose_rows, tokenise_for_lm, tokenise_texts

__all__ = ["AnySplit", "Split", "TokenisedData", "load_data"]
SPLITS = ("train", "validation", "test")
_CODE_VERSION = 2  # raise it when the same rows would become other tokens or another split
_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")
Tokens = tuple[dict[str, Split], int]  # by split name, and the padding token


AnySplit = Split | ImageSplit


@dataclass(frozen=True)
class TokenisedData:
    """Texts as tokens, images as pixels. `fingerprint` is of the rows and their split, whatever the tokenizer or image
    processor and wherever the files lie."""

    train: AnySplit
    validation: AnySplit
    test: AnySplit
    labels: tuple[str, ...]  # empty for causal-lm
    duplicates_removed: int
    fingerprint: str
    pad_token_id: int


def load_data(setup: Setup, place: ModelPlace) -> TokenisedData:
    """Read, clear of duplicates, split and tokenise the study's data; the tokens come from the cache where they can.
    So do images, as pixels. Where the study makes its own base, rows of the labels that this has learnt are left out.

    Of rows with the same text (case and white space aside), or the same pixels, the test split keeps one, else
    validation, else train.
    Fractions are of all rows, seeded by setup.split_seed and, for classification, drawn from every class alike; every
    class keeps a training row. Of validation and test at most max_evaluation_rows tokenised rows are drawn.
    Raises FieldError on `data.…` for what cannot be used, and on `model` where its tokenizer cannot.
    """
    rows, duplicates_removed = distinct_rows(setup)
    if setup.pretrain is not None:
        rows = of_classes(rows, set(setup.pretrain.labels), wanted=False)
    if not rows["train"]:
        duplicates = f" ({duplicates_removed} duplicates removed)" if duplicates_removed else ""
        raise FieldError(("data.source", f"{setup.data.source}: no rows are left to train on{duplicates}"))
    labels = _list_labels(rows, setup.data) if setup.task != "causal-lm" else ()
    rows = make_splits(rows, setup.data, setup.split_seed)
    _check_splits(rows, labels, setup.data)
    fingerprint = row_fingerprint(rows)
    if setup.task == "image-classification":
        images = image_splits(rows, labels, place, fingerprint, Path(setup.cache))
        return TokenisedData(
            **images,
            labels=labels,
            duplicates_removed=duplicates_removed,
            fingerprint=fingerprint,
            pad_token_id=0,
        )
    cached = Path(setup.cache) / f"tokens-{_cache_key(setup, place, fingerprint)}.npz"
    tokens = read_cache(cached, SPLITS)
    if tokens is None:
        tokens = _tokenise(rows, labels, setup, place)
        write_cache(cached, tokens)
    splits, pad_token_id = tokens
    most = setup.data.max_evaluation_rows
    if most is not None:
        for i, name in enumerate(("validation", "test")):
            splits[name] = choose_rows(splits[name], most, np.random.default_rng([setup.split_seed, i]))
    return TokenisedData(
        **splits,
        labels=labels,
        duplicates_removed=duplicates_removed,
        fingerprint=fingerprint,
        pad_token_id=pad_token_id,
    )


def distinct_rows(setup: Setup) -> tuple[Rows, int]:
    """All rows of the source without duplicates, and how many those were."""
    rows = read_rows(setup.data, setup.task)
    if setup.task == "image-classification":
        rows = {name: with_pixel_digests(own, Path(setup.cache)) for name, own in rows.items()}
    return remove_duplicates(rows)


def of_classes(rows: Rows, classes: Collection[str], wanted: bool) -> Rows:
    """The rows of these classes, or (not wanted) of the others."""
    return {name: [row for row in own if (row["label"] in classes) == wanted] for name, own in rows.items()}


def remove_duplicates(rows: Rows) -> tuple[Rows, int]:
    """Rows without a text or an image twice in any splits, and how many were removed: test keeps its own, then
    validation."""
    seen: set[bytes] = set()
    kept: Rows = {}
    for name in reversed(SPLITS):
        if name in rows:
            kept[name] = []
            for row in rows[name]:
                key = _normalised(row)
                if key not in seen:
                    seen.add(key)
                    kept[name].append(row)
    return kept, sum(map(len, rows.values())) - sum(map(len, kept.values()))


def make_splits(rows: Rows, settings: DataSettings, seed: int) -> Rows:
    """Draw from `train` the splits that are given as a fraction; rows keep their order within a split.

    Every class gives its share to within one row, and its first drawn row stays in train.
    """
    train = rows["train"]
    classes = np.array([row.get("label", "") for row in train], dtype=object)
    order = np.random.default_rng(seed).permutation(len(train))
    order = order[np.argsort(classes[order], kind="stable")]
    first = np.array([i == 0 or classes[order[i]] != classes[order[i - 1]] for i in range(len(order))], dtype=bool)
    free = order[~first]
    taken: dict[str, np.ndarray] = {}
    for name, share in (("test", settings.test), ("validation", settings.validation)):
        if isinstance(share, float):
            wanted = min(round(share * len(train)), len(free))
            # Evenly spaced over rows sorted by class: each class gives its share.
            at = np.floor((np.arange(wanted) + 0.5) * len(free) / max(wanted, 1)).astype(int)
            taken[name], free = free[at], np.delete(free, at)
    taken["train"] = np.concatenate([order[first], free])
    return {**rows, **{name: [train[i] for i in np.sort(indices)] for name, indices in taken.items()}}


def _normalised(row: Row) -> bytes:
    """What two rows share when they are duplicates."""
    words = [m["role"] + "\0" + m["content"] for m in row["messages"]] if "messages" in row else []
    words += [row[name] for name in ("text", "prompt", "completion", "pixels") if name in row]
    return text_key(*words)


def text_key(*texts: str) -> bytes:
    """The same for texts that differ in case and white space alone."""
    text = "\0".join(" ".join(part.split()).casefold() for part in texts)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _check_splits(rows: Rows, labels: tuple[str, ...], settings: DataSettings) -> None:
    """Each split has rows, and each class a training row."""
    count = sum(map(len, rows.values()))
    problems = []
    for name, share in (("validation", settings.validation), ("test", settings.test)):
        if not rows[name]:
            what = (
                f"the split {share!r} has no rows" if isinstance(share, str) else f"{share:g} of {count} rows is none"
            )
            problems.append((f"data.{name}", f"{what}: nothing to evaluate on"))
    unseen = sorted(set(labels) - {row["label"] for row in rows["train"]}) if labels else []
    if unseen:
        problems.append(("data.label", f"{', '.join(map(repr, unseen))}: no training row has this class"))
    if problems:
        raise FieldError(*problems)


def _list_labels(rows: Rows, settings: DataSettings) -> tuple[str, ...]:
    """The classes of all splits: by value where all are numbers, else by name."""
    counts = Counter(row["label"] for split in rows.values() for row in split)
    numbers = {label: number for label in counts if (number := _number(label)) is not None}
    numeric = len(numbers) == len(counts)
    if len(counts) == 1:
        message = (
            f"column {settings.label!r} holds one class only, {next(iter(counts))!r}: there is nothing to tell apart"
        )
        raise FieldError(("data.label", message))
    continuous = numeric and not all(number.is_integer() for number in numbers.values())
    if len(counts) > 20 and (continuous or len(counts) > sum(counts.values()) / 2):
        kind = "measurements" if continuous else "free text or row numbers"
        message = f"column {settings.label!r} holds {len(counts)} different values, as {kind} do, not classes"
        raise FieldError(("data.label", f"{message}: name a column of classes, or make one (say, by thresholds)"))
    return tuple(sorted(counts, key=lambda label: (numbers[label], label)) if numeric else sorted(counts))


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def row_fingerprint(rows: Rows) -> str:
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(name.encode())
        for row in rows[name]:
            told = {key: value for key, value in row.items() if key != "image"}  # its digest is told
            digest.update(json.dumps(told, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"


def _cache_key(setup: Setup, place: ModelPlace, fingerprint: str) -> str:
    parts = [_CODE_VERSION, fingerprint, setup.task, setup.data.max_length, tokenizer_fingerprint(place)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tokenizer_fingerprint(place: ModelPlace) -> list[str]:
    """Of its files, since loading a tokenizer takes longer than all the rest."""
    library = version("transformers")
    if not place.local or place.gguf_file:
        return [library, model_fingerprint(place)]
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(place.path).iterdir() if p.suffix in _TOKENIZER_FILES):
        digest.update(path.name.encode() + path.read_bytes())
    return [library, digest.hexdigest()]


def read_cache(path: Path, names: Sequence[str]) -> Tokens | None:
    """The splits of these names; None where they are not there whole."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if file.zip.testzip() is not None:
                return None
            fields = {name: file[name] for name in file.files}
        splits = {
            name: Split(
                fields[f"{name}.input_ids"],
                fields[f"{name}.offsets"],
                fields[f"{name}.labels"],
                Truncation(*fields[f"{name}.truncation"].tolist()),
            )
            for name in names
        }
        return splits, int(fields["pad_token_id"])
    except Exception:  # whatever a damaged file raises, it is built anew
        return None


def write_cache(path: Path, tokens: Tokens) -> None:
    """Write it whole or not at all. Raises OSError."""
    splits, pad_token_id = tokens
    fields: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        truncation = np.array(astuple(split.truncation))
        arrays = {"input_ids": split.input_ids, "offsets": split.offsets, "labels": split.labels}
        fields |= {f"{name}.{part}": array for part, array in {**arrays, "truncation": truncation}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a reader never sees half a file
    try:
        with aside.open("wb") as stream:
            np.savez(stream, allow_pickle=False, pad_token_id=np.int64(pad_token_id), **fields)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _tokenise(rows: Rows, labels: tuple[str, ...], setup: Setup, place: ModelPlace) -> Tokens:
    tokenizer = load_tokenizer(place)
    max_length = setup.data.max_length
    if max_length > tokenizer.model_max_length:
        limit = tokenizer.model_max_length
        raise FieldError(("data.max_length", f"is {max_length}, and {place.name} reads at most {limit} tokens"))
    splits = {}
    for name in SPLITS:
        if setup.task == "sequence-classification":
            splits[name] = tokenise_texts(rows[name], labels, max_length, tokenizer)
        else:
            splits[name] = tokenise_for_lm(rows[name], max_length, tokenizer)
        if not len(splits[name]):
            if splits[name].truncation.dropped:
                field = "data.messages" if setup.data.messages is not None else "data.completion"
                raise FieldError((field, f"no row of {name} has an answer to learn within {max_length} tokens"))
            field = "data.source" if name == "train" else f"data.{name}"
            raise FieldError((field, f"no row of {name} has two tokens or more"))
    return splits, int(tokenizer.pad_token_id)
