"""Numbers of an analysis across domains: what each adapter changes on each domain's text, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from sweep.report.intervals import Interval, t_interval

Found = dict[str, Any]  # see `sweep.adapters.domains.compare_domains`
MIXED = "mixed"


def ranks(found: Found) -> list[int]:
    return sorted({row["rank"] for row in found["losses"]})


def bits_per_byte(found: Found, domain: str, loss: float) -> float:
    """Of a loss in nats a token: what no choice of tokens changes, and so what can be compared across languages."""
    text = found["text"][domain]
    return float(loss) * float(text["tokens"]) / (math.log(2) * float(text["bytes"]))


def changes(found: Found, adapter: str, rank: int, domain: str) -> dict[int, float]:
    """By seed: loss on the domain's text with the adapter − the base's, in nats a token."""
    base = found["base"][domain]
    return {
        row["seed"]: row["loss"][domain] - base
        for row in found["losses"]
        if (row["adapter"], row["rank"]) == (adapter, rank) and row["loss"][domain] is not None
    }


def over_seeds(by_seed: dict[int, float]) -> Interval | None:
    return t_interval(list(by_seed.values())) if by_seed else None


def kept(found: Found, rank: int, domain: str) -> Interval | None:
    """The share of its own adapter's gain that the mixture keeps on a domain, seed by seed.

    None where there is no gain to keep: then the share means nothing.
    """
    own, mixed = changes(found, domain, rank, domain), changes(found, MIXED, rank, domain)
    pairs = {seed: mixed[seed] / own[seed] for seed in own if seed in mixed and own[seed] < 0}
    return over_seeds(pairs) if len(pairs) == len(own) else None


def rank_gain(found: Found, domain: str) -> dict[int, float]:
    """By seed: loss of the smallest rank − that of the largest, on the domain that both learned, in nats a token."""
    smallest, *_, largest = ranks(found)
    low, high = (changes(found, domain, rank, domain) for rank in (smallest, largest))
    return {seed: low[seed] - high[seed] for seed in low if seed in high}


def rank_gain_bits(found: Found, domain: str) -> dict[int, float]:
    """The same in bits a byte."""
    return {seed: bits_per_byte(found, domain, gain) for seed, gain in rank_gain(found, domain).items()}


def by_distance(found: Found) -> list[str]:
    """The domains from what the base predicts best, in bits a byte, to what it predicts worst."""
    return sorted(found["domains"], key=lambda domain: bits_per_byte(found, domain, found["base"][domain]))


def gain_differences(found: Found) -> list[tuple[str, str, Interval]]:
    """(further domain, nearer domain, difference of their rank gains in bits a byte), paired by seed."""
    pairs = []
    for near, far in combinations(by_distance(found), 2):
        one, other = rank_gain_bits(found, near), rank_gain_bits(found, far)
        differences = {seed: other[seed] - one[seed] for seed in other if seed in one}
        interval = over_seeds(differences)
        if interval is not None:
            pairs.append((far, near, interval))
    return pairs


def side(interval: Interval | None) -> int:
    """−1 or 1 where the interval lies below or above 0; 0 where nothing is shown."""
    if interval is None or interval.low is None or interval.high is None:
        return 0
    return -1 if interval.high < 0 else 1 if interval.low > 0 else 0


def loss_rows(found: Found) -> Sequence[dict[str, object]]:
    """One row for each adapter and domain, the base's first: for the CSV."""
    rows: list[dict[str, object]] = []
    for row in [{"adapter": "none", "loss": found["base"]}, *found["losses"]]:
        for domain, loss in row["loss"].items():
            known = loss is not None
            rows.append(
                {
                    **{key: row.get(key) if row.get(key) is not None else "" for key in COLUMNS[:5]},
                    "domain": domain,
                    "loss": loss if known else "",
                    "bits_per_byte": bits_per_byte(found, domain, loss) if known else "",
                    "change": loss - found["base"][domain] if known else "",
                }
            )
    return rows


COLUMNS = ("adapter", "rank", "seed", "arm", "learning_rate", "domain", "loss", "bits_per_byte", "change")
