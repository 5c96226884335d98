"""Rows to token arrays: classification texts, running text in chunks, prompts and completions, conversations."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sweep.study.errors import FieldError, first_line
from sweep.study.records import Truncation
from sweep.training.locate import quiet
from sweep.training.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 2048  # bounds the memory that the tokenizer's own records take
_CHARACTERS_A_TOKEN = 16  # ample: running text has four or five
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
Encoded = tuple[list[int], list[int]]  # token ids, and 1 where the token is a target


@dataclass(frozen=True)
class Split:
    """Rows of one split, without padding.

    input_ids: int32, the tokens of all rows, concatenated.
    offsets: int64 (rows + 1,): row i is input_ids[offsets[i]:offsets[i + 1]].
    labels: int64 (rows,), an index into the classes; for causal-lm int8, concatenated like input_ids, 1 where the token
    is a target (the first token of a row never is: nothing predicts it).
    truncation: what max_length took on the way.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    truncation: Truncation = field(default_factory=Truncation)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())


def choose_rows(split: Split, most: int, rng: np.random.Generator) -> Split:
    """At most that many rows, drawn at random, in their order."""
    chosen = np.sort(rng.permutation(len(split))[:most])
    tokens = np.concatenate([np.arange(split.offsets[i], split.offsets[i + 1]) for i in chosen])
    offsets = np.concatenate([[0], np.cumsum(split.lengths[chosen])])
    labels = split.labels[tokens if split.labels.dtype == np.int8 else chosen]
    return Split(split.input_ids[tokens], offsets, labels)


