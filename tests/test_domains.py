"""Studies over domains: their parts, what is refused, and adapters on one another's text against PEFT."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import sweep
from fakes import probe
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from test_study_file import problems_of
from tiny_texts import save_tiny_llama, write_lines
from transformers import AutoTokenizer, LlamaForCausalLM

from sweep import cli, over_domains
from sweep.adapters.domains import compare_domains
from sweep.adapters.kept import read_kept
from sweep.driver.driver import run_study
from sweep.execution.executor import InlineExecutor
from sweep.execution.worker import Work
from sweep.report.domains import bits_per_byte
from sweep.report.domains_report import write_domains_report
from sweep.study.domains import domain_studies, parts_of
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.study.records import CONFIRM
from sweep.study.schema import Study
from sweep.tracking.analyses import read_analysis
from sweep.tracking.connection import locked
from sweep.tracking.journal import StudyRecord, TrialRecord, read_study_record
from sweep.training.data import load_data
from sweep.training.locate import locate_model
from sweep.training.tokens import Split

DOMAINS = ("en", "fr", "de")
LANGUAGES = Path(__file__).parents[1] / "studies" / "languages.yaml"


def study_file(folder: Path) -> Path:
    raw = {
        "name": "tongues",
        "question": "Which?",
        "model": str(folder / "llama"),
        "task": "causal-lm",
        "data": {
            "domains": list(DOMAINS),
            "source": str(folder / "{domain}.txt"),
            "max_length": 10,
            "validation": 0.15,
            "test": 0.2,
            "max_evaluation_rows": 9,
        },
        "arms": {
            "rank": [2, 8],
            "alpha_ratio": [2.0],
            "target_modules": [["q_proj", "v_proj"]],
            "full_finetuning": False,
        },
        "tune": {"learning_rate": [0.03]},
        "train": {"steps": 4, "batch_size": 4, "precision": "float32"},
        "confirm": {"seeds": [1, 2], "reference": 8, "epsilon": 0.05},
    }
    path = folder / "tongues.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of a command that is run in this process."""
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def three_domains(folder: Path) -> None:
    save_tiny_llama(folder / "llama")
    for seed, domain in enumerate(DOMAINS):
        write_lines(folder / f"{domain}.txt", 60, seed)
    study_file(folder)


