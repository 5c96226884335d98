"""One base and many adapters: each row has PEFT's logits for its adapter, and the base is given back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import in_peft, inputs_of, logits_in_peft, write_with_peft
from random_models import FAMILIES, frozen_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sweep.adapters.serve import ServingBase, plan_slots
from sweep.study.errors import FieldError
from sweep.training.base import Base

LLAMA = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 5, "use_rslora": True, "target_modules": "all-linear"},
    "c": {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
    "d": {"r": 2, "use_dora": True, "target_modules": ["v_proj"]},
    "e": {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}},
}
BERT = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"]},
    "b": {"r": 5, "target_modules": ["word_embeddings", "dense"]},
    "c": {"r": 3, "use_dora": True, "target_modules": ["query"]},
}
Served = tuple[ServingBase, dict[str, Path]]


def serve(family: str, kinds: dict[str, dict[str, object]], to: Path) -> Served:
    base = ServingBase(Base(copy.deepcopy(frozen_model(FAMILIES[family])), ()))
    folders = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        folders[name] = write_with_peft(family, to / name, seed, **kind)
        base.add(name, folders[name])
    return base, folders


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve("llama", LLAMA, tmp_path_factory.mktemp("llama"))  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=24), st.integers(1, 4))
def test_slots_hold_every_row_once_and_none_twice(rows: list[str | None], times: int) -> None:
    pack_order = [None, "c", "a", "b"]
    slots, order = plan_slots(rows, pack_order)
    assert sorted(order) == list(range(len(rows)))
    g = len(rows) // len(slots)
    assert [rows[i] for i in order] == [name for name in slots for _ in range(g)]
    assert plan_slots(sorted(rows * times, key=str), pack_order)[0] == slots


@pytest.mark.parametrize("rows", ["aabcde-b", "a-", "abcab", "eecc", "d-ddd"])
def test_a_mixed_batch_has_pefts_logits_for_every_row(llama: Served, rows: str) -> None:
    base, folders = llama
    names = [None if row == "-" else row for row in rows]
    inputs = inputs_of("llama", len(names))
    model = in_peft("llama", **folders)
    alone = {name: logits_in_peft(model, inputs, name) for name in folders}
    alone["-"] = plain(frozen_model(FAMILIES["llama"]), inputs)
    wanted = torch.stack([alone[row][i] for i, row in enumerate(rows)])
    ours = base.logits(inputs, names)
    torch.testing.assert_close(ours, wanted, atol=3e-5, rtol=1e-5)
    if "d" not in rows:  # PEFT mixes no DoRA
        mixed = logits_in_peft(model, inputs, adapter_names=[name or "__base__" for name in names])
        torch.testing.assert_close(ours, mixed, atol=3e-5, rtol=1e-5)


def test_heads_of_their_own_are_served_side_by_side(tmp_path: Path) -> None:
    """A row of the base has the base's head."""
    base, folders = serve("bert", BERT, tmp_path)  # type: ignore[arg-type]
    names = ["b", None, "a", "c", "b", "a", "b"]
    inputs = inputs_of("bert", len(names))
    model = in_peft("bert", **folders)
    expected = {name: logits_in_peft(model, inputs, name) for name in folders}
    expected |= {None: plain(frozen_model(FAMILIES["bert"]), inputs)}  # type: ignore[dict-item]
    wanted = torch.stack([expected[name][i] for i, name in enumerate(names)])  # type: ignore[index]
    torch.testing.assert_close(base.logits(inputs, names), wanted, atol=3e-5, rtol=1e-5)
    assert (expected["a"] - expected["b"]).abs().max() > 0.1


