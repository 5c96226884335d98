"""Mixed and compressed adapters: against PEFT's own add_weighted_adapter, NumPy's SVD, and as PEFT loads them."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft_folders import in_peft, inputs_of, logits_in_peft, write_with_peft

from sweep.adapters.folders import whole_folder
from sweep.adapters.mix import Part, mix, write_mixed
from sweep.adapters.peft_format import PeftAdapter, read_adapter
from sweep.study.errors import FieldError

PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "other ranks and modules": (
        "llama",
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 3}},
    ),
    "Conv1D and embeddings": (
        "gpt2",
        {"r": 3, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
        {"r": 4, "lora_alpha": 2, "target_modules": ["wte", "c_fc"], "fan_in_fan_out": True},
    ),
}
WEIGHTS = (0.7, -0.4)


def pair(kind: str, to: Path) -> tuple[str, Path, Path]:
    family, one, other = PAIRS[kind]
    return family, write_with_peft(family, to / "a", 1, **one), write_with_peft(family, to / "b", 2, **other)


def parts_of(a: Path, b: Path) -> list[Part]:
    return [Part(folder.name, read_adapter(folder), weight) for folder, weight in zip((a, b), WEIGHTS, strict=True)]


def updates(model: PeftModel, adapter: str) -> dict[str, np.ndarray]:
    """ΔW of every adapted layer, as PEFT computes it."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach().double().numpy()  # type: ignore[operator]
        for name, layer in layers.items()
        if adapter in {*layer.lora_A, *layer.lora_embedding_A}  # type: ignore[misc]
    }


@pytest.mark.parametrize("kind", PAIRS)
def test_the_sum_is_pefts_cat(kind: str, tmp_path: Path) -> None:
    family, a, b = pair(kind, tmp_path)
    write_mixed(mix(parts_of(a, b)), tmp_path / "ours", {})
    model = in_peft(family, a=a, b=b, ours=tmp_path / "ours")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "theirs", combination_type="cat")
    theirs, ours = updates(model, "theirs"), updates(model, "ours")
    assert ours.keys() == theirs.keys() == updates(model, "a").keys() | updates(model, "b").keys()
    for name, update in theirs.items():
        np.testing.assert_allclose(ours[name], update, atol=2e-6)
    inputs = inputs_of(family, 3)
    model.eval()
    expected = logits_in_peft(model, inputs, "theirs")
    torch.testing.assert_close(logits_in_peft(model, inputs, "ours"), expected, atol=3e-5, rtol=1e-5)
    assert (expected - logits_in_peft(model, inputs, "a")).abs().max() > 0.01


@pytest.mark.parametrize("kind", PAIRS)
def test_a_smaller_rank_is_pefts_svd_and_numpy_says_what_it_loses(kind: str, tmp_path: Path) -> None:
    family, a, b = pair(kind, tmp_path)
    mixed = mix(parts_of(a, b), rank=2)
    write_mixed(mixed, tmp_path / "ours", {})
    model = in_peft(family, a=a, b=b, ours=tmp_path / "ours")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "theirs", combination_type="svd", svd_rank=2)
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "whole", combination_type="cat")
    theirs, ours, whole = updates(model, "theirs"), updates(model, "ours"), updates(model, "whole")
    assert ours.keys() == theirs.keys()
    energy, lost = 0.0, 0.0
    for name, update in theirs.items():
        np.testing.assert_allclose(ours[name], update, atol=2e-5)  # PEFT decomposes in float32
        U, S, Vh = np.linalg.svd(whole[name], full_matrices=False)
        np.testing.assert_allclose(ours[name], (U[:, :2] * S[:2]) @ Vh[:2], atol=3e-6)
        assert mixed.lost(name, 2) == pytest.approx((S[2:] ** 2).sum() / (S**2).sum(), abs=1e-6)
        energy, lost = energy + (S**2).sum(), lost + (S[2:] ** 2).sum()
    assert mixed.lost_in_all(2) == pytest.approx(lost / energy, abs=1e-6)
    assert 0.01 < mixed.lost_in_all(2) < 0.9


