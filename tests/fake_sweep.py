"""The `sweep` command with the fake trainer in place of the engine, in a process of its own.

`python fake_sweep.py OPTIONS run STUDY.yaml …`: OPTIONS is JSON, see `Options`. Everything else is the command's own:
its lock, driver, journals, storage, messages and exit codes. Without "track" nothing goes to MLflow; no adapter is
exported and no report written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

TESTS = Path(__file__).parent


class Options(TypedDict, total=False):
    seconds: float  # that a rung takes
    patience: float  # seconds, with a storage that does not answer
    pause: float  # seconds between two attempts to reach a storage
    hold: list[Any]  # which rung waits, and for which file
    kill: list[Any]  # function's module and name, "before" or "after", which call: there the process kills itself
    track: bool  # project into MLflow
    track_every: float  # seconds
    jump: list[float]  # from which rung on the wall clock is wrong (-1: from the start), and by how many seconds
    inputs: bool  # data and model are real, and their fingerprints; only the training is not
    versions: dict[str, str]  # packages that claim another version
    without: str  # a package that cannot be imported
    gate: str  # folder with a file for each process that is ready; they begin at once when one of them is "open"


def start(options: Options, *words: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the command; its output is both streams together."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SWEEP_", "MLFLOW_"))}
    command = [sys.executable, __file__, json.dumps(options), *words]
    paths = f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**clean, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 180) -> tuple[int, str]:
    """Exit code and output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def run(options: Options, *words: str, cwd: Path, **environment: str) -> tuple[int, str]:
    return finish(start(options, *words, cwd=cwd, **environment))


def main() -> None:
    options: Options = json.loads(sys.argv[1])
    sys.argv = ["sweep", *sys.argv[2:]]
    sys.path.insert(0, str(TESTS))
    if options.get("jump", [0])[0] < 0:
        _set_clock(options["jump"][1])
    if "without" in options:
        sys.modules[options["without"]] = None  # type: ignore[assignment]
    import fakes

    import sweep.driver.patience
    import sweep.tracking.mlflow

    preparing = {"prepare": fakes.prepare, "fingerprints": fakes.fingerprints}
    for name, functions in {
        "prepare": _real_inputs(fakes.prepare) if options.get("inputs") else preparing,
        "forecast": {"forecast": fakes.forecast},
        "probe": {"probe": fakes.probe},
        "rung": {"train_rung": _trainer(options, fakes.train_rung)},
    }.items():
        sys.modules[f"sweep.training.{name}"] = SimpleNamespace(**functions)  # type: ignore[assignment]
    sys.modules["sweep.publishing"] = SimpleNamespace(publish=_publish, lines=_lines)  # type: ignore[assignment]
    if not options.get("track"):
        silent = SimpleNamespace(start=_nothing, hasten=_nothing, finish=_nothing, stop=_nothing)
        sweep.tracking.mlflow.Projector = lambda *args: silent  # type: ignore[assignment, misc]
    sweep.tracking.mlflow.EVERY_S = options.get("track_every", sweep.tracking.mlflow.EVERY_S)
    sweep.driver.patience.PATIENCE_S = options.get("patience", 60.0)  # before the driver takes it
    if "pause" in options:
        sweep.driver.patience.FIRST_PAUSE_S = options["pause"]
    if "versions" in options:
        _change_versions(options["versions"])
    if "kill" in options:
        _kill_at(*options["kill"])
    from sweep.cli import main as command

    if "gate" in options:
        Path(options["gate"], str(os.getpid())).touch()
        while not Path(options["gate"], "open").exists():
            time.sleep(0.002)
    command()


def _trainer(options: Options, real: Callable[..., Any]) -> Callable[..., Any]:
    rungs = count()

    def train_rung(unit: Any) -> Any:
        time.sleep(options.get("seconds", 0.0))
        rung = next(rungs)
        if "jump" in options and rung == options["jump"][0]:
            _set_clock(options["jump"][1])
        while "hold" in options and rung == options["hold"][0] and not Path(options["hold"][1]).exists():
            time.sleep(0.05)
        return real(unit)

    return train_rung


def _real_inputs(prepare: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    from dataclasses import replace

    from sweep.training.prepare import fingerprints

    def prepare_with(setup: Any, arms: Any) -> Any:
        data, model, _ = fingerprints(setup)
        return replace(prepare(setup, arms), data_fingerprint=data, model_fingerprint=model)

    return {"prepare": prepare_with, "fingerprints": fingerprints}


def _set_clock(seconds: float) -> None:
    """What a clock that is set shows; the monotonic clock is not touched by it."""
    real = time.time
    time.time = lambda: real() + seconds


def _nothing(*values: Any) -> None:
    pass


def _publish(study: Any, folder: Any, projector: Any, cache: Path, say: Any) -> Any:
    return SimpleNamespace(whole=True, warning=projector.finish(60))


def _lines(places: Any, name: str, home: Any) -> list[str]:
    return [f"warning: {places.warning}"] if places.warning else ["done"]


def _change_versions(changed: dict[str, str]) -> None:
    import importlib.metadata as metadata

    real = metadata.version
    metadata.version = lambda name: changed.get(name) or real(name)


def _kill_at(module: str, name: str, when: str, which: int) -> None:
    """Kill this process with SIGKILL before or after the which-th call (from 0) of a function."""
    owner = import_module(module)
    real, calls = getattr(owner, name), count()

    def killing(*args: Any, **values: Any) -> Any:
        now = next(calls) == which
        if now and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(*args, **values)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, name, killing)


if __name__ == "__main__":
    main()
