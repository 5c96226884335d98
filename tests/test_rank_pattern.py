"""Rank patterns from spectra: the stated rules by hand, and read by PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, TaskType, get_peft_model
from random_models import FAMILIES, frozen_model

from sweep.adapters.rank_pattern import as_pattern, keep_share, within_budget
from sweep.adapters.rank_use import block_of, module_kinds
from sweep.report.rank_use_tables import pattern_yaml
from sweep.study.file import read_study

SPECTRA = {
    "wide": [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 0.1, 0.1])],
    "flat": [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])],
    "idle": [torch.zeros(3), torch.zeros(3)],
}


def test_the_smallest_rank_that_keeps_the_share_in_every_seed() -> None:
    # wide: 9, 4, 1 of 14 in the first seed (0.64, 0.93), almost all of the second in one value
    assert keep_share(SPECTRA, 0.9, most=3) == {"wide": 2, "flat": 3, "idle": 1}
    assert keep_share(SPECTRA, 0.9, most=2) == {"wide": 2, "flat": 2, "idle": 1}


def test_a_budget_goes_where_the_update_is_for_its_parameters() -> None:
    """Means of squares: wide 9, 2.005, 0.505; flat 1, 1, 1. At equal cost wide comes first, then flat."""
    even = dict.fromkeys(SPECTRA, 10)
    assert within_budget(SPECTRA, even, budget=40, most=3) == {"wide": 2, "flat": 1, "idle": 1}
    assert within_budget(SPECTRA, even, budget=60, most=3) == {"wide": 2, "flat": 3, "idle": 1}
    assert within_budget(SPECTRA, even, budget=1000, most=3) == {"wide": 3, "flat": 3, "idle": 1}
    dear = {"wide": 30, "flat": 10, "idle": 10}  # 0.067 a parameter at wide, 0.1 at flat
    assert within_budget(SPECTRA, dear, budget=90, most=3) == {"wide": 1, "flat": 3, "idle": 1}
    assert within_budget(SPECTRA, dear, budget=1, most=3) == {"wide": 1, "flat": 1, "idle": 1}


def test_peft_reads_the_pattern_as_it_is_meant() -> None:
    model = copy.deepcopy(frozen_model(FAMILIES["bert"]))
    names = [n for n, m in model.named_modules() if n.endswith((".query", ".value"))]
    ranks = {name: 1 + i % 3 for i, name in enumerate(names)}
    common, pattern = as_pattern(ranks)
    arms = yaml.safe_load(pattern_yaml({"rank": common, "rank_pattern": pattern, "alpha_ratio": 2.0}))["arms"]
    config = LoraConfig(
        r=arms["rank"][0],
        lora_alpha=arms["alpha_ratio"][0] * arms["rank"][0],
        rank_pattern=arms["rank_pattern"],
        alpha_pattern=arms["alpha_pattern"],
        target_modules=["query", "value"],
        task_type=TaskType.SEQ_CLS,
    )
    peft = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, r in ranks.items():
        layer: Any = peft.get_submodule(f"base_model.model.{name}")
        assert (layer.r["default"], layer.scaling["default"]) == (r, 2.0)


def test_a_study_file_takes_the_pattern() -> None:
    ranks = {f"bert.encoder.layer.{i}.attention.self.query": r for i, r in enumerate((3, 1, 3, 5))}
    common, pattern = as_pattern(ranks)
    text = pattern_yaml({"rank": common, "rank_pattern": pattern, "alpha_ratio": 0.5})
    arms = yaml.safe_load(text)["arms"]
    overrides = [f"arms.{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in arms.items()]
    quickstart = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
    arm, _ = read_study(quickstart, [*overrides, "confirm.reference=3"]).study.list_arms()
    assert {name: arm.rank_at(name) for name in ranks} == ranks
    assert {arm.scaling_at(name) for name in ranks} == {0.5}


def test_layers_are_named_by_what_they_are() -> None:
    blocks = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    names = [f"bert.encoder.layer.{i}.{end}" for i in (0, 11) for end in blocks] + ["bert.pooler.dense"]
    kinds = module_kinds(names)
    assert [kinds[name] for name in names[:4]] == [
        "query",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    assert kinds[names[7]] == "output.dense" and kinds["bert.pooler.dense"] == "pooler.dense"
    assert (block_of(names[0]), block_of(names[5]), block_of(names[-1])) == (0, 11, None)
