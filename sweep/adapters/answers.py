"""What a base and its adapters say to texts: a class, or the next token and the loss of the text itself.

Shapes: R rows, T tokens, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from sweep.adapters.peft_format import CLASSIFIER, LANGUAGE_MODEL, PeftAdapter, same_base
from sweep.adapters.serve import ServingBase
from sweep.study.errors import FieldError
from sweep.training.base import HEAD_NAMES
from sweep.training.locate import quiet
from sweep.training.tasks import CAUSAL_LM, CLASSIFICATION, EVAL_LOGITS, EVAL_TOKENS, IMAGES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = {CLASSIFIER: CLASSIFICATION, LANGUAGE_MODEL: CAUSAL_LM}
LONGEST = 1024  # tokens of a text, where neither model nor tokenizer names a limit below


@dataclass(frozen=True)
class Answer:
    text: str
    adapter: str | None  # None: the base
    said: str  # the class, or the next token
    probability: float
    loss: float | None  # a language model's mean over the text's own tokens; None for classes, and for a single token


def common_task(adapters: Sequence[PeftAdapter]) -> str:
    """The task that all the adapters are for. Raises FieldError where there is none."""
    if any(adapter.task == IMAGES for adapter in adapters):
        raise FieldError(("ADAPTER", "an adapter for images answers no text; `load_serving_base` serves it in Python"))
    kinds = {adapter.task_type or (CLASSIFIER if _outputs(adapter) else LANGUAGE_MODEL) for adapter in adapters}
    if len(kinds) > 1 or not kinds <= TASKS.keys():
        raise FieldError(("ADAPTER", f"task types {', '.join(sorted(kinds))}: ask adapters of one task, {or_(TASKS)}"))
    return TASKS[kinds.pop()]


def common_base(adapters: Sequence[PeftAdapter]) -> str:
    """The base that all the adapters name, or that came with them. Raises FieldError where they differ or name none."""
    named = [adapter for adapter in adapters if adapter.base_model]
    if not named or not all(same_base(named[0], other) for other in named):
        names = sorted({adapter.base_model for adapter in named if adapter.base_model})
        found = "they name none" if not names else "they name " + ", ".join(names)
        found += ", which are different models" if len(names) == 1 else ""
        raise FieldError(("--base", f"say which base the adapters stand on: {found}"))
    own = next((adapter.own_base for adapter in named if adapter.own_base), None)
    return str(own or named[0].base_model)


def common_labels(adapters: Sequence[PeftAdapter]) -> tuple[str, ...]:
    """The classes, or LABEL_0 … where no folder tells them. Raises FieldError where the heads' outputs differ."""
    outputs = {outputs for adapter in adapters if (outputs := _outputs(adapter))}
    if len(outputs) != 1:
        found = f"the heads have {' and '.join(map(str, sorted(outputs)))} outputs" if outputs else "none has a head"
        raise FieldError(("ADAPTER", f"{found}: ask classifiers of the same classes together"))
    count = outputs.pop()
    named = next((adapter.labels for adapter in adapters if len(adapter.labels) == count), None)
    return named or tuple(f"LABEL_{i}" for i in range(count))


def answer(
    base: ServingBase,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    labels: Sequence[str],
    asked: Sequence[tuple[str, str | None]],
) -> Iterator[Answer]:
    """Each (text, adapter) in the order given, as many in one pass as fit. A text that is too long loses its end.

    labels: see `common_labels`; an adapter that knows its own is read by those.
    """
    config: Any = base.base.model.config
    positions = getattr(config, "max_position_embeddings", None) or LONGEST
    longest = min(LONGEST, tokenizer.model_max_length, positions)
    tokens = EVAL_TOKENS if task == CLASSIFICATION else min(EVAL_TOKENS, EVAL_LOGITS // config.vocab_size)
    with quiet():
        lengths = [len(ids) for ids in tokenizer([text for text, _ in asked])["input_ids"]]
    if not min(lengths):
        raise FieldError(("--text", "one is empty: the model needs a token to answer"))
    per_pass = max(1, tokens // min(longest, max(lengths)))
    for at in range(0, len(asked), per_pass):
        part = asked[at : at + per_pass]
        with quiet():
            inputs = tokenizer(
                [text for text, _ in part],
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = base.logits(given, [name for _, name in part]).float().cpu()
        for i, (text, name) in enumerate(part):
            if task == CLASSIFICATION:
                own = base.adapters[name].labels if name else ()
                yield _class(text, name, logits[i], own or labels)
            else:
                count = int(given["attention_mask"][i].sum())
                yield _continuation(text, name, logits[i, :count], given["input_ids"][i, :count], tokenizer)


def or_(names: Any) -> str:
    return " or ".join(sorted(names))


def _class(text: str, adapter: str | None, logits_C: Tensor, labels: Sequence[str]) -> Answer:
    probability_C = logits_C.softmax(-1)
    best = int(probability_C.argmax())
    return Answer(text, adapter, labels[best], float(probability_C[best]), None)


def _continuation(
    text: str, adapter: str | None, logits_TV: Tensor, ids_T: Tensor, tokenizer: PreTrainedTokenizerBase
) -> Answer:
    loss = float(cross_entropy(logits_TV[:-1], ids_T[1:])) if len(ids_T) > 1 else None
    probability_V = logits_TV[-1].softmax(-1)
    best = int(probability_V.argmax())
    return Answer(text, adapter, repr(tokenizer.decode([best])), float(probability_V[best]), loss)


def _outputs(adapter: PeftAdapter) -> int | None:
    """How many classes the head that the adapter brings tells apart: what its smallest layer puts out."""
    heads = [name for name in adapter.saved if any(part in HEAD_NAMES for part in name.split("."))]
    weights = [adapter.state[f"{name}.weight"] for name in heads if f"{name}.weight" in adapter.state]
    return min(map(len, weights), default=None)
