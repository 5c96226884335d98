"""Where a model or a data set lies: hub, local path, inside an installed package. A failure names what was tried."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.study.errors import FieldError, first_line
from sweep.training.trust import reading, unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "package:"
DIGITS = "sklearn:digits"
DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = (".safetensors", ".gguf")
_SECONDS_FOR_THE_HUB = 4.0
_MIB = 1 << 20


@dataclass(frozen=True)
class ModelPlace:
    name: str  # as the study says
    path: str  # local folder, or hub id
    gguf_file: str | None  # file name inside path
    local: bool
    trust_remote_code: bool = False  # whether code that lies beside its weights may run


@dataclass(frozen=True)
class DataPlace:
    """Exactly one of files, folder, hub_id and digits is set."""

    files: tuple[str, ...] = ()  # all of DATA_SUFFIXES, sorted
    folder: str | None = None  # a folder of class folders
    hub_id: str | None = None
    digits: bool = False  # scikit-learn's images


def locate_model(name: str, trust_remote_code: bool = False) -> ModelPlace:
    """A hub id, a local folder, a local .gguf file, or `package:NAME/PATH` for one of the latter two.

    A hub model that is cached is used from the cache when the hub cannot be reached.
    Raises FieldError on `model`.
    """
    return replace(_located_model(name), trust_remote_code=trust_remote_code)


def _located_model(name: str) -> ModelPlace:
    if name.startswith(PACKAGE):
        return _local_model(name, _in_package(name, "model"))
    path = Path(name).expanduser()
    if path.exists():
        return _local_model(name, path.absolute())
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or name.endswith(".gguf"):
        raise FieldError(("model", f"{name!r}: there is no such file or folder ({path.absolute()})"))
    return _hub_model(name, path)


def locate_data(source: str) -> DataPlace:
    """A file, a glob, a folder (of data files, or of class folders), `package:NAME/…` for these, `sklearn:digits`, or a
    hub data set id.

    Raises FieldError on `data.source`.
    """
    if source.startswith("sklearn:"):
        if source != DIGITS:
            raise FieldError(("data.source", f"{source!r}: of scikit-learn's data sets there is {DIGITS} alone"))
        return DataPlace(digits=True)
    path = _in_package(source, "data.source") if source.startswith(PACKAGE) else Path(source).expanduser()
    if path.is_dir():
        return _data_folder(source, path.absolute())
    if path.exists():
        return DataPlace(files=_known_kinds([path.absolute()]))
    if glob.has_magic(str(path)):
        found = [Path(p).absolute() for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)]
        if not found:
            raise FieldError(("data.source", f"no file matches {path.absolute()}"))
        return DataPlace(files=_known_kinds(found))
    if not _HUB_ID.fullmatch(source) or source.startswith(".") or path.suffix.lower() in DATA_SUFFIXES:
        raise FieldError(("data.source", f"{source!r}: there is no such file or folder ({path.absolute()})"))
    return DataPlace(hub_id=source)


@cache
def hub_problem() -> str | None:
    """Why the hub cannot be used, or None: HF_HUB_OFFLINE, or one request that fails or takes over four seconds.

    The libraries retry for most of a minute before they say so; ask here first. Asked once a process.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS_FOR_THE_HUB)
            answer.append(None)
        except Exception as error:  # whatever the transport raises, the hub is out of reach
            answer.append(f"{constants.ENDPOINT} cannot be reached ({first_line(error)})")

    # A thread, because looking up a name may hang beyond any timeout of the request.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS_FOR_THE_HUB + 1)
    return answer[0] if answer else f"{constants.ENDPOINT} did not answer within {_SECONDS_FOR_THE_HUB + 1:g} s"


