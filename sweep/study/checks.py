"""What no single section of the study file can see: keys of another task, sections that must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sweep.study.arms import LORA_PREFIX, PREFIX
from sweep.study.schema import IMAGES, SCRATCH, Arms, Confirm, Data, Range, Search, Train, Tune, rate_values


def cross_checks(sections: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What no single section can see: yields (field path, message), from those sections that are well-formed."""
    yield from _checks_of_the_task(sections)
    arms, tune, train = sections.get("arms"), sections.get("tune"), sections.get("train")
    search, confirm = sections.get("search"), sections.get("confirm")
    if isinstance(arms, Arms):
        yield from ((("arms", field), message) for field, message in (*arms.repeats(), *arms.mismatches()))
        if arms.full_finetuning and sections.get("quantization") is not None:
            yield (
                ("arms", "full_finetuning"),
                "trains every weight, and those of a quantised base cannot be trained: set it to false, "
                "or leave quantization out",
            )
    if isinstance(search, Search) and isinstance(train, Train) and search.rungs and search.rungs[-1] != train.steps:
        yield (
            ("search", "rungs"),
            f"the last rung must be train.steps ({train.steps}), not {search.rungs[-1]}; set both",
        )
    if isinstance(train, Train) and (train.micro_batch_size or 0) > train.batch_size:
        yield ("train", "micro_batch_size"), f"{train.micro_batch_size} is more than batch_size ({train.batch_size})"
    if isinstance(confirm, Confirm):
        if isinstance(arms, Arms) and confirm.reference not in arms.rank:
            yield ("confirm", "reference"), f"rank {confirm.reference} is not among arms.rank {arms.rank}"
        if isinstance(search, Search) and search.seed in confirm.seeds:
            yield ("confirm", "seeds"), f"{search.seed} is search.seed: confirm seeds must be fresh"
        if len(set(confirm.seeds)) < len(confirm.seeds):
            yield ("confirm", "seeds"), "holds a seed twice"
    if isinstance(tune, Tune):
        if isinstance(arms, Arms) and arms.full_finetuning and tune.full_finetuning is None:
            yield (
                ("tune", "full_finetuning"),
                "missing: full fine-tuning needs its own learning rates (about a tenth of LoRA's), "
                "or set arms.full_finetuning: false",
            )
        if isinstance(arms, Arms) and tune.prefix is not None and PREFIX not in arms.method:
            yield ("tune", "prefix"), "no arm has these rates: add prefix to arms.method, or leave them out"
        ours = len(rate_values(tune.learning_rate))
        for name, rates in tune.own().items():
            values = len(rate_values(rates))
            if values != ours:
                yield (
                    ("tune", name, "learning_rate"),
                    f"has {values} values and tune.learning_rate {ours}: every arm gets the same number",
                )
        ranges = all(isinstance(rates, Range) for rates in (tune.learning_rate, *tune.own().values()))
        if isinstance(search, Search) and search.sampler != "grid" and not ranges:
            yield (
                ("tune", "learning_rate"),
                f"sampler {search.sampler} draws from a range: give low, high and values, or use sampler: grid",
            )


def _checks_of_the_task(sections: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that another task reads, and a base from scratch without its section or the reverse."""
    task, data = sections.get("task"), sections.get("data")
    if isinstance(data, Data) and task == IMAGES:
        for key in ("text", "prompt", "completion", "messages", "max_length"):
            if getattr(data, key) is not None:
                yield ("data", key), "is for text; image-classification reads data.image and data.label"
    elif isinstance(data, Data) and data.image is not None and task is not None:
        yield ("data", "image"), f"is for image-classification; {task} reads text"
    arms = sections.get("arms")
    if task == IMAGES and isinstance(arms, Arms) and not set(arms.method).isdisjoint((PREFIX, LORA_PREFIX)):
        yield ("arms", "method"), "a prefix stands before tokens, and images have none: leave prefix out"
    if task == IMAGES and sections.get("forgetting") is not None:
        yield ("forgetting",), "is a loss on text; leave it out with image-classification"
    if task == IMAGES and sections.get("latency") is not None:
        yield ("latency",), "is measured over lengths of text; leave it out with image-classification"
    if "pretrain" in sections:
        is_scratch, pretrain = sections.get("model") == SCRATCH, sections["pretrain"]
        if is_scratch and pretrain is None:
            yield ("pretrain",), "missing: model: scratch needs it (architecture, config, labels, steps, …)"
        if pretrain is not None and not is_scratch:
            yield ("pretrain",), f"goes with model: {SCRATCH}, and the model is {sections.get('model')}"
        elif pretrain is not None and task != IMAGES:
            yield ("pretrain",), f"is for image-classification, and the task is {task}"
