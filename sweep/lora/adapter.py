"""Adapters of single trials, and packs of them on one frozen model.

A trial's state is a dict of tensors under PEFT's names: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight`
(out, r), the head's own `<module>.weight`, `<module>.bias`, and a prefix's `prompt_embeddings` (p, hidden size).
A pack stacks K such states over the model's layers.

Shapes: K trials in the pack, G trials of one stack, P elements a trial in a flat buffer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sweep.lora.layers import (
    Bucket,
    PackedConv2d,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
    PackedTrainedLinear,
)
from sweep.lora.methods import DORA, PISSA, State, is_adaptable, tensor_names
from sweep.lora.passes import ForwardPass, layer_key
from sweep.lora.prefix import PROMPT, Prefix, put_before_tokens
from sweep.lora.trunk import share_trunk


@dataclass(frozen=True)
class Adapter:
    """One trial's adapter: its rank, its scaling, the modules it adapts, and its tensors."""

    r: int  # of the modules that `ranks` does not name
    scaling: float  # of those that `scalings` does not name
    modules: tuple[str, ...]  # full module names
    state: State
    seed: int = 0  # decides what dropout drops
    method: str = "lora"
    ranks: Mapping[str, int] = field(default_factory=dict)
    scalings: Mapping[str, float] = field(default_factory=dict)
    prefix_length: int = 0  # of the embeddings that it puts before a row's tokens

    def rank_at(self, module: str) -> int:
        return self.ranks.get(module, self.r)

    def scaling_at(self, module: str) -> float:
        return self.scalings.get(module, self.scaling)

    @property
    def kind(self) -> str:
        """Trials of one kind share buckets: LoRA, rsLoRA and LoRA+ differ in scaling and learning rates alone."""
        return self.method if self.method in (DORA, PISSA) else "lora"


@dataclass(frozen=True)
class Stack:
    """One trained tensor of the pack: (G, …) over trials start … stop−1; `name` is each trial's name of its slice."""

    name: str
    start: int
    stop: int
    tensor: nn.Parameter


@dataclass(frozen=True)
class Flat:
    """The stacks of one role over the same trials as one buffer: what the optimizer works on, a row a trial."""

    role: str  # "A", "B", "bias" or "other": LoRA+ and weight decay treat them differently
    value_GP: Tensor  # the stacks' tensors are views of it
    stacks: tuple[Stack, ...]

    @property
    def start(self) -> int:
        return self.stacks[0].start

    @property
    def stop(self) -> int:
        return self.stacks[0].stop


@dataclass
class Pack:
    """K trials installed on a model."""

    trials: int
    forward_pass: ForwardPass
    flats: list[Flat] = field(default_factory=list)
    frozen: list[State] = field(default_factory=list)  # of each trial: what it carries and does not train
    replaced: list[tuple[str, nn.Module]] = field(default_factory=list)  # what stood where the packed layers stand
    hooks: list[RemovableHandle] = field(default_factory=list)


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that an adapter may sit on: linear layers, GPT-2's Conv1D, embeddings, ungrouped convolutions."""
    return {name: module for name, module in model.named_modules() if is_adaptable(module)}


def pack_order(adapters: Sequence[Adapter]) -> list[int]:
    """The order in which trials share buckets: those of one kind and rank on the same modules stand together."""

    def place(i: int) -> tuple[object, ...]:
        adapter = adapters[i]
        return adapter.modules, adapter.kind, adapter.r, sorted(adapter.ranks.items()), adapter.prefix_length, i

    return sorted(range(len(adapters)), key=place)


def install(model: nn.Module, adapters: Sequence[Adapter], head: Sequence[str], dropout: float = 0.0) -> Pack:
    """Put the adapters on the model's layers; trial k of the pack is adapters[k]. The model's tensors stay untouched.

    head: names of the nn.Linear layers of which each trial trains a copy of its own.
    """
    device = next(model.parameters()).device
    seeds_K = torch.tensor([a.seed for a in adapters], dtype=torch.int64, device=device)
    pack = Pack(len(adapters), ForwardPass(seeds_K, dropout))
    try:
        _replace_layers(model, adapters, head, pack)
        adapted = [name for name, module in pack.replaced if name not in head]
        if any(adapter.prefix_length for adapter in adapters):  # no two trials' rows are the same
            pack.hooks += put_before_tokens(model, _prefixes(pack), len(adapters))
        else:
            pack.hooks += share_trunk(model, adapted, pack.forward_pass)
    except BaseException:  # out of memory, or an interrupt: the next pack must find the base as it was
        remove(model, pack)
        raise
    return pack


