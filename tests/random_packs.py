"""Packs of trials on tiny random models by the engine's own step, and each trial alone in PEFT.

The reference is PEFT's own model with a plain torch optimizer, clip_grad_norm_ and transformers' own schedules;
all that the two share are initial tensors, the rows' order and what dropout drops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from random_models import FAMILIES, PAD, Family, frozen_model, frozen_rows
from torch import Tensor, nn

from sweep.lora.adapter import install
from sweep.lora.methods import is_conv1d
from sweep.lora.optim import Recipe, start_optimizer
from sweep.lora.passes import ForwardPass, dropout_keep, layer_key
from sweep.lora.prefix import PROMPT
from sweep.lora.readout import behind_attention, read_first_position
from sweep.study.arms import ALL_LINEAR, Arm
from sweep.study.records import DataSettings, Prepared, Setup, TrainSettings, TrialSpec
from sweep.training.base import Base, adapter_of
from sweep.training.batches import Batch, collate, step_rows
from sweep.training.rung import PackTrainee, fresh_state, train_step
from sweep.training.tasks import CAUSAL_LM

ROWS, STEPS = 4, 4  # rows of a trial's batch, steps of a run
LINEAR_ONLY = ("dora", "pissa", "lora+")  # lora+ knows convolutions too, but no embeddings
SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warm, _: transformers.get_constant_schedule_with_warmup(optimizer, warm),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On layers this small a second thread costs twice what it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixed_pack(family: Family, rates: float = 1.0) -> list[Trial]:
    """All that trials of one pack may differ in, with buckets of one trial and of two. rates: a factor on all rates.

    The first two see the same rows.
    """
    first, second = family.linear[0], family.linear[2]
    of_block_1 = (rf".*\.1\..*{first}", 6)
    pack = [
        Trial(8, 0.5, "rslora", seed=1, clip=0.05, rate=3e-2, schedule="cosine"),
        Trial(2, 1, "lora", (first, second), seed=1, warmup=0.5, decay=0.2),
        Trial(2, 2, "lora+", (first, second), seed=2, betas=(0.8, 0.95), init="gaussian", schedule="constant"),
        Trial(4, 1, "dora", seed=3, clip=0.3, decay=0.5, rate=2e-2),
        Trial(4, 2, "dora", (second,), seed=7, steps=9, clip=0.1),
        Trial(3, 2, "pissa", (second, family.linear[-1]), seed=4, schedule="cosine", warmup=0.25),
        Trial(3, 1, "pissa", (second,), seed=8),
        Trial(3, 1, "rslora", (*family.others, first), seed=5, decay=0.3, rate=2e-2),
        Trial(3, 2, "lora", family.others, seed=9),
        Trial(1, 4, "lora", (first,), seed=6, steps=2, schedule="constant", betas=(0.5, 0.9)),
        Trial(2, 1, "rslora", (first, second), seed=10, ranks=(of_block_1,), alphas=((second, 5.0),)),
        Trial(3, 2, "pissa", seed=11, ranks=((second, 2), of_block_1, (first, 5)), alphas=((first, 1.5),)),
        Trial(4, 1, "dora", (first, second), seed=12, ranks=((first, 1),), alphas=((of_block_1[0], 3.0),)),
    ]
    return [replace(trial, rate=trial.rate * rates) for trial in pack]


def prefixed_pack(family: Family, rates: float = 1.0) -> list[Trial]:
    """Prefixes of three lengths, alone and with LoRA, among trials without; two see the same rows.

    rates: a factor on all rates.
    """
    first, second = family.linear[0], family.linear[2]
    only = {"r": 0, "ratio": 0.0, "method": "prefix", "endings": ()}
    pack = [
        Trial(2, 1, "lora", (first, second), seed=1, warmup=0.5, decay=0.2),
        Trial(**only, prefix=5, seed=1, clip=0.3, rate=0.1),
        Trial(2, 2, "lora+prefix", (first,), seed=2, prefix=3, rate=3e-2, decay=0.3, schedule="cosine"),
        Trial(2, 2, "lora+prefix", (first,), seed=7, prefix=3, ranks=((first, 4),), betas=(0.8, 0.95)),
        Trial(4, 1, "dora", seed=3, clip=0.3, decay=0.5, rate=2e-2),
        Trial(**only, prefix=1, seed=4, steps=2, decay=0.2),
        Trial(3, 2, "lora+prefix", (family.others[0], second), seed=5, prefix=5, steps=9),
        Trial(**only, prefix=5, seed=6, rate=0.3, schedule="constant"),
        Trial(3, 1, "lora+prefix", seed=8, prefix=2, clip=0.05),
    ]
    return [replace(trial, rate=trial.rate * rates) for trial in pack]


@dataclass(frozen=True)
class Trial:
    """One trial of a pack; `endings` are its target modules."""

    r: int = 2
    ratio: float = 1.0
    method: str = "lora"
    endings: tuple[str, ...] = (ALL_LINEAR,)
    seed: int = 0
    init: str = "kaiming"
    rate: float = 1e-2
    steps: int = STEPS
    schedule: str = "linear"
    warmup: float = 0.0
    decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    lr_ratio: float = 4.0  # of lora+ alone
    ranks: tuple[tuple[str, int], ...] = ()  # rank_pattern
    alphas: tuple[tuple[str, float], ...] = ()  # alpha_pattern
    prefix: int = 0

    @property
    def arm(self) -> Arm:
        return Arm("", self.method, self.r, self.ratio, self.endings, self.ranks, self.alphas, self.prefix)

    @property
    def recipe(self) -> Recipe:
        ratio = self.lr_ratio if self.method == "lora+" else 1.0
        return Recipe(
            self.rate, self.steps, self.schedule, self.warmup, self.decay, self.clip, self.betas, lr_ratio=ratio
        )

    @property
    def lives(self) -> int:
        return min(self.steps, STEPS)


@dataclass(frozen=True)
class Run:
    """What the trials of a pack must share."""

    optimizer: str = "adamw"
    dropout: float = 0.0
    micro: int | None = None  # rows of a trial in one device batch
    plain_head: bool = False
    repeats_known: bool = True  # whether batches say which rows are the same
    first_position: bool = False  # whether an encoder's top is computed at the first position alone


@dataclass
class Trained:
    """A trial after some steps."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    alive: bool = True


