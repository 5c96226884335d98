"""What a report tells of how to repeat it, and what it must never tell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import SESSION, quickstart, write_study

import sweep as package
from sweep.driver.provenance import describe_session, find_commit, shown_command
from sweep.report.provenance import provenance_facts
from sweep.report.report import write_report
from sweep.study.credentials import without_credentials
from sweep.tracking.journal import append, read_events, read_study_record
from sweep.tracking.lines import as_line

CANARY = "hunter2canary"


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/x/.venv/bin/sweep", "run", "studies/a.yaml"], "sweep run studies/a.yaml"),
        (["sweep", "run", f"/home/{CANARY}/my studies/a.yaml"], "sweep run …/a.yaml"),
        (["sweep", "run", "a.yaml", "--home", f"/data/{CANARY}/home"], "sweep run a.yaml --home …/home"),
        (["sweep", "run", "a.yaml", f"--home=/data/{CANARY}/home"], "sweep run a.yaml --home=…/home"),
        (
            ["sweep", "run", "a.yaml", "--set", f"storage=postgresql://me:{CANARY}@h/db"],
            "sweep run a.yaml --set storage=…",
        ),
        (
            ["sweep", "run", "a.yaml", f"--set=storage=postgresql://me:pw@{CANARY}/db"],
            "sweep run a.yaml --set=storage=…",
        ),
        (
            ["sweep", "run", "a.yaml", "--set", f"data.source=https://me:{CANARY}@h/rows.csv?token={CANARY}"],
            "sweep run a.yaml --set 'data.source=https://h/rows.csv?token=…'",
        ),
        (
            ["sweep", "run", "a.yaml", "--set", "search.rungs=[50,100]", "--set", "question=Which one?"],
            "sweep run a.yaml --set 'search.rungs=[50,100]' --set 'question=Which one?'",
        ),
        (["/x/bin/pytest", "-q", CANARY], ""),
    ],
)
def test_the_command_is_told_as_typed_without_paths_and_credentials(words: list[str], shown: str) -> None:
    assert shown_command(words) == shown


def test_the_commit_is_that_of_the_checkout_that_holds_the_package(tmp_path: Path) -> None:
    shutil.copytree(Path(package.__file__).parent, tmp_path / "sweep", ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q")
    assert find_commit(tmp_path / "sweep") == "", "another's checkout: the package is no part of it"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert find_commit(tmp_path / "sweep") == head
    (tmp_path / "notes.txt").write_text("beside the package")
    assert find_commit(tmp_path / "sweep") == head
    (tmp_path / "sweep" / "new.py").write_text("")
    assert find_commit(tmp_path / "sweep") == f"{head} + uncommitted changes"


def test_a_session_tells_what_it_ran_on() -> None:
    told = describe_session()
    assert "command" not in told, "this is no sweep command"
    assert told["versions"]["sweep"] == package.__version__ and told["system"]
    assert told["hardware"]["cpu"] and told["hardware"]["cores"] >= 1 and told["hardware"]["memory_bytes"] > 2**28


@pytest.mark.slow
def test_a_run_writes_down_its_own_command_and_the_report_shows_it(tmp_path: Path) -> None:
    study = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
    (tmp_path / "texts").mkdir()
    shutil.copy(study, tmp_path / "texts" / "mine.yaml")
    small = ("train.steps=2", "search.rungs=[2]", "arms.rank=[2]", "arms.alpha_ratio=[1]", "confirm.reference=2")
    small += ("confirm.seeds=[1]", "arms.full_finetuning=false", "tune.full_finetuning=null", "data.max_length=8")
    sets = [word for value in ("train.precision=float32", *small) for word in ("--set", value)]
    command = [
        Path(sys.executable).with_name("sweep"),
        "run",
        tmp_path / "texts" / "mine.yaml",
        *sets,
        "--home",
        "home",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (started,) = [e for e in read_events(tmp_path / "home/studies/quickstart/journal.jsonl") if e["event"] == "started"]
    assert started["command"].startswith("sweep run …/mine.yaml --set train.precision=float32 --set train.steps=2 ")
    text = (tmp_path / "reports" / "quickstart" / "report.md").read_text()
    assert "sweep run …/mine.yaml --set train.precision=float32" in text and started["hardware"]["cpu"] in text
    assert str(tmp_path) not in text


def test_every_different_session_is_told_and_nothing_secret_is(tmp_path: Path) -> None:
    study = quickstart(
        f"data.source=https://me:{CANARY}@host/rows.csv?api_key={CANARY}", f"storage=sqlite:////{CANARY}/o.db"
    )
    record = write_study(tmp_path / "home", study)
    other = {
        **SESSION,
        "command": f"sweep run studies/quickstart.yaml --home /srv/{CANARY}/x --set data.source=https://me:{CANARY}@h/x",
        "commit": "f" * 40,
        "hardware": {**SESSION["hardware"], "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15"]},  # type: ignore[dict-item]
    }
    append(record.folder.journal, "started", **other)
    append(record.folder.journal, "started", **SESSION)
    write_report(study, read_study_record(record.folder), tmp_path / "out")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text().split("Repeat it")[-1]
        for says in (
            SESSION["commit"],
            "f" * 40,
            "AMD EPYC 9654, 2 cores, 16.0 GiB of memory, no GPU",
            "GPU NVIDIA H100",
        ):
            assert str(says) in text
        assert text.count("AMD EPYC") == 2 and "1, 2, 3, 4, 5 in the confirm phase" in text
        for says in ("9f31c0a2", "51be77d0", "optuna 5.0.0", "torch 2.13.0", "Linux-6.1.0"):
            assert says in text
    for path in (tmp_path / "out").rglob("*.*"):
        assert CANARY.encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("device", "torch", "gpus", "told"),
    [
        ("cpu", "2.13.0", [], None),
        ("cpu", "2.13.0", ["NVIDIA H100, 81559 MiB, 550.54.15"], None),
        ("NVIDIA H100", "2.13.0", ["NVIDIA H100, 81559 MiB, 550.54.15"], None),
        ("NVIDIA H100", "2.13.0+cpu", [], "NVIDIA H100, with torch 2.13.0"),
        ("NVIDIA H100", "2.13.0", [], "NVIDIA H100"),
        ("cpu", "2.12.0", [], "cpu, with torch 2.13.0"),
    ],
)
def test_workers_elsewhere_are_told_of_beside_the_command(
    tmp_path: Path, device: str, torch: str, gpus: list[str], told: str | None
) -> None:
    study = quickstart()
    record = write_study(tmp_path / "home", study)
    assert record.prepared is not None and record.prepared.versions["torch"] == "2.13.0"
    session = {
        "versions": {"python": "3.11.9", "torch": torch},
        "hardware": {"cpu": "EPYC", "cores": 2, "memory_bytes": 2**34, "gpus": gpus},
    }
    changed = replace(record, prepared=replace(record.prepared, device=device), provenance=(session,))
    facts = dict(provenance_facts(study, [changed]))
    assert facts.get("Trained on") == told and f"torch {torch}," in facts["Versions"]
    later = replace(changed, provenance=(session, {"versions": {"torch": "2.13.0"}}))
    assert "Trained on" not in dict(provenance_facts(study, [later])), "a session of the command had the same"


def test_what_older_journals_lack_is_said_to_be_lacking(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path / "home", study, stop_after=5)
    lines = record.folder.journal.read_bytes().splitlines(keepends=True)
    started = as_line({"event": "started", "time": 1.0, "versions": {"python": "3.11"}})
    record.folder.journal.write_bytes(started + lines[1])
    write_report(study, read_study_record(record.folder), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("not recorded") == 4 and "python 3.11" in text


def test_credentials_are_cut_out_of_addresses() -> None:
    assert without_credentials("postgresql://me:pw@h/db?password=x&sslmode=require") == (
        "postgresql://h/db?password=…&sslmode=require"
    )
    assert without_credentials("https://h/x?X-Amz-Signature=ab&api_key=cd&page=2 'a@b'") == (
        "https://h/x?X-Amz-Signature=…&api_key=…&page=2 'a@b'"
    )
