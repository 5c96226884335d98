"""The commands on studies that have run, and on questions that are refused; nothing is trained here."""

from __future__ import annotations

import csv
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import sweep
from journals import write_adapter
from synthetic import QUICKSTART, THREE_RATES, quickstart, write_study

from sweep import cli, doctor, publishing
from sweep.driver.question import write_question
from sweep.study.files import read_json
from sweep.study.home import Home
from sweep.study.records import CONFIRM
from sweep.tracking.journal import TrialRecord, read_study_record
from sweep.tracking.mlflow import Projector, find_tracking, register
from sweep.tracking.registered import remember_registered

NAME = "quickstart"


def journaled(home: Home, **values: Any) -> Home:
    """A home in which the quickstart has run to its end, with made-up numbers."""
    study, folder = quickstart(), home.study(NAME)
    write_study(folder.path, study, **values)
    write_question(study, folder)
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return journaled(Home(tmp_path_factory.mktemp("home")))


def files_of(home: Home) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file() and path.name != "lock"}


def here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of a command that is run in this process, where the libraries are loaded already."""
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_report_writes_its_files_where_it_is_told_or_into_reports(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, folder in (([], "reports/quickstart"), (["--to", "elsewhere"], "elsewhere")):
        assert here(monkeypatch, "report", NAME, "--home", str(home.root), *words) == 0
        assert f"report: {folder}/report.html" in capsys.readouterr().out
        assert {path.name for path in Path(folder).iterdir()} == {"report.html", "report.md", "trials.csv", "figures"}
        with open(Path(folder, "trials.csv"), newline="") as rows:
            assert len(list(csv.DictReader(rows))) == len(read_study_record(home.study(NAME)).trials)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--arm", "r3-ratio1"], "no arm 'r3-ratio1'; the study has r2-ratio1, r2-ratio2, "),
        (["--trial", "999"], "no trial 999; the study has trials 0 to "),
    ],
)
def test_export_refuses_what_the_study_has_not(
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    to = tmp_path / "adapter"
    assert here(monkeypatch, "export", NAME, "--home", str(home.root), "--to", str(to), *words) == 2
    assert reason in capsys.readouterr().err
    assert not to.exists()


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[TrialRecord]:
    """The trials that were exported; a small file stands for each adapter."""
    trials: list[TrialRecord] = []

    def export(study: Any, record: Any, trial: TrialRecord, to: Path, *rest: Any) -> None:
        write_adapter(to)
        trials.append(trial)

    monkeypatch.setattr(publishing, "export", export)
    return trials


def test_export_takes_the_best_confirm_trial_of_the_arm_named_or_recommended(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[TrialRecord]
) -> None:
    words = ["export", NAME, "--home", str(home.root), "--to", str(tmp_path / "adapter")]
    assert here(monkeypatch, *words, "--arm", "r8-ratio2") == 0
    assert here(monkeypatch, *words) == 0
    assert here(monkeypatch, *words, "--trial", "1") == 0
    named, recommended, numbered = exported
    assert (named.spec.arm.name, named.spec.phase) == ("r8-ratio2", CONFIRM)
    rivals = [t for t in read_study_record(home.study(NAME)).trials if t.spec.arm.name == "r8-ratio2"]
    losses = [t.last.eval_loss for t in rivals if t.spec.phase == CONFIRM and t.last and t.last.eval_loss]
    assert named.last is not None and named.last.eval_loss == min(losses)
    assert (recommended.spec.arm.name, recommended.spec.phase) == ("r4-ratio2", CONFIRM)
    assert numbered.spec.number == 1


def test_doctor_says_of_a_home_that_cannot_be_written_what_would_lie_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.training.locate.hub_problem", lambda: None)
    for name in ("SWEEP_STORAGE", "SWEEP_CHECKPOINTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    for home, well in ((tmp_path / "home", True), (tmp_path / "file" / "home", False)):
        checks = {check.name: check for check in doctor.examine(Home(home))}
        for name in ("home", "Optuna storage", "checkpoints", "tracking"):
            assert checks[name].ok is well, name


def test_doctor_lists_versions_and_ends_with_0(tmp_path: Path) -> None:
    done = sweep("doctor", "--home", str(tmp_path / "home"), cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split()[1]: line.split()[2] for line in done.stdout.splitlines() if line.startswith(" ok")}
    assert found["mlflow"] == mlflow.__version__
    assert set(doctor.NEEDED) <= set(found)


@pytest.mark.parametrize(
    "tracking",
    [
        "http://me:s3cret@127.0.0.1:1",
        "http://me:s3cret@127.0.0.1",  # without a port, urllib takes the password for one
        "postgresql://me:s3cret@127.0.0.1:1/mlflow",
        "postgresql://127.0.0.1:1/mlflow?user=me&password=s3cret",
    ],
)
def test_doctor_shows_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: str) -> None:
    monkeypatch.setattr("sweep.training.locate.hub_problem", lambda: None)
    monkeypatch.setenv("SWEEP_STORAGE", "postgresql://me:s3cret@127.0.0.1:1/optuna")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    checks = {check.name: check for check in doctor.examine(Home(tmp_path))}
    assert "s3cret" not in str(checks)
    assert not checks["Optuna storage"].ok
    assert "://127.0.0.1" in checks["tracking"].found


@pytest.mark.parametrize("words", [["--dry-run", "--price-per-hour", "0"], ["--price-per-hour", "2"]])
def test_a_price_is_positive_and_of_a_dry_run(tmp_path: Path, words: list[str]) -> None:
    done = sweep("run", str(QUICKSTART), *words, "--home", "home", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("--price-per-hour: ")
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_dry_run_shows_every_arm_and_leaves_no_study(tmp_path: Path) -> None:
    small = ["--set", "data.max_length=8", "--set", "train.batch_size=2"]
    done = sweep("run", str(QUICKSTART), *small, "--dry-run", "--price-per-hour", "36", "--home", "home", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for arm in quickstart().list_arms():
        assert any(line.split()[:1] == [arm.name] for line in done.stdout.splitlines())
    assert "9 arms, 36 search trials" in done.stdout
    below = " ".join(done.stdout.split())
    assert "probed alone for a few steps: r2-lora-query+value, r64-lora-query+value, full" in below
    assert re.search(
        r"the whole study in packs, as it will run: at most ([\d.]+) hours \(.*?\), [\d.]+ at 36 an hour", below
    )
    assert not (tmp_path / "home" / "studies").exists()
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_a_changed_question_is_refused_with_the_difference_and_nothing_is_touched(home: Home, tmp_path: Path) -> None:
    before = files_of(home)
    changed = ["--set", "confirm.epsilon=0.123"]
    done = sweep("run", str(QUICKSTART), *changed, "--home", str(home.root), cwd=tmp_path)
    assert done.returncode == 2
    assert "study 'quickstart' has run with another question" in done.stderr
    lines = [line.split() for line in done.stderr.splitlines()]
    assert lines[-2:] == [["-", "confirm.epsilon:", "0.05"], ["+", "confirm.epsilon:", "0.123"]]
    assert files_of(home) == before


def test_what_shows_with_the_model_at_hand_is_refused_by_file_line_and_field(tmp_path: Path) -> None:
    text = QUICKSTART.read_text().replace("rank: [2, 4, 8, 64]", "rank: [2, 9999]").replace("ce: 64", "ce: 9999")
    (tmp_path / "big.yaml").write_text(text)
    line = next(i for i, found in enumerate(text.splitlines(), start=1) if "rank: [2, 9999]" in found)
    done = sweep("run", "big.yaml", "--home", "home", cwd=tmp_path)
    assert done.returncode == 2
    assert f"big.yaml:{line}: arms.rank: rank 9999 is larger than layer" in done.stderr
    assert not (tmp_path / "home" / "mlflow.db").exists()  # the mended question is tracked afresh


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[TrialRecord]) -> Iterator[Home]:
    """A home whose complete study, without failures, was published from the folder `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = journaled(Home(tmp_path / "home"), ends={})
    assert not publish(home).warnings
    yield home
    assert len(exported) == 1  # whatever followed, the adapter was written once


def publish(home: Home) -> publishing.Places:
    study, folder = quickstart(), home.study(NAME)
    projector = Projector(study, folder, find_tracking(home))
    projector.start()
    return publishing.publish(study, folder, projector, home.cache, print)


def tracked(database: Path) -> tuple[int, Path]:
    """(number of runs, the parent's artifacts), past MLflow's client, which remembers a database that is gone."""
    with sqlite3.connect(database) as open_database:
        (number,) = open_database.execute("SELECT COUNT(*) FROM runs").fetchone()
        ((uri,),) = open_database.execute("SELECT artifact_uri FROM runs WHERE name = 'quickstart (study)'").fetchall()
    return number, Path(uri.removeprefix("file://"))


def test_two_commands_at_the_end_of_one_study_write_report_and_adapter_once(
    published: Home,
    monkeypatch: pytest.MonkeyPatch,
    exported: list[TrialRecord],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (published.study(NAME).path / "published.json").unlink()
    exported.clear()
    both, stand_in = threading.Barrier(2), publishing.export
    inside: list[int] = []

    def slow_export(*asked: Any) -> None:
        inside.append(1)
        time.sleep(0.5)  # long enough for the other, which would write over it
        stand_in(*asked)

    def one() -> publishing.Places:
        both.wait(timeout=60)
        return publish(published)

    monkeypatch.setattr(publishing, "export", slow_export)
    with ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(one) for _ in range(2)]
        assert first.result() == second.result()
    assert inside == [1]
    assert capsys.readouterr().out.count("another `sweep run` writes what study quickstart found") == 1


def test_the_same_command_brings_a_lost_database_back_and_names_what_was_registered_in_it(
    published: Home, tmp_path: Path
) -> None:
    database, folder, tracking = published.root / "mlflow.db", published.study(NAME), find_tracking(published)
    adapter = folder.path / "adapter"
    register(quickstart(), folder, tracking, adapter, None, "my topics", "why")
    remember_registered(folder, tracking, adapter, 7, "my topics")
    assert not publish(published).warnings, "it is there"
    for file in published.root.glob("mlflow.db*"):
        file.unlink()
    as_it_ran = [word for override in THREE_RATES for word in ("--set", override)]
    done = sweep("run", str(QUICKSTART), *as_it_ran, "--home", str(published.root), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "study quickstart is complete: nothing to train" in done.stdout
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert "has lost registered model my topics of trial 7" in warning
    assert "`sweep export quickstart --trial 7 --to DIR --register 'my topics'` registers it again" in warning
    assert read_json(folder.path / "registered.json") == [], "told once"
    number, artifacts = tracked(database)
    assert number == len(read_study_record(published.study(NAME)).trials) + 1
    assert (artifacts / "report" / "report.html").exists()
    assert (artifacts / "adapter" / "adapter_config.json").exists()


def test_a_complete_study_goes_to_another_tracking_database_too(
    published: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'second.db'}")
    assert not publish(published).warnings
    assert tracked(tmp_path / "second.db")[0] == len(read_study_record(published.study(NAME)).trials) + 1
