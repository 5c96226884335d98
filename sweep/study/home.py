"""The home: the folder where everything that studies produce lies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    root: Path

    @property
    def optuna_url(self) -> str:
        return f"sqlite:///{self.root / 'optuna.db'}"

    @property
    def mlflow_url(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root / "mlartifacts"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def study(self, name: str) -> StudyFolder:
        return StudyFolder(self.root / "studies" / name)


@dataclass(frozen=True)
class StudyFolder:
    """`studies/<name>/` in the home."""

    path: Path

    @property
    def study_file(self) -> Path:
        return self.path / "study.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def second_journal(self) -> Path:
        """The lines of the journal that nothing can tell again."""
        return self.path / "journal-2.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    def trial(self, number: int) -> Path:
        return self.trials / str(number)

    def analysis(self, name: str) -> Path:
        return self.path / "analyses" / f"{name}.json"


def find_home(option: Path | None) -> Home:
    """`--home`, else `$SWEEP_HOME`, else `./.sweep`."""
    return Home((option or Path(os.environ.get("SWEEP_HOME") or ".sweep")).absolute())
