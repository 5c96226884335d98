"""What a later reader needs to repeat a session: its command, the code's commit and versions, the machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import sweep
from sweep.report.words import without_paths

SECONDS = 10  # for another program to answer
PACKAGES = ("optuna", "mlflow", "torch", "transformers", "tokenizers", "datasets", "numpy", "peft", "safetensors")
TO_LAST_PART = re.compile(r"(^|=)~?/.*/")  # an absolute path, blanks and all
STORAGE = re.compile(r"(.*=)?(storage|checkpoints)=")  # --set storage=URL, or --set=storage=URL in one word


def describe_session() -> dict[str, Any]:
    """For the journal. Holds no path of this machine and no credentials; what cannot be found out is left out."""
    told = {
        "command": shown_command(sys.argv),
        "commit": find_commit(Path(sweep.__file__).parent),
        "system": platform.platform(),
        "hardware": _hardware(),
        "versions": _versions(),
    }
    return {name: value for name, value in told.items() if value}


def changed_versions(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What a study goes on with that it did not begin with; None where all is the same. MLflow only looks on."""
    changed = [
        f"{name} {then[name]} → {now[name]}"
        for name in sorted(then.keys() & now.keys() - {"mlflow"})
        if then[name] != now[name]
    ]
    if not changed:
        return None
    return (
        f"the study goes on with other versions than it began with ({', '.join(changed)}): trials from before and "
        "after may differ by more than their settings"
    )


def shown_command(words: list[str]) -> str:
    """`sweep` and its arguments as a shell takes them; empty where another program runs us.

    Absolute paths are cut to their last part, credentials are cut out of URLs, and where the storage or the checkpoints
    lie is not told.
    """
    program, *arguments = words
    if Path(program).stem != "sweep":
        return ""
    return " ".join(["sweep", *map(_shown, arguments)])


def find_commit(package: Path) -> str:
    """The commit of the checkout that holds the package's own files, and whether they differ from it; else empty."""
    if (
        _git(package, "ls-files", "--error-unmatch", "__init__.py") is None
    ):  # installed: at most somebody else's checkout
        return ""
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return f"{commit} + uncommitted changes" if changes else commit or ""


def _shown(word: str) -> str:
    before = STORAGE.match(word)
    if before:
        return f"{before[0]}…"
    cut = without_paths(TO_LAST_PART.sub(r"\1…/", word))
    return cut if re.fullmatch(r"[\w@%+=:,./…-]+", cut) else shlex.quote(cut)


def _git(folder: Path, *words: str) -> str | None:
    """What git says, or None where there is no git or no such thing."""
    return _output(["git", "-C", str(folder), *words])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus = [line.strip() for line in (_output(asked) or "").splitlines() if line.strip()]
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,  # "name, memory, driver", one each
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()  # Arm's kernels name none


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "sweep": sweep.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