def load_tokenizer(place: ModelPlace) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding with the end-of-text token where it has no padding token.

    Raises FieldError on `model`.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(place.path, local_files_only=place.local, **reading(place))
    except Exception as error:  # transformers raises many kinds; all mean the same to the study
        raise unusable(place, ": its tokenizer cannot be loaded", error) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FieldError(("model", f"{place.name}: its tokenizer has neither a padding nor an end-of-text token"))
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_fingerprint(place: ModelPlace) -> str:
    """What identifies the model's files, cheaply.

    Of the hub: id and commit. Local: names, sizes, config.json, and the first and last MiB of each weights file; its
    code where that may run.
    """
    path = Path(place.path)
    if not place.local:
        return f"hub:{place.name}@{_hub_commit(place.name)}"
    if path.parent.name == "snapshots":  # the hub's cache: the same model as when the hub can be reached
        return f"hub:{place.name}@{path.name}"
    digest = hashlib.sha256()
    files = [path / place.gguf_file] if place.gguf_file else sorted(p for p in path.iterdir() if p.suffix in _WEIGHTS)
    config = path / "config.json"
    if config.exists() and not place.gguf_file:
        digest.update(config.read_bytes())
    for code in sorted(path.rglob("*.py")) if place.trust_remote_code else ():
        digest.update(code.relative_to(path).as_posix().encode() + hashlib.sha256(code.read_bytes()).digest())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_MIB))
            stream.seek(max(0, size - _MIB))
            digest.update(stream.read(_MIB))
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside; as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _in_package(name: str, field: str) -> Path:
    """The path in an installed package, found without importing it; its last parts may be a glob."""
    package, _, rest = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier():
        hint = package.replace("-", "_")
        raise FieldError((field, f"{name!r}: {package!r} is no import name" + (f"; {hint}?" if hint else "")))
    spec = find_spec(package)
    if spec is None:
        install = package.replace("_", "-")
        raise FieldError(
            (field, f"{name!r}: no Python package {package} is installed here; try `pip install {install}`")
        )
    if rest.startswith("/") or ".." in Path(rest).parts:
        raise FieldError((field, f"{name!r}: {rest} leads out of the package; give the path itself"))
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    if not roots:
        raise FieldError((field, f"{name!r}: {package} is a single module and holds no files"))
    for root in roots:
        if (root / rest).exists() or (glob.has_magic(rest) and glob.glob(str(root / rest), recursive=True)):
            return root / rest
    at = roots[0] / rest
    while not at.is_dir():
        at = at.parent
    raise FieldError((field, f"{name!r}: there is no {rest} in the package; {_contents(at)}"))


def _contents(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name != "__pycache__")
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{folder} holds {', '.join(names[:12])}{more}" if names else f"{folder} is empty"


def _local_model(name: str, path: Path) -> ModelPlace:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise FieldError(("model", f"{name}: give the model's folder or a .gguf file, not {path.name}"))
        return ModelPlace(name, str(path.parent), path.name, True)
    if (path / "config.json").exists():
        return ModelPlace(name, str(path), None, True)
    ggufs = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if len(ggufs) == 1:
        return ModelPlace(name, str(path), ggufs[0], True)
    if ggufs:
        raise FieldError(("model", f"{name}: several .gguf files, name one: {', '.join(ggufs)}"))
    raise FieldError(("model", f"{name}: no config.json and no .gguf file there; {_contents(path)}"))


def _hub_model(name: str, path: Path) -> ModelPlace:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    problem = hub_problem()
    try:
        if problem is None:
            HfApi().model_info(name, timeout=_SECONDS_FOR_THE_HUB)
            return ModelPlace(name, name, None, False)
        return ModelPlace(name, snapshot_download(name, local_files_only=True), None, True)
    except GatedRepoError:
        message = "the hub wants you to accept its terms and to log in: `hf auth login`"
    except RepositoryNotFoundError:
        message = "the hub has no such model, or it is private: check the id, or `hf auth login`"
    except HFValidationError as error:
        message = f"not a hub id: {first_line(error)}"
    except Exception as error:  # LocalEntryNotFoundError offline, or any transport error
        if problem is None:
            message = f"the hub did not answer about it: {first_line(error)}"
        else:
            message = (
                f"not found. Tried: the folder {path.absolute()} (not there), the hub ({problem}), "
                "the hub's local cache (not in it). Give a local folder, a .gguf file or package:NAME/PATH, "
                "or download the model where there is a network: `hf download " + name + "`"
            )
    raise FieldError(("model", f"{name}: {message}")) from None


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent.name
    return str(HfApi().model_info(name, timeout=_SECONDS_FOR_THE_HUB).sha)


def _known_kinds(files: list[Path]) -> tuple[str, ...]:
    unknown = [p for p in files if p.suffix.lower() not in DATA_SUFFIXES]
    if unknown:
        known = ", ".join(DATA_SUFFIXES)
        raise FieldError(("data.source", f"{unknown[0]}: unknown kind of file; known are {known}"))
    return tuple(str(p) for p in files)


def _data_folder(source: str, folder: Path) -> DataPlace:
    """Hidden files are passed over; anything else that would be left out is an error."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    below = [p for p in entries if p.is_dir()]
    if below and len(below) == len(entries):
        return DataPlace(folder=str(folder))
    if below:
        raise FieldError(("data.source", f"{source}: either files or class folders, not both; {_contents(folder)}"))
    if not entries:
        raise FieldError(("data.source", f"{source}: the folder {folder} is empty"))
    return DataPlace(files=_known_kinds(entries))
