"""What is timed is what it says it is, by PEFT's outputs; and the report's claims by numbers made up by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import in_peft, inputs_of, logits_in_peft, on_disk, write_with_peft
from random_models import FAMILIES, frozen_model
from scipy.stats import binom
from synthetic import quickstart, write_study
from test_export import run_trials

from sweep.adapters.latency import Confirmed, LatencyError, list_variants, measure_latency
from sweep.adapters.peft_format import read_adapter
from sweep.report.latency import latency_sentences, median_interval, overhead_table, times_table
from sweep.report.report import write_report
from sweep.study.arms import Arm
from sweep.study.errors import FieldError
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.study.schema import Latency, Study
from sweep.tracking.analyses import write_analysis
from sweep.tracking.journal import StudyRecord
from sweep.training.base import Base, adapter_of
from sweep.training.rung import base_for

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
SMALL = [
    "task=causal-lm",
    "data.text=text",
    "data.max_length=8",
    "data.validation=0.1",
    "data.test=0.1",
    "arms.target_modules=[[q_proj, v_proj]]",
    "arms.rank=[2,5]",
    "confirm.reference=5",
    "train.steps=1",
    "search.rungs=[1]",
    "train.batch_size=2",
    "train.precision=float32",
]


def test_every_variant_is_what_peft_makes_of_its_adapter_and_the_base_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = copy.deepcopy(frozen_model(FAMILIES["llama"]))
    base, confirmed, folders = Base(model, ()), [], {}
    for seed, r in enumerate((2, 5)):
        settings = {"r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"]}
        folders[f"r{r}"] = write_with_peft("llama", tmp_path / f"r{r}", seed, **settings)
        arm = Arm(f"r{r}", "lora", r, 2.0, ("q_proj", "v_proj"))
        confirmed.append(Confirmed(arm, adapter_of(base, arm, read_adapter(folders[f"r{r}"]).state)))
    inputs = inputs_of("llama", 4)
    peft = in_peft("llama", **folders)
    expected = {name: logits_in_peft(peft, inputs, name) for name in folders}
    with peft.disable_adapter():
        expected["base"] = logits_in_peft(peft, inputs)
    expected["merged"] = expected["r5"]
    expected["2 adapters in one batch"] = torch.cat([expected["r2"][:2], expected["r5"][2:]])
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    variants = list_variants(base, confirmed, 4)
    assert {variant.name for variant, _ in variants} == expected.keys()
    for variant, stand in variants:
        with stand(), torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected[variant.name], atol=3e-5, rtol=1e-5)
        for name, (place, value) in before.items():
            now = model.get_parameter(name)
            assert now.data_ptr() == place and torch.equal(now.view(torch.int32), value.view(torch.int32))
    assert [variant.kind for variant, _ in list_variants(base, confirmed, 1)] == ["base", "merged", *["unmerged"] * 2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyRecord, Home]:
    folder = tmp_path_factory.mktemp("study")
    on_disk("llama", folder)
    (folder / "rows.txt").write_text("\n".join(f"w{i} w{i + 2} w{i * 2} w{i + 5}" for i in range(1, 29)))
    overrides = [*SMALL, f"model={folder / 'base'}", f"data.source={folder / 'rows.txt'}"]
    study, home = read_study(QUICKSTART, overrides).study, Home(folder / "home")
    return study, run_trials(study, home, ["r2-ratio1", "r5-ratio1", "full"]), home


def test_every_variant_is_timed_in_every_turn_at_every_size(ran: tuple[Study, StudyRecord, Home]) -> None:
    study, record, home = ran
    assert record.prepared is not None
    base = base_for(study.setup(str(home.cache)), record.prepared, record.trials[0].spec.arm)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    found = measure_latency(study, record, home.cache, Latency(batch_sizes=[1, 4], lengths=[4, 16], repeats=6))
    assert [(cell["batch"], cell["length"]) for cell in found["cells"]] == [(1, 4), (1, 16), (4, 4), (4, 16)]
    alone = ["base", "merged", "r2-ratio1", "r5-ratio1"]
    for cell in found["cells"]:
        several = ["2 adapters in one batch"] if cell["batch"] == 4 else []
        assert sorted(cell["seconds"]) == sorted([*alone, *several])
        for name in cell["seconds"]:
            assert len(cell["seconds"][name]) == len(cell["standing_seconds"][name]) == 6
            assert all(0 < seconds < 60 for seconds in cell["seconds"][name])
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    write_analysis(record.folder, "latency", found)
    assert all(len(row.cells) == 6 for row in times_table(found).rows)
    assert [row.cells[-1].text == "–" for row in times_table(found).rows] == [True, True, False, False]


def test_the_versions_told_are_those_of_the_process_that_timed(ran: tuple[Study, StudyRecord, Home]) -> None:
    study, record, home = ran
    assert record.prepared is not None
    trained = replace(record, prepared=replace(record.prepared, versions={"torch": "0.1+of.workers"}))
    found = measure_latency(study, trained, home.cache, Latency(batch_sizes=[1], lengths=[4], repeats=5))
    assert found["versions"]["torch"] == version("torch")


def test_what_cannot_be_timed_is_refused(ran: tuple[Study, StudyRecord, Home], tmp_path: Path) -> None:
    study, record, home = ran
    with pytest.raises(FieldError, match=r"latency.lengths: 17 is more than the model's 16 positions"):
        measure_latency(study, record, home.cache, Latency(lengths=[17]))
    made_up = quickstart()
    with pytest.raises(LatencyError, match="no complete confirm trial of LoRA whose weights are kept"):
        measure_latency(made_up, write_study(tmp_path / "study", made_up), tmp_path, Latency())


@pytest.mark.parametrize("n", [6, 7, 9, 12, 25, 40])
def test_the_interval_of_a_median_covers_it_as_the_binomial_says(n: int) -> None:
    low, high = median_interval(range(n)) or (0, 0)
    k = int(low)  # values outside on either side
    assert high == n - 1 - k
    assert 1 - 2 * binom.cdf(k, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(k + 1, n, 0.5)


def test_nine_turns_give_the_second_and_the_eighth_value_and_five_give_none() -> None:
    assert median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 8)
    assert median_interval([1, 2, 3, 4, 5]) is None


def made_up(repeats: int = 9, merged: float = 1.0) -> dict[str, Any]:
    """Turns of different speed; r2 takes 10 % longer at few tokens and 2 % at many, whatever the turn's speed."""
    speeds = [1.0 + 0.5 * (turn % 3) for turn in range(repeats)]

    def times(base: float, factor: float) -> list[float]:
        return [base * speed * (factor + 0.004 * (turn % 2)) for turn, speed in enumerate(speeds)]

    cells = []
    for batch, length, extra in ((1, 16, 1.10), (16, 64, 1.02)):
        base = 0.001 * batch * length
        seconds = {
            "base": [base * s for s in speeds],
            "merged": times(base, merged - 0.002),
            "r2-ratio1": times(base, extra),
        }
        cells.append({"batch": batch, "length": length, "seconds": seconds, "standing_seconds": seconds})
    variants = [("base", "base"), ("merged", "merged"), ("r2-ratio1", "unmerged")]
    return {
        "precision": "float32",
        "attention": "eager",
        "device": "cpu",
        "versions": {},
        "repeats": repeats,
        "ranks": {"r2-ratio1": 2},
        "variants": [{"name": name, "kind": kind, "arms": []} for name, kind in variants],
        "cells": cells,
    }


