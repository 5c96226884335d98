"""What differs between studies, and what may be compared for it: plain rules, by the keys of the study file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sweep.report.words import NOTHING, join, without_paths
from sweep.study.file import dotted
from sweep.study.records import Prepared
from sweep.study.schema import Study

Ran = tuple[Study, Prepared | None]  # what was asked, and what was found out about model, data and machine

MODEL, DATA, SEARCH, CALIBRATED = "the model", "the data", "the search", "the precision or the attention"
MACHINE, LIBRARIES = "the machine", "the libraries"
JUDGING, SEEDS, BESIDE = "which arms are judged, and how", "the seeds", "no result of an arm"
NO_CAUSE = (JUDGING, SEEDS, BESIDE)  # change no loss but by chance
CAUSES_OF_COST = (MACHINE, LIBRARIES)
_PLACES = {  # by key, or by what stands before its first dot; a key that is not here is a place of its own
    "model": MODEL,
    "pretrain": MODEL,
    "model fingerprint": MODEL,
    "task": DATA,
    "data": DATA,
    "data.max_length": "data.max_length",
    "data fingerprint": DATA,
    "tune": SEARCH,
    "search": SEARCH,
    "train.precision": CALIBRATED,
    "arms.rank": JUDGING,
    "arms.alpha_ratio": JUDGING,
    "arms.full_finetuning": JUDGING,
    "confirm.seeds": SEEDS,
    "confirm": JUDGING,
    "rank_use": BESIDE,
    "latency": BESIDE,
    "forgetting": BESIDE,
    "published": BESIDE,
    "device": MACHINE,
    "precision": CALIBRATED,
    "attention": CALIBRATED,
    "pack size": BESIDE,
}
_NO_QUESTION = {"name", "question", "storage"}  # a storage's URL may hold a password
# What names the data or the model: where fingerprints say they are the same, another path makes no difference.
_BY_FINGERPRINT = {MODEL: "model fingerprint", DATA: "data fingerprint"}
_NOT_IN_FINGERPRINT = ("task", "data.max_evaluation_rows")


@dataclass(frozen=True)
class Difference:
    key: str  # dotted, as in the study file; or a fact of the machine, the model or the data
    values: tuple[str, ...]  # one a study
    place: str  # what it is a part of


@dataclass(frozen=True)
class Comparable:
    """What the differences between studies leave to be compared. A reason is empty where it may be."""

    causes: tuple[str, ...]  # places that differ and may change an arm's losses or costs
    cause: str  # a sentence: to what a difference between the studies may be put down
    losses: str  # why test losses may not be set side by side
    costs: str  # why memory and time themselves may not, but only shares of full fine-tuning's in the same study


def differences(ran: Sequence[Ran]) -> tuple[Difference, ...]:
    """Keys of the study files and facts of what was prepared in which not all studies have the same value.

    The facts of a study that has prepared nothing yet are unknown, and so no difference.
    """
    told = [{**_asked(study), **_facts(prepared)} for study, prepared in ran]
    asked = {key for study, _ in ran for key in _asked(study)}
    found = {}
    for key in dict.fromkeys(key for one in told for key in one):
        values = [one.get(key) for one in told]
        known = [v for v, (_, prepared) in zip(values, ran, strict=True) if key in asked or prepared is not None]
        if any(value != known[0] for value in known[1:]):
            found[key] = values
    return tuple(Difference(key, tuple(map(_shown, values)), _place(key, found, told)) for key, values in found.items())


def same_sections(ran: Sequence[Ran]) -> list[str]:
    """The keys and sections of the study file in which nothing differs and something is set."""
    asked = [_asked(study) for study, _ in ran]
    differ = {key.split(".")[0] for one in asked for key in one if any(o.get(key) != one[key] for o in asked)}
    return [head for head in dict.fromkeys(key.split(".")[0] for key in asked[0]) if head not in differ]


def may_be_compared(ran: Sequence[Ran]) -> Comparable:
    """The rules.

    - Of places that may change an arm's losses or costs: where one differs, what differs in the results may be put
      down to it; where several do, to none of them alone; where none does, it is chance.
    - Losses may be set side by side where they are the same kind of loss on the same rows (`loss_reason`).
    - Memory and time themselves may be compared on one machine with one set of libraries; or across machines where
      nothing else differs. Elsewhere only shares of full fine-tuning's cost within each study may.
    """
    places = tuple(dict.fromkeys(d.place for d in differences(ran)))
    causes = tuple(place for place in places if place not in NO_CAUSE)
    losses = next((why for a, b in combinations(ran, 2) if (why := loss_reason(a, b))), "")
    unknown = [study.name for study, prepared in ran if prepared is None]
    moved = [place for place in causes if place in CAUSES_OF_COST]
    costs = ""
    if unknown:
        costs = f"the machine of {join(unknown)} is not known yet"
    elif moved and len(causes) > 1:
        costs = f"{join(moved)} and more than that differ"
    return Comparable(causes, _cause(causes, places), losses, costs)


def loss_reason(a: Ran, b: Ran) -> str:
    """Why test losses of two studies are not of the same kind on the same rows; empty where they are."""
    (one, prepared_one), (other, prepared_other) = a, b
    if one.task != other.task:
        return f"their tasks differ, {one.task} and {other.task}"
    if prepared_one is None or prepared_other is None:
        return f"{one.name if prepared_one is None else other.name} has not read its data yet"
    if prepared_one.data_fingerprint != prepared_other.data_fingerprint:
        return "their data differ, and losses on different rows are not comparable"
    most = one.data.max_evaluation_rows, other.data.max_evaluation_rows
    if most[0] != most[1] or (most[0] is not None and one.search.seed != other.search.seed):
        return "they are evaluated on different rows of their data (data.max_evaluation_rows)"
    if one.task != "causal-lm":
        return ""
    if prepared_one.model_fingerprint != prepared_other.model_fingerprint:
        return "their models differ, and so may their tokenizers: losses a token are of different tokens"
    if one.data.max_length != other.data.max_length:
        return "they cut their rows at different lengths (data.max_length): losses a token are of different tokens"
    return ""


def _cause(causes: Sequence[str], places: Sequence[str]) -> str:
    if len(causes) > 1:
        return f"They differ in {join(list(causes))}: what differs in their results cannot be put down to one of these."
    if causes:
        return (
            f"Of what may change an arm's result or cost they differ in {causes[0]} alone, as far as it is recorded: "
            "what is shown to differ in their results may be put down to it."
        )
    if SEEDS in places:
        return "They ask the same of the same on other seeds: what differs in an arm's results is chance."
    return "Nothing that may change an arm's result or cost is known to differ: what differs in it is chance."


def _asked(study: Study) -> dict[str, Any]:
    """Dotted key → value, without those that are not set and those that are no question."""
    keys = dotted(study).items()
    return {key: value for key, value in keys if value is not None and key.split(".")[0] not in _NO_QUESTION}


def _facts(prepared: Prepared | None) -> dict[str, Any]:
    if prepared is None:
        return {}
    return {
        "model fingerprint": prepared.model_fingerprint,
        "data fingerprint": prepared.data_fingerprint,
        "device": prepared.device,
        "precision": prepared.precision,
        "attention": prepared.attention,
        "pack size": prepared.pack_size,
        **{f"version of {name}": version for name, version in sorted(prepared.versions.items())},
    }


def _place(key: str, found: dict[str, Any], told: Sequence[dict[str, Any]]) -> str:
    """What a key that differs is a part of; BESIDE where it is shown to make no difference."""
    if key.startswith("version of "):
        return LIBRARIES
    if key == "search.rungs" and "train.steps" in found:  # the last rung is the last step
        return "train.steps"
    if key in ("precision", "attention") and "device" in found and "train.precision" not in found:
        return MACHINE  # which decides what calibration chooses
    place = _PLACES.get(key) or _PLACES.get(key.split(".")[0]) or key
    fingerprint = _BY_FINGERPRINT.get(place)
    if fingerprint is None or key in _NOT_IN_FINGERPRINT or fingerprint in found:
        return place
    return BESIDE if all(fingerprint in one for one in told) else place


def _shown(value: Any) -> str:
    if value is None:
        return NOTHING
    return without_paths(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
