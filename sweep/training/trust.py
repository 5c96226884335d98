"""What is trusted of a model's files: safetensors and GGUF are read, pickles never; its code runs if allowed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep.study.errors import FieldError, first_line

if TYPE_CHECKING:
    from sweep.training.locate import ModelPlace

CODE = "trust_remote_code"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NAMED_WEIGHTS = "transformers_weights"  # the key by which a config.json names its file of weights
CONVERT = (
    "only safetensors are loaded. Convert it where nothing can be lost: load it with transformers "
    "(use_safetensors=False) and save it into a new folder with save_pretrained, the tokenizer too"
)
ALLOW = (
    f"read that code; to run it, set {CODE}: true in the study file and confirm it with --trust-remote-code "
    "(for `sweep adapters`, name it with --base and confirm)"
)


def reading(place: ModelPlace) -> dict[str, Any]:
    """What every `from_pretrained` of a configuration, tokenizer or image processor is given beside the path.

    Whether the model's code runs is always said: transformers asks at a prompt where it is not.
    """
    settings: dict[str, Any] = {CODE: place.trust_remote_code}
    if place.gguf_file:  # only where it is used: transformers takes the key's presence as a request for GGUF
        settings["gguf_file"] = place.gguf_file
    return settings


def reading_weights(place: ModelPlace) -> dict[str, Any]:
    """The same for models: of their weights no pickle is read.

    Raises FieldError on `model` where a local folder has nothing else.
    """
    # Else transformers asks a public service to convert pickles on the hub, and loads what that proposes.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if place.gguf_file:
        return reading(place)
    if place.local:
        _refuse_pickle(place)
    return {**reading(place), "use_safetensors": True, "weights_only": True}


def unusable(place: ModelPlace, what: str, error: Exception) -> FieldError:
    """Whatever transformers raised, as an error about the field that can mend it. what: "cannot be loaded", …"""
    told = str(error)
    if CODE in told:
        return FieldError((CODE, f"{place.name} brings code of its own, which would run with all your rights: {ALLOW}"))
    if "safetensors" in told and "file named" in told:
        return FieldError(("model", f"{place.name} has no weights in safetensors, and pickles can run code: {CONVERT}"))
    return FieldError(("model", f"{place.name}{what}: {first_line(error)}"))


def _refuse_pickle(place: ModelPlace) -> None:
    """Raise FieldError where the folder's weights are a pickle."""
    folder = Path(place.path)
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    named = _named_weights(folder / "config.json")
    if named.endswith(PICKLES):
        pickles = [named]
    elif any(name.endswith(".safetensors") for name in names):
        return
    if pickles:
        why = f"its weights, {pickles[0]}, are a pickle, which can run any program when it is read; {CONVERT}"
        raise FieldError(("model", f"{place.name}: {why}"))


def _named_weights(config: Path) -> str:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers says so
        return ""
    return str(found.get(NAMED_WEIGHTS, "")) if isinstance(found, dict) else ""
