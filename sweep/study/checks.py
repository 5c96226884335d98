"""What no single section of the study file can see: keys of another task, sections that must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sweep.study.schema import IMAGES, SCRATCH, Arms, Confirm, Data, Range, Search, Train, Tune, rate_values


def cross_checks(sections: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What no single section can see: yields (field path, message), from those sections that are well-formed."""
    yield from _checks_of_the_task(sections)
    arms, tune, train = sections.get("arms"), sections.get("tune"), sections.get("train")
    search, confirm = sections.get("search"), sections.get("confirm")
    if isinstance(arms, Arms):
        yield from ((("arms", field), message) for field, message in arms.repeats())
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
        if tune.full_finetuning is not None:
            ours = len(rate_values(tune.learning_rate))
            full = len(rate_values(tune.full_finetuning.learning_rate))
            if ours != full:
                yield (
                    ("tune", "full_finetuning", "learning_rate"),
                    f"has {full} values and tune.learning_rate {ours}: every arm gets the same number",
                )
        if isinstance(search, Search) and search.sampler != "grid":
            both = [tune.learning_rate] + ([tune.full_finetuning.learning_rate] if tune.full_finetuning else [])
            if not all(isinstance(rates, Range) for rates in both):
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
    if "pretrain" in sections:
        is_scratch, pretrain = sections.get("model") == SCRATCH, sections["pretrain"]
        if is_scratch and pretrain is None:
            yield ("pretrain",), "missing: model: scratch needs it (architecture, config, labels, steps, …)"
        if pretrain is not None and not is_scratch:
            yield ("pretrain",), f"goes with model: {SCRATCH}, and the model is {sections.get('model')}"
        elif pretrain is not None and task != IMAGES:
            yield ("pretrain",), f"is for image-classification, and the task is {task}"