def test_overheads_are_paired_by_turn() -> None:
    """Between turns the base's own time varies by half; the ratio within a turn does not."""
    first, second = overhead_table(made_up()).rows
    assert [cell.text for cell in first.cells] == ["1 × 16", "−0.2", "+10.0"]
    assert (first.cells[2].below, second.cells[2].text) == ("+10.0 to +10.4", "+2.0")
    assert first.cells[1].below == "−0.2 to +0.2"


def test_sentences_claim_what_the_intervals_show_and_say_where_the_paper_is_contradicted() -> None:
    study = quickstart()
    said = " ".join(latency_sentences(study, made_up()))
    assert re.search(r"Merged: −0\.2 % \(\S+ × \d+\) to −0\.2 % \(\S+ × \d+\); shown slower at none of 2 sizes\.", said)
    assert "r2-ratio1, unmerged: +2.0 % (16 × 64) to +10.0 % (1 × 16); shown slower at 2 of 2 sizes." in said
    assert "Here too no difference between the merged model and the base is shown" in said
    assert "leave room for −0.2 to +0.2 %" in said and "contradicts" not in said
    assert "like adapter layers they cost more where a pass is small" in said
    slow = " ".join(latency_sentences(study, made_up(merged=1.03)))
    assert "contradicts the paper" in slow and "slower at 1 × 16 and slower at 16 × 64" in slow
    noisy = made_up()
    noisy["cells"][0]["seconds"]["r2-ratio1"][:4] = [0.001] * 4
    assert "the intervals meet" in " ".join(latency_sentences(study, noisy))
    few = " ".join(latency_sentences(study, made_up(repeats=5)))
    assert "no difference can be shown" in few and "shown slower" not in few and "Too few turns" in few


def test_the_report_shows_it_and_keeps_every_time(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path / "home" / "quickstart", study)
    write_analysis(record.folder, "latency", made_up())
    write_report(study, record, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## What does an adapter cost when it answers?" in text and "figures/latency.png" in text
    assert (tmp_path / "out" / "figures" / "latency.png").stat().st_size > 10_000
    rows = (tmp_path / "out" / "latency.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3 * 9 and rows[1].startswith("1,16,base,1,0.016")


def test_the_study_file_asks_for_it() -> None:
    assert quickstart().latency is None
    asked = quickstart("latency={lengths: [8]}").latency
    assert asked is not None
    assert asked.model_dump() == {"batch_sizes": [1, 4, 16], "lengths": [8], "repeats": 9, "precision": "study"}
