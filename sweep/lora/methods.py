"""How a trial's tensors begin, at each kind of layer and by each method; their names and shapes are PEFT's.

Shapes: I input features, O output features, r rank; an embedding has I = its entries, a convolution I = C·kh·kw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sweep.lora.quantized import dequantized, is_quantized

State = dict[str, Tensor]
DORA, PISSA, LORA_PLUS = "dora", "pissa", "lora+"
KAIMING, GAUSSIAN = "kaiming", "gaussian"

_LEADING: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (I, O); by name, since this room imports torch alone."""
    return type(layer).__name__ == "Conv1D" and getattr(layer, "nf", None) is not None


def is_adaptable(layer: nn.Module) -> bool:
    """Whether the layer is a frozen matrix that a packed layer knows; not a kind of it that computes something else."""
    forward = getattr(type(layer), "forward", None)
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and forward is nn.Conv2d.forward
    if isinstance(layer, nn.Embedding):  # embed_scale: a factor that the packed layer knows
        return forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
    if isinstance(layer, nn.Linear):
        return forward is nn.Linear.forward or is_quantized(layer)
    return is_conv1d(layer)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(O, I) of the matrix that a layer is."""
    if is_quantized(layer):  # its weight is of another shape
        return layer.out_features, layer.in_features  # type: ignore[return-value]
    weight = layer.get_parameter("weight")
    if isinstance(layer, nn.Embedding):
        return weight.shape[1], weight.shape[0]
    if is_conv1d(layer):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


def tensor_names(layer: nn.Module) -> tuple[str, str]:
    """PEFT's names of A and B."""
    if isinstance(layer, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def trained_numbers(layer: nn.Module, r: int, method: str) -> int:
    """How many numbers a trial trains at this layer."""
    O, I = matrix_shape(layer)  # noqa: E741
    return r * (O + I) + (O if method == DORA else 0)


def frozen_numbers(layer: nn.Module, r: int, method: str) -> int:
    """How many numbers a trial carries at this layer and does not train: PiSSA's factors of step 0."""
    return r * sum(matrix_shape(layer)) if method == PISSA else 0


def refusal(layer: nn.Module, method: str) -> str | None:
    """Why a method cannot adapt this layer, or None where it can."""
    if method == LORA_PLUS and isinstance(layer, nn.Embedding):
        return "method lora+ speeds up the factor that begins at zero, which at an embedding is A; use lora there"
    if method in (DORA, PISSA) and not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        return f"method {method} adapts linear layers, not {type(layer).__name__}; use lora or rslora there"
    return None


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator of (seed, name) alone: neither rank nor order of the modules moves another module's draw."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def init_adapter(
    layers: Mapping[str, nn.Module], method: str, r: int, scaling: float, seed: int, init: str = KAIMING
) -> State:
    """A trial's tensors at step 0: the update is nothing, whatever the method.

    A: uniform in ±1/√I ("kaiming": He et al. 2015, arXiv 1502.01852, with a = √5; PEFT's default), or normal with
    standard deviation 1/r ("gaussian"); B zero. At an embedding A is zero and B normal, as in PEFT. LoRA, rsLoRA and
    LoRA+ begin alike. DoRA adds the base's row norms; PiSSA begins from the base itself. Raises ValueError where the
    method does not know the layer.
    """
    state: State = {}
    for name, layer in layers.items():
        reason = refusal(layer, method)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        A_name, B_name = (f"{name}.{tensor}" for tensor in tensor_names(layer))
        if method == PISSA:
            A_rI, B_Or = pissa(layer, r, scaling)
            state |= {A_name: A_rI, B_name: B_Or}
            state |= {f"{name}.initial_A.weight": A_rI.clone(), f"{name}.initial_B.weight": B_Or.clone()}
            continue
        state[A_name], state[B_name] = _draw(layer, r, generator_for(seed, name), init)
        if method == DORA:
            state[f"{name}.lora_magnitude_vector"] = _matrix(layer).norm(dim=1)
    return state


def pissa(layer: nn.Module, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) with scaling · BA = the r leading singular parts of W₀.

    PiSSA, Meng et al. 2024, arXiv 2404.02948, equations 2–3: A = √S Vᵀ, B = U √S, over a base of W₀ − BA. In a pack
    the base is shared and stays whole; its residual is taken by a second, frozen update −BA of step 0. That is exact
    in float32, doubles the update's rank in time, and the adapter's size in checkpoints. In bfloat16 its error is of
    the size of PiSSA's alone, whose residual is rounded.
    """
    U_Or, S_r, Vh_rI = _leading_parts(layer, r)
    root_r = (S_r / scaling).sqrt()
    return (root_r[:, None] * Vh_rI).contiguous(), (U_Or * root_r).contiguous()


def init_head(layers: Mapping[str, nn.Linear], seed: int) -> State:
    """A head's fresh weights, normal with standard deviation 0.02 (BERT's), biases zero; the same in every arm."""
    state: State = {}
    for name, layer in layers.items():
        state[f"{name}.weight"] = torch.randn(layer.weight.shape, generator=generator_for(seed, name)) * 0.02
        if layer.bias is not None:
            state[f"{name}.bias"] = torch.zeros(layer.bias.shape)
    return state


def _draw(layer: nn.Module, r: int, generator: torch.Generator, init: str) -> tuple[Tensor, Tensor]:
    O, I = matrix_shape(layer)  # noqa: E741
    if isinstance(layer, nn.Embedding):
        return torch.zeros(r, I), torch.randn(O, r, generator=generator)
    if init == GAUSSIAN:
        A_rI = torch.randn(r, I, generator=generator) / r
    else:
        A_rI = (torch.rand(r, I, generator=generator) * 2 - 1) / math.sqrt(I)
    if isinstance(layer, nn.Conv2d):
        return A_rI.view(r, *layer.weight.shape[1:]), torch.zeros(O, r, 1, 1)
    return A_rI, torch.zeros(O, r)


def _matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (O, I), in float32 on the CPU."""
    if is_quantized(layer):
        return dequantized(layer, torch.float32).cpu()
    weight = layer.get_parameter("weight").detach().float().cpu()
    return weight.T if is_conv1d(layer) else weight


def _leading_parts(layer: nn.Module, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, r), S (r,), Vᵀ (r, I) of the base's weight; kept, since a study asks for them in every trial."""
    if layer not in _LEADING or len(_LEADING[layer][1]) < r:
        U, S, Vh = torch.linalg.svd(_matrix(layer), full_matrices=False)
        kept = max(r, 64)
        _LEADING[layer] = U[:, :kept].clone(), S[:kept].clone(), Vh[:kept].clone()
    U, S, Vh = _LEADING[layer]
    return U[:, :r], S[:r], Vh[:r]