def tokenise_texts(
    rows: Sequence[Row], labels: tuple[str, ...], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Split:
    """Classification: each text with the tokenizer's special tokens, truncated at max_length."""
    ids: list[list[int]] = []
    cut = lost = 0
    for batch in _batches(rows):
        texts = [row["text"] for row in batch]
        for one, text_lost in _truncated(texts, max_length, tokenizer):
            ids.append(one)
            cut, lost = cut + (text_lost > 0), lost + text_lost
    index = {label: i for i, label in enumerate(labels)}
    truncation = Truncation(len(rows), cut, sum(len(row["text"]) for row in rows), lost)
    return _pack(ids, np.array([index[row["label"]] for row in rows], dtype=np.int64), truncation)


def tokenise_for_lm(rows: Sequence[Row], max_length: int, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Causal-lm: the tokens of each row, and which of them are targets.

    `text`: all tokens, end-of-text appended, cut into consecutive chunks of max_length, so that nothing is lost; a last
    chunk of one token is dropped. `prompt` and `completion`: the two are joined as they stand, targets are the
    completion and the end of text. `messages`: the tokenizer's chat template, targets are the assistant's turns.
    A prompt that is too long loses its beginning; only then does an answer lose its end. A row without a target is
    dropped and counted. Raises FieldError on `model` or `data.messages`.
    """
    if not tokenizer.is_fast:
        raise FieldError(("model", "causal-lm needs a fast tokenizer (a tokenizer.json): this one has no offsets"))
    rows_out: list[Encoded] = []
    cut = whole = lost = answers_cut = dropped = 0
    start, end = _start(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(rows):
        if "messages" in batch[0]:
            encoded = _encode_messages(batch, tokenizer)
            fixed = [_begins(ids, tokenizer.bos_token_id) for ids, _ in encoded]
        else:
            spans = [_text_and_targets(row) for row in batch]
            encoded = [
                (start + ids + end, [0] * len(start) + targets + [1] * len(end))
                for ids, targets in _encode(spans, tokenizer)
            ]
            fixed = [len(start)] * len(encoded)
        for (ids, targets), first in zip(encoded, fixed, strict=True):
            whole += len(ids)
            if "text" in batch[0]:
                cuts = range(0, len(ids), max_length)
                rows_out += [(ids[at : at + max_length], targets[at : at + max_length]) for at in cuts]
                continue
            kept = _fit(ids, targets, first, max_length)
            cut, lost = cut + (len(kept[0]) < len(ids)), lost + len(ids) - len(kept[0])
            answers_cut += sum(kept[1]) < sum(targets)
            dropped += not any(kept[1][1:])
            rows_out += [kept] if any(kept[1][1:]) else []
    rows_out = [(ids, [0, *targets[1:]]) for ids, targets in rows_out if len(ids) > 1]
    flat = [flag for _, targets in rows_out for flag in targets]
    truncation = Truncation(len(rows), cut, whole, lost, answers_cut, dropped)
    return _pack([ids for ids, _ in rows_out], np.array(flat, dtype=np.int8), truncation)


def _pack(ids: Sequence[Sequence[int]], labels: np.ndarray, truncation: Truncation) -> Split:
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    flat = np.fromiter((token for row in ids for token in row), dtype=np.int32, count=int(offsets[-1]))
    return Split(flat, offsets, labels, truncation)


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        yield rows[at : at + _ROWS_AT_ONCE]


def _truncated(
    texts: Sequence[str], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """The tokens of each text, at most max_length, and how many of its characters they leave out."""
    with quiet():
        if not tokenizer.is_fast:  # it tells no places: the share of the tokens stands for that of the characters
            for text, ids in zip(
                texts, tokenizer(texts, truncation=True, max_length=max_length)["input_ids"], strict=True
            ):
                tokens = len(tokenizer(text)["input_ids"]) if len(ids) == max_length else len(ids)
                yield ids, math.ceil(len(text) * (tokens - len(ids)) / max(tokens, 1))
            return
        heads = [_head(text, max_length) for text in texts]
        found = tokenizer(heads, truncation=True, max_length=max_length).encodings or []
        for text, head, one in zip(texts, heads, found, strict=True):
            if head is not text and not one.overflowing:
                (one,) = tokenizer([text], truncation=True, max_length=max_length).encodings or []
            yield one.ids, len(text) - max(end for _, end in one.offsets) if one.overflowing else 0


def _head(text: str, max_length: int) -> str:
    """The beginning of a text, up to a space, that nearly always fills max_length: tokenising the rest is waste."""
    enough = _CHARACTERS_A_TOKEN * max_length
    space = text.rfind(" ", 0, enough)
    return text[:space] if len(text) > enough and space > 0 else text


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, where this tokenizer puts one."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _begins(ids: list[int], bos: int | None) -> int:
    """How many tokens a template puts before the first turn: 1 for a beginning of text, but not for one every turn."""
    return int(bos is not None and ids[:1] == [bos] and bos not in ids[1:])


def _text_and_targets(row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The row as one text, and the stretches of it that are to be learnt."""
    if "text" in row:
        return row["text"], [(0, len(row["text"]))]
    text = row["prompt"] + row["completion"]
    return text, [(len(row["prompt"]), len(text))]


def _encode(
    texts: Sequence[tuple[str, list[tuple[int, int]]]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Encoded]:
    """A token is a target where it reaches into one of the text's stretches.

    Some tokenizers leave spaces out of their tokens' places: a token begins no later than the one before it ends.
    """
    with quiet():
        found = tokenizer([text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=True)
    for ids, places, (_, spans) in zip(found["input_ids"], found["offset_mapping"], texts, strict=True):
        begins = [min(a, b) for (a, _), (_, b) in zip(places, [(0, 0), *places], strict=False)]
        yield (
            ids,
            [int(any(b > low and a < high for low, high in spans)) for a, (_, b) in zip(begins, places, strict=True)],
        )


def _fit(ids: list[int], targets: list[int], fixed: int, max_length: int) -> Encoded:
    """At most max_length tokens: the prompt loses its beginning, after the `fixed` first tokens, then the end goes."""
    prompt = targets.index(1) if 1 in targets else len(ids)
    drop = min(max(0, len(ids) - max_length), max(0, prompt - fixed - 1))
    keep = [*range(fixed), *range(fixed + drop, len(ids))][:max_length]
    return [ids[i] for i in keep], [targets[i] for i in keep]


def _encode_messages(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    if not tokenizer.chat_template:
        raise FieldError(("data.messages", "the model's tokenizer has no chat template: use prompt and completion"))
    conversations = [_up_to_last_answer(row["messages"]) for row in rows]
    try:
        template = tokenizer.get_chat_template()
        if _MARKS_ANSWERS.search(template):
            texts = _render_marked(conversations, template, tokenizer)
        else:
            texts = [_render(conversation, tokenizer) for conversation in conversations]
    except FieldError:
        raise
    except Exception as error:  # templates raise what they like, about roles above all
        raise FieldError(("data.messages", f"the model's chat template refuses them: {first_line(error)}")) from None
    return list(_encode(texts, tokenizer))


def _render_marked(
    conversations: list[list[dict[str, str]]], template: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Each conversation as text, and where its template marks answers.

    Not transformers' own mask of tokens: it leaves out every answer that begins with a space where a tokenizer leaves
    spaces out of its tokens' places.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marked = render_jinja_template(
        conversations, chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    return [(text, [(start, stop) for start, stop in spans]) for text, spans in zip(texts, marked, strict=True)]


def _up_to_last_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise FieldError(("data.messages", f"no assistant answers anything in {str(messages)[:80]}…"))
    return messages[: answers[-1] + 1]


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where the assistant's turns stand: what each adds to the conversation before it."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = str(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
            after = str(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                why = "the model's chat template rewrites earlier turns, so answers cannot be told from prompts"
                raise FieldError(("data.messages", why))
            spans.append((len(before), len(after)))
    return text, spans
