"""One frozen base, many adapters: load them once, switch without reloading, serve rows of different adapters at once.

Shapes: R rows, K slots of g rows each (R = K·g), T tokens, C classes, V vocabulary.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sweep.adapters.export import endings
from sweep.adapters.folders import save_adapter
from sweep.adapters.peft_format import PeftAdapter, read_adapter
from sweep.lora.adapter import Adapter, Pack, adaptable_modules, install, linear_modules, remove
from sweep.lora.methods import matrix_shape, refusal
from sweep.lora.trunk import block_list
from sweep.study.errors import FieldError
from sweep.training.base import Base, load_base
from sweep.training.locate import load_tokenizer, locate_model
from sweep.training.tasks import IMAGES

Slots = tuple[str | None, ...]  # the adapter of each slot; None: the base


def plan_slots(rows: Sequence[str | None], order: Sequence[str | None]) -> tuple[Slots, list[int]]:
    """How rows of several adapters become one pack's batch: its slots, and the order in which it takes the rows.

    order: of the adapters in the pack. With g the greatest common divisor of the adapters' counts every slot has g
    rows, and an adapter has as many slots as its rows fill: nothing is computed twice and no row is padding. The same
    mix of adapters has the same slots, however its rows stand and however many they are.
    """
    counts = Counter(rows)
    g = math.gcd(*counts.values())
    slots = tuple(name for name in order for _ in range(counts[name] // g))
    return slots, sorted(range(len(rows)), key=lambda i: order.index(rows[i]))


@dataclass
class ServingBase:
    """A base and the adapters that were added to it. Its own tensors are never written to."""

    base: Base
    adapters: dict[str, PeftAdapter] = field(default_factory=dict)
    active: str | None = None
    _installed: tuple[Slots, Pack] | None = None
    _alone: set[str] = field(default_factory=set)  # adapters whose saved modules share no pass with other rows

    def add(self, name: str, folder: Path) -> PeftAdapter:
        """Read an adapter under a name; it takes the place of an earlier one. Raises FieldError where it does not fit
        this base."""
        self._take_down()
        adapter = read_adapter(folder)
        check_fit(adapter, self.base.model, folder)
        self.adapters[name] = adapter
        self._alone.discard(name)
        if not saved_in_packs(adapter, self.base.model):
            self._alone.add(name)
        return adapter

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self._known(name)
        self._take_down()
        del self.adapters[name]
        self._alone.discard(name)
        self.active = None if self.active == name else self.active

    def use(self, name: str | None) -> None:
        """Which adapter answers where rows name none; None: the base alone, with every layer its own again."""
        self._known(name)
        self.active = name
        self._stand((name,))

    def logits(self, inputs: Mapping[str, Tensor], rows: Sequence[str | None] | None = None) -> Tensor:
        """Each row by its adapter. rows: the adapter of each (None: the base); left out, the one in use answers all.

        inputs: what the model's forward takes, rows first. Returns (R, C) or (R, T, V), rows in the order given. All
        rows share one pass, but those of an adapter that `saved_in_packs` denies, which has one of its own. What stands
        on the base stays as long as the plan of slots does: several passes put up their own each time.
        """
        count = len(next(iter(inputs.values())))
        if count == 0:
            raise FieldError(("inputs", "there are no rows; give at least one"))
        names = [self.active] * count if rows is None else list(rows)
        if len(names) != count:
            raise FieldError(("rows", f"{len(names)} adapters for {count} rows; name one for each"))
        for name in names:
            self._known(name)
        passes: dict[str | None, list[int]] = {}
        for i, name in enumerate(names):
            passes.setdefault(name if name in self._alone else None, []).append(i)
        device = next(self.base.model.parameters()).device
        model: Any = self.base.model
        found: list[Tensor] = []
        taken: list[int] = []
        for part in passes.values():
            slots, order = plan_slots([names[i] for i in part], self._order())
            pack = self._stand(slots)
            if pack is not None:
                pack.forward_pass.rows = len(part)
            places = [part[i] for i in order]
            with torch.no_grad():
                found.append(model(**{key: value[places].to(device) for key, value in inputs.items()}).logits)
            taken += places
        return torch.cat(found)[torch.tensor(taken, device=device).argsort()]

    def save(self, name: str, folder: Path) -> None:
        """Write an adapter in PEFT's format. Raises FieldError as `save_adapter` does."""
        self._known(name)
        adapter = self.adapters[name]
        self._take_down()  # names of layers are asked of the base as it is
        save_adapter(adapter, folder, endings(self.base, tuple(adapter.ranks)), {"saved": name})

    def close(self) -> None:
        """Give the base its own layers back, bit for bit."""
        self._take_down()

    def _order(self) -> list[str | None]:
        """The base, then the adapters, those of one shape side by side: they share buckets."""
        shape = {name: (adapter.method, tuple(adapter.ranks.items())) for name, adapter in self.adapters.items()}
        return [None, *sorted(shape, key=lambda name: (shape[name], name))]

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            near = difflib.get_close_matches(name, self.adapters, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            there = ", ".join(self.adapters) or "none"
            raise FieldError(("rows", f"there is no adapter {name!r}{hint} (added: {there})"))

    def _stand(self, slots: Slots) -> Pack | None:
        """The pack of these slots, put on the base where it does not stand there yet; None for the base alone."""
        if self._installed is not None and self._installed[0] == slots:
            return self._installed[1]
        self._take_down()
        if set(slots) == {None}:
            return None
        self._installed = slots, install_slots(self.base.model, slots, self.adapters)
        return self._installed[1]

    def _take_down(self) -> None:
        if self._installed is not None:
            remove(self.base.model, self._installed[1])
            self._installed = None


def load_serving_base(
    model: str,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    precision: str = "float32",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> ServingBase:
    """Load a base as a study does: a hub id, a path, or package:NAME/PATH. Raises FieldError.

    labels: of a classifier, whose fresh head has one output each. trust_remote_code: whether code that the base brings
    may run.
    """
    place = locate_model(model, trust_remote_code)
    pad_token_id = 0 if task == IMAGES else load_tokenizer(place).pad_token_id
    # Not the cached one: two sets of adapters may stand on bases of the same name.
    return ServingBase(load_base.__wrapped__(place, task, tuple(labels), pad_token_id, precision, attention))


def check_fit(adapter: PeftAdapter, model: nn.Module, source: Path) -> None:
    """Raises FieldError where the adapter is for other modules or shapes than the model has."""
    layers = adaptable_modules(model)
    problems = []
    for module, r in adapter.ranks.items():
        layer = layers.get(module)
        if layer is None:
            near = difflib.get_close_matches(module, layers, n=1)
            hint = f"; the nearest name is {near[0]}" if near else ""
            problems.append(f"the base has no layer {module} that can be adapted{hint}")
            continue
        O, I = matrix_shape(layer)  # noqa: E741
        A, B = (adapter.state[name] for name in adapter.names(module))
        reason = refusal(layer, adapter.method)
        if isinstance(layer, nn.Embedding) != ("lora_embedding_A" in adapter.names(module)[0]):
            problems.append(f"{module} is {type(layer).__name__} in the base, and something else in the adapter")
        elif (A[0].numel(), B.numel()) != (I, O * r):
            problems.append(f"{module} is {O}×{I} in the base and {B.numel() // r}×{A[0].numel()} in the adapter")
        elif reason is not None:
            problems.append(f"{module}: {reason}")
    problems += _misfits_of_saved(adapter, model)
    for module, weight in adapter.embeddings.items():
        if module not in layers or not torch.equal(layers[module].get_parameter("weight").cpu().to(weight), weight):
            problems.append(f"{module}: the adapter comes with another embedding than the base's")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise FieldError((str(source), f"does not fit the base: {problems[0]}{more}"))


def _misfits_of_saved(adapter: PeftAdapter, model: nn.Module) -> list[str]:
    """What keeps the modules that the adapter saved from the places of the base's own."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    tensors = model.state_dict(keep_vars=True)
    problems = [f"modules_to_save: the base has no module {layer}" for layer in adapter.saved if layer not in modules]
    for name, tensor in adapter.state.items():
        layer, _, last = name.rpartition(".")
        if layer not in adapter.saved or layer not in modules:
            continue
        if name not in tensors:
            problems.append(f"modules_to_save: {layer} has no {last} in the base")
        elif tensors[name].shape != tensor.shape:
            ours, theirs = tuple(tensors[name].shape), tuple(tensor.shape)
            what = layer if last == "weight" else name
            problems.append(f"{what} is {ours} in the base and {theirs} in the adapter: has it other labels or tokens?")
    return problems


def saved_in_packs(adapter: PeftAdapter, model: nn.Module) -> bool:
    """Whether packed layers hold all that the adapter saved, so that its rows share a pass with those of others.

    They hold linear layers outside the blocks: they answer in float32, which a block of another precision cannot take.
    """
    linear, blocks = linear_modules(model), block_list(model)
    within = tuple(layer for layer in adapter.saved if blocks is not None and layer.startswith(f"{blocks}."))
    return not within and linear.keys() >= set(adapter.saved)


def saved_copies(adapter: PeftAdapter, model: nn.Module) -> dict[str, nn.Module]:
    """Copies of the base's modules with the adapter's tensors, as PEFT makes them: a weight that the base ties to
    another is tied no more."""
    outermost = [a for a in adapter.saved if not any(a.startswith(f"{b}.") for b in adapter.saved)]
    copies = {layer: copy.deepcopy(model.get_submodule(layer)) for layer in outermost}
    for layer, module in copies.items():
        inside = {n.removeprefix(f"{layer}."): t for n, t in adapter.state.items() if n.startswith(f"{layer}.")}
        module.load_state_dict(inside, strict=False)  # what the adapter did not save stays the base's
    return copies


def install_slots(model: nn.Module, slots: Slots, adapters: Mapping[str, PeftAdapter]) -> Pack:
    """Put an adapter on the model for each slot; a layer that only some adapters bring is the base's in the others.

    An adapter that `saved_in_packs` denies stands alone: copies of the modules that it saved take the base's places.
    """
    used = {name: adapters[name] for name in slots if name is not None}
    saved = list(dict.fromkeys(layer for adapter in used.values() for layer in adapter.saved))
    for name, adapter in used.items():
        both = [module for module in adapter.ranks if any(f"{module}.".startswith(f"{layer}.") for layer in saved)]
        if both:
            raise FieldError(("rows", f"{name} adapts {both[0]}, which another one replaces: use them in turns"))
    alone = next((adapter for adapter in used.values() if not saved_in_packs(adapter, model)), None)
    copies = {} if alone is None else saved_copies(alone, model)
    head = saved if alone is None else []
    linear = linear_modules(model)
    own = {f"{layer}.{n}": p.detach().float().cpu() for layer in head for n, p in linear[layer].named_parameters()}
    ready = {
        name: Adapter(
            0,
            0.0,
            tuple(adapter.ranks),
            {**own, **adapter.state},
            method=adapter.method,
            ranks=adapter.ranks,
            scalings={module: adapter.scaling(module) for module in adapter.ranks},
        )
        for name, adapter in used.items()
    }
    base = Adapter(0, 0.0, (), own)
    pack = install(model, [base if name is None else ready[name] for name in slots], head)
    for layer, module in copies.items():
        pack.replaced.append((layer, model.get_submodule(layer)))
        model.set_submodule(layer, module)
    return pack