def run_part(part: Study, home: Home, executor: object) -> None:
    """A part without MLflow, solo probes, report and export, which are as for any study."""
    work = replace(Work(), probe=probe)
    run_study(part, home.study(part.name), InlineExecutor(), home.optuna_url, home.cache, work)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study over three tiny domains that has run."""
    folder = tmp_path_factory.mktemp("domains")
    three_domains(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cli, "_run", run_part)
        assert here(patch, "run", "tongues.yaml", "--home", "home") == 0
    return folder


def records_of(folder: Path) -> dict[str, StudyRecord]:
    home = Home(folder / "home")
    return {domain: read_study_record(home.study(f"tongues-{domain}")) for domain in DOMAINS}


def found_in(folder: Path) -> dict[str, Any]:
    found = read_analysis(Home(folder / "home").study("tongues"), "domains")
    assert found is not None
    return found


def test_every_domain_becomes_a_study_with_its_name_in_place_of_the_placeholder() -> None:
    study = read_study(LANGUAGES).study
    parts = domain_studies(study)
    assert [part.name for part in parts.values()] == ["languages-en", "languages-fr", "languages-de"]
    french = parts["fr"]
    assert (french.data.config, french.data.domains) == ("20231101.fr", None)
    assert french.question.endswith("(fr)")
    back = {"name": "languages", "question": study.question, "data": study.data}
    assert french.model_copy(update=back) == study, "nothing else differs"
    local = read_study(LANGUAGES, ["data.source=../texts/{domain}.txt", "data.config=null"]).study
    assert [part.data.source for part in parts_of(local)] == [f"../texts/{d}.txt" for d in ("en", "fr", "de")]
    assert parts_of(french) == [french]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.config=null"], "data.domains: neither data.source nor data.config holds {domain}"),
        (["data.domains=null"], "data.config: holds {domain}, and data.domains names none"),
        (["data.domains=[en]"], "data.domains: list should have at least 2 items"),
        (["data.domains=[en, en]"], "data.domains: names a domain twice"),
        (["data.domains=[en, mixed]"], "data.domains: 'mixed' has a meaning in the report: name the domain otherwise"),
        (["data.domains=[none, fr]"], "data.domains: 'none' has a meaning in the report: name the domain otherwise"),
        (["data.domains=[en, FR]"], "data.domains.1: 'FR': use lower-case letters, digits and dashes only"),
        (["arms.method=[dora]"], "arms.method: with data.domains, adapters are mixed, which is exact for lora, lora+"),
        (["arms.rank_pattern={layers.0.q_proj: 4}"], "arms.rank_pattern: with data.domains"),
        (["arms.target_modules=[[q_proj], [v_proj]]"], "arms.target_modules: with data.domains"),
        (["confirm.finalists=arm"], "confirm.finalists: with data.domains"),
        (["task=sequence-classification"], "data.domains: is for task causal-lm"),
    ],
)
def test_domains_that_cannot_be_compared_are_refused(tmp_path: Path, overrides: list[str], line: str) -> None:
    assert any(line in problem for problem in problems_of(tmp_path, LANGUAGES.read_text(), *overrides))


def test_a_study_over_domains_runs_its_parts_and_compares_them_once(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.name for path in (ran / "reports" / "tongues").iterdir()}
    assert names == {"report.html", "report.md", "losses.csv", "figures"}
    found = found_in(ran)
    rows = {(row["adapter"], row["rank"], row["seed"]) for row in found["losses"]}
    assert rows == {(a, r, s) for a in (*DOMAINS, "mixed") for r in (2, 8) for s in (1, 2)}
    text = (ran / "reports" / "tongues" / "report.md").read_text()
    assert "the model is the base, bit for bit" in text and "no trend can be claimed" in text

    monkeypatch.chdir(ran)
    monkeypatch.setattr(cli, "_run", run_part)
    before = {path: path.read_bytes() for path in ran.rglob("*") if path.is_file()}
    assert here(monkeypatch, "run", "tongues.yaml", "--home", "home") == 0
    assert {path: path.read_bytes() for path in before} == before


def test_two_commands_at_the_end_of_one_study_over_domains_write_one_after_the_other(
    ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ran)
    home, said = Home(ran / "home"), Queue[str]()
    study = read_study(ran / "tongues.yaml").study
    with ThreadPoolExecutor(1) as pool:
        with locked(home.study("tongues").path / "publish.lock"):
            waiting = pool.submit(over_domains.publish, study, home, said.put)
            assert said.get(timeout=60) == (
                "another `sweep run` writes what study tongues found: this one waits for it"
            )
            assert not waiting.done()
        assert waiting.result(timeout=60)[-1] == "report:    reports/tongues/report.html"


@pytest.mark.slow
def test_parts_have_reports_and_adapters_of_their_own(tmp_path: Path) -> None:
    three_domains(tmp_path)
    done = sweep("run", "tongues.yaml", "--home", "home", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for domain in DOMAINS:
        assert f"reports/tongues-{domain}/report.html" in done.stdout
        assert (tmp_path / "home" / "studies" / f"tongues-{domain}" / "adapter" / "adapter_config.json").exists()
    assert done.stdout.rstrip().endswith("reports/tongues/report.html")


def test_commands_name_the_parts(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran)
    for words in (["export", "tongues", "--to", "x"], ["dashboard", "tongues"]):
        assert here(monkeypatch, *words, "--home", "home") == 2
        told = capsys.readouterr().err
        assert "tongues is a study over domains: name one of tongues-en, tongues-fr, tongues-de" in told
    assert here(monkeypatch, "status", "--home", "home") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.strip().startswith("tongues")]
    assert listed == [f"tongues-{d}" for d in DOMAINS]
    assert here(monkeypatch, "report", "tongues", "--to", "again", "--home", "home") == 0
    assert (ran / "again" / "report.md").read_bytes() == (ran / "reports/tongues/report.md").read_bytes()
    assert here(monkeypatch, "run", "tongues.yaml", "--home", "home", "--set", "confirm.epsilon=0.1") == 2
    assert "confirm.epsilon: 0.1" in capsys.readouterr().err
    assert read_study(ran / "home/studies/tongues/study.yaml").study.confirm.epsilon == 0.05


def mean_loss(model: Any, split: Split) -> float:
    """A plain loop, a row at a time."""
    total, count = 0.0, 0
    for start, stop in zip(split.offsets, split.offsets[1:], strict=False):
        row = torch.from_numpy(split.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            total += float(model.eval()(input_ids=row, labels=row).loss) * (stop - start - 1)
        count += stop - start - 1
    return total / count


def with_adapters(folder: Path, trials: dict[str, TrialRecord]) -> Any:
    """transformers' model with PEFT's adapters, one a domain."""
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama")
    for domain, trial in trials.items():
        arm = trial.spec.arm
        config = LoraConfig(r=arm.r, lora_alpha=int(arm.lora_alpha), target_modules=["q_proj", "v_proj"])
        if domain == next(iter(trials)):
            model = get_peft_model(model, config, adapter_name=domain)
        else:
            model.add_adapter(domain, config)
        weights = read_kept(trial)
        named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        assert not set_peft_model_state_dict(model, named, adapter_name=domain).unexpected_keys
    return model


def test_losses_on_all_domains_are_pefts_alone_and_mixed_by_concatenation(ran: Path) -> None:
    study, found = read_study(ran / "tongues.yaml").study, found_in(ran)
    records, place = records_of(ran), locate_model(study.model)
    home = Home(ran / "home")
    texts = {d: load_data(p.setup(str(home.cache)), place).test for d, p in domain_studies(study).items()}
    assert all(len(split) == 9 for split in texts.values())
    base = {d: mean_loss(LlamaForCausalLM.from_pretrained(ran / "llama"), split) for d, split in texts.items()}
    assert found["base"] == pytest.approx(base, abs=1e-4)
    trials = {
        (domain, t.spec.arm.r, t.spec.seed): t
        for domain, record in records.items()
        for t in record.trials
        if t.spec.phase == CONFIRM
    }
    for row in found["losses"]:
        rank, seed = row["rank"], row["seed"]
        if row["adapter"] == "mixed":
            model = with_adapters(ran, {domain: trials[domain, rank, seed] for domain in ("fr", "de")})
            model.add_weighted_adapter(["fr", "de"], [0.5, 0.5], "mixed", combination_type="cat")
            model.set_adapter("mixed")
        else:
            model = with_adapters(ran, {row["adapter"]: trials[row["adapter"], rank, seed]})
        expected = {domain: mean_loss(model, split) for domain, split in texts.items()}
        assert row["loss"] == pytest.approx(expected, abs=1e-4), (row["adapter"], rank, seed)
        assert max(abs(expected[d] - base[d]) for d in DOMAINS) > 1e-3, "the adapter does nothing: the test is blind"


def test_adapters_off_are_seen_to_leave_the_base_as_it_was_or_not(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_in(ran)["off_equals_base"] is True
    import sweep.adapters.domains as module

    def leaves_a_trace(model: Any, pack: Any) -> None:
        honest(model, pack)
        with torch.no_grad():
            weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))  # by one bit

    honest, study = module.remove, read_study(ran / "tongues.yaml").study
    monkeypatch.setattr(module, "remove", leaves_a_trace)
    module.load_base.cache_clear()
    found = compare_domains(domain_studies(study), records_of(ran), Home(ran / "home").cache, lambda line: None)
    module.load_base.cache_clear()
    assert found["off_equals_base"] is False
    write_domains_report(study, found, records_of(ran), ran / "damaged")
    assert "NOT the base bit for bit" in (ran / "damaged" / "report.md").read_text()


def test_bits_a_byte_are_those_of_the_text(ran: Path) -> None:
    study, found = read_study(ran / "tongues.yaml").study, found_in(ran)
    tokenizer = AutoTokenizer.from_pretrained(ran / "llama")
    part = domain_studies(study)["fr"]
    split = load_data(part.setup(str(Home(ran / "home").cache)), locate_model(study.model)).test
    rows = [split.input_ids[a + 1 : b].tolist() for a, b in zip(split.offsets, split.offsets[1:], strict=False)]
    count = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in rows)
    assert found["text"]["fr"]["bytes"] == count and found["text"]["fr"]["tokens"] == sum(map(len, rows))
    expected = found["base"]["fr"] * sum(map(len, rows)) / math.log(2) / count
    assert bits_per_byte(found, "fr", found["base"]["fr"]) == pytest.approx(expected)


def test_evaluation_rows_are_capped_by_the_split_seed_and_training_rows_are_not(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    write_lines(tmp_path / "en.txt", 60, 0)
    write_lines(tmp_path / "fr.txt", 60, 1)
    write_lines(tmp_path / "de.txt", 60, 2)
    study = domain_studies(read_study(study_file(tmp_path)).study)["en"]
    setup, place = study.setup(str(tmp_path / "cache")), locate_model(study.model)
    whole, capped, other = (
        load_data(replace(setup, data=replace(setup.data, max_evaluation_rows=most)), place) for most in (None, 9, 5)
    )
    assert len(capped.validation) == len(capped.test) == 9 and len(other.test) == 5 < len(whole.test)
    np.testing.assert_array_equal(capped.train.input_ids, whole.train.input_ids)
    assert capped.fingerprint == whole.fingerprint
    rows = {tuple(r) for r in np.split(whole.test.input_ids, whole.test.offsets[1:-1])}
    assert all(tuple(r) in rows for r in np.split(capped.test.input_ids, capped.test.offsets[1:-1]))
