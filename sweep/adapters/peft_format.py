"""Adapters in PEFT's format, ours or anyone's, read into a record. Safetensors and JSON, never pickle.

What a folder says and the record cannot hold exactly is refused, with the key that says it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sweep.lora.methods import DORA, State
from sweep.study.arms import pattern_key
from sweep.study.errors import FieldError
from sweep.study.files import file_sha256

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MARK = "sweep.json"  # tells what we wrote from a folder that must not be overwritten
PREFIX = "base_model.model."
BASE = "base"  # the folder below an adapter's that holds its base, where a study made that
SUBFOLDER = "prefix"  # of a LoRA adapter's folder: PEFT has no adapter that is both
CLASSIFIER, LANGUAGE_MODEL = "SEQ_CLS", "CAUSAL_LM"  # PEFT's task types that have a task here
EMBEDDING_BASE = ".base_layer.weight"  # PEFT saves the base's own embeddings along where they are adapted
# What tells how an adapter was trained, or what the tensors' own names tell.
OF_NO_EFFECT = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
}
LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that change no base weight
_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
_TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")


class _Config(BaseModel):
    """What is read of adapter_config.json; null stands for PEFT's own default."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str | None = None
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    bias: str | None = None
    fan_in_fan_out: bool | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = True


class _Mark(BaseModel):
    """What is read of the file that we leave beside an adapter."""

    model_config = ConfigDict(strict=True, extra="ignore")

    labels: list[str] = []
    task: str | None = None
    model_fingerprint: str | None = None
    sha256: dict[str, str] = {}  # of configurations and tensors, by their paths in the folder


Form = TypeVar("Form", bound=BaseModel)


@dataclass(frozen=True)
class Settings:
    """Ranks and alphas as PEFT's configuration says them: common ones, and patterns for modules with their own."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter: ΔW = scaling · BA of every module, and what else it brings. Tensors are float32, under our names."""

    method: str  # "lora" or "dora"
    ranks: dict[str, int]  # by the adapted module's full name
    alphas: dict[str, float]
    state: State
    use_rslora: bool = False
    fan_in_fan_out: bool = False  # PEFT's word for Conv1D's transposed weights
    saved: tuple[str, ...] = ()  # modules whose tensors stand in place of the base's own: heads, norms, embeddings
    modules_to_save: tuple[str, ...] = ()  # as the configuration names them
    task_type: str | None = None
    base_model: str | None = None
    labels: tuple[str, ...] = ()  # where they are known: what we wrote tells them
    task: str | None = None  # the same
    model_fingerprint: str | None = None  # of the base; the same
    own_base: Path | None = None  # the base that came with the adapter, where nobody else has it
    embeddings: State = field(default_factory=dict)  # the base's own, by module, which PEFT saves beside adapted ones
    settings: Settings | None = None  # as they were read or asked for; None: made from ranks and alphas

    def scaling(self, module: str) -> float:
        """The factor on BA: alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732)."""
        r = self.ranks[module]
        return self.alphas[module] / (math.sqrt(r) if self.use_rslora else r)

    def names(self, module: str) -> tuple[str, str]:
        """Of the module's A and B in `state`."""
        if f"{module}.lora_embedding_A" in self.state:
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state.values())