def initial_state(family: Family, trial: Trial) -> dict[str, Tensor]:
    model = frozen_model(family)
    base = Base(model, family.head)
    spec = TrialSpec(0, trial.arm, trial.rate, trial.seed, "search", "")
    return fresh_state(base, spec, TrainSettings(STEPS, ROWS, init_lora_weights=trial.init))


def start_pack(
    family: Family, trials: Sequence[Trial], run: Run, start: int = 0, earlier: Sequence[Trained] | None = None
) -> PackTrainee:
    """The trials on the family's model, at step 0 or where `earlier` left them."""
    model = frozen_model(family)
    states = [initial_state(family, t) for t in trials] if earlier is None else [one.weights for one in earlier]
    base = Base(model, family.head)
    adapters = [adapter_of(base, t.arm, state, t.seed) for t, state in zip(trials, states, strict=True)]
    behind = behind_attention(model)
    pack = install(model, adapters, family.head, run.dropout)
    if run.first_position:
        assert behind is not None
        pack.hooks.append(read_first_position(model, behind))
    moments = None if earlier is None else [one.moments for one in earlier]
    optimizer = start_optimizer(pack, [trial.recipe for trial in trials], run.optimizer, start, moments)
    return PackTrainee(model, run.plain_head, pack, optimizer)


