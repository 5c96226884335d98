"""Did it use its rank? The updates of a study's confirmed arms, layer by layer, as plain numbers for the report."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from sweep.adapters.kept import open_kept
from sweep.adapters.rank_pattern import as_pattern, keep_share, within_budget
from sweep.adapters.subspaces import OUTPUT, A, Comparison, compare, found, plan_comparisons, short, steps
from sweep.adapters.truncation import Truncated, score_truncated
from sweep.adapters.updates import a_rows, matrix_of, parts_of, truncated
from sweep.lora.lowrank import Parts, lost_share
from sweep.lora.methods import State, generator_for, matrix_shape
from sweep.lora.spectra import (
    amplification,
    dense_parts,
    effective_rank,
    kept_rank,
    projected_norm,
    random_rows,
    row_space,
)
from sweep.report.confirmed import confirm_trials
from sweep.report.statistics import confirmed_of_ranks
from sweep.study.arms import Arm
from sweep.study.errors import Damaged
from sweep.study.records import COMPLETE, TrialSpec
from sweep.study.schema import RankUse, Study
from sweep.tracking.journal import StudyRecord, TrialRecord
from sweep.training.base import Base, load_base, target_layers
from sweep.training.checkpoint import load_some_weights
from sweep.training.rung import located, tokenised


class RankUseError(RuntimeError):
    """Nothing can be said; one line that says why."""


@dataclass(frozen=True)
class Trained:
    """A confirm trial that kept its weights."""

    spec: TrialSpec
    folder: Path  # that holds them

    def read(self, names: Sequence[str]) -> State:
        return load_some_weights(self.folder, names)


@dataclass
class Walk:
    """What is gathered on the way over the layers."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    spectra: dict[str, list[Tensor]] = field(default_factory=dict)  # of the largest rank's arm: by layer, a seed each
    states: dict[tuple[int, int], State] = field(default_factory=lambda: defaultdict(dict))  # by (rank, seed)
    lost: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))  # share of ‖ΔW‖²


def measure_rank_use(study: Study, record: StudyRecord, cache: Path) -> dict[str, Any]:
    """Spectra, directions, amplification, truncation and suggested patterns of the confirmed arms.

    Ranks are compared by one arm each, the one that search chose. Raises RankUseError where no LoRA trial of the
    confirm phase kept its weights, or one's are damaged, FieldError where model or data can no longer be used.
    """
    with ExitStack() as stack:
        trained = {arm: _trained(confirm_trials(record, arm), stack) for arm in study.list_arms()}
        return _measure(study, record, trained, cache)


def _measure(study: Study, record: StudyRecord, trained: dict[Arm, list[Trained]], cache: Path) -> dict[str, Any]:
    if record.prepared is None:
        raise RankUseError(f"study {study.name} has no prepared model and data; run it first")
    trained = {arm: trials for arm, trials in trained.items() if trials and (arm.r or arm.is_full)}
    chosen = [a for a in confirmed_of_ranks(study, record).values() if a in trained and not a.prefix_length]
    if not chosen:
        raise RankUseError(f"study {study.name} has no complete confirm trial of LoRA whose weights are kept")
    setup = study.setup(str(cache))
    pad_token_id = tokenised(setup).pad_token_id
    base = load_base(located(setup), study.task, record.prepared.labels, pad_token_id, "float32", "eager")
    targets = {arm: target_layers(base.model, base.head, arm.target_modules) for arm in trained if not arm.is_full}
    adapted = {name for layers in targets.values() for name in layers}
    layers = {name: layer for name, layer in base.model.named_modules() if name in adapted}
    kinds, options = module_kinds(list(layers)), study.rank_use or RankUse()

    full = [t.spec.seed for arm, trials in trained.items() if arm.is_full for t in trials]
    seeds_of = [(arm, [t.spec.seed for t in trained[arm]]) for arm in chosen]
    comparisons = plan_comparisons(seeds_of, full)
    smaller = [arm.r for arm in chosen[:-1]]
    walk = Walk()
    for name, layer in layers.items():
        here = {arm: trials for arm, trials in trained.items() if arm.is_full or name in targets[arm]}
        _visit(walk, comparisons, name, kinds[name], layer, base, here, chosen[-1], smaller, options.keep)
    losses = _truncated_losses(study, record, base, trained[chosen[-1]], walk, str(cache))
    return {
        "keep": options.keep,
        "chosen": {str(arm.r): arm.name for arm in chosen},
        "layers": walk.rows,
        "similarity": [found(c) for c in comparisons if c.grids],
        "truncated": losses,
        "suggestions": _suggest(walk.spectra, layers, chosen, options),
    }