def same_base(one: PeftAdapter, other: PeftAdapter) -> bool:
    """By the bases' fingerprints where both are known, else by the names that the configurations give them."""
    if one.model_fingerprint and other.model_fingerprint:
        return one.model_fingerprint == other.model_fingerprint
    return one.base_model == other.base_model


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a folder that PEFT or `sweep export` wrote. Raises FieldError, naming the file and the key."""
    ours = _read_mark(folder)
    written = _read_json(folder, CONFIG)
    if (folder / SUBFOLDER / CONFIG).exists():
        _refuse(
            folder, SUBFOLDER, "a prefix goes with this adapter; load both with PEFT, as the folder's README.md says"
        )
    method = _check_config(folder, written)
    config = _valid(folder, CONFIG, written, _Config)
    tensors = _read_tensors(folder)
    state: State = {}
    embeddings: State = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            _refuse(folder, TENSORS, f"{key!r} does not begin with {PREFIX!r}: PEFT would leave it out")
        if not tensor.is_floating_point():
            _refuse(folder, TENSORS, f"{key!r} holds {tensor.dtype}, not floating-point numbers")
        name = key.removeprefix(PREFIX)
        if name.endswith("lora_magnitude_vector.weight"):
            name = name.removesuffix(".weight")
        if name.endswith(EMBEDDING_BASE):
            embeddings[name.removesuffix(EMBEDDING_BASE)] = tensor
        elif ".lora_" in name:
            state[name] = tensor.float()
        else:
            others[name] = tensor.float()
    modules = _modules(folder, state, method)
    to_save = tuple(config.modules_to_save or ())
    settings = Settings(config.r, config.lora_alpha, config.rank_pattern or {}, config.alpha_pattern or {})
    for key in (*settings.rank_pattern, *settings.alpha_pattern):
        _check_pattern(folder, key)
    ranks = {m: _of_module(settings.rank_pattern, m, settings.r) for m in modules}
    for module, names in modules.items():
        A, B = (next(state[name] for name in names if name.endswith(ends)) for ends in (_A, _B))
        if A.dim() < 2 or B.dim() < 2:
            _refuse(folder, TENSORS, f"{module}: A and B are matrices, or kernels")
        if {A.shape[0], B.shape[1]} != {ranks[module]}:
            found = " and ".join(map(str, sorted({A.shape[0], B.shape[1]})))
            _refuse(folder, CONFIG, f"r: {ranks[module]} for {module}, whose tensors have rank {found}")
    base_model = config.base_model_name_or_path or None
    own_base = folder / BASE
    for path in sorted(own_base.rglob("*")):  # it is copied with the adapter, and links would be followed
        _inside(folder, path.relative_to(folder).as_posix())
    return PeftAdapter(
        method=method,
        ranks=ranks,
        alphas={m: _of_module(settings.alpha_pattern, m, settings.lora_alpha) for m in modules},
        state={**state, **others},
        use_rslora=bool(config.use_rslora),
        fan_in_fan_out=bool(config.fan_in_fan_out),
        saved=_saved_layers(folder, others, to_save),
        modules_to_save=to_save,
        task_type=config.task_type,
        base_model=base_model,
        labels=tuple(ours.labels),
        task=ours.task,
        model_fingerprint=ours.model_fingerprint,
        own_base=own_base if base_model == BASE and own_base.is_dir() else None,
        embeddings=embeddings,
        settings=settings,
    )


def is_damaged(folder: Path) -> bool:
    """Whether configurations or tensors, also of its prefix and its own base, are no longer those that sweep wrote."""
    try:
        _read_mark(folder)
    except FieldError:
        return True
    return False


def _read_mark(folder: Path) -> _Mark:
    """What we left beside an adapter, empty where others wrote it. Refuses files that are not those it tells of."""
    mark = _valid(folder, MARK, _read_json(folder, MARK) if (folder / MARK).exists() else {}, _Mark)
    for name, written in mark.sha256.items():
        try:
            found = file_sha256(_inside(folder, name))
        except OSError as error:
            _refuse(folder, name, f"cannot be read: {error.strerror}")
        if found != written:
            why = f"is not what sweep wrote (its sha256 differs from that in {MARK}); write it anew, or without {MARK}"
            _refuse(folder, name, f"{why} it is read as it is")
    return mark


def _check_config(folder: Path, config: Mapping[str, Any]) -> str:
    """The method. Refuses whatever has an effect that the record cannot hold."""
    if config.get("peft_type") != "LORA":
        _refuse(folder, CONFIG, f"peft_type: {config.get('peft_type')!r}; only LORA adapters are read")
    if config.get("bias") not in (None, "none"):
        _refuse(folder, CONFIG, f"bias: {config['bias']!r} trains the base's biases too; only none is read")
    init = config.get("init_lora_weights", True)
    if init not in (None, *LEAVE_THE_BASE):
        why = "changes the base as PEFT loads it; save it with path_initial_model_for_weight_conversion"
        _refuse(folder, CONFIG, f"init_lora_weights: {init!r} {why}")
    for key, value in config.items():
        if key not in _Config.model_fields.keys() | OF_NO_EFFECT and value not in (None, False, {}, []):
            _refuse(folder, CONFIG, f"{key}: {json.dumps(value)[:60]} is not known here, so its outputs would differ")
    return DORA if config.get("use_dora") else "lora"


def _valid(folder: Path, name: str, found: Mapping[str, Any], form: type[Form]) -> Form:
    try:
        return form.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = json.dumps(first["input"], default=str)[:60]
        what = "is missing" if first["type"] == "missing" else f"{given}: {first['msg'].lower()}"
        _refuse(folder, name, f"{'.'.join(map(str, first['loc']))}: {what}")


def _check_pattern(folder: Path, key: str) -> None:
    try:
        re.compile(key)
    except re.error as error:
        _refuse(folder, CONFIG, f"{key!r} is no pattern: {error}")


def _modules(folder: Path, state: State, method: str) -> dict[str, list[str]]:
    """The adapted modules in the order of their names, with their tensors' names. Each has an A and a B."""
    modules: dict[str, list[str]] = {}
    for name in sorted(state):
        found = _TENSOR.fullmatch(name)
        if found is None:
            _refuse(folder, TENSORS, f"{name!r} is no tensor of LoRA or DoRA")
        modules.setdefault(found[1], []).append(found[2])
    if not modules:
        _refuse(folder, TENSORS, "holds no lora_A and lora_B")
    wanted = [["lora_A.weight", "lora_B.weight"], ["lora_embedding_A", "lora_embedding_B"]]
    for module, parts in modules.items():
        if [part for part in parts if part != "lora_magnitude_vector"] not in wanted:
            _refuse(folder, TENSORS, f"{module} has {', '.join(parts)}; there must be one A and one B")
        if ("lora_magnitude_vector" in parts) != (method == DORA):
            _refuse(folder, TENSORS, f"{module}: lora_magnitude_vector goes with use_dora: true, and only with it")
    return {module: [f"{module}.{part}" for part in parts] for module, parts in modules.items()}