def train_pack(
    family: Family,
    trials: Sequence[Trial],
    run: Run = Run(),
    start: int = 0,
    stop: int = STEPS,
    earlier: Sequence[Trained] | None = None,
    watch: Callable[[PackTrainee], object] = lambda trainee: None,
) -> list[Trained]:
    """Steps start+1 … stop of a pack. watch: called with the pack before its first step."""
    data = frozen_rows(family)
    settings = TrainSettings(STEPS, ROWS, micro_batch_size=run.micro, precision="float32", optimizer=run.optimizer)
    setup = Setup("", family.task, DataSettings("", 0, "", ""), settings, 0, "")
    prepared = Prepared({}, 0, "", (), "", 0, {}, "cpu", "float32", "eager", len(trials))
    trainee = start_pack(family, trials, run, start, earlier)
    try:
        watch(trainee)
        orders = [step_rows(data.lengths, ROWS, trial.seed, start, stop) for trial in trials]
        losses = []
        for step, rows in enumerate(zip(*orders, strict=True), start):
            batch = collate(data, np.concatenate(rows), PAD)
            if not run.repeats_known:
                batch = replace(batch, source_R=np.arange(len(batch.source_R)))
            losses.append(train_step(trainee, batch, setup, prepared, step))
        found = []
        for k, loss_S in enumerate(torch.stack(losses, 1).tolist()):
            found.append(Trained(loss_S, *trainee.states(k), bool(trainee.alive_K[k])))
    finally:
        trainee.close()
    return found


class SeededDropout(nn.Module):
    """In the place of PEFT's lora_dropout: drops what the engine's generator says for (seed, step, layer, row)."""

    def __init__(self, forward_pass: ForwardPass, name: str):
        super().__init__()
        self.forward_pass, self.key = forward_pass, layer_key(name)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.flatten(2) if x.ndim == 4 else x  # a convolution's image: (rows, channels, places)
        return x * dropout_keep(inputs[None].shape, self.forward_pass, self.key).view(x.shape)


def peft_model(family: Family, trial: Trial, dropout: float = 0.0, init: bool | str = True) -> nn.Module:
    """PEFT's own model of the arm, with PEFT's own choice of layers and its own initial tensors."""
    model, all_linear = copy.deepcopy(frozen_model(family)), trial.endings == (ALL_LINEAR,)
    classify = family.task != CAUSAL_LM
    lora = LoraConfig(
        r=trial.r,
        lora_alpha=trial.arm.lora_alpha,  # type: ignore[arg-type]
        target_modules=ALL_LINEAR if all_linear else list(trial.endings),
        rank_pattern=dict(trial.ranks),
        alpha_pattern=dict(trial.alphas),
        exclude_modules=list(family.head) or None,
        modules_to_save=[name.rpartition(".")[2] for name in family.head] or None,
        use_rslora=trial.method == "rslora",
        use_dora=trial.method == "dora",
        init_lora_weights=init,
        fan_in_fan_out=family.name == "gpt2",
        lora_dropout=dropout,
        task_type=None if classify else TaskType.CAUSAL_LM,
    )
    if not trial.prefix:
        return get_peft_model(model, lora)  # type: ignore[arg-type]
    if trial.r:  # PEFT has no such pair: its LoRA layers inside, its prompt tuning around
        lora.modules_to_save = None
        inject_adapter_in_model(lora, model)
    task = TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM
    both = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=trial.prefix))  # type: ignore[arg-type]
    both.word_embeddings = model.get_input_embeddings()  # type: ignore[operator]  # the adapted one, if it is
    for name, p in both.named_parameters():
        p.requires_grad_(p.requires_grad or ".lora_" in name)
    return both


def peft_name(name: str, prefixed: bool = False) -> str:
    """A tensor's name in PEFT's model for its name in a trial's state. prefixed: in a model of its prompt tuning."""
    if name == PROMPT:
        return "prompt_encoder.default.embedding.weight"
    if prefixed:
        return peft_name(name).replace("base_model.model.", "base_model.", 1)
    module, _, tensor = name.rpartition(".")
    if ".lora_embedding_" in name:
        return f"base_model.model.{name}.default"
    if name.endswith("lora_magnitude_vector"):
        return f"base_model.model.{name}.default.weight"
    if ".lora_" in name:
        return f"base_model.model.{module}.default.{tensor}"
    return f"base_model.model.{module}.modules_to_save.default.{tensor}"