def module_kinds(names: Sequence[str]) -> dict[str, str]:
    """What a layer is, whichever block it stands in: its name behind the block's number, no longer than tells apart."""
    behind = {name: re.split(r"(?:^|\.)\d+\.", name)[-1] for name in names}
    kinds = set(behind.values())

    def shortest(kind: str) -> str:
        parts = kind.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        return next((e for e in endings if sum(k == e or k.endswith(f".{e}") for k in kinds) == 1), kind)

    return {name: shortest(kind) for name, kind in behind.items()}


def block_of(name: str) -> int | None:
    """The number of the block that a layer stands in; the last number of its name."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[-1]) if numbers else None


def _trained(trials: Sequence[TrialRecord], stack: ExitStack) -> list[Trained]:
    """Those that kept their weights, open as long as the stack is. Raises RankUseError where one's are damaged."""
    kept = [trial for trial in trials if trial.state == COMPLETE and trial.kept is not None]
    try:
        return [Trained(t.spec, stack.enter_context(open_kept(t))) for t in sorted(kept, key=lambda t: t.spec.seed)]
    except Damaged as error:
        raise RankUseError(str(error)) from None


def _visit(
    walk: Walk,
    comparisons: Sequence[Comparison],
    name: str,
    kind: str,
    layer: nn.Module,
    base: Base,
    trained: Mapping[Arm, Sequence[Trained]],
    largest: Arm,
    smaller: Sequence[int],
    keep: float,
) -> None:
    """One layer of every trial that adapts it."""
    own = next(n for n, p in base.model.named_parameters() if p is layer.get_parameter("weight"))
    W_OI = matrix_of(layer, layer.get_parameter("weight"))
    ranks = {arm: (largest if arm.is_full else arm).rank_at(name) for arm in trained}  # directions that are looked at
    most = max(ranks.values())
    base_parts = dense_parts(W_OI, most)
    parts: dict[tuple[str, int], Parts] = {}
    readers = {(arm.name, t.spec.seed): t for arm, trials in trained.items() for t in trials}
    for arm, trials in trained.items():
        for trial in trials:
            update = parts_of(name, layer, own, arm, trial.read, most)
            parts[arm.name, trial.spec.seed] = update
            where = {"arm": arm.name, "seed": trial.spec.seed, "layer": name, "kind": kind, "block": block_of(name)}
            k = min(ranks[arm], len(update[2]))
            walk.rows.append({**where, **_layer_numbers(update, W_OI, base_parts, k, keep, name, trial.spec.seed)})
    if largest in trained:
        walk.spectra[name] = [parts[largest.name, t.spec.seed][1] for t in trained[largest]]
        for trial in trained[largest]:
            for k in (*smaller, largest.r):
                state = truncated(name, layer, parts[largest.name, trial.spec.seed], k)
                walk.states[k, trial.spec.seed].update(state)
                walk.lost[k, trial.spec.seed].append(lost_share(parts[largest.name, trial.spec.seed][1], k))

    def directions(of: str, arm: Arm, seed: int) -> Tensor | None:
        if of == A:
            return row_space(a_rows(name, layer, readers[arm.name, seed].read))
        U, S, Vh = parts[arm.name, seed]
        rows = U.T if of == OUTPUT else Vh
        return rows[: ranks[arm]] if S.any() else None

    for comparison in comparisons:
        if comparison.one in trained and comparison.other in trained:
            compare(comparison, name, kind, directions, most)


