"""`sweep dashboard`: the MLflow UI over what was tracked, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

from sweep.exits import FAILED, Refused
from sweep.study.home import Home
from sweep.tracking.mlflow import (
    dashboard_address,
    dashboard_command,
    dashboard_environment,
    find_tracking,
    is_tracked,
)

SECONDS_TO_START = 90.0
SECONDS_TO_STOP = 10.0


def serve(home: Home, study: str | None, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM; where tracking goes to a server, only say where that is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background starts commands that ignore it
    if study is not None and not is_tracked(home, study):
        print(f"study {study} is not in MLflow yet: `sweep run` puts it there; this shows what is", flush=True)
    if find_tracking(home).uri.startswith(("http://", "https://")):
        print(f"tracking goes to a server with a UI of its own: {dashboard_address(home, port, study)}")
        return
    if _taken(port):
        raise Refused(f"port {port} is taken; choose another: sweep dashboard --port {port + 1}", code=FAILED)
    command = dashboard_command(home, port)
    with tempfile.TemporaryFile() as log:
        # A session of its own: Ctrl-C reaches us alone, and the server with its workers is ended as one group.
        server = subprocess.Popen(
            command, env=dashboard_environment(home), stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_until_up(server, port)
            print(f"{dashboard_address(home, port, study)} (Ctrl-C stops it)", flush=True)
            server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _stop(server)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    raise Refused("the MLflow server ended by itself:", *said[-5:], code=FAILED)


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _wait_until_up(server: subprocess.Popen[bytes], port: int) -> None:
    """Returns when the server answers, has ended, or has had time enough."""
    deadline = time.monotonic() + SECONDS_TO_START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
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