def _saved_layers(folder: Path, others: State, to_save: Sequence[str]) -> tuple[str, ...]:
    """Of each tensor the module that holds it. PEFT saves every module whose full name ends with a name in to_save."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in others)
    for layer in layers:
        parts = layer.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if not any(path.endswith(name) for path in above for name in to_save):
            _refuse(folder, TENSORS, f"{layer!r} is neither an adapter nor one of modules_to_save")
    return tuple(layers)


def _of_module(pattern: Mapping[str, Any], module: str, common: Any) -> Any:
    """A module's own rank or alpha, as PEFT finds it."""
    key = pattern_key(tuple(pattern.items()), module)
    return common if key is None else pattern[key]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(_inside(folder, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _refuse(folder, name, "there is no such file; an adapter is a folder that PEFT or `sweep export` wrote")
    except (ValueError, RecursionError) as error:
        _refuse(folder, name, f"is not JSON: {error}")
    if not isinstance(found, dict):
        _refuse(folder, name, "is not a JSON object")
    return found


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = _inside(folder, TENSORS)
    if not path.exists() and (folder / PICKLE).exists():
        why = "is a pickle, which runs programs when it is read; save it anew with PEFT's safe_serialization=True"
        _refuse(folder, PICKLE, why)
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        _refuse(folder, TENSORS, f"cannot be read: {' '.join(str(error).split())}")


def _inside(folder: Path, name: str) -> Path:
    """The file, which lies in the folder itself, or where the hub's cache keeps the folder's files."""
    try:
        path, home = (folder / name).resolve(), folder.resolve()
    except ValueError:  # a NUL, half of a surrogate pair
        _refuse(folder, ascii(name), "is no name of a file")
    blobs = home.parent.parent / "blobs"
    if not path.is_relative_to(home) and not (home.parent.name == "snapshots" and path.parent == blobs):
        _refuse(folder, name, f"leads out of the folder, to {path}")
    return path


def _refuse(folder: Path, name: str, why: str) -> NoReturn:
    raise FieldError((str(folder / name), why))
