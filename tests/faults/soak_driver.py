"""What a soak runs: the driver with a trainer that trains nothing, in a process of its own. `soak_driver.py HOME`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from fakes import fake_work, make_study, train_rung

from sweep.driver.driver import Busy, run_study
from sweep.execution.local import LocalExecutor
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit

WORKERS, SECONDS_A_UNIT = 2, 0.02


def train(unit: Unit) -> tuple[Measurement, ...]:
    """Long enough to be hit."""
    time.sleep(SECONDS_A_UNIT)
    return train_rung(unit)


def interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(root: Path) -> int:
    """0 done, 1 with a line that says why; raises KeyboardInterrupt when it is interrupted."""
    home, study, workers = Home(root), make_study(), LocalExecutor([{}] * WORKERS)
    try:
        run_study(study, home.study(study.name), workers, home.optuna_url, home.cache, fake_work(train))
    except (Busy, OSError, RuntimeError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    finally:
        workers.shutdown()
    return 0


if __name__ == "__main__":
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        sys.exit(main(Path(sys.argv[1])))
    except KeyboardInterrupt:
        sys.exit(130)
