"""What crosses between rooms, processes and the disk: plain, frozen, standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sweep.study.arms import Arm

SEARCH, CONFIRM = "search", "confirm"
# States in which a trial's journal may end.
COMPLETE, PRUNED, DIVERGED, FAILED = "complete", "pruned", "diverged", "failed"
INFEASIBLE = "infeasible"  # does not fit on the device: a result, not a failure
UNEVEN = 1.5  # the median step of a probe over the shortest, above which its time says little


@dataclass(frozen=True)
class DataSettings:
    """Where the examples come from; the study file's `data`. Images have no max_length: it is 0 there."""

    source: str
    max_length: int
    validation: float | str
    test: float | str
    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    image: str | None = None
    split: str = "train"
    config: str | None = None
    max_evaluation_rows: int | None = None  # of validation and of test; None: all of them


@dataclass(frozen=True)
class ForgettingSettings:
    """Held-out text of the source domain; the study file's `forgetting`."""

    source: str
    text: str = "text"
    config: str | None = None
    split: str = "train"
    max_length: int = 128
    max_rows: int = 200


@dataclass(frozen=True)
class TrainSettings:
    """How every trial trains; the study file's `train`."""

    steps: int
    batch_size: int
    warmup: float = 0.1  # share of the steps
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float | None = 1.0  # largest gradient norm of a trial; None: no clipping
    dropout: float = 0.0
    precision: str = "auto"
    optimizer: str = "adamw"  # or "sgd", with betas[0] as its momentum
    betas: tuple[float, float] = (0.9, 0.999)
    loraplus_lr_ratio: float = 16.0  # lr_B / lr_A of method lora+
    init_lora_weights: str = "kaiming"  # how A begins; or "gaussian"
    micro_batch_size: int | None = None  # rows of a trial in one pass; their gradients add up to the batch's


@dataclass(frozen=True)
class PretrainSettings:
    """How a study makes its own base model; the study file's `pretrain`."""

    architecture: str  # transformers' model type
    config: str  # JSON of what the architecture's configuration sets apart from its defaults
    labels: tuple[str, ...]  # the classes whose rows the base learns; the study itself has the others
    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    image_size: int | None = None  # sides in pixels, where the configuration does not say


@dataclass(frozen=True)
class Setup:
    """What all trials of a study share: with it and a checkpoint any worker can take a trial up."""

    model: str
    task: str
    data: DataSettings
    train: TrainSettings
    split_seed: int  # decides which rows are training, validation and test
    cache: str  # folder for tokens, pixels, calibrations and pretrained bases
    quantization: str | None = None  # "4bit" or "8bit": how the frozen base is held
    trust_remote_code: bool = False  # whether code that the model brings may run
    forgetting: ForgettingSettings | None = None
    pretrain: PretrainSettings | None = None  # where the study makes its own base


@dataclass(frozen=True)
class Truncation:
    """What `data.max_length` took from the rows of one split. Running text goes into chunks and loses nothing."""

    rows: int = 0  # before any was dropped
    cut: int = 0  # rows that lost something
    whole: int = 0  # length of all rows: characters of classification's texts, else tokens
    lost: int = 0  # of that length
    answers_cut: int = 0  # rows that lost a part of an answer
    dropped: int = 0  # rows without any target, which would teach nothing


@dataclass(frozen=True)
class SourceText:
    """The text that forgetting is measured on, and the loss of the base on it, before any training."""

    rows: int
    targets: int  # tokens that the loss is a mean over
    removed: int  # rows that stand in the study's data too
    fingerprint: str
    masked: bool  # a masked-language-model loss, of tokens hidden once for all; else that of each next token
    loss: float  # in the precision that packs are evaluated in
    full_loss: float  # in that of full fine-tuning

    def base_loss(self, arm: Arm) -> float:
        """What the arm's losses are held against: in bfloat16 the two ways of evaluating differ by rounding."""
        return self.full_loss if arm.is_full else self.loss


@dataclass(frozen=True)
class Prepared:
    """What is found out about model, data and machine before the first trial. `precision` is never "auto"."""

    rows: dict[str, int]  # rows of train, validation, test
    duplicates_removed: int
    data_fingerprint: str
    labels: tuple[str, ...]  # empty for causal-lm
    model_fingerprint: str
    total_params: int
    trainable_params: dict[str, int]  # by arm name, the head included
    device: str
    precision: str
    attention: str
    pack_size: int
    calibration: tuple[dict[str, Any], ...] = ()  # the figures that decided precision, attention and pack size
    calibration_kept: bool = False  # whether they had been measured on this machine before
    tokens_per_step: float = 0.0  # mean tokens of one trial's batch, padding not counted; of images their number
    chance_loss: float | None = None  # test loss of always answering by the training labels' frequencies
    chance_accuracy: float | None = None  # None for causal-lm
    versions: dict[str, str] = field(default_factory=dict)
    truncation: dict[str, Truncation] = field(default_factory=dict)  # by split
    source_text: SourceText | None = None  # None where the study does not ask about forgetting
    pretraining: dict[str, Any] = field(default_factory=dict)  # of a base made by the study: parameters, rows, scores


@dataclass(frozen=True)
class TrialSpec:
    """An arm, its learning rate and a seed. `number` is Optuna's; `folder` holds its journal and checkpoints."""

    number: int
    arm: Arm
    learning_rate: float
    seed: int
    phase: str
    folder: str
    place: str = ""  # folder or URL of its checkpoints, where that is not `folder`; it holds no credentials


@dataclass(frozen=True)
class Saved:
    """A checkpoint as the journal knows it: nothing else is ever read or gone on from."""

    name: str  # its folder, relative to the trial's
    sha256: str  # of its checkpoint.json, which holds the digests of its files


@dataclass(frozen=True)
class Unit:
    """The unit of work: the trials of one pack, over the steps start+1 … stop of one rung."""

    setup: Setup
    prepared: Prepared
    trials: tuple[TrialSpec, ...]
    start: int
    stop: int
    test: bool  # evaluate on the test split too (the last rung of the confirm phase)
    checkpoints: tuple[Saved, ...] = ()  # that the trials go on from, in their order; none at step 0


@dataclass(frozen=True)
class Measurement:
    """What one rung found for one trial. Its checkpoint lies on disk before this exists."""

    number: int
    start: int
    stop: int
    train_loss: tuple[float, ...]  # one a step, start+1 … stop; shorter when the trial diverged
    eval_loss: float | None  # None when the trial diverged
    eval_metrics: dict[str, float]  # eval_accuracy or eval_perplexity
    test_metrics: dict[str, float]  # test_loss and the task's own; empty but at the end of confirm
    checkpoint: str  # folder, relative to the trial's; "" when the trial diverged
    diverged_at: int | None  # step of the first loss or gradient norm that is not finite
    pack_size: int
    pack_seconds: float  # wall time of the whole pack's rung: joint, never a trial's own
    tokens: int  # of this trial in this rung, padding not counted; of images their number
    pack_train_seconds: float | None = None  # of these the training steps alone: no loading, evaluation, checkpoints
    test_rows: str = ""  # file with the losses of the test rows, one by one, relative to the trial's folder
    # Where the study asks about forgetting, in the confirm phase:
    forgetting_loss: float | None = None  # on the text of the source domain, after the rung
    eval_loss_at_start: float | None = None  # of the first rung: validation loss before any step
    checkpoint_sha256: str = ""  # see `Saved`

    @property
    def saved(self) -> Saved | None:
        """The rung's checkpoint; None when the trial diverged."""
        return Saved(self.checkpoint, self.checkpoint_sha256) if self.checkpoint else None


@dataclass(frozen=True)
class Cost:
    """A solo probe: the arm alone, in a fresh process, a few steps after warm-up. Bytes and seconds."""

    cost_key: str
    trainable_params: int
    total_params: int
    peak_memory_bytes: int
    memory: dict[str, int]  # weights, gradients, optimizer, activations
    step_time_s: float  # median
    step_times_s: tuple[float, ...]
    tokens_per_second: float
    adapter_bytes: int
    device: str

    @property
    def uneven(self) -> bool:
        """Whether the steps differed so much that their median says little."""
        return self.step_time_s > UNEVEN * min(self.step_times_s)


@dataclass(frozen=True)
class Forecast:
    """What an arm will cost alone, foretold before the first trial. Bytes and seconds."""

    cost_key: str
    trainable_params: int
    peak_memory_bytes: int
    step_time_s: float | None  # None where not even a forward pass could be timed
    fits: bool  # into StudyForecast.memory_limit_bytes
    probed: bool  # from a few probe steps of its own; else scaled from arms that were
    note: str = ""  # why it is less than that, where it is


@dataclass(frozen=True)
class StudyForecast:
    """What a study will cost, foretold before the first trial; never changed by what is measured later."""

    arms: tuple[Forecast, ...]  # one a cost_key
    memory_limit_bytes: int  # what a trial alone may take, at that time
    validation_s: float  # evaluating one trial of a pack on all validation rows
    test_s: float  # and on all test rows
    packed_s: float | None = None  # training and evaluating all trials in packs
    alone_s: float | None = None  # the same one by one

    def of(self, cost_key: str) -> Forecast | None:
        return next((arm for arm in self.arms if arm.cost_key == cost_key), None)

    @property
    def doubtful(self) -> frozenset[str]:
        """The cost keys of the arms that are not expected to fit."""
        return frozenset(arm.cost_key for arm in self.arms if not arm.fits)


def to_json(record: Any) -> dict[str, Any]:
    """A frozen record as JSON-ready values."""
    return asdict(record)


def arm_from_json(value: dict[str, Any]) -> Arm:
    """An arm of a journal, of one written before arms had patterns too."""
    patterns = {name: tuple((key, at) for key, at in value.get(name, ())) for name in ("rank_pattern", "alpha_pattern")}
    return Arm(**{**value, **patterns, "target_modules": tuple(value["target_modules"])})


def trial_from_json(value: dict[str, Any]) -> TrialSpec:
    return TrialSpec(**{**value, "arm": arm_from_json(value["arm"])})


def measurement_from_json(value: dict[str, Any]) -> Measurement:
    return Measurement(**{**value, "train_loss": tuple(value["train_loss"])})


def prepared_from_json(value: dict[str, Any]) -> Prepared:
    truncation = {split: Truncation(**taken) for split, taken in value.get("truncation", {}).items()}
    tuples = {name: tuple(value[name]) for name in ("labels", "calibration")}
    text = value.get("source_text")
    return Prepared(
        **{**value, **tuples, "truncation": truncation, "source_text": SourceText(**text) if text else None}
    )


def cost_from_json(value: dict[str, Any]) -> Cost:
    return Cost(**{**value, "step_times_s": tuple(value["step_times_s"])})


def forecast_from_json(value: dict[str, Any]) -> StudyForecast:
    return StudyForecast(**{**value, "arms": tuple(Forecast(**arm) for arm in value["arms"])})
