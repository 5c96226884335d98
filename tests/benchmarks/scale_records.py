"""What `scale` found, as plain records."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import Provenance


@dataclass(frozen=True)
class Driven:
    """One search over workers that sleep."""

    repetition: int
    trials: int
    workers: int
    pack: int  # trials
    pack_s: float  # that a worker sleeps for a pack
    search_s: float  # from the first pack's start to the last trial's end
    driver_cpu_ms: tuple[float, ...]  # of the driver a trial, by fifths of the search

    @property
    def ideal_s(self) -> float:
        """Of a driver that takes no time."""
        return math.ceil(math.ceil(self.trials / self.pack) / self.workers) * self.pack_s

    @property
    def overhead_ms(self) -> float:
        """What the study takes longer than that, a trial."""
        return (self.search_s - self.ideal_s) / self.trials * 1e3


@dataclass(frozen=True)
class Tracked:
    """One study that works on every core, with MLflow beside it or without."""

    repetition: int
    tracked: bool
    training_s: float  # until the driver is through
    after_s: float = 0.0  # until MLflow has everything
    points: int = 0  # training losses that MLflow then holds


@dataclass(frozen=True)
class Reported:
    repetition: int
    trials: int
    read_s: float  # the journals
    write_s: float  # statistics, figures, page
    page_bytes: int


@dataclass
class Scale:
    """What each part found, and in which run."""

    provenance: dict[str, Provenance] = field(default_factory=dict)  # by part
    driven: list[Driven] = field(default_factory=list)
    tracked: list[Tracked] = field(default_factory=list)
    reported: list[Reported] = field(default_factory=list)

    def begin(self, part: str, provenance: Provenance) -> None:
        """Forget what an earlier run found of a part."""
        self.provenance[part] = provenance
        found: dict[str, list[Any]] = {"driver": self.driven, "mlflow": self.tracked, "report": self.reported}
        found[part].clear()


def read_scale(path: Path) -> Scale:
    raw = json.loads(path.read_text())
    return Scale(
        {part: Provenance(**entry) for part, entry in raw["provenance"].items()},
        [Driven(**{**entry, "driver_cpu_ms": tuple(entry["driver_cpu_ms"])}) for entry in raw["driven"]],
        [Tracked(**entry) for entry in raw["tracked"]],
        [Reported(**entry) for entry in raw["reported"]],
    )
