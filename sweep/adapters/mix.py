"""Weighted sums of adapters, exact or of a smaller rank, and what the smaller rank loses.

ΔW = Σ weight_i · scaling_i · B_i A_i is again low-rank: with A's and B's concatenated it is exact, of rank Σ r_i. Its
leading singular parts are the nearest update of a smaller rank (Eckart and Young 1936), module by module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweep.adapters.folders import save_adapter
from sweep.adapters.peft_format import PeftAdapter, same_base
from sweep.lora.lowrank import factors, lost_share, update_parts, weighted_sum
from sweep.lora.methods import DORA, State
from sweep.study.errors import FieldError


@dataclass(frozen=True)
class Part:
    name: str  # as messages call it
    adapter: PeftAdapter
    weight: float


@dataclass(frozen=True)
class Mixed:
    adapter: PeftAdapter
    spectra: dict[str, Tensor] = field(default_factory=dict)  # singular values of ΔW by module, where a rank was wanted
    notes: tuple[str, ...] = ()

    def lost(self, module: str, rank: int) -> float:
        """The share of the module's ‖ΔW‖² that `rank` loses."""
        return lost_share(self.spectra[module], rank)

    def lost_in_all(self, rank: int) -> float:
        """The share of ‖ΔW‖², summed over the modules, that `rank` loses."""
        whole = sum(float(S_r.square().sum()) for S_r in self.spectra.values())
        lost = sum(float(S_r[rank:].square().sum()) for S_r in self.spectra.values())
        return lost / whole if whole else 0.0


def mix(parts: Sequence[Part], rank: int | None = None) -> Mixed:
    """The weighted sum of adapters over the union of their modules; heads are averaged.

    rank: the largest rank of a module in the result; None: exact. Raises FieldError for DoRA, for different bases, and
    for heads that do not go together.
    """
    _check(parts)
    state: State = {}
    ranks: dict[str, int] = {}
    spectra: dict[str, Tensor] = {}
    for module in dict.fromkeys(module for part in parts for module in part.adapter.ranks):
        having = [part.adapter for part in parts if module in part.adapter.ranks]
        A_name, B_name = having[0].names(module)
        shape_A, shape_B = having[0].state[A_name].shape, having[0].state[B_name].shape
        updates = [
            (
                part.adapter.state[A_name].flatten(1),
                part.adapter.state[B_name].flatten(1),
                part.weight * part.adapter.scaling(module),
            )
            for part in parts
            if module in part.adapter.ranks
        ]
        if any(A.shape[1] != updates[0][0].shape[1] or len(B) != len(updates[0][1]) for A, B, _ in updates):
            raise FieldError((module, "has other shapes in the other adapters: they are for different bases"))
        A, B = weighted_sum(updates)
        if rank is not None:
            U, S, Vh = update_parts(A, B, 1.0)
            spectra[module] = S
            if rank < len(A):
                A, B = factors((U, S, Vh), rank, 1.0)
        ranks[module] = len(A)
        state[A_name], state[B_name] = A.view(len(A), *shape_A[1:]), B.view(shape_B[0], len(A), *shape_B[2:])
    heads, notes = _average_heads(parts)
    labels: tuple[str, ...] = next((part.adapter.labels for part in parts if part.adapter.labels), ())
    known = [part.adapter for part in parts if part.adapter.model_fingerprint]
    first = parts[0].adapter
    mixed = PeftAdapter(
        method="lora",
        ranks=ranks,
        alphas={module: float(r) for module, r in ranks.items()},  # scaling 1: weights and scalings are in B
        state={**state, **heads},
        fan_in_fan_out=any(part.adapter.fan_in_fan_out for part in parts),
        saved=tuple(dict.fromkeys(layer for part in parts for layer in part.adapter.saved)),
        modules_to_save=tuple(dict.fromkeys(name for part in parts for name in part.adapter.modules_to_save)),
        task_type=first.task_type,
        base_model=first.base_model,
        labels=labels,
        task=next((part.adapter.task for part in parts if part.adapter.task), None),
        model_fingerprint=known[0].model_fingerprint if known else None,
        own_base=next((part.adapter.own_base for part in parts if part.adapter.own_base), None),
        embeddings={name: t for part in parts for name, t in part.adapter.embeddings.items()},
    )
    return Mixed(mixed, spectra, notes)


