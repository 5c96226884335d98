"""`sweep dashboard`: the MLflow UI over what was tracked, until Ctrl-C. Heavy libraries are imported inside it, as in
`cli.py`."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweep.arguments import HomeOption, need_writable, ran
from sweep.exits import FAILED, Refused
from sweep.study.home import Home, find_home
from sweep.study.lifeline import temporary_folder

if TYPE_CHECKING:
    from sweep.tracking.served import Login, Served

SECONDS_TO_START = 90.0
SECONDS_TO_STOP = 10.0

commands = typer.Typer()


@commands.command()
def dashboard(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Open on this study's experiment.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option(help="The address to serve on. Any but this machine's own asks for a password.")
    ] = "127.0.0.1",
    home: HomeOption = None,
) -> None:
    """Serve the MLflow UI over what was tracked, on 127.0.0.1, until Ctrl-C."""
    from sweep.tracking.served import Served

    place = find_home(home)
    name = ran(study, place)[0].name if study else None
    need_writable(place)
    serve(place, name, Served(host, port))


def serve(home: Home, study: str | None, served: Served) -> None:
    """Serve until Ctrl-C or SIGTERM; where tracking goes to a server, only say where that is.

    Raises Refused where the address is not to be had, or beyond this machine without a user and a password.
    """
    from sweep.tracking.mlflow import dashboard_address, dashboard_command, find_tracking, is_tracked

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background starts commands that ignore it
    if study is not None and not is_tracked(home, study):
        missing = f"study {study} is not in MLflow yet: `sweep run` puts it there; this shows what is"
        print(missing, file=sys.stderr, flush=True)
    if find_tracking(home).uri.startswith(("http://", "https://")):
        print(f"tracking goes to a server with a UI of its own: {dashboard_address(home, served.root(), study)}")
        return
    login = None if served.is_local else _ask_login(served)
    _need_free(served)
    command = dashboard_command(home, served.port, served.host, login is not None)
    with tempfile.TemporaryFile() as log, temporary_folder("sweep-dashboard-") as private:
        # A session of its own: Ctrl-C reaches us alone, and the server with its workers is ended as one group.
        environment = _environment(home, served, login, private)
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            print("starting MLflow's UI", file=sys.stderr, flush=True)
            _wait_until_up(server, served)
            print(f"{dashboard_address(home, served.root(), study)} (Ctrl-C stops it)", flush=True)
            server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _stop(server)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    raise Refused("the MLflow server ended by itself:", *said[-5:], code=FAILED)


def _ask_login(served: Served) -> Login:
    """Of whoever may look from elsewhere: from the environment, or asked for at a terminal. Says what that means."""
    from sweep.tracking.served import Login, given_login

    if find_spec("flask_wtf") is None:
        raise Refused(f"--host {served.host}: asking for a password needs `pip install 'lora-sweep[auth]'`")
    login = given_login(os.environ)
    if login is None and sys.stdin.isatty():
        login = Login(typer.prompt("user"), typer.prompt("password", hide_input=True, confirmation_prompt=True))
    if login is None:
        raise Refused(
            f"--host {served.host}: others could reach it, so it asks for a user and a password: set "
            "SWEEP_DASHBOARD_USER and SWEEP_DASHBOARD_PASSWORD, or leave --host out and come through a tunnel "
            f"(ssh -L {served.port}:127.0.0.1:{served.port} this-machine)"
        )
    problem = login.problem()
    if problem:
        raise Refused(f"--host {served.host}: {problem}")
    print(
        f"warning: served beyond this machine ({served.host}), and not encrypted: whoever can listen on the way reads "
        "the password too; a tunnel to 127.0.0.1 or a proxy with TLS is safer",
        file=sys.stderr,
        flush=True,
    )
    return login


def _environment(home: Home, served: Served, login: Login | None, private: Path) -> dict[str, str]:
    """private: a folder that only this user can read."""
    from sweep.tracking.mlflow import dashboard_environment
    from sweep.tracking.served import authentication, limits

    asked = authentication(login, private) if login else {}
    return {**dashboard_environment(home), **limits(served), **asked}


def _need_free(served: Served) -> None:
    family = socket.AF_INET6 if ":" in served.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((served.host, served.port))
        except socket.gaierror as error:
            raise Refused(f"--host: {served.host} is no address of this machine ({error.strerror})") from None
        except PermissionError:
            raise Refused(f"--port: {served.port} is not yours to serve on; choose one above 1023") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise Refused(f"--host: {served.host} is no address of this machine") from None
            again = f"sweep dashboard --port {served.port + 1}"
            raise Refused(f"port {served.port} is taken; choose another: {again}", code=FAILED) from None


def _wait_until_up(server: subprocess.Popen[bytes], served: Served) -> None:
    """Returns when the server answers, has ended, or has had time enough."""
    deadline = time.monotonic() + SECONDS_TO_START
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with without_proxy.open(f"{served.probe()}/health", timeout=2):
                return
        except (OSError, HTTPException):  # HTTPException: with no server yet a connection may meet itself
            time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
