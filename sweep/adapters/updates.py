"""A trial's update ΔW = W' − W₀ at one layer by its singular parts, whatever the method; and truncated to a rank.

Shapes: I input features, O output features, k rank kept; see `sweep.lora.methods` for each layer's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sweep.adapters.merge import as_plain_lora, merged_weight
from sweep.lora.lowrank import Parts, factors, update_parts
from sweep.lora.methods import DORA, PISSA, State, is_conv1d, tensor_names
from sweep.lora.spectra import dense_parts
from sweep.study.arms import Arm

Read = Callable[[list[str]], State]  # some of a trial's tensors, by their names


def matrix_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight in the layer's own layout as the matrix (O, I) that the layer is, in float64 on the CPU."""
    matrix = weight.detach().double().cpu().flatten(1)
    return matrix.T if isinstance(layer, nn.Embedding) or is_conv1d(layer) else matrix


def lora_names(name: str, layer: nn.Module, arm: Arm) -> list[str]:
    """The tensors that a LoRA arm keeps of a layer."""
    names = [f"{name}.{tensor}" for tensor in tensor_names(layer)]
    if arm.method == PISSA:
        names += [f"{name}.initial_A.weight", f"{name}.initial_B.weight"]
    if arm.method == DORA:
        names.append(f"{name}.lora_magnitude_vector")
    return names


def parts_of(name: str, layer: nn.Module, own_name: str, arm: Arm, read: Read, most: int) -> Parts:
    """ΔW's singular values and at most `most` leading vectors; for PiSSA over the whole base, twice the rank.

    own_name: what full fine-tuning calls the layer's weight; tied weights go by the first of their names.
    """
    if arm.is_full:
        update = matrix_of(layer, read([own_name])[own_name]) - matrix_of(layer, layer.get_parameter("weight"))
        return dense_parts(update, most)
    state = read(lora_names(name, layer, arm))
    if arm.method == DORA:
        merged = merged_weight(name, layer, arm, state)
        return dense_parts(matrix_of(layer, merged) - matrix_of(layer, layer.get_parameter("weight")), most)
    if arm.method == PISSA:
        state = as_plain_lora(name, state)
    A, B = (state[f"{name}.{tensor}"].flatten(1) for tensor in tensor_names(layer))
    U, S, Vh = update_parts(A, B, arm.scaling_at(name))
    return U[:, :most], S, Vh[:most]


def truncated(name: str, layer: nn.Module, parts: Parts, k: int) -> State:
    """ΔW's k leading singular parts as a plain LoRA adapter's tensors, of rank k and scaling 1."""
    A_kI, B_Ok = factors(parts, k, 1.0)
    lack = k - len(A_kI)  # a layer of a smaller rank
    A_kI, B_Ok = pad(A_kI, (0, 0, 0, lack)), pad(B_Ok, (0, lack))
    if isinstance(layer, nn.Conv2d):
        A_kI, B_Ok = A_kI.view(k, *layer.weight.shape[1:]), B_Ok[:, :, None, None]
    A_name, B_name = tensor_names(layer)
    return {f"{name}.{A_name}": A_kI.contiguous(), f"{name}.{B_name}": B_Ok.contiguous()}


def a_rows(name: str, layer: nn.Module, read: Read) -> Tensor:
    """The trial's A as (r, I)."""
    A_name = f"{name}.{tensor_names(layer)[0]}"
    return read([A_name])[A_name].flatten(1).to(torch.float64)