def write_mixed(mixed: Mixed, to: Path, made_by: dict[str, Any]) -> None:
    """Write it in PEFT's format. made_by: what `sweep.json` tells of it. Raises FieldError as `save_adapter` does."""
    save_adapter(mixed.adapter, to, list(mixed.adapter.ranks), made_by)


def _check(parts: Sequence[Part]) -> None:
    for part in parts:
        if part.adapter.method == DORA:
            why = "its magnitudes rescale every row of the base's weights, so its change to them is no low-rank update"
            raise FieldError((part.name, f"is DoRA: {why}; merge it into a model instead"))
    first, *others = parts
    for other in others:
        if not same_base(first.adapter, other.adapter):
            said = ", ".join(f"{part.name} {_called(part.adapter)}" for part in (first, other))
            raise FieldError(("ADAPTER", f"adapters of different bases do not mix: {said}"))
    for of in ("task_type", "task"):
        values = {getattr(part.adapter, of): part.name for part in parts}
        values = values if of == "task_type" else {task: name for task, name in values.items() if task}
        if len(values) > 1:
            said = ", ".join(f"{name} {value}" for value, name in values.items())
            raise FieldError(("ADAPTER", f"adapters of different tasks do not mix: {said}"))
    adapted = {module: part.name for part in parts for module in part.adapter.ranks}
    for part in parts:
        for layer in part.adapter.saved:
            if layer in adapted:
                raise FieldError((part.name, f"replaces {layer}, which {adapted[layer]} adapts: they do not mix"))


def _called(adapter: PeftAdapter) -> str:
    """The base, with its fingerprint: two bases may have one name."""
    mark = f" ({adapter.model_fingerprint})" if adapter.model_fingerprint else ""
    return f"{adapter.base_model or 'an unnamed base'}{mark}"


def _average_heads(parts: Sequence[Part]) -> tuple[State, tuple[str, ...]]:
    """Layers that stand in place of the base's, averaged by the weights over the adapters that bring them."""
    having = [part for part in parts if part.adapter.saved]
    if len(having) < 2:
        return {n: t for part in having for n, t in _head(part.adapter).items()}, _alone(having, parts)
    labels = {part.adapter.labels for part in having if part.adapter.labels}
    if len(labels) > 1:
        said = " and ".join(", ".join(names) for names in labels)
        raise FieldError(("ADAPTER", f"their heads tell different classes apart, so no average is right: {said}"))
    first, *others = having
    shapes = {name: tensor.shape for name, tensor in _head(first.adapter).items()}
    for other in others:
        if {name: tensor.shape for name, tensor in _head(other.adapter).items()} != shapes:
            raise FieldError((other.name, f"its head has other layers or shapes than that of {first.name}"))
    whole = sum(part.weight for part in having)
    if whole == 0:
        raise FieldError(("ADAPTER", "the weights of the adapters with heads sum to 0, so the heads have no average"))
    heads = {
        name: torch.stack([part.weight / whole * part.adapter.state[name] for part in having]).sum(0) for name in shapes
    }
    known = "same classes" if labels else "same shapes; their folders do not tell the classes"
    shares = ", ".join(f"{part.name} {part.weight / whole:.3g}" for part in having)
    note = f"heads ({', '.join(first.adapter.saved)}) are averaged, which is no sum of updates: {shares} ({known})"
    return heads, (note,)


def _alone(having: Sequence[Part], parts: Sequence[Part]) -> tuple[str, ...]:
    if not having or len(parts) == 1:
        return ()
    return (f"the head ({', '.join(having[0].adapter.saved)}) is that of {having[0].name}: no other brings one",)


def _head(adapter: PeftAdapter) -> State:
    return {name: tensor for name, tensor in adapter.state.items() if name.rpartition(".")[0] in adapter.saved}
