"""How far a study can grow: the driver over 16 workers, 100,000 points on their way to MLflow, a report of 10,000.

    python -m tests.benchmarks.scale [--parts driver mlflow report] [--trials 1000] [--repeats 3] [--out DIR]

Writes DIR/scale.json; parts that are not asked for keep what it holds of them. Nothing is trained: the workers sleep,
and where training has to be slowed to be seen it is matrix products. Journals, checkpoints, Optuna's and MLflow's
SQLite databases and the report are the real ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .records import provenance, write_json
from .scale_records import Scale, read_scale

PARTS = ("driver", "mlflow", "report")
SECONDS_A_PACK = (0.0, 2.0, 5.0)  # 0: the driver is all that there is to wait for
OUT = Path("reports/benchmarks")


def main(words: Sequence[str]) -> Scale:
    from .scale_parts import drive, report, track  # here, for each worker process imports this module

    given = parse(words)
    path = given.out / "scale.json"
    found = read_scale(path) if path.exists() else Scale()
    for part in given.parts:
        found.begin(part, provenance())
    for repetition in range(given.repeats):
        if "driver" in given.parts:
            for seconds in SECONDS_A_PACK:
                found.driven.append(drive(given.trials, seconds, repetition))
        if "mlflow" in given.parts:
            # Each comes first in every second repetition, so that a machine that tires speaks for neither.
            order = (True, False) if repetition % 2 else (False, True)
            found.tracked += [track(given.trials, tracked, repetition) for tracked in order]
        if "report" in given.parts:
            found.reported.append(report(10 * given.trials, repetition))
        write_json(found, path)
        print(found, file=sys.stderr, flush=True)
    return found


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.benchmarks.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--trials", type=int, default=1000, help="of the search; the report is on ten times as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(sys.argv[1:])