def trained_parameters(family: Family, trial: Trial, model: nn.Module) -> dict[str, nn.Parameter]:
    """What PEFT trains, by the engine's names, with the engine's initial tensors copied in."""
    initial = {name: value for name, value in initial_state(family, trial).items() if ".initial_" not in name}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = {peft_name(name, trial.prefix > 0): name for name in initial}
    assert set(found) == set(ours), set(found) ^ set(ours)  # PEFT adapts the same layers and trains the same tensors
    with torch.no_grad():
        for name, p in found.items():
            p.copy_(initial[ours[name]])
    return {ours[name]: p for name, p in found.items()}


@torch.no_grad()
def take_residuals(model: nn.Module) -> None:
    """PiSSA: PEFT's base is what A and B leave of it."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base = layer.get_base_layer()
            base.weight -= layer.scaling["default"] * ((B @ A).T if is_conv1d(base) else B @ A)


def train_in_peft(family: Family, trial: Trial, run: Run) -> Trained:
    """A plain PyTorch loop over the trial alone, to its own last step."""
    model = peft_model(family, trial, run.dropout)
    trained = trained_parameters(family, trial, model)
    if trial.method == "pissa":
        take_residuals(model)
    forward_pass = ForwardPass(torch.tensor([trial.seed]), run.dropout, dropout=True)
    if run.dropout:
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                above = "base_model." if trial.prefix else "base_model.model."
                layer.lora_dropout["default"] = SeededDropout(forward_pass, name.removeprefix(above))
    model.train(run.dropout > 0)  # PEFT's DoRA asks for the mode; the models' own dropout is 0
    groups = []
    for name, p in trained.items():
        rate = trial.rate * (trial.recipe.lr_ratio if "lora_B" in name or "embedding_B" in name else 1.0)
        groups.append({"params": [p], "lr": rate, "weight_decay": 0.0 if name.endswith(".bias") else trial.decay})
    optimizer: torch.optim.Optimizer
    if run.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=trial.betas)
    else:
        optimizer = torch.optim.SGD(groups, momentum=trial.betas[0])
    schedule = SCHEDULES[trial.schedule](optimizer, math.ceil(trial.warmup * trial.steps), trial.steps)
    data, losses = frozen_rows(family), []
    for step, rows in enumerate(step_rows(data.lengths, ROWS, trial.seed, 0, trial.lives)):
        forward_pass.step = step
        inputs = tensors(family, collate(data, rows, PAD))
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), math.inf if trial.clip is None else trial.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(losses, {name: p.detach().clone() for name, p in trained.items()})


def tensors(family: Family, batch: Batch) -> dict[str, Tensor]:
    """A batch as the model's own forward takes it, which then makes the loss by itself."""
    ids, mask, labels = (torch.from_numpy(a) for a in (batch.input_ids_RT, batch.attention_mask_RT, batch.labels))
    if family.task == CAUSAL_LM:
        labels = torch.where(labels, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same(ours: Trained, theirs: Trained, steps: int, what: object, atol: float = 5e-5) -> None:
    """Every loss of the first `steps` steps to 2e-5, and every trained tensor after the last to atol.

    Tensors by their root mean square: AdamW divides by the gradient, and where an entry's is no larger than rounding,
    neither ours nor PEFT's step there means anything.
    """
    tolerance = min(2e-5, atol)
    np.testing.assert_allclose(
        ours.losses[:steps], theirs.losses[:steps], tolerance, tolerance, err_msg=f"loss of {what}"
    )
    for name, value in theirs.weights.items():
        difference = (ours.weights[name] - value).square().mean().sqrt().item()
        assert difference <= atol, f"{name} differs by {difference:.2g} in {what}"


def assert_trained_as_in_peft(family: Family, trials: list[Trial], run: Run) -> None:
    for trial, ours in zip(trials, train_pack(family, trials, run), strict=True):
        assert_same(ours, train_in_peft(family, trial, run), trial.lives, (trial, run))
