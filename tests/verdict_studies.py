"""Studies whose test losses are known, for tests of what may be said of them."""

from __future__ import annotations

from pathlib import Path

from synthetic import quickstart, write_study

from sweep.report.statistics import Findings, find
from sweep.study.arms import Arm

SEEDS = [1, 2, 3, 4, 5]
WOBBLE = dict(zip(SEEDS, (0.002, -0.001, 0.003, -0.002, 0.0), strict=True))


def find_in(tmp_path: Path, loss_of: dict[int, float], *overrides: str, **how: object) -> Findings:
    """The findings of a study whose test losses are loss_of[rank] plus an arm-and-seed wobble of a few thousandths."""
    study = quickstart(*overrides)

    def loss(arm: Arm, seed: int) -> float:
        return loss_of[arm.r] + WOBBLE.get(seed, 0.0) * (1 + arm.r % 3) + 0.01 * seed

    how.setdefault("ends", {})
    return find(study, write_study(tmp_path / "study", study, loss, **how))  # type: ignore[arg-type]


def verdicts(findings: Findings) -> dict[int, str | None]:
    return {r.arm.r: r.verdict for r in findings.arms if not r.arm.is_full}


GOOD = {0: 0.18, 2: 0.20, 4: 0.20, 8: 0.20, 64: 0.20}
