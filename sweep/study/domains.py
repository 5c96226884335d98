"""A study over domains: one ordinary study for each, and an analysis across them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sweep.study.schema import Arms, Confirm, Data, Study

DOMAIN = "{domain}"  # stands for a domain's name in data.source and data.config
EXACT_SUMS = {"lora", "rslora", "lora+"}  # methods whose update is scaling · BA and nothing else


def domain_studies(study: Study) -> dict[str, Study]:
    """The parts, by domain: `<name>-<domain>`, with the domain's name in place of `{domain}`."""
    return {domain: _part(study, domain) for domain in study.data.domains or ()}


def parts_of(study: Study) -> list[Study]:
    """What runs: the study itself, or its parts."""
    return list(domain_studies(study).values()) or [study]


def _part(study: Study, domain: str) -> Study:
    data, question = study.data, study.question
    own = data.model_copy(
        update={
            "domains": None,
            "source": data.source.replace(DOMAIN, domain),
            "config": data.config and data.config.replace(DOMAIN, domain),
        }
    )
    return study.model_copy(
        update={
            "name": f"{study.name}-{domain}",
            "question": f"{question} ({domain})" if question else "",
            "data": own,
        }
    )


def domain_checks(sections: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a study over domains needs, for its parts to differ and its adapters to be mixed."""
    data, arms, confirm = sections.get("data"), sections.get("arms"), sections.get("confirm")
    if not isinstance(data, Data):
        return
    placed = [name for name in ("source", "config") if DOMAIN in (getattr(data, name) or "")]
    if data.domains is None:
        yield from ((("data", name), f"holds {DOMAIN}, and data.domains names none") for name in placed)
        return
    if not placed:
        yield ("data", "domains"), f"neither data.source nor data.config holds {DOMAIN}: all would read the same rows"
    if sections.get("task", "causal-lm") != "causal-lm":
        yield ("data", "domains"), "is for task causal-lm: losses of classes cannot be compared across domains"
    if isinstance(arms, Arms) and not set(arms.method) <= EXACT_SUMS:
        yield (
            ("arms", "method"),
            f"with data.domains, adapters are mixed, which is exact for {', '.join(sorted(EXACT_SUMS))} alone",
        )
    if isinstance(arms, Arms) and len(arms.target_modules) > 1:
        yield ("arms", "target_modules"), "with data.domains, adapters on the same modules are mixed: give one entry"
    if isinstance(arms, Arms) and (arms.rank_pattern or arms.alpha_pattern):
        yield ("arms", "rank_pattern"), "with data.domains, adapters are mixed rank by rank: give no patterns"
    if isinstance(confirm, Confirm) and confirm.finalists != "rank":
        yield ("confirm", "finalists"), "with data.domains, adapters are mixed rank by rank: use finalists: rank"
