"""Adapters of single trials, and packs of them on one frozen model.

A trial's state is a dict of tensors under PEFT's names: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight`
(out, r), and the head's own `<module>.weight`, `<module>.bias`. A pack stacks K such states over the model's layers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweep.lora.layers import Bucket, ForwardPass, PackedLoraLinear, PackedTrainedLinear

State = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """One trial's adapter: its rank, its scaling, the modules it adapts, and its tensors."""

    r: int
    scaling: float
    modules: tuple[str, ...]  # full module names
    state: State
    seed: int = 0  # decides what dropout drops


@dataclass(frozen=True)
class Stack:
    """One trained tensor of the pack: (G, …) over trials start … stop−1; `name` is each trial's name of its slice."""

    name: str
    start: int
    stop: int
    tensor: nn.Parameter


@dataclass(frozen=True)
class Pack:
    """K trials installed on a model."""

    trials: int
    stacks: list[Stack]
    replaced: list[tuple[str, nn.Module]]  # what stood where the packed layers stand now
    forward_pass: ForwardPass


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator of (seed, name) alone: neither rank nor order of the modules moves another module's draw."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def init_lora(layers: dict[str, nn.Linear], r: int, seed: int) -> State:
    """A uniform in ±1/√in (Kaiming with a = √5, PEFT's default), B zero: the update starts at nothing."""
    state: State = {}
    for name, layer in layers.items():
        bound = 1.0 / math.sqrt(layer.in_features)
        noise = torch.rand(r, layer.in_features, generator=generator_for(seed, name))
        state[f"{name}.lora_A.weight"] = (noise * 2 - 1) * bound
        state[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, r)
    return state


def init_head(layers: dict[str, nn.Linear], seed: int) -> State:
    """A head's fresh weights, normal with standard deviation 0.02 (BERT's), biases zero; the same in every arm."""
    state: State = {}
    for name, layer in layers.items():
        state[f"{name}.weight"] = torch.randn(layer.weight.shape, generator=generator_for(seed, name)) * 0.02
        if layer.bias is not None:
            state[f"{name}.bias"] = torch.zeros(layer.bias.shape)
    return state


def pack_order(adapters: Sequence[Adapter]) -> list[int]:
    """The order in which trials share buckets: those of one rank on the same modules stand together."""
    return sorted(range(len(adapters)), key=lambda i: (adapters[i].modules, adapters[i].r, i))


def install(model: nn.Module, adapters: Sequence[Adapter], head: Sequence[str], dropout: float = 0.0) -> Pack:
    """Put the adapters on the model's layers; trial k of the pack is adapters[k]. The model's tensors stay untouched.

    head: names of the nn.Linear layers of which each trial trains a copy of its own.
    """
    device = next(model.parameters()).device
    forward_pass = ForwardPass(torch.tensor([a.seed for a in adapters], dtype=torch.int64, device=device), dropout)
    pack = Pack(len(adapters), [], [], forward_pass)
    try:
        _replace_layers(model, adapters, head, pack)
    except BaseException:  # out of memory, or an interrupt: the next pack must find the base as it was
        remove(model, pack)
        raise
    return pack


def _replace_layers(model: nn.Module, adapters: Sequence[Adapter], head: Sequence[str], pack: Pack) -> None:
    """Put packed layers in place, one by one, each noted in pack.replaced before it stands."""
    device, stacks = pack.forward_pass.seeds_K.device, pack.stacks
    layers = linear_modules(model)
    adapted = {name for adapter in adapters for name in adapter.modules}
    for index, name in enumerate(name for name in layers if name in adapted):
        buckets = []
        for start, stop in _runs_of_one_rank(adapters, name):
            group = adapters[start:stop]
            A_GrI = _stack(group, f"{name}.lora_A.weight", device)
            B_GOr = _stack(group, f"{name}.lora_B.weight", device)
            scaling_G11 = torch.tensor([a.scaling for a in group], device=device).view(-1, 1, 1)
            buckets.append(Bucket(start, stop, A_GrI, B_GOr, scaling_G11))
            stacks.append(Stack(f"{name}.lora_A.weight", start, stop, A_GrI))
            stacks.append(Stack(f"{name}.lora_B.weight", start, stop, B_GOr))
        packed_layer = PackedLoraLinear(layers[name], len(adapters), buckets, pack.forward_pass, index)
        pack.replaced.append((name, layers[name]))
        model.set_submodule(name, packed_layer)
    for name in head:
        weight_KOI = _stack(adapters, f"{name}.weight", device)
        bias_KO = _stack(adapters, f"{name}.bias", device) if layers[name].bias is not None else None
        packed = PackedTrainedLinear(weight_KOI, bias_KO)
        stacks.append(Stack(f"{name}.weight", 0, len(adapters), packed.weight))
        if packed.bias is not None:
            stacks.append(Stack(f"{name}.bias", 0, len(adapters), packed.bias))
        pack.replaced.append((name, layers[name]))
        model.set_submodule(name, packed)


def remove(model: nn.Module, pack: Pack) -> None:
    """Give the model its own layers back, bit for bit."""
    for name, module in pack.replaced:
        model.set_submodule(name, module)


def trial_state(pack: Pack, k: int) -> State:
    """Trial k's tensors, on the CPU."""
    return {s.name: s.tensor[k - s.start].detach().cpu().clone() for s in pack.stacks if s.start <= k < s.stop}


def _runs_of_one_rank(adapters: Sequence[Adapter], name: str) -> list[tuple[int, int]]:
    """(start, stop) of neighbouring trials that adapt module `name` with one rank."""
    ranks = [a.r if name in a.modules else None for a in adapters]
    runs = [(r, [i for i, _ in group]) for r, group in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1])]
    return [(members[0], members[-1] + 1) for r, members in runs if r is not None]


def _stack(group: Sequence[Adapter], name: str, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.stack([adapter.state[name] for adapter in group]).to(device, torch.float32))
