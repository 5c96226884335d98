"""The text that forgetting is measured on: held-out rows of the source domain, as tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sweep.study.errors import FieldError
from sweep.study.records import DataSettings, ForgettingSettings, Setup
from sweep.training.data import read_cache, text_key, tokenizer_fingerprint, write_cache
from sweep.training.locate import ModelPlace, load_tokenizer
from sweep.training.sources import Row, read_rows
from sweep.training.tasks import CAUSAL_LM, CLASSIFICATION
from sweep.training.tokens import Split, choose_rows, tokenise_for_lm, tokenise_texts
from sweep.training.trust import reading, unusable

TASKS = (CLASSIFICATION, CAUSAL_LM)  # whose models read text
MASKED_SHARE = 0.15  # of a row's tokens; at least one
_CODE_VERSION = 1  # raise it when the same rows would become other tokens


@dataclass(frozen=True)
class HeldOutText:
    """split.labels: 1 where the token is a target; masked: where it is hidden from the model."""

    split: Split
    removed: int
    fingerprint: str
    mask_token_id: int | None  # None: each token is predicted from those before it


@lru_cache(maxsize=2)
def load_source_text(setup: Setup, place: ModelPlace) -> HeldOutText:
    """Read, clear of what the study's data holds too, draw and tokenise; the tokens come from the cache if they can.

    At most max_rows rows of the source are drawn by the split seed, and of their tokens, in rows of at most
    max_length, again max_rows rows. Raises FieldError on `forgetting.…`.
    """
    settings = setup.forgetting
    assert settings is not None  # else nobody asks
    if setup.task not in TASKS:
        raise FieldError(("forgetting", f"is not there yet for {setup.task}: leave it out"))
    rows, removed = _clear(_read(settings), setup)
    if not rows:
        where = f" that does not stand in data.source too ({removed} rows do)" if removed else ""
        raise FieldError(("forgetting.source", f"{settings.source}: there is no text{where}"))
    masked = setup.task == CLASSIFICATION and has_masked_head(place)
    rng = np.random.default_rng([setup.split_seed, settings.max_rows])
    rows = [rows[i] for i in np.sort(rng.permutation(len(rows))[: settings.max_rows])]
    fingerprint = f"sha256:{hashlib.sha256(json.dumps([row['text'] for row in rows]).encode()).hexdigest()}"
    tokenizer_files = tokenizer_fingerprint(place)
    parts = [_CODE_VERSION, fingerprint, settings.max_length, settings.max_rows, setup.split_seed, masked]
    key = hashlib.sha256(json.dumps([*parts, tokenizer_files]).encode()).hexdigest()[:32]
    cached = Path(setup.cache) / f"source-{key}.npz"
    tokens = read_cache(cached, ("source",))
    if tokens is None:
        tokens = _tokenise(rows, settings, place, masked, rng)
        write_cache(cached, tokens)
    splits, mask_token_id = tokens
    return HeldOutText(splits["source"], removed, fingerprint, mask_token_id if masked else None)


@lru_cache(maxsize=8)
def has_masked_head(place: ModelPlace) -> bool:
    """Whether models of its kind predict masked tokens; else they predict the next one. Raises FieldError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(place.path, local_files_only=place.local, **reading(place))
    except Exception as error:  # transformers raises many kinds; all mean the same to the study
        raise unusable(place, ": its configuration cannot be read", error) from None
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _read(settings: ForgettingSettings) -> list[Row]:
    """The source's rows; what cannot be used is named as a field of `forgetting`."""
    wanted = DataSettings(
        source=settings.source,
        max_length=settings.max_length,
        validation=0.1,  # fractions: the whole split is read, and nothing is drawn from it
        test=0.1,
        text=settings.text,
        split=settings.split,
        config=settings.config,
    )
    try:
        return read_rows(wanted, CAUSAL_LM)["train"]
    except FieldError as error:
        named = [(f"forgetting.{field.removeprefix('data.')}", message) for field, message in error.problems]
        raise FieldError(*named) from None


def _clear(rows: list[Row], setup: Setup) -> tuple[list[Row], int]:
    """Each text once, without those that stand in the study's data (case and white space aside); how many those are."""
    studied: set[bytes] = set()
    for split in read_rows(setup.data, setup.task).values():
        for row in split:
            studied.update(text_key(m["content"]) for m in row.get("messages", ()))
            studied.update(text_key(row[name]) for name in ("text", "prompt", "completion") if name in row)
    by_key = {text_key(row["text"]): row for row in reversed(rows)}  # of two rows the first stays
    kept = [row for key, row in reversed(by_key.items()) if key not in studied]
    return kept, len(by_key) - len(kept)


def _tokenise(
    rows: list[Row], settings: ForgettingSettings, place: ModelPlace, masked: bool, rng: np.random.Generator
) -> tuple[dict[str, Split], int]:
    """The drawn rows, and the mask token (−1 where nothing is masked)."""
    tokenizer = load_tokenizer(place)
    if settings.max_length > tokenizer.model_max_length:
        limit = tokenizer.model_max_length
        raise FieldError(("forgetting.max_length", f"is {settings.max_length}, and {place.name} reads at most {limit}"))
    if not masked:
        split = tokenise_for_lm(rows, settings.max_length, tokenizer)
        return {"source": choose_rows(split, settings.max_rows, rng)}, -1
    if tokenizer.mask_token_id is None:
        raise FieldError(("forgetting.source", f"the tokenizer of {place.name} has no mask token"))
    split = tokenise_texts([{**row, "label": ""} for row in rows], ("",), settings.max_length, tokenizer)
    hidden = np.zeros(len(split.input_ids), dtype=np.int8)
    special = np.isin(split.input_ids, tokenizer.all_special_ids)
    for start, stop in zip(split.offsets, split.offsets[1:], strict=False):
        words = start + np.flatnonzero(~special[start:stop])
        hidden[rng.permutation(words)[: max(1, round(MASKED_SHARE * len(words)))]] = 1
    return {"source": Split(split.input_ids, split.offsets, hidden)}, int(tokenizer.mask_token_id)
