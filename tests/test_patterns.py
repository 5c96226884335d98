"""Rank and alpha that vary by layer: by PEFT's own rule; what is refused; what older journals hold or compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from peft.tuners.lora import LoraLayer
from random_models import FAMILIES, frozen_model
from random_packs import Trial
from random_packs_in_peft import peft_model
from synthetic import quickstart, write_study

from sweep.driver.groups import form_groups
from sweep.driver.plan import search_slots
from sweep.report.statistics import find
from sweep.study.arms import Arm, lora_arms
from sweep.study.errors import FieldError
from sweep.study.finalists import finalist_groups
from sweep.study.records import arm_from_json
from sweep.training.base import Base, check_arm

BERT = FAMILIES["bert"]
TRICKY = (
    ("dense", 2),  # takes attention.output.dense too: the first key that fits counts
    ("attention.output.dense", 3),
    (r"layer\.[1-9]\.attention\.self\.(query|key)", 5),
    ("bert.encoder.layer.0.attention.self.key", 6),
    ("alue", 7),  # no ending after a dot
)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_every_layer_has_pefts_rank_and_scaling(method: str) -> None:
    alphas = tuple((key, 1.5 * r) for key, r in TRICKY[::-1])
    for trial in (Trial(4, 2, method, ranks=TRICKY), Trial(4, 2, method, ranks=TRICKY, alphas=alphas)):
        theirs = {
            name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
            for name, layer in peft_model(BERT, trial).named_modules()
            if isinstance(layer, LoraLayer)
        }
        ours = {name: (trial.arm.rank_at(name), trial.arm.scaling_at(name)) for name in theirs}
        assert ours == theirs and {r for r, _ in theirs.values()} == {2, 4, 5, 6}


def test_parameters_are_counted_by_each_layers_rank() -> None:
    trial = Trial(4, 1, ranks=TRICKY[2:4])
    theirs = sum(p.numel() for p in peft_model(BERT, trial).parameters() if p.requires_grad)
    assert check_arm(Base(frozen_model(BERT), BERT.head), trial.arm) == theirs


@pytest.mark.parametrize(
    ("arm", "field", "words"),
    [
        (Trial(ranks=(("qwery", 4),)).arm, "arms.rank_pattern", "'qwery': fits no adapted layer; did you mean query"),
        (Trial(alphas=(("alue", 4.0),)).arm, "arms.alpha_pattern", "fits no adapted layer; did you mean value"),
        (Trial(endings=("value",), ranks=(("query", 4),)).arm, "arms.rank_pattern", "adapted are value"),
        (Trial(ranks=TRICKY[:2]).arm, "arms.rank_pattern", "'attention.output.dense': a key before it takes every"),
        (Trial(ranks=(("query", 17),)).arm, "arms.rank_pattern", "rank 17 is larger than layer bert.encoder.layer.0"),
        (Trial(17, ranks=(("query", 4),)).arm, "arms.rank", "rank 17 is larger than layer"),
    ],
)
def test_a_pattern_that_does_not_fit_the_model_is_refused(arm: Arm, field: str, words: str) -> None:
    with pytest.raises(FieldError, match=words) as caught:
        check_arm(Base(frozen_model(BERT), BERT.head), arm)
    assert [name for name, _ in caught.value.problems] == [field]


def test_arms_of_older_journals_load_and_new_ones_come_back() -> None:
    old = {"name": "r4", "method": "lora", "r": 4, "alpha_ratio": 2.0, "target_modules": ["query"]}
    assert arm_from_json(old) == Arm("r4", "lora", 4, 2.0, ("query",))
    new = Trial(ranks=TRICKY, alphas=(("query", 2.0),)).arm
    assert arm_from_json(asdict(new)) == new


def test_arms_of_another_pattern_are_judged_apart_and_stand_outside_the_sequence(tmp_path: Path) -> None:
    """Rank 8 with 64 in a layer is no rank 8: it must neither prune rank 8 nor be recommended as the smallest rank."""
    study = quickstart("arms.rank_pattern=[{}, {query: 32}]", "arms.alpha_ratio=[1]", "confirm.finalists=arm")
    groups = form_groups(search_slots(study), study.rungs, study.search.keep)
    assert [len(group.slots) for group in groups] == [3] * 9
    assert len(finalist_groups(study.model_copy(update={"confirm": quickstart().confirm}))) == 9
    found = find(study, write_study(tmp_path / "study", study, lambda arm, seed: 0.2 + 0.001 * seed, ends={}))
    outside = [r for r in found.arms if not r.in_sequence]
    assert {r.arm.name for r in outside} == {f"r{r}-ratio1-query=32" for r in (2, 4, 8, 64)} | {"full"}
    assert all(r.to_reference is not None and "outside the sequence" in r.note for r in outside if not r.arm.is_full)
    assert found.recommended == "r2-ratio1"


def test_ranks_are_compared_as_ever_where_every_arm_has_a_pattern(tmp_path: Path) -> None:
    study = quickstart("arms.rank_pattern={query: 32}", "arms.alpha_ratio=[1]")
    found = find(study, write_study(tmp_path / "study", study, lambda arm, seed: 0.2 + 0.001 * seed, ends={}))
    assert found.recommended == "r2-ratio1" and all(r.in_sequence for r in found.arms if not r.arm.is_full)


def test_every_combination_of_patterns_is_an_arm() -> None:
    arms = lora_arms([2, 4], [1.0], ["lora"], [("q",)], [(), (("q", 8),)], [(), (("q", 1.0),)])
    assert len({arm.name for arm in arms}) == len(arms) == 8