def _replace_layers(model: nn.Module, adapters: Sequence[Adapter], head: Sequence[str], pack: Pack) -> None:
    """Put packed layers in place, one by one, each noted in pack.replaced before it stands."""
    device, adapted = pack.forward_pass.seeds_K.device, {name for adapter in adapters for name in adapter.modules}
    layers = {name: layer for name, layer in adaptable_modules(model).items() if name in adapted or name in head}
    runs = {name: _runs_of_one_rank(adapters, name) for name in layers if name not in head}
    wanted = []  # (role, tensor's name, start, stop) of all that is trained
    for name, spans in runs.items():
        for start, stop in spans:
            A_name, B_name = tensor_names(layers[name])
            wanted += [("A", f"{name}.{A_name}", start, stop), ("B", f"{name}.{B_name}", start, stop)]
            if adapters[start].kind == DORA:
                wanted.append(("other", f"{name}.lora_magnitude_vector", start, stop))
    wanted += [("other", PROMPT, *span) for span in _runs([adapter.prefix_length or None for adapter in adapters])]
    for name in head:
        wanted.append(("other", f"{name}.weight", 0, len(adapters)))
        if getattr(layers[name], "bias", None) is not None:
            wanted.append(("bias", f"{name}.bias", 0, len(adapters)))
    pack.flats += _flatten(adapters, wanted, device)
    pack.frozen += [{n: t for n, t in a.state.items() if ".initial_" in n} for a in adapters]
    tensors = {(stack.name, stack.start): stack.tensor for flat in pack.flats for stack in flat.stacks}
    for name, spans in runs.items():
        A_name, B_name = tensor_names(layers[name])
        buckets = [
            Bucket(
                start,
                stop,
                tensors[f"{name}.{A_name}", start],
                tensors[f"{name}.{B_name}", start],
                torch.tensor([a.scaling_at(name) for a in adapters[start:stop]], device=device).view(-1, 1, 1),
                _initial(adapters[start:stop], name, device),
                tensors.get((f"{name}.lora_magnitude_vector", start)),
            )
            for start, stop in spans
        ]
        kind = _packed_kind(layers[name])
        _put(model, pack, name, kind(layers[name], len(adapters), buckets, pack.forward_pass, layer_key(name)))
    for name in head:
        _put(model, pack, name, PackedTrainedLinear(tensors[f"{name}.weight", 0], tensors.get((f"{name}.bias", 0))))


def _put(model: nn.Module, pack: Pack, name: str, packed: nn.Module) -> None:
    pack.replaced.append((name, model.get_submodule(name)))
    model.set_submodule(name, packed)


def remove(model: nn.Module, pack: Pack) -> None:
    """Give the model its own layers back, bit for bit."""
    for hook in pack.hooks:
        hook.remove()
    for name, module in pack.replaced:
        model.set_submodule(name, module)


def trial_state(pack: Pack, k: int) -> State:
    """Trial k's tensors, on the CPU."""
    stacks = [stack for flat in pack.flats for stack in flat.stacks if stack.start <= k < stack.stop]
    trained = {
        s.name: s.tensor[k - s.start].detach().cpu().clone(memory_format=torch.contiguous_format) for s in stacks
    }
    return {**trained, **pack.frozen[k]}


def _packed_kind(layer: nn.Module) -> type[PackedLayer]:
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding
    return PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear


def _runs_of_one_rank(adapters: Sequence[Adapter], name: str) -> list[tuple[int, int]]:
    """(start, stop) of neighbouring trials that adapt module `name` by one kind of method with one rank."""
    return _runs([(a.kind, a.rank_at(name)) if name in a.modules else None for a in adapters])


def _runs(keys: Sequence[object]) -> list[tuple[int, int]]:
    """(start, stop) of neighbours with one key; None is no key."""
    runs = [(key, [i for i, _ in group]) for key, group in itertools.groupby(enumerate(keys), key=lambda pair: pair[1])]
    return [(members[0], members[-1] + 1) for key, members in runs if key is not None]


def _prefixes(pack: Pack) -> list[Prefix]:
    stacks = [stack for flat in pack.flats for stack in flat.stacks if stack.name == PROMPT]
    return [Prefix(s.start, s.stop, s.tensor) for s in sorted(stacks, key=lambda stack: stack.start)]


def _flatten(
    adapters: Sequence[Adapter], wanted: Sequence[tuple[str, str, int, int]], device: torch.device
) -> list[Flat]:
    """The adapters' tensors in one buffer for each (role, start, stop), with a stack that views its part for each."""
    members: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for role, name, start, stop in wanted:
        members[role, start, stop].append(name)
    flats = []
    for (role, start, stop), names in members.items():
        rows = [torch.cat([a.state[name].reshape(-1).float() for name in names]) for a in adapters[start:stop]]
        value_GP, stacks, done = torch.stack(rows).to(device), [], 0
        for name in names:
            shape = adapters[start].state[name].shape
            view = value_GP[:, done : done + shape.numel()].view(stop - start, *shape)
            stacks.append(Stack(name, start, stop, nn.Parameter(view)))
            done += shape.numel()
        flats.append(Flat(role, value_GP, tuple(stacks)))
    return flats


def _initial(group: Sequence[Adapter], name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
    if group[0].kind != PISSA:
        return None
    A0_GrI, B0_GOr = (
        torch.stack([a.state[f"{name}.initial_{factor}.weight"] for a in group]).to(device, torch.float32)
        for factor in ("A", "B")
    )
    return A0_GrI, B0_GOr