def test_compressing_keeps_layers_that_are_small_enough_as_they_are(tmp_path: Path) -> None:
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    folder = write_with_peft("llama", tmp_path / "a", **settings)
    small = mix([Part("a", read_adapter(folder), 1.0)], rank=3)
    write_mixed(small, tmp_path / "small", {})
    assert set(read_adapter(tmp_path / "small").ranks.values()) == {2, 3}
    model = in_peft("llama", a=folder, small=tmp_path / "small")
    before, after = updates(model, "a"), updates(model, "small")
    for name, update in before.items():
        U, S, Vh = np.linalg.svd(update)
        nearest = (U[:, :3] * S[:3]) @ Vh[:3]
        np.testing.assert_allclose(after[name], nearest, atol=3e-6)
        assert (small.lost(name, 3) == pytest.approx(0, abs=1e-12)) == ("v_proj" in name)


def test_ranks_beyond_a_layers_sides_come_back_within_them(tmp_path: Path) -> None:
    """Two adapters of rank 10 on 16 × 8: their sum has rank 8, whatever rank is asked for."""
    both = [write_with_peft("llama", tmp_path / n, s, r=10, target_modules=["v_proj"]) for s, n in enumerate("ab")]
    mixed = mix(parts_of(*both), rank=19)
    assert set(mixed.adapter.ranks.values()) == {8}
    assert mixed.lost_in_all(19) == 0
    write_mixed(mixed, tmp_path / "ours", {})
    model = in_peft("llama", a=both[0], b=both[1], ours=tmp_path / "ours")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "theirs", combination_type="cat")
    for name, update in updates(model, "theirs").items():
        np.testing.assert_allclose(updates(model, "ours")[name], update, atol=3e-6)


def bert(to: Path, seed: int, **settings: Any) -> PeftAdapter:
    return read_adapter(
        write_with_peft("bert", to / str(seed), seed, **{"r": 2, "target_modules": ["query"], **settings})
    )


def test_heads_are_averaged_by_their_weights_where_they_tell_the_same_classes_apart(tmp_path: Path) -> None:
    a, b = bert(tmp_path, 1), bert(tmp_path, 2)
    mixed = mix([Part("a", replace(a, labels=("x", "y", "z")), 3.0), Part("b", b, 1.0)])
    for name in ("classifier.weight", "classifier.bias"):
        expected = 0.75 * a.state[name].double().numpy() + 0.25 * b.state[name].double().numpy()
        np.testing.assert_allclose(mixed.adapter.state[name], expected, atol=1e-6)
    assert mixed.adapter.labels == ("x", "y", "z")
    assert "averaged" in mixed.notes[0] and "a 0.75, b 0.25" in mixed.notes[0]
    write_mixed(mixed, tmp_path / "ours", {})
    loaded = in_peft("bert", ours=tmp_path / "ours").state_dict()
    found = loaded["base_model.model.classifier.modules_to_save.ours.weight"]
    torch.testing.assert_close(found, mixed.adapter.state["classifier.weight"], atol=0, rtol=0)


def test_what_does_not_mix_is_refused_with_the_reason(tmp_path: Path) -> None:
    a, b = bert(tmp_path, 1), bert(tmp_path, 2)
    dora = bert(tmp_path, 3, use_dora=True)
    refused = [
        ([Part("a", a, 1), Part("d", dora, 1)], "d: is DoRA: its magnitudes rescale"),
        ([Part("a", replace(a, base_model="one"), 1), Part("b", replace(b, base_model="two"), 1)], "different bases"),
        (
            [Part("a", replace(a, model_fingerprint="x"), 1), Part("b", replace(b, model_fingerprint="y"), 1)],
            "different bases",
        ),
        ([Part("a", a, 1), Part("b", replace(b, task_type="CAUSAL_LM"), 1)], "different tasks"),
        ([Part("a", replace(a, task="one"), 1), Part("b", replace(b, task="two"), 1)], "different tasks"),
        (
            [Part("a", replace(a, labels=("x", "y", "z")), 1), Part("b", replace(b, labels=("z", "y", "x")), 1)],
            "classes",
        ),
        ([Part("a", a, 1), Part("b", b, -1)], "sum to 0"),
        (
            [
                Part("a", a, 1),
                Part("b", replace(b, state={**b.state, "classifier.weight": torch.ones(2, 16)}), 1),
            ],
            "other layers or shapes",
        ),
    ]
    for parts, message in refused:
        with pytest.raises(FieldError, match=message):
            mix(parts)


def test_labels_task_and_the_base_that_came_along_go_with_a_mixture(tmp_path: Path) -> None:
    bert(tmp_path, 1)
    folder = tmp_path / "1"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    told = {"labels": ["x", "y", "z"], "task": "sequence-classification", "model_fingerprint": "abc"}
    (folder / "sweep.json").write_text(json.dumps(told))
    mixed = mix([Part("a", read_adapter(folder), 0.5)])
    write_mixed(mixed, tmp_path / "ours", {"mixed": [["a", 0.5]]})
    assert json.loads((tmp_path / "ours" / "sweep.json").read_text()).items() >= told.items()
    again = read_adapter(tmp_path / "ours")
    assert again.own_base == tmp_path / "ours" / "base" and (again.own_base / "config.json").read_text() == "{}"


def test_the_export_of_a_trial_is_not_overwritten_but_another_mixture_is(tmp_path: Path) -> None:
    mixed, to = mix([Part("a", bert(tmp_path, 1), 1.0)]), tmp_path / "ours"
    for weight in (1.0, 2.0):
        write_mixed(mixed, to, {"mixed": [["a", weight]]})
    assert json.loads((to / "sweep.json").read_text())["mixed"] == [["a", 2.0]]
    exported = json.dumps({**json.loads((to / "sweep.json").read_text()), "study": "s", "trial": 3})
    (to / "sweep.json").write_text(exported)
    with pytest.raises(FieldError, match="adapter of a trial, of study s"):
        write_mixed(mixed, to, {})
    assert (to / "sweep.json").read_text() == exported


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    mixed = mix([Part("a", bert(tmp_path, 1), 1.0)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FieldError, match=r"^--to: .*mine holds thesis.txt, which sweep did not write"):
        write_mixed(mixed, tmp_path / "mine", {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "base/mine.txt", "base/adapter_config.json"])
def test_a_folder_of_ours_to_which_someone_added_a_file_is_kept_and_the_file_named(tmp_path: Path, name: str) -> None:
    adapter, base, to = bert(tmp_path, 1), tmp_path / "base", tmp_path / "ours"
    base.mkdir()
    (base / "config.json").write_text("{}")
    mixed = mix([Part("a", replace(adapter, own_base=base), 1.0)])
    write_mixed(mixed, to, {})
    write_mixed(mixed, to, {})
    (to / name).parent.mkdir(exist_ok=True)
    (to / name).write_text("mine")
    first = ".git" if name.startswith(".git") else name
    with pytest.raises(FieldError, match=rf"^--to: .*ours holds {first}, which .*; choose another folder$"):
        write_mixed(mixed, to, {})
    assert (to / name).read_text() == "mine" and (to / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sweep": "1"}', '{"files": []}', '{"sweep": "1", "files": [1]}'])
def test_a_mark_that_is_not_ours_protects_its_folder(tmp_path: Path, text: str) -> None:
    mixed, to = mix([Part("a", bert(tmp_path, 1), 1.0)]), tmp_path / "theirs"
    to.mkdir()
    (to / "sweep.json").write_text(text)
    with pytest.raises(FieldError, match=r"^--to: .*theirs holds a sweep.json that does not say which files"):
        write_mixed(mixed, to, {})
    assert (to / "sweep.json").read_text() == text


def test_a_file_that_comes_while_we_write_is_kept(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    with pytest.raises(FieldError, match=r"holds notes.txt"), whole_folder(tmp_path / "ours"):
        (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["ours", "notes.txt"]


def test_an_earlier_folder_is_whole_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, to = mix([Part("a", bert(tmp_path, 1), 1.0)]), tmp_path / "ours"
    write_mixed(mixed, to, {})
    honest = os.replace

    def busy(source: Path, target: Path) -> None:
        if target == to and source.name.startswith(".tmp"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        honest(source, target)

    before = sorted(path.name for path in to.iterdir())
    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(FieldError, match=r"^--to: .*ours cannot be written \(Device or resource busy\)"):
        write_mixed(mixed, to, {})
    assert sorted(path.name for path in to.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "ours"]
