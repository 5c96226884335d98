"""Running the `sweep` command in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SWEEP = [sys.executable, "-c", "from sweep.cli import main; main()"]


def sweep(*words: str, cwd: Path, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """typed: what its standard input holds."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SWEEP_", "MLFLOW_"))}
    return subprocess.run(
        [*SWEEP, *words],
        cwd=cwd,
        env={**clean, **environment},
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )
