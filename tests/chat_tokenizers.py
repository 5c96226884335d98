"""Small tokenizers of several kinds, made here, and chat templates of many shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "user assistant system tool: hello hello, world! 12 + 30 = 42. And in German: Straße, Käse, größer.",
    "weather(city='Berlin') gives {'degrees': 21}; it is warm  and   sunny in Berlin today.\n\nThank you!\n",
]
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@lru_cache
def small_tokenizer(kind: str) -> Any:
    """byte-level (as GPT-2's), trimmed (the same, with places that leave out spaces), or metaspace (as Llama 2's)."""
    if kind == "metaspace":
        made = Tokenizer(models.BPE(unk_token=None, byte_fallback=True))
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer: Any = trainers.BpeTrainer(vocab_size=520, special_tokens=[*MARKS, *alphabet], show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=MARKS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    made.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )


# Each answers `add_generation_prompt`, so that answers can be told from prompts without marks.
PLAIN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "default system turn": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "stripped": (
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ '</s>' if m.role == 'assistant' }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "instructions": (  # as Llama 2's: the generation prompt is nothing, the system turn is part of the first user's
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {% if system and loop.index0 == 1 %}{{ system }}\n"
        "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'tool' %}[RESULT] {{ m.content }} [/RESULT]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
}
# The same with its answers marked, as transformers' own mask wants it: what must be learnt, end of turn included.
MARKED = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "default system turn": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "stripped": (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %}assistant:{% generation %} {{ m.content | trim }}</s>"
        "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.role }}: {{ m.content | trim }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "instructions": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {% if system and loop.index0 == 1 %}{{ system }}\n"
        "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'tool' %}[RESULT] {{ m.content }} [/RESULT]"
        "{% elif m.role == 'assistant' %}{% generation %} {{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    ),
}
