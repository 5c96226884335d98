"""The benchmarks' commands work and their report tells the truth; no timing is asserted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import contenders, scale, scale_parts, scale_records, scale_tables, steps
from .peft_loop import DEFAULT, Mode
from .records import (
    BARE,
    CONTENDERS,
    FULL,
    OURS,
    TRAINER,
    TRAINER_DEFAULT,
    Chosen,
    Missing,
    Provenance,
    Rate,
    Results,
    Run,
    read_results,
    write_json,
)
from .report import write_report
from .summary import cells, times
from .work import packs_of, top_third


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more, and tests that run beside this one would slow all of them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_smallest_cell_runs_and_failures_are_written_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def too_large(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def broken(bench: contenders.Bench, mode: Mode) -> Any:
        if mode == DEFAULT:
            raise ValueError("no such thing")
        return run_trainer(bench, mode)

    run_trainer = contenders.run_trainer
    monkeypatch.setattr(contenders, "run_full", too_large)
    monkeypatch.setattr(contenders, "run_trainer", broken)
    monkeypatch.setattr(contenders, "MODES", (Mode("bfloat16", False, "eager"),))
    words = ["--shapes", "minilm-2x8", "--modules", "q,v", "--packs", "1", "2", "--repeats", "1", "--steps", "1"]
    results = steps.main([*words, "--memory", "4", "--out", str(tmp_path)])

    assert read_results(tmp_path / "steps.json") == results
    one, two = cells(results)
    assert set(two.seconds) == set(CONTENDERS) - {FULL, TRAINER_DEFAULT}
    assert {name: missing.status for name, missing in two.missing.items()} == {
        FULL: "does not fit",
        TRAINER_DEFAULT: "failed",
    }
    assert one.shares[OURS] > 0 and one.computed_share is not None
    page = (write_report(tmp_path, tmp_path / "report")).read_text()
    assert all(name in page for name in CONTENDERS)
    assert "does not fit. RuntimeError: DefaultCPUAllocator" in page and "failed. ValueError: no such thing" in page
    assert "minilm-8x32, q,v, K = 1, 2, 4, 8, 12, 24: left out" in page
    assert (tmp_path / "report" / "crossover.png").stat().st_size > 1000


def test_a_losing_cell_is_reported_as_losing(tmp_path: Path) -> None:
    results = hand_made(ours={1: 0.05, 4: 0.02}, bare=0.04, trainer=0.06)
    write_json(results, tmp_path / "steps.json")
    page = write_report(tmp_path, tmp_path).read_text()
    lost = [line for line in page.splitlines() if ": we lose" in line]
    assert len(lost) == 2 and all("K = 1 against (" in line and "ratio 0.80 (0.80–0.80)" in line for line in lost)
    assert "40 against our 50 ms" in lost[0] and BARE in lost[0]
    assert "3.00× of 2.5× over (b) Optuna + PEFT + Trainer: met; 2.00× of 2× over" in page
    assert "minilm-8x32, q,v, K = 4 (the fastest K)" in page and "minilm-16x64, q,v: not measured" in page
    assert "| minilm-8x32, q,v, K = 4 | not measured | not measured | 0.80" in page.replace("(0.80–0.80) ", "")
    assert page.count("**This benchmark has not run.**") == 3  # search, gpu and scale


def test_a_cell_that_is_won_only_sometimes_is_not_called_won(tmp_path: Path) -> None:
    results = hand_made(ours={4: 0.02}, bare=0.04, trainer=0.06)
    slow = Run("minilm-8x32", "q,v", OURS, "bfloat16/eager", 4, (2, 4, 8, 64), 1, (0.2,), 256, 256)
    fast = Run("minilm-8x32", "q,v", BARE, "bfloat16/eager", 1, (8,), 1, (0.03,), 256, 256)
    write_json(Results(**{**vars(results), "runs": [*results.runs, slow, fast]}), tmp_path / "steps.json")
    assert "we win by the median, but not in every repetition" in write_report(tmp_path, tmp_path).read_text()


def test_packs_mix_the_ranks_equally() -> None:
    assert packs_of(1) == [(2,), (4,), (8,), (64,)]
    assert packs_of(2) == [(2, 4), (8, 64)]
    assert packs_of(8) == [(2, 2, 4, 4, 8, 8, 64, 64)]
    for size in (0, 3, 6):
        with pytest.raises(ValueError, match="cannot mix"):
            packs_of(size)


def test_top_third_is_the_last_layers() -> None:
    names = [f"encoder.layer.{i}.attention.query" for i in range(6)]
    assert top_third(names) == tuple(names[4:])


def test_a_step_of_k_processes_counts_for_k_trials() -> None:
    runs = [Run("s", "q,v", "(d)", "", 2, (rank,), 0, (0.2, 0.4), 1, 1) for rank in (2, 4)]
    assert times(Results(nowhere(), runs), "s", "q,v", "(d)", 2) == {0: pytest.approx(0.15)}


def hand_made(ours: dict[int, float], bare: float, trainer: float) -> Results:
    """Seconds a trial and step, in one repetition."""
    where = ("minilm-8x32", "q,v")
    runs = [
        Run(*where, OURS, "bfloat16/eager", k, (2,) * k, 0, (seconds * k,), 256, 256) for k, seconds in ours.items()
    ]
    runs.append(Run(*where, BARE, "bfloat16/eager", 1, (8,), 0, (bare,), 256, 256))
    runs.append(Run(*where, TRAINER, "bfloat16/eager", 1, (8,), 0, (trainer,), 256, 256, (), 0.3))
    chosen = [Chosen(*where, name, "bfloat16/eager", {"bfloat16/eager": 0.01}) for name in (OURS, BARE, TRAINER)]
    missing = [Missing(*where, FULL, 1, "does not fit", "too large")]
    return Results(nowhere(), runs, missing, [Rate("minilm-8x32", "bfloat16", "2048³", 0, 4e11)], chosen)


def nowhere() -> Provenance:
    return Provenance("python -m tests.benchmarks.steps", "a machine", {"torch": "0"}, "today")


@pytest.mark.slow
def test_the_smallest_study_of_scale_runs_and_its_goals_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(scale_parts, "WORKERS", 2)
    monkeypatch.setattr(scale_parts, "PRODUCTS", 1)
    monkeypatch.setattr(scale, "SECONDS_A_PACK", (0.0,))
    found = scale.main(["--trials", "40", "--repeats", "1", "--out", str(tmp_path)])
    assert scale_records.read_scale(tmp_path / "scale.json") == found
    assert [run.trials for run in found.driven] == [40] and len(found.driven[0].driver_cpu_ms) == 5
    assert [run.points for run in found.tracked] == [0, (40 + 10) * scale_parts.POINTS]  # a finalist for each rank
    page = write_report(tmp_path, tmp_path).read_text()
    again = scale.main(["--parts", "report", "--trials", "20", "--repeats", "1", "--out", str(tmp_path)])
    assert (again.driven, again.tracked) == (found.driven, found.tracked) and again.reported != found.reported
    assert "5,000 training losses" in page and f"The report on {found.reported[0].trials} trials" in page


def test_overhead_is_what_a_driver_of_no_time_would_save() -> None:
    """21 packs over 4 workers are six rounds of 2 s."""
    driven = scale_records.Driven(0, 105, 4, 5, 2.0, 12.525, (1.0,) * 5)
    assert driven.ideal_s == 12.0 and driven.overhead_ms == pytest.approx(5.0)
    tables = scale_tables.scale_markdown(scale_records.Scale({"driver": Provenance("c", "m", {}, "d")}, [driven]))
    assert "5.0 (5.0): **missed**" in tables and "MLflow has not been measured" in tables
