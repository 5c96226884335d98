"""The dashboard is this machine's own, and asks for a password where it is served beyond it."""

from __future__ import annotations

import base64
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import journals
import psutil
import pytest
from browsing import picture, see
from commands import SWEEP, sweep
from selenium import webdriver
from servers import free_port

from sweep import dashboard as command
from sweep.driver.question import write_question
from sweep.exits import Refused
from sweep.study.home import Home
from sweep.tracking.mlflow import find_tracking, project
from sweep.tracking.served import Login, Served, limits

USER, PASSWORD = "someone", "c4n4ry: 50%/of@it"
LOGIN = {"SWEEP_DASHBOARD_USER": USER, "SWEEP_DASHBOARD_PASSWORD": PASSWORD}


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    address: str
    port: int


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """With a study that was tracked."""
    home, study = Home(tmp_path_factory.mktemp("home")), journals.sample_study()
    folder = journals.whole_study(home, study)
    write_question(study, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project(study, folder, find_tracking(home))
    return home


@pytest.fixture(scope="module")
def beyond(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A dashboard on every address of this machine."""
    yield from serving(home, tmp_path_factory.mktemp("run"), "--host", "0.0.0.0")


@pytest.fixture(scope="module")
def local(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from serving(home, tmp_path_factory.mktemp("run"))


def serving(home: Home, place: Path, *words: str) -> Iterator[Running]:
    """Ctrl-C ends it with code 0; it leaves no process and no file behind, and tells no secret."""
    port, private = free_port(), place / "tmp"
    private.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SWEEP_", "MLFLOW_"))}
    with (place / "err").open("w") as err:
        process = subprocess.Popen(
            [*SWEEP, "dashboard", "topics", "--home", str(home.root), "--port", str(port), *words],
            env={**clean, **LOGIN, "TMPDIR": str(private)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said.startswith("http://"), (place / "err").read_text()
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(everyone) >= 2
        for one in everyone:
            assert "c4n4ry" not in " ".join(one.cmdline())
        yield Running(process, said.split()[0], port)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert [one for one in everyone if one.is_running()] == [] and list(private.iterdir()) == []
        assert "c4n4ry" not in said + process.stdout.read() + (place / "err").read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
        process.stdout.close()


def answer(url: str, login: tuple[str, str] | None = None, **headers: str) -> int:
    """The status of a request, made without any proxy."""
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return int(opener.open(urllib.request.Request(url, headers=headers), timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code


def search(host: str, port: int) -> str:
    return f"http://{host}:{port}/api/2.0/mlflow/experiments/search?max_results=3"


def outer_address() -> str:
    """An address of this machine that is not loopback's."""
    every = [one.address for addresses in psutil.net_if_addrs().values() for one in addresses if one.family.value == 2]
    return next((address for address in every if not address.startswith("127.")), "127.0.0.1")


def test_beyond_this_machine_nothing_is_told_without_the_password(beyond: Running) -> None:
    for host in ("127.0.0.1", outer_address()):
        for url in (f"http://{host}:{beyond.port}/", search(host, beyond.port)):
            assert answer(url) == 401
            assert answer(url, (USER, "wrong password")) == answer(url, ("admin", "password1234")) == 401
            assert answer(url, (USER, PASSWORD)) == 200


def test_what_the_password_needs_on_disk_is_the_user_s_alone(beyond: Running) -> None:
    (private,) = Path(psutil.Process(beyond.process.pid).environ()["TMPDIR"]).glob("sweep-dashboard-*/in")
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "auth.ini").stat().st_mode) == 0o600
    assert {path.name for path in private.iterdir()} >= {"auth.ini", "users.db"}
    for path in private.iterdir():
        assert b"c4n4ry" not in path.read_bytes()


