"""Adapters of several domains on one base: the loss of each on the text of all, alone and mixed.

Shapes: K adapters at once on the base.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sweep.adapters.kept import read_kept
from sweep.lora.adapter import Adapter, install, pack_order, remove
from sweep.lora.lowrank import weighted_sum
from sweep.lora.methods import State
from sweep.report.confirmed import confirm_trials
from sweep.study.errors import FieldError
from sweep.study.records import COMPLETE, Prepared, TrialSpec
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord
from sweep.training.base import Base, load_base
from sweep.training.batches import collate
from sweep.training.data import TokenisedData, load_data
from sweep.training.locate import ModelPlace, load_tokenizer, locate_model
from sweep.training.tasks import CAUSAL_LM, evaluation_passes, summarise
from sweep.training.tokens import Split

MIXED = "mixed"
CHECKED_ROWS = 8  # of each domain, on which the base's logits are compared bit for bit


@dataclass(frozen=True)
class Measured:
    """One adapter to be measured: a confirm trial's, or a mixture of several of one rank and seed."""

    domain: str  # MIXED for a mixture
    rank: int
    seed: int
    adapter: Adapter
    arm: str
    learning_rate: float | None  # None for a mixture


def compare_domains(
    studies: Mapping[str, Study], records: Mapping[str, StudyRecord], cache: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Test losses (nats a token) on every domain: of the base, of each confirmed adapter, and of mixtures.

    A mixture holds the adapters of all domains but the first at one rank and seed, with equal weights, exactly: their
    ranks are concatenated. All are measured on one base, in the first domain's precision.
    Raises FieldError where data or model are not those that the domains were trained with.
    """
    first = next(iter(studies.values()))
    prepared = _same_base(studies, records)
    place = locate_model(first.model, first.trust_remote_code)
    data = {domain: load_data(study.setup(str(cache)), place) for domain, study in studies.items()}
    _refuse_other_data(studies, records, data)
    pad_token_id = next(iter(data.values())).pad_token_id
    shared = (prepared.labels, pad_token_id, prepared.precision, prepared.attention, first.quantization)
    settings = (place, first.task, *shared)
    base = load_base(*settings)
    texts = {domain: found.test for domain, found in data.items() if isinstance(found.test, Split)}
    before = _losses(base, (), texts, pad_token_id)[0]
    adapters = [m for domain, record in records.items() for m in _confirmed(domain, record)]
    if not adapters:
        raise RuntimeError(f"no confirm trial of {first.name} or the other domains completed: nothing to compare")
    adapters += _mixtures(adapters, list(studies)[1:])
    packs = _packs(adapters, prepared.pack_size)
    rows: list[dict[str, Any]] = []
    for i, pack in enumerate(packs, 1):
        say(f"measuring adapters on {len(texts)} domains: pack {i} of {len(packs)}")
        found = _losses(base, [m.adapter for m in pack], texts, pad_token_id)
        rows += [_row(m, losses) for m, losses in zip(pack, found, strict=True)]
    order = [*studies, MIXED]
    return {
        "domains": list(studies),
        "precision": prepared.precision,
        "device": prepared.device,
        "text": {domain: _describe(split, place) for domain, split in texts.items()},
        "base": before,
        "off_equals_base": before == _losses(base, (), texts, pad_token_id)[0]
        and _same_logits(base, load_base.__wrapped__(*settings), texts, pad_token_id),
        "checked_rows": {domain: min(CHECKED_ROWS, len(split)) for domain, split in texts.items()},
        "losses": sorted(rows, key=lambda row: (order.index(row["adapter"]), row["rank"], row["seed"])),
    }


def _same_base(studies: Mapping[str, Study], records: Mapping[str, StudyRecord]) -> Prepared:
    """What the first domain was prepared with; the others must have had the same model."""
    prepared = {domain: record.prepared for domain, record in records.items()}
    first = prepared[next(iter(studies))]
    assert first is not None  # the parts are finished
    for domain, other in prepared.items():
        if other is None or other.model_fingerprint != first.model_fingerprint:
            raise FieldError(("model", f"has changed before {studies[domain].name} ran: its adapters sit on another"))
    return first


def _refuse_other_data(
    studies: Mapping[str, Study], records: Mapping[str, StudyRecord], data: Mapping[str, TokenisedData]
) -> None:
    for domain, found in data.items():
        prepared = records[domain].prepared
        if prepared is None or prepared.data_fingerprint != found.fingerprint:
            raise FieldError(
                ("data.source", f"{studies[domain].data.source} has changed since {studies[domain].name} ran")
            )


def _confirmed(domain: str, record: StudyRecord) -> list[Measured]:
    """The domain's confirm trials that completed, full fine-tuning left out: it has no adapter."""
    found = []
    arms = {trial.spec.arm.name: trial.spec.arm for trial in record.trials if not trial.spec.arm.is_full}
    for trial in (trial for arm in arms.values() for trial in confirm_trials(record, arm)):
        spec = trial.spec
        if trial.state == COMPLETE and trial.kept is not None:
            state = read_kept(trial)
            found.append(
                Measured(domain, spec.arm.r, spec.seed, _adapter(spec, state), spec.arm.name, spec.learning_rate)
            )
    return found


def _adapter(spec: TrialSpec, state: State) -> Adapter:
    modules = tuple(sorted({name.partition(".lora_")[0] for name in state if ".lora_" in name}))
    return Adapter(spec.arm.r, spec.arm.scaling, modules, state, method=spec.arm.method)


def _mixtures(adapters: Sequence[Measured], domains: Sequence[str]) -> list[Measured]:
    """One for each rank and seed at which every one of the domains has an adapter; none of a single domain."""
    if len(domains) < 2:
        return []
    members: dict[tuple[int, int], list[Measured]] = defaultdict(list)
    for m in adapters:
        if m.domain in domains:
            members[m.rank, m.seed].append(m)
    return [
        Measured(MIXED, rank, seed, mix([m.adapter for m in group], [1 / len(group)] * len(group)), "", None)
        for (rank, seed), group in sorted(members.items())
        if len(group) == len(domains)
    ]


def mix(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ weight · update as one adapter of scaling 1: the ranks of all are concatenated. All adapt the same modules."""
    state: State = {}
    for name in (name for name in adapters[0].state if ".lora_A." in name or name.endswith(".lora_embedding_A")):
        of_B = name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        parts = [(a.state[name], a.state[of_B], w * a.scaling) for a, w in zip(adapters, weights, strict=True)]
        state[name], state[of_B] = weighted_sum(parts)
    return Adapter(sum(adapter.r for adapter in adapters), 1.0, adapters[0].modules, state)


def _packs(adapters: Sequence[Measured], size: int) -> list[list[Measured]]:
    """Adapters of one rank stand together, so that none is padded to another's."""
    order = pack_order([m.adapter for m in adapters])
    return [[adapters[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def _losses(
    base: Base, adapters: Sequence[Adapter], texts: Mapping[str, Split], pad_token_id: int
) -> list[dict[str, float]]:
    """The mean loss of each adapter on each text, in nats a token; of the base itself without adapters."""
    pack = install(base.model, adapters, base.head) if adapters else None
    try:
        told = pack.forward_pass if pack else None
        found: list[dict[str, float]] = [{} for _ in range(max(1, len(adapters)))]
        for domain, split in texts.items():
            passes = evaluation_passes(base.model, split, CAUSAL_LM, len(found), pad_token_id, base.plain_head, told)
            for losses, score in zip(found, summarise(passes, CAUSAL_LM), strict=True):
                losses[domain] = score["loss"]
        return found
    finally:
        if pack is not None:
            remove(base.model, pack)


def _row(m: Measured, losses: dict[str, float]) -> dict[str, Any]:
    return {
        "adapter": m.domain,
        "rank": m.rank,
        "seed": m.seed,
        "arm": m.arm,
        "learning_rate": m.learning_rate,
        "loss": {domain: loss if math.isfinite(loss) else None for domain, loss in losses.items()},
    }


@torch.no_grad()
def _same_logits(base: Base, fresh: Base, texts: Mapping[str, Split], pad_token_id: int) -> bool:
    """Whether the base that adapters sat on gives the logits of one that was just loaded, bit for bit."""
    for split in texts.values():
        batch = collate(split, range(min(CHECKED_ROWS, len(split))), pad_token_id)
        logits = []
        for model in (base.model, fresh.model):
            device = next(model.parameters()).device
            ids, mask = (torch.from_numpy(x).to(device) for x in (batch.input_ids_RT, batch.attention_mask_RT))
            logits.append(model(input_ids=ids, attention_mask=mask).logits)
        if not torch.equal(*logits):
            return False
    return True


def _describe(split: Split, place: ModelPlace) -> dict[str, int]:
    """Rows, target tokens, and the bytes (UTF-8) and characters that these spell; an end of text spells none."""
    tokenizer = load_tokenizer(place)
    count, characters = 0, 0
    for start, stop in zip(split.offsets, split.offsets[1:], strict=False):
        targets = split.input_ids[start:stop][split.labels[start:stop] == 1]
        text = tokenizer.decode(targets.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        count, characters = count + len(text.encode()), characters + len(text)
    return {"rows": len(split), "tokens": int(split.labels.sum()), "bytes": count, "characters": characters}