def plain(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def test_switching_keeps_the_base_and_removing_gives_it_back_bit_for_bit(tmp_path: Path) -> None:
    base, _ = serve("bert", BERT, tmp_path)  # type: ignore[arg-type]
    model = base.base.model
    inputs = inputs_of("bert", 5)
    first = plain(model, inputs)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    adapted = []
    for name in ["a", "c", None, "b", "a"]:
        base.use(name)
        adapted.append(base.logits(inputs))
    base.logits(inputs, ["a", "b", "c", None, "a"])
    assert torch.equal(adapted[0], adapted[4]) and not torch.allclose(adapted[0], adapted[1])
    for ending in (lambda: base.use(None), base.close):
        base.use("a")
        ending()
        assert dict(model.named_modules()) == modules
        assert torch.equal(plain(model, inputs).view(torch.int32), first.view(torch.int32))
        now = dict(model.named_parameters())
        assert now.keys() == before.keys()
        for name, (place, value) in before.items():
            assert now[name].data_ptr() == place and torch.equal(now[name].view(torch.int32), value.view(torch.int32))
    base.use("a")
    base.drop("a")
    assert base.active is None and torch.equal(base.logits(inputs), first)


def test_the_pack_stays_while_the_mix_does(llama: Served) -> None:
    base, _ = llama
    base.logits(inputs_of("llama", 4), ["a", "b", "a", None])
    layer = base.base.model.get_submodule("model.layers.0.self_attn.q_proj")
    base.logits(inputs_of("llama", 8), ["b", "a", "a", None] * 2)
    assert base.base.model.get_submodule("model.layers.0.self_attn.q_proj") is layer
    base.logits(inputs_of("llama", 4), ["b", "a", "b", None])
    assert base.base.model.get_submodule("model.layers.0.self_attn.q_proj") is not layer


@pytest.mark.parametrize("rows", [[], None])
def test_a_batch_of_no_rows_is_refused(llama: Served, rows: list[str | None] | None) -> None:
    none = {name: tensor[:0] for name, tensor in inputs_of("llama", 1).items()}
    with pytest.raises(FieldError, match="there are no rows; give at least one"):
        llama[0].logits(none, rows)


def test_what_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    base, _ = serve("llama", {}, tmp_path)
    theirs = write_with_peft("gpt2", tmp_path / "gpt2", r=2, target_modules=["c_attn"])
    with pytest.raises(FieldError, match=r"no layer transformer.h.0.attn.c_attn"):
        base.add("a", theirs)
    assert base.adapters == {}
    with pytest.raises(FieldError, match="there is no adapter 'a'"):
        base.use("a")


def test_one_adapts_what_another_replaces(tmp_path: Path) -> None:
    kinds = {
        "lora": {"r": 2, "target_modules": ["lm_head"]},
        "whole": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    base, folders = serve("llama", kinds, tmp_path)  # type: ignore[arg-type]
    inputs = inputs_of("llama", 2)
    with pytest.raises(FieldError, match=r"lora adapts lm_head, which another one replaces"):
        base.logits(inputs, ["lora", "whole"])
    for name in kinds:
        base.use(name)
        expected = logits_in_peft(in_peft("llama", **{name: folders[name]}), inputs)
        torch.testing.assert_close(base.logits(inputs), expected, atol=2e-5, rtol=1e-5)


SAVED: dict[str, dict[str, dict[str, object]]] = {
    "bert": {
        "norms": {"r": 2, "target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
        "others": {"r": 2, "target_modules": ["value"], "modules_to_save": ["LayerNorm", "pooler"]},
        "head": {"r": 3, "target_modules": ["query", "value"], "modules_to_save": ["pooler", "classifier"]},
        "lora": {"r": 4, "target_modules": ["query"]},
    },
    "llama": {
        "chat": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "norms": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
        "head": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    },
    "gpt2": {  # its lm_head is tied to wte
        "chat": {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
        "words": {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["wte"]},
        "lora": {"r": 4, "target_modules": ["c_attn"]},
    },
}


def bits(model: torch.nn.Module) -> dict[str, tuple[int, bytes]]:
    tensors = model.state_dict(keep_vars=True)
    return {n: (t.data_ptr(), t.detach().contiguous().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


@pytest.mark.parametrize("family", SAVED)
def test_modules_that_peft_saved_are_served_alone_and_beside_other_adapters(family: str, tmp_path: Path) -> None:
    """Each row has PEFT's logits for its adapter, and the base is its own again, bit for bit."""
    base, folders = serve(family, SAVED[family], tmp_path)
    model = base.base.model
    modules, before = dict(model.named_modules()), bits(model)
    names = [*folders, None, *reversed(folders), None]
    inputs = inputs_of(family, len(names))
    wanted = {None: plain(frozen_model(FAMILIES[family]), inputs)}
    for name, folder in folders.items():
        wanted[name] = logits_in_peft(in_peft(family, **{name: folder}), inputs)
        assert (wanted[name] - wanted[None]).abs().max() > 0.1, "the adapter changes nothing"
        base.use(name)
        torch.testing.assert_close(base.logits(inputs), wanted[name], atol=3e-5, rtol=1e-5)
    rows = torch.stack([wanted[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(base.logits(inputs, names), rows, atol=3e-5, rtol=1e-5)
    base.use(next(iter(folders)))
    base.logits(inputs)
    base.use(None)
    assert torch.equal(base.logits(inputs), wanted[None])
    assert dict(model.named_modules()) == modules and bits(model) == before


@pytest.mark.parametrize("saved", ["lm_head", "mlp", "norm", "embed_tokens"])
def test_saved_modules_stand_in_a_base_of_half_precision(saved: str, tmp_path: Path) -> None:
    base, _ = serve("llama", {}, tmp_path)
    folder = write_with_peft("llama", tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=[saved])
    base.base.model.bfloat16()
    base.add("a", folder)
    inputs = inputs_of("llama", 3)
    expected = logits_in_peft(in_peft("llama", a=folder), inputs)
    ours = base.logits(inputs, ["a"] * 3).float()
    assert (ours - expected).norm() < 0.05 * expected.norm()


def test_a_saved_module_that_the_base_has_not_or_otherwise_is_named(tmp_path: Path) -> None:
    base, _ = serve("llama", {}, tmp_path)
    folder = write_with_peft("llama", tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    path, at = folder / "adapter_model.safetensors", "base_model.model.model.norm"
    tensors = load_file(path)
    weight = tensors.pop(f"{at}.weight")
    for key, tensor, said in (
        (
            "base_model.model.model.other_norm.weight",
            weight,
            "modules_to_save: the base has no module model.other_norm",
        ),
        (f"{at}.bias", weight, "modules_to_save: model.norm has no bias in the base"),
        (f"{at}.weight", weight[:3].clone(), r"model.norm is \(16,\) in the base and \(3,\) in the adapter"),
    ):
        save_file({**tensors, key: tensor}, path)
        with pytest.raises(FieldError, match=said):
            base.add("a", folder)
        assert not base.adapters
