"""The study file's schema: strict, every field with its meaning. Reading and error lines are in `file.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Tag, field_validator, model_validator

from sweep.study.arms import ALL_LINEAR, LORA_PREFIX, PREFIX, Arm, full_arm, lora_arms
from sweep.study.published import Published
from sweep.study.records import DataSettings, ForgettingSettings, PretrainSettings, Setup, TrainSettings
from sweep.study.values import (
    AlphaPatterns,
    Count,
    Domains,
    Fraction,
    Modules,
    Part,
    PlaceName,
    Positive,
    RankPatterns,
    has_repeats,
    one_of,
    patterns,
)

IMAGES, SCRATCH = "image-classification", "scratch"
Task = Literal["sequence-classification", "causal-lm", "image-classification"]
Method = Literal["lora", "rslora", "lora+", "dora", "pissa", "prefix", "lora+prefix"]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Data(Strict):
    source: str = Field(min_length=1)  # with data.domains it holds {domain}, or config does
    domains: Domains | None = None  # one study each, and an analysis across them; the first is the control
    text: str | None = None  # "text", but for images
    image: str | None = None  # "image", for images
    label: str = "label"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    config: str | None = None  # a hub data set's configuration
    split: str = "train"  # the split that training rows come from
    max_length: Annotated[int, Field(ge=4)] | None = None  # tokens; 128, but for images
    validation: Part = 0.1
    test: Part = 0.1
    max_evaluation_rows: Count | None = None  # of validation and of test, drawn by the split seed

    @model_validator(mode="after")
    def _columns_go_together(self) -> Data:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together: name both columns or neither")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("name either messages, or prompt and completion")
        fractions = [x for x in (self.validation, self.test) if isinstance(x, float)]
        if sum(fractions) >= 0.9:
            raise ValueError("validation and test together leave under a tenth of the rows for training")
        return self


class Pretrain(Strict):
    """A base that the study makes itself, for `model: scratch`."""

    architecture: str = Field(min_length=1)
    config: dict[str, Any] = {}
    labels: Annotated[list[str | int], Field(min_length=2)]
    steps: Count
    batch_size: Count
    learning_rate: Positive
    seed: Annotated[int, Field(ge=0)] = 0
    image_size: Count | None = None

    @field_validator("labels")
    @classmethod
    def _tell_labels_apart(cls, labels: list[str | int]) -> list[str | int]:
        if has_repeats([str(label) for label in labels]):  # the data's labels are read as text
            raise ValueError("names a label twice")
        return labels

    def settings(self) -> PretrainSettings:
        labels = tuple(str(label) for label in self.labels)
        config = json.dumps(self.config, sort_keys=True)
        return PretrainSettings(**{**self.model_dump(), "config": config, "labels": labels})


class Arms(Strict):
    rank: Annotated[list[Count], Field(min_length=1)]
    alpha_ratio: Annotated[list[Positive], Field(min_length=1)]
    method: Annotated[list[Method], Field(min_length=1)] = ["lora"]
    target_modules: Annotated[list[Modules], Field(min_length=1)] = ["all-linear"]
    rank_pattern: RankPatterns = {}  # as in PEFT: module name, ending or regular expression -> rank
    alpha_pattern: AlphaPatterns = {}  # … -> lora_alpha
    prefix_length: list[Count] = []  # of methods prefix and lora+prefix: trained embeddings before the input
    full_finetuning: bool = True

    def repeats(self) -> Iterator[tuple[str, str]]:
        """What would make an arm appear twice: (field, message)."""
        for name in ("rank", "alpha_ratio", "method", "prefix_length"):
            if has_repeats(getattr(self, name)):
                yield name, "holds a value twice: each combination is one arm"
        if has_repeats([frozenset([ALL_LINEAR] if x == ALL_LINEAR else x) for x in self.target_modules]):
            yield "target_modules", "names the same modules twice (in any order they are the same arms)"
        for name, given in (
            ("rank_pattern", patterns(self.rank_pattern)),
            ("alpha_pattern", patterns(self.alpha_pattern)),
        ):
            if has_repeats(given):
                yield name, "holds a pattern twice: each combination is one arm"

    def mismatches(self) -> Iterator[tuple[str, str]]:
        """Methods that lack what they need, and needs that no method has: (field, message)."""
        prefixed = [method for method in self.method if method in (PREFIX, LORA_PREFIX)]
        if prefixed and not self.prefix_length:
            yield "prefix_length", f"missing: method {prefixed[0]} needs lengths, as in [4, 16]"
        if self.prefix_length and not prefixed:
            yield "prefix_length", "no method uses it: add prefix or lora+prefix to arms.method, or leave it out"
        if set(self.method) == {PREFIX}:
            yield "method", "prefix alone has no rank to hold the others against (confirm.reference): add lora"


class Range(Strict):
    low: Positive
    high: Positive
    values: Count
    log: bool = True

    @model_validator(mode="after")
    def _low_below_high(self) -> Range:
        if self.low > self.high or (self.low == self.high and self.values > 1):
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if has_repeats(self.points()):
            raise ValueError(f"low ({self.low:g}) and high ({self.high:g}) are too close for {self.values} values")
        return self

    def points(self) -> list[float]:
        """`values` rates from low to high, both included; rounded to four digits so that they can be read and typed."""
        if self.values == 1:
            return [self.low]
        shares = [i / (self.values - 1) for i in range(self.values)]
        if self.log:
            raw = [math.exp(math.log(self.low) + s * (math.log(self.high) - math.log(self.low))) for s in shares]
        else:
            raw = [self.low + s * (self.high - self.low) for s in shares]
        return [float(f"{x:.4g}") for x in raw]


def _no_rate_twice(rates: list[float]) -> list[float]:
    if has_repeats(rates):
        raise ValueError("holds a learning rate twice: every arm is tuned over the same number of different rates")
    return rates


Rates = Annotated[
    Annotated[Range, Tag("mapping")]
    | Annotated[list[Positive], Field(min_length=1), AfterValidator(_no_rate_twice), Tag("list")],
    one_of("must be a list of rates, or {low, high, log, values}"),
]


class TuneOwn(Strict):
    learning_rate: Rates


class Tune(Strict):
    learning_rate: Rates
    full_finetuning: TuneOwn | None = None
    prefix: TuneOwn | None = None  # of method prefix, which wants higher rates; without it, those of the others

    def own(self) -> dict[str, Rates]:
        """The rates of what has its own, by key."""
        given = {"full_finetuning": self.full_finetuning, "prefix": self.prefix}
        return {name: one.learning_rate for name, one in given.items() if one is not None}


def _two(betas: list[float]) -> list[float]:
    if len(betas) != 2:
        raise ValueError("must be two numbers, the decay of AdamW's first and second moment, as [0.9, 0.999]")
    return betas


class Train(Strict):
    steps: Count
    batch_size: Count
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive | None = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], AfterValidator(_two)] = [0.9, 0.999]
    loraplus_lr_ratio: Positive = 16.0  # lr_B / lr_A of method lora+
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    micro_batch_size: Count | None = None  # rows of a trial that go through the device at once


class Search(Strict):
    sampler: Literal["grid", "tpe", "gp", "random", "qmc", "nsga2"] = "grid"
    rungs: list[Count] = []
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _rungs_rise(self) -> Search:
        if any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ValueError(f"rungs must rise: {self.rungs}")
        return self


class Confirm(Strict):
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    finalists: Literal["rank", "arm", "rate"] = "rank"  # each rank's best, every arm, or every arm at each of its rates
    reference: Count
    epsilon: Positive


class RankUse(Strict):
    """Asks for the analysis of what rank the updates used; `sweep rank-use` makes it for any study."""

    keep: Fraction = 0.9  # share of ‖ΔW‖² that the first suggested rank pattern keeps
    budget: Count | None = None  # the rank whose parameters the second one takes; default: the second largest


def _each_once(values: list[int]) -> list[int]:
    if has_repeats(values):
        raise ValueError("holds a value twice")
    return values


Sizes = Annotated[list[Count], Field(min_length=1), AfterValidator(_each_once)]


class Latency(Strict):
    """Asks for the analysis of what adapters cost when they answer; `sweep latency` makes it for any study."""

    batch_sizes: Sizes = [1, 4, 16]
    lengths: Sizes = [16, 64, 128]  # tokens a row
    repeats: Count = 9
    precision: Literal["study", "float32"] = "study"  # of the base: as the study trained, or float32


class Forgetting(Strict):
    """Held-out text of the source domain: what the base knew, and trials may forget."""

    source: str = Field(min_length=1)
    text: str = "text"
    config: str | None = None  # a hub data set's configuration
    split: str = "train"
    max_length: Annotated[int, Field(ge=4)] = 128
    max_rows: Count = 200


class Resources(Strict):
    """What workers may take of the machine or the cluster. It is no part of the question: a study may move."""

    workers: Count | None = None  # default: one a GPU; without a GPU, one
    cpus: Positive | None = None  # cores of each; default: an equal share
    gpus: Annotated[float, Field(ge=0, le=1)] | None = None  # of each; at 0.5 two share one, at 0 none is used
    seconds_per_rung: Positive | None = None  # a pack that takes longer hangs: its worker is ended, and it is retried


def _is_url(address: str) -> str:
    if "://" not in address:
        raise ValueError("is no URL; write it as in postgresql://user@host/database")
    return address


class Study(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=150)]  # of folders: no dots, no slashes
    question: str = ""
    model: str = Field(min_length=1)
    trust_remote_code: bool = False  # run code that the model brings; --trust-remote-code confirms it each time
    quantization: Literal["4bit", "8bit"] | None = None  # of the frozen base (QLoRA); CUDA only
    pretrain: Pretrain | None = None
    task: Task
    data: Data
    arms: Arms
    tune: Tune
    train: Train
    search: Search = Search()
    confirm: Confirm
    rank_use: RankUse | None = None
    latency: Latency | None = None
    forgetting: Forgetting | None = None
    published: list[Published] = []  # figures of others, set beside this study's in its report
    storage: Annotated[str, AfterValidator(_is_url)] | None = None  # any Optuna URL; default: sqlite in the home
    checkpoints: PlaceName | None = None  # a folder, or any URL of fsspec; default: the home
    resources: Resources | None = None  # of workers: with --executor local or ray

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, raw: Any) -> Any:
        """The columns and the length that the task reads, where the file does not say."""
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict):
            return raw
        usual = {"image": "image"} if raw.get("task") == IMAGES else {"text": "text", "max_length": 128}
        given = {key: value for key, value in raw["data"].items() if key not in usual or value is not None}
        return {**raw, "data": {**usual, **given}}

    @property
    def rungs(self) -> tuple[int, ...]:
        return tuple(self.search.rungs or [self.train.steps])

    def list_arms(self) -> tuple[Arm, ...]:
        modules = [(ALL_LINEAR,) if entry == ALL_LINEAR else tuple(entry) for entry in self.arms.target_modules]
        arms = lora_arms(
            self.arms.rank,
            self.arms.alpha_ratio,
            list(self.arms.method),
            modules,
            patterns(self.arms.rank_pattern),
            patterns(self.arms.alpha_pattern),
            self.arms.prefix_length,
        )
        return (*arms, full_arm()) if self.arms.full_finetuning else arms

    def rates(self, arm: Arm) -> Range | list[float]:
        """The learning rates, or their range, that `arm` is tuned over."""
        if arm.is_full and self.tune.full_finetuning is not None:
            return self.tune.full_finetuning.learning_rate
        if arm.method == PREFIX and self.tune.prefix is not None:
            return self.tune.prefix.learning_rate
        return self.tune.learning_rate

    def setup(self, cache: str) -> Setup:
        given = self.data.model_dump(exclude={"domains"})
        read = {"text": "text", "max_length": 0, **{k: v for k, v in given.items() if v is not None}}
        return Setup(
            model=self.model,
            task=self.task,
            data=DataSettings(**read),
            train=TrainSettings(**{**self.train.model_dump(), "betas": tuple(self.train.betas)}),
            split_seed=self.search.seed,
            cache=cache,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
            forgetting=ForgettingSettings(**self.forgetting.model_dump()) if self.forgetting else None,
            pretrain=self.pretrain.settings() if self.pretrain else None,
        )


def rate_values(rates: Range | list[float]) -> list[float]:
    return rates.points() if isinstance(rates, Range) else list(rates)
