"""The report over domains: its figures by hand and by SciPy, what it says is shown and what it leaves open."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journals import STEPS, ask, measure, start_journal
from scipy import stats

from sweep.adapters.domains import Measured, _mixtures
from sweep.lora.adapter import Adapter
from sweep.report.domains import changes, gain_differences, kept, over_seeds, rank_gain, rank_gain_bits
from sweep.report.domains_report import write_domains_report
from sweep.study.domains import domain_studies
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.study.records import COMPLETE, SEARCH
from sweep.study.schema import Study, rate_values
from sweep.tracking.journal import StudyRecord, append_end, append_rung, read_study_record

LANGUAGES = Path(__file__).parents[1] / "studies" / "languages.yaml"


def made_up(values: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """An analysis in which adapter a of rank r changes the loss on domain d by the seeds' values of "a>d"."""
    domains = ["en", "fr", "de"]
    base = {"en": 3.0, "fr": 4.0, "de": 4.5}
    rows = []
    for adapter, rank, seed in product((*domains, "mixed"), (2, 64), (1, 2, 3)):
        change = {d: values.get(f"{adapter}>{d}", {}).get(rank, [0.0, 0.0, 0.0])[seed - 1] for d in domains}
        row = {"adapter": adapter, "rank": rank, "seed": seed, "arm": f"r{rank}", "learning_rate": 0.01}
        rows.append({**row, "loss": {d: base[d] + change[d] for d in domains}})
    sizes = {"en": 400, "fr": 300, "de": 250}
    text = {d: {"rows": 9, "tokens": 100, "bytes": n, "characters": n} for d, n in sizes.items()}
    return {
        "domains": domains,
        "precision": "float32",
        "device": "cpu",
        "text": text,
        "base": base,
        "off_equals_base": True,
        "checked_rows": dict.fromkeys(domains, 8),
        "losses": rows,
    }


SHOWN = {
    "en>en": {2: [-0.10, -0.11, -0.12], 64: [-0.12, -0.13, -0.14]},
    "fr>fr": {2: [-0.40, -0.42, -0.41], 64: [-0.60, -0.66, -0.63]},
    "de>de": {2: [-0.50, -0.51, -0.55], 64: [-0.90, -0.93, -0.95]},
    "fr>en": {64: [0.05, 0.06, 0.07]},
    "de>en": {64: [-0.05, 0.06, 0.01]},
    "mixed>fr": {2: [-0.20, -0.21, -0.22], 64: [-0.30, -0.32, -0.33]},
    "mixed>de": {2: [-0.20, -0.21, -0.22], 64: [-0.45, -0.46, -0.47]},
}


def not_run(study: Study, home: Path) -> dict[str, StudyRecord]:
    """Parts whose journals are empty."""
    return {domain: read_study_record(Home(home).study(part.name)) for domain, part in domain_studies(study).items()}


def test_findings_are_those_that_scipy_gives_by_hand() -> None:
    found = made_up(SHOWN)

    def expected(values: Any) -> tuple[float, float, float]:
        return np.mean(values), *stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))

    def numbers(interval: Any) -> tuple[float, float, float]:
        return interval.mean, interval.low, interval.high

    own = np.array(SHOWN["fr>fr"][64])
    assert numbers(over_seeds(changes(found, "fr", 64, "fr"))) == pytest.approx(expected(own))
    assert numbers(kept(found, 64, "fr")) == pytest.approx(expected(np.array(SHOWN["mixed>fr"][64]) / own))
    gains = {d: np.array(SHOWN[f"{d}>{d}"][2]) - np.array(SHOWN[f"{d}>{d}"][64]) for d in ("en", "fr", "de")}
    assert list(rank_gain(found, "de").values()) == pytest.approx(gains["de"])
    bits = {d: gains[d] * 100 / math.log(2) / found["text"][d]["bytes"] for d in gains}
    assert list(rank_gain_bits(found, "de").values()) == pytest.approx(bits["de"])
    differences = {(far, near): numbers(interval) for far, near, interval in gain_differences(found)}
    assert set(differences) == {("fr", "en"), ("de", "en"), ("de", "fr")}
    for (far, near), interval in differences.items():
        assert interval == pytest.approx(expected(bits[far] - bits[near]))


def test_report_says_what_is_shown_what_is_not_and_what_contradicts_the_literature(tmp_path: Path) -> None:
    study = read_study(LANGUAGES).study
    lead = write_domains_report(study, made_up(SHOWN), not_run(study, tmp_path), tmp_path / "one")
    text = (tmp_path / "one" / "report.md").read_text()
    assert "Every domain's own adapter is shown to lower its test loss" in lead[0]
    assert "fr is shown to cost (+0.060, +0.035 to +0.085); de is not shown to cost or to help" in lead[1]
    assert "de is shown to gain more than en" in text and "it agrees" in text and "With 3 domains no trend" in text
    with open(tmp_path / "one" / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 24 * 3 and [row["adapter"] for row in rows[:3]] == ["none"] * 3
    flat = {**SHOWN, "de>de": {2: [-0.50, -0.51, -0.55], 64: [-0.40, -0.41, -0.44]}, "fr>fr": {64: [0.1, 0.2, -0.3]}}
    lead = write_domains_report(study, made_up(flat), not_run(study, tmp_path), tmp_path / "other")
    text = (tmp_path / "other" / "report.md").read_text()
    assert "is shown to lower the test loss of en and de alone" in lead[0]
    assert "which contradicts it" in text and "on fr there was no gain to keep on every seed" in text
    assert "nan" not in text.split("<details>")[0].lower().split()


def test_of_the_control_and_one_other_domain_nothing_is_mixed(tmp_path: Path) -> None:
    study = read_study(LANGUAGES, ["data.domains=[en, fr]"]).study
    one = [Measured("fr", 2, seed, Adapter(2, 1.0, ("q",), {}), "r2", 0.01) for seed in (1, 2)]
    assert _mixtures(one, ["fr"]) == []
    found = made_up(SHOWN)
    pair = {**found, "domains": ["en", "fr"], "losses": [r for r in found["losses"] if r["adapter"] in ("en", "fr")]}
    lead = write_domains_report(study, pair, not_run(study, tmp_path), tmp_path / "report")
    assert "fr is shown to cost" in lead[1] and "mixed" not in lead[1]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Beside the control there is fr alone, so nothing was mixed." in text and "mixture keeps" not in text


def test_where_anothers_adapter_helps_the_control_the_report_says_what_that_hides(tmp_path: Path) -> None:
    study = read_study(LANGUAGES).study
    hides = "and that hides what was forgotten"
    lead = write_domains_report(study, made_up(SHOWN), not_run(study, tmp_path), tmp_path / "one")
    assert hides not in lead[1]
    helps = {**SHOWN, "fr>en": {64: [-0.15, -0.16, -0.17]}}
    lead = write_domains_report(study, made_up(helps), not_run(study, tmp_path), tmp_path / "other")
    assert "fr is shown to help" in lead[1] and hides in lead[1]


def test_a_part_whose_best_rate_is_on_an_edge_is_named_in_the_report(tmp_path: Path) -> None:
    study = read_study(LANGUAGES).study
    parts = domain_studies(study)
    folder = start_journal(Home(tmp_path), parts["fr"])
    for arm in parts["fr"].list_arms():
        for rate in rate_values(parts["fr"].rates(arm)):
            spec = ask(folder, arm, rate, study.search.seed, SEARCH)
            found = measure(spec, 0, STEPS)  # the highest rate is the best at rank 8, a middle one elsewhere
            loss = abs(math.log(rate / (3.0e-2 if arm.r == 8 else 1.0e-2)))
            append_rung(spec, replace(found, stop=study.train.steps, eval_loss=1 + loss))
            append_end(spec, COMPLETE)
    write_domains_report(study, made_up(SHOWN), not_run(study, tmp_path), tmp_path / "report")
    for name in ("report.md", "report.html"):
        told = [line for line in (tmp_path / "report" / name).read_text().splitlines() if "on the upper edge" in line]
        assert len(told) == 1 and "languages-fr: r8-ratio1: the best learning rate, 0.03," in told[0].replace("\\", "")