def _layer_numbers(
    update: Parts, W_OI: Tensor, base_parts: Parts, k: int, keep: float, name: str, seed: int
) -> dict[str, Any]:
    """Spectrum and amplification of one update; k: how many of its directions are held against W₀."""
    U, S, Vh = update
    generator = generator_for(seed, f"{name}/random")
    random = random_rows(k, len(W_OI), generator).T, random_rows(k, W_OI.shape[1], generator)
    amplified = amplification(update, W_OI, k)
    return {
        "shape": list(W_OI.shape),
        "singular_values": [short(float(S[i - 1])) for i in steps(len(S))],
        "steps": steps(len(S)),
        "norm": short(float(S.norm())),
        "effective_rank": short(effective_rank(S)),
        "kept_rank": kept_rank(S, keep),
        "directions": k,
        "in_update": short(projected_norm(W_OI, U[:, :k], Vh[:k])),
        "in_base": short(float(base_parts[1][:k].norm())),
        "in_random": short(projected_norm(W_OI, *random)),
        "base_norm": short(float(base_parts[1].norm())),
        "amplification": None if amplified is None else short(amplified),
    }


def _truncated_losses(
    study: Study, record: StudyRecord, base: Base, trained: Sequence[Trained], walk: Walk, cache: str
) -> list[dict[str, Any]]:
    """The test scores of the largest rank's adapters at every rank, their own too: there it is what they scored."""
    assert record.prepared is not None
    heads = {name: base.model.get_submodule(name) for name in base.head}
    names = [f"{name}.{p}" for name, head in heads.items() for p, _ in head.named_parameters()]
    by_seed = {t.spec.seed: t for t in trained}
    adapters = [
        Truncated(by_seed[seed].spec, k, {**state, **by_seed[seed].read(names)})
        for (k, seed), state in sorted(walk.states.items())
    ]
    scores = score_truncated(study.setup(cache), record.prepared, adapters)
    return [
        {
            "rank": a.rank,
            "seed": a.trial.seed,
            "lost": short(float(np.mean(walk.lost[a.rank, a.trial.seed]))),
            **{f"test_{metric}": value for metric, value in scored.items()},
        }
        for a, scored in zip(adapters, scores, strict=True)
    ]


def _suggest(
    spectra: Mapping[str, Sequence[Tensor]], layers: Mapping[str, nn.Module], chosen: Sequence[Arm], options: RankUse
) -> list[dict[str, Any]]:
    """Rank patterns by two rules from the spectra of the largest rank's adapters, with the parameters they take."""
    largest = max(chosen[-1].rank_at(name) for name in spectra)
    costs = {name: sum(matrix_shape(layers[name])) for name in spectra}
    rank = options.budget or (chosen[-2].r if len(chosen) > 1 else largest)
    ruled = [
        ({"rule": "keep", "share": options.keep}, keep_share(spectra, options.keep, largest)),
        ({"rule": "budget", "of_rank": rank}, within_budget(spectra, costs, rank * sum(costs.values()), largest)),
    ]
    suggestions = []
    for rule, ranks in ruled:
        common, pattern = as_pattern(ranks)
        parameters = sum(costs[name] * r for name, r in ranks.items())
        parameters_of_rank = {str(arm.r): arm.r * sum(costs.values()) for arm in chosen}
        suggestions.append(
            {
                **rule,
                "rank": common,
                "rank_pattern": pattern,
                "alpha_ratio": chosen[-1].alpha_ratio,
                "parameters": parameters,
                "parameters_of_rank": parameters_of_rank,
            }
        )
    return suggestions
