"""Adapters that PEFT wrote have PEFT's outputs here; what cannot be held exactly is refused by its key."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from peft_folders import in_peft, inputs_of, logits_in_peft, write_with_peft
from random_models import FAMILIES, frozen_model
from safetensors.torch import load_file, save_file

from sweep.adapters.folders import write_adapter, write_mark
from sweep.adapters.peft_format import is_damaged, read_adapter, same_base
from sweep.adapters.serve import ServingBase
from sweep.study.errors import FieldError
from sweep.training.base import Base

QV = ["query", "value"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "up_proj": 16},
        },
    ),
    "rslora patterns": ("bert", {"r": 4, "use_rslora": True, "target_modules": QV, "rank_pattern": {"query": 3}}),
    "dora": ("bert", {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": [*QV, "output.dense"]}),
    "dora patterns": (
        "gpt2",
        {
            "r": 3,
            "use_dora": True,
            "target_modules": ["c_attn", "c_fc"],
            "fan_in_fan_out": True,
            "rank_pattern": {"c_fc": 2},
            "alpha_pattern": {"c_attn": 1},
        },
    ),
    "conv1d": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("gpt2", {"r": 3, "lora_alpha": 2, "target_modules": ["wte", "wpe", "c_attn"]}),
    "saved output layer": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved norms by an ending": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "saved tied embedding": ("gpt2", {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "saved tied embedding and head": (
        "gpt2",
        {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    ),
    "saved whole part": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "some layers": ("llama", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


def serving(family: str) -> ServingBase:
    return ServingBase(Base(frozen_model(FAMILIES[family]), ()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_pefts_has_pefts_logits_and_is_written_back_as_it_was(kind: str, tmp_path: Path) -> None:
    family, settings = KINDS[kind]
    folder = write_with_peft(family, tmp_path / "theirs", **settings)
    inputs = inputs_of(family, 3)
    expected = logits_in_peft(in_peft(family, a=folder), inputs)
    base = serving(family)
    try:
        base.add("a", folder)
        base.use("a")
        torch.testing.assert_close(base.logits(inputs), expected, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(base.logits(inputs, [None] * 3), expected, atol=1e-2), "the adapter changes nothing"
        base.save("a", tmp_path / "ours")
    finally:
        base.close()
    again = logits_in_peft(in_peft(family, a=tmp_path / "ours"), inputs)
    torch.testing.assert_close(again, expected, atol=0, rtol=0)
    theirs, ours = (load_file(at / "adapter_model.safetensors") for at in (folder, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_ranks_and_scalings_are_those_of_pefts_layers(tmp_path: Path) -> None:
    family, settings = KINDS["patterns"]
    folder = write_with_peft(family, tmp_path, **settings)
    found, model = read_adapter(folder), in_peft(family, a=folder)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found.ranks == {name: layer.r["a"] for name, layer in layers.items()}  # type: ignore[index,operator]
    assert {m: found.scaling(m) for m in found.ranks} == {n: m.scaling["a"] for n, m in layers.items()}  # type: ignore[index,operator]
    assert len(set(found.ranks.values())) == 3


def edited(folder: Path, **config: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "lora_only"),
        ("peft_type", "ADALORA"),
        ("init_lora_weights", "pissa_niter_4"),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("ensure_weight_tying", True),
        ("target_parameters", ["mlp.weight"]),
        ("lora_bias", True),
        ("something_of_next_year", 3),
        ("r", 5),
        ("r", "4"),
        ("r", 0),
        ("lora_alpha", None),
        ("rank_pattern.q_proj", {"q_proj": "2"}),
        ("alpha_pattern", ["q_proj"]),
        ("modules_to_save", "lm_head"),
    ],
)
def test_what_cannot_be_held_exactly_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    edited(write_with_peft(family, tmp_path, **settings), **{key.split(".")[0]: value})
    with pytest.raises(FieldError, match=rf"adapter_config.json: {re.escape(key)}"):
        read_adapter(tmp_path)


def test_what_cannot_be_read_is_refused_with_its_file(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path, **settings)
    edited(folder, rank_pattern={"q_proj(": 4})
    with pytest.raises(FieldError, match=r"adapter_config.json: 'q_proj\(' is no pattern"):
        read_adapter(folder)
    edited(folder, rank_pattern={})
    (folder / "sweep.json").write_text('{"labels": "sport"}')
    with pytest.raises(FieldError, match=r"sweep\.json: labels"):
        read_adapter(folder)
    (folder / "sweep.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    wide = {**tensors, first: torch.cat([tensors[first], tensors[first]], dim=1)}
    save_file(wide, folder / "adapter_model.safetensors")
    with pytest.raises(
        FieldError, match=r"r: 4 for model\.layers\.0\.self_attn\.q_proj, whose tensors have rank 4 and 8"
    ):
        read_adapter(folder)


def test_lora_that_goes_with_a_prefix_is_refused_rather_than_read_by_half(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path, **settings)
    (folder / "prefix").mkdir()
    (folder / "prefix" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(FieldError, match="prefix: a prefix goes with this adapter"):
        read_adapter(folder)


def test_damage_is_found_in_a_prefix_and_in_a_base_that_come_along_and_texts_may_be_changed(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path, **settings)
    weights = ["adapter_model.safetensors", "prefix/adapter_model.safetensors", "base/model.safetensors"]
    configs = ["adapter_config.json", "prefix/adapter_config.json", "base/config.json"]
    for name in (*weights[1:], *configs[1:]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / Path(weights[0] if name in weights else configs[0])).read_bytes())
    (folder / "README.md").write_text("card")
    write_mark(folder, {})
    (folder / "README.md").write_text("my own words")
    assert not is_damaged(folder)
    for name in (*weights, *configs):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        assert is_damaged(folder), name
        (folder / name).write_bytes(content)
    (folder / weights[1]).unlink()
    assert is_damaged(folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_is_no_name_of_a_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = write_with_peft("llama", tmp_path, r=2, target_modules=["q_proj"])
    (folder / "sweep.json").write_text(json.dumps({"sha256": {name: "0"}}))
    with pytest.raises(FieldError, match=r"is no name of a file"):
        read_adapter(folder)


def test_bases_are_the_same_by_fingerprint_and_else_by_name(tmp_path: Path) -> None:
    found = read_adapter(write_with_peft("llama", tmp_path, r=2, target_modules=["q_proj"]))
    here, there = replace(found, base_model="here"), replace(found, base_model="there")
    assert same_base(here, here) and not same_base(here, there)
    assert same_base(replace(here, model_fingerprint="one"), replace(there, model_fingerprint="one"))
    assert not same_base(replace(here, model_fingerprint="one"), replace(here, model_fingerprint="two"))
    assert same_base(replace(here, model_fingerprint="one"), here)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(frozen_model(FAMILIES["llama"]))
    get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="LOHA"):
        read_adapter(tmp_path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    write_with_peft(family, tmp_path, **settings)
    (tmp_path / "adapter_model.safetensors").unlink()
    trap = b'cbuiltins\nexec\n(S\'open("%s", "w")\'\ntR.' % str(tmp_path / "ran").encode()
    (tmp_path / "adapter_model.bin").write_bytes(trap)
    with pytest.raises(FieldError, match="pickle"):
        read_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed_but_into_the_hubs_cache_it_is(name: str, tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path / "models--a--b" / "snapshots" / "c0ffee", **settings)
    outside, blobs = tmp_path / "elsewhere", tmp_path / "models--a--b" / "blobs"
    for at, allowed in ((outside, False), (blobs, True)):
        at.mkdir()
        here = (folder / name).resolve()
        here.rename(at / "blob")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(at / "blob")
        if allowed:
            assert read_adapter(folder).ranks
        else:
            with pytest.raises(FieldError, match="leads out"):
                read_adapter(folder)


def test_tensors_that_peft_would_pass_over_are_refused(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    tensors = load_file(write_with_peft(family, tmp_path, **settings) / "adapter_model.safetensors")
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(FieldError, match="does not begin with"):
        read_adapter(tmp_path)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(16)}, path)
    with pytest.raises(FieldError, match=r"'model.norm' is neither an adapter nor one of modules_to_save"):
        read_adapter(tmp_path)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    with pytest.raises(FieldError, match="one A and one B"):
        read_adapter(tmp_path)


def test_half_precision_tensors_are_those_that_peft_computes_with(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    path = write_with_peft(family, tmp_path, **settings) / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    inputs, base = inputs_of(family, 2), serving(family)
    base.add("a", tmp_path)
    base.use("a")
    ours = base.logits(inputs)
    base.close()
    torch.testing.assert_close(ours, logits_in_peft(in_peft(family, a=tmp_path), inputs), atol=2e-5, rtol=1e-5)


def test_a_name_that_ends_like_another_keeps_its_own_rank(tmp_path: Path) -> None:
    """PEFT takes a pattern for every module whose name ends with it."""
    found = read_adapter(write_with_peft("llama", tmp_path / "a", r=2, target_modules=["q_proj"]))
    ranks = {"q": 2, "x.q": 3, "x.y.q": 4, "z": 4}
    state = {f"{m}.lora_{f}.weight": torch.ones((r, 5) if f == "A" else (5, r)) for m, r in ranks.items() for f in "AB"}
    (tmp_path / "b").mkdir()
    odd = replace(found, ranks=ranks, alphas={m: 2.5 * r for m, r in ranks.items()}, state=state, settings=None)
    write_adapter(odd, tmp_path / "b", list(ranks))
    assert read_adapter(tmp_path / "b").ranks == ranks
    assert read_adapter(tmp_path / "b").alphas == odd.alphas