def test_other_hosts_names_are_refused_so_that_no_web_site_reaches_it(beyond: Running, local: Running) -> None:
    for running, login in ((beyond, (USER, PASSWORD)), (local, None)):
        url = search("127.0.0.1", running.port)
        assert answer(url, login) == answer(url, login, Host="localhost:8080") == 200
        for host in ("evil.example", f"evil.example:{running.port}", "10.evil.example", "192.168.evil.example:5000"):
            assert answer(url, login, Host=host) == 403


def test_on_this_machine_alone_no_password_is_asked_and_nobody_else_is_served(local: Running) -> None:
    assert local.address.startswith(f"http://127.0.0.1:{local.port}/#/experiments/")
    assert answer(search("127.0.0.1", local.port)) == 200
    connections = psutil.net_connections("tcp")
    assert {one.laddr.ip for one in connections if one.laddr.port == local.port and one.status == "LISTEN"} == {
        "127.0.0.1"
    }


@pytest.mark.slow
@pytest.mark.browser
def test_a_person_who_knows_the_password_finds_the_trials(browser: webdriver.Chrome, beyond: Running) -> None:
    place, page = f"{outer_address()}:{beyond.port}", beyond.address.partition("/#/")[2]
    browser.get(
        f"http://{USER}:{quote(PASSWORD, safe='')}@{place}/version"
    )  # as if typed: from now on it is sent along
    browser.get(f"http://{place}/#/{page}")
    see(browser, "20 matching runs", "r2-ratio1 lr 3e-3 seed 1 confirm")
    picture(browser, "mlflow-with-password")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_beyond_this_machine_it_wants_a_user_and_a_password(host: str, home: Home, tmp_path: Path) -> None:
    for missing in ("SWEEP_DASHBOARD_USER", "SWEEP_DASHBOARD_PASSWORD"):
        said = sweep("dashboard", "--host", host, "--home", str(home.root), cwd=tmp_path, **{**LOGIN, missing: ""})
        (line,) = said.stderr.splitlines()
        assert said.returncode == 2 and line.startswith(f"--host {host}: ") and "SWEEP_DASHBOARD_PASSWORD" in line


def refusal(home: Home, served: Served) -> str:
    with pytest.raises(Refused) as refused:
        command.serve(home, None, served)
    return str(refused.value)


def test_what_cannot_be_served_is_said_in_a_line(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    assert refusal(home, Served("192.0.2.7", port)) == "--host: 192.0.2.7 is no address of this machine"
    assert "--host: no.such.name.invalid is no address" in refusal(home, Served("no.such.name.invalid", port))
    monkeypatch.setenv("SWEEP_DASHBOARD_PASSWORD", "short")
    assert "12 characters" in refusal(home, Served("0.0.0.0", port))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "lora-sweep[auth]" in refusal(home, Served("0.0.0.0", port))


def test_at_a_terminal_it_asks(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in LOGIN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    asked = []
    answers = {"user": USER, "password": PASSWORD}
    monkeypatch.setattr("typer.prompt", lambda what, **how: asked.append((what, how)) or answers[what])
    assert command._ask_login(Served("0.0.0.0", 5000)) == Login(USER, PASSWORD)
    assert asked == [("user", {}), ("password", {"hide_input": True, "confirmation_prompt": True})]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: served beyond this machine (0.0.0.0), and not encrypted")


def test_what_answers_before_the_server_with_no_http_is_not_taken_for_it() -> None:
    """As a connection to a port in the range of outgoing ones does that meets itself: its own question comes back."""
    met = threading.Event()

    def answer(listener: socket.socket) -> None:
        while True:
            with listener.accept()[0] as one:
                one.sendall(one.recv(4096))
            met.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, subprocess.Popen(["sleep", "3"]) as server:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        command._wait_until_up(server, Served("127.0.0.1", listener.getsockname()[1]))
        assert met.is_set() and server.poll() == 0, "it was waited for, until the server ended"


def test_the_user_s_own_limits_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow.example.org")
    assert limits(Served())["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mlflow.example.org"
