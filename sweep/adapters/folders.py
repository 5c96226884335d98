"""Folders of adapters, written whole: in PEFT's format, with a mark that tells ours from others' files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sweep import __version__
from sweep.adapters.peft_format import BASE, EMBEDDING_BASE, MARK, PREFIX, TENSORS, PeftAdapter, Settings
from sweep.lora.methods import DORA
from sweep.study.errors import FieldError


def save_adapter(adapter: PeftAdapter, to: Path, target_modules: Sequence[str], made_by: Mapping[str, Any]) -> None:
    """Write an adapter that was made of others: their labels, task and own base go with it.

    target_modules: see `write_adapter`. made_by: what `sweep.json` tells of it besides. Raises FieldError where `to`
    holds other files, or the export of a trial, which such an adapter never takes the place of.
    """
    if holds_other_files(to):
        raise FieldError((str(to), "holds other files; name a new folder"))
    if holds_export(to):
        raise FieldError((str(to), "holds the adapter of a trial; name a new folder"))
    with whole_folder(to) as half:
        write_adapter(adapter, half, target_modules)
        if adapter.own_base is not None:
            shutil.copytree(adapter.own_base, half / BASE)
        told = {
            "sweep": __version__,
            **made_by,
            "labels": list(adapter.labels),
            "task": adapter.task,
            "model_fingerprint": adapter.model_fingerprint,
        }
        (half / MARK).write_text(json.dumps(told, indent=1))


def write_adapter(adapter: PeftAdapter, to: Path, target_modules: Sequence[str], dropout: float = 0.0) -> None:
    """Write configuration and tensors into a folder: PEFT's own LoraConfig writes the first, so that no key is missing.

    target_modules: endings that name exactly the adapted modules, or their full names.
    """
    from peft import LoraConfig

    settings = adapter.settings or _settings(adapter)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=_whole(settings.lora_alpha),
        target_modules=sorted(target_modules),
        task_type=adapter.task_type,
        base_model_name_or_path=adapter.base_model,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.method == DORA,
        fan_in_fan_out=adapter.fan_in_fan_out,
        lora_dropout=dropout,
        modules_to_save=list(adapter.modules_to_save) or None,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern={key: _whole(alpha) for key, alpha in settings.alpha_pattern.items()},
        inference_mode=True,
    )
    config.save_pretrained(str(to))
    named = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.state.items()}
    named |= {f"{PREFIX}{module}{EMBEDDING_BASE}": t.contiguous() for module, t in adapter.embeddings.items()}
    save_file(named, to / TENSORS, metadata={"format": "pt"})


def holds_other_files(to: Path) -> bool:
    """Whether something lies there that we did not write."""
    return to.exists() and (not to.is_dir() or (any(to.iterdir()) and not (to / MARK).exists()))


def holds_export(to: Path) -> bool:
    """Whether a trial's own adapter lies there: it cost training."""
    mark = to / MARK
    return mark.exists() and "trial" in json.loads(mark.read_text())


@contextmanager
def whole_folder(to: Path) -> Iterator[Path]:
    """A folder beside `to` to write into; it takes that place once the block ends, and is gone where it raises."""
    half = to.parent / f".tmp-{to.name}-{os.getpid()}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        yield half
        for file in (path for path in half.rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors writes for the owner alone
        shutil.rmtree(to, ignore_errors=True)
        os.replace(half, to)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _settings(adapter: PeftAdapter) -> Settings:
    """The most common rank and alpha, and a pattern for every module that has another: one that fits it alone."""
    r = Counter(adapter.ranks.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alphas.values()).most_common(1)[0][0]
    return Settings(
        r,
        alpha,
        {f"^{re.escape(module)}": other for module, other in adapter.ranks.items() if other != r},
        {f"^{re.escape(module)}": other for module, other in adapter.alphas.items() if other != alpha},
    )


def _whole(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha
