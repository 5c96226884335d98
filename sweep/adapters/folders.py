"""Folders of adapters, written whole: in PEFT's format, with a mark that tells ours from others' files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file

from sweep import __version__
from sweep.adapters.peft_format import BASE, CONFIG, EMBEDDING_BASE, MARK, PREFIX, TENSORS, PeftAdapter, Settings
from sweep.lora.methods import DORA
from sweep.study.errors import FieldError
from sweep.study.files import file_sha256

BASE_CONFIG = "config.json"  # of a base that comes along


def save_adapter(adapter: PeftAdapter, to: Path, target_modules: Sequence[str], made_by: Mapping[str, Any]) -> None:
    """Write an adapter that was made of others: their labels, task and own base go with it.

    target_modules: see `write_adapter`. made_by: what `sweep.json` tells of it besides. Raises FieldError as
    `check_target` does.
    """
    with whole_folder(to) as half:
        write_adapter(adapter, half, target_modules)
        if adapter.own_base is not None:
            shutil.copytree(adapter.own_base, half / BASE)
        told = {
            **made_by,
            "labels": list(adapter.labels),
            "task": adapter.task,
            "model_fingerprint": adapter.model_fingerprint,
        }
        write_mark(half, told)


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


def write_mark(folder: Path, told: Mapping[str, Any]) -> None:
    """Write `sweep.json` as the last file of a folder: what we tell of it, our files, the digests of an adapter's.

    Of texts that people may change (README.md, a tokenizer's settings) there are none.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = [PurePosixPath(name) for name in files]
    weights = [path.as_posix() for path in paths if path.suffix == ".safetensors" or path.name in (CONFIG, BASE_CONFIG)]
    digests = {name: file_sha256(folder / name) for name in weights if CONFIG in files}
    mark = {"sweep": __version__, **told, "files": [*files, MARK], "sha256": digests}
    (folder / MARK).write_text(json.dumps(mark, indent=1))


def check_target(to: Path, study: str | None = None) -> Path:
    """Where `to` really is, links followed, for a folder that takes the place of what lies there.

    study: whose export it will be; None: an adapter made of others. Raises FieldError unless nothing lies there, or an
    earlier folder of ours with no file but ours in it, which is no trial's export or one of the same study.
    """
    with _naming(to):
        place = Path(os.path.realpath(to))
        if not place.exists():
            return place
        if not place.is_dir():
            raise _refused(to, "is a file")
        mark = _our_mark(to) if (place / MARK).exists() else {"files": []}
        foreign = _first_foreign(place, mark["files"])
        if foreign is not None:
            raise _refused(to, f"holds {foreign}, which sweep did not write")
        if mark.get("study", study) != study:  # it cost training
            raise _refused(to, f"holds the adapter of a trial, of study {mark['study']}")
        if Path.cwd().is_relative_to(place):
            raise _refused(to, "is the folder that you are in, which cannot be replaced")
        return place


@contextmanager
def whole_folder(to: Path, study: str | None = None) -> Iterator[Path]:
    """A folder beside `to` to write into; it takes that place once the block ends, and is gone where it raises.

    Raises FieldError as `check_target` does, and where nothing can be written there.
    """
    place = check_target(to, study)
    half, old = (place.parent / f".{kind}-{place.name}-{os.getpid()}" for kind in ("tmp", "old"))
    try:
        with _naming(to):
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
        yield half
        for file in (path for path in half.rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors writes for the owner alone
        check_target(to, study)  # again: an export takes minutes, in which files may have come
        with _naming(to):
            _take_place(half, place, old)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _take_place(half: Path, place: Path, old: Path) -> None:
    """What lies there goes aside first: where it cannot be moved, nothing of it is lost."""
    if not place.exists():
        os.replace(half, place)
        return
    os.replace(place, old)
    try:
        os.replace(half, place)
    except OSError:
        os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _our_mark(to: Path) -> dict[str, Any]:
    try:
        mark = json.loads((to / MARK).read_text(encoding="utf-8"))
    except ValueError:
        mark = None
    files = mark.get("files") if isinstance(mark, dict) and "sweep" in mark else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise _refused(to, f"holds a {MARK} that does not say which files sweep wrote")
    return dict(mark)


def _first_foreign(place: Path, files: Sequence[str]) -> str | None:
    """The first name there that is none of the files, nor a folder that holds one of them."""
    ours = {*files, *(str(folder) for name in files for folder in PurePosixPath(name).parents)}
    for here, folders, names in os.walk(place):
        for name in sorted([*folders, *names]):
            path = Path(here, name).relative_to(place).as_posix()
            if path not in ours:
                return path
    return None


@contextmanager
def _naming(to: Path) -> Iterator[None]:
    """Errors of the file system, told of the option."""
    try:
        yield
    except OSError as error:
        raise _refused(to, f"cannot be written ({error.strerror or error})") from None


def _refused(to: Path, why: str) -> FieldError:
    return FieldError(("--to", f"{to} {why}; choose another folder"))


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
