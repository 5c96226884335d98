"""Servers that a test starts: on 127.0.0.1, stopped by their process id."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lasting_port() -> int:
    """A free port for a server that will be down for a while: no outgoing connection is given one below 32768."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], health: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; the block begins when `health` answers. It leads a group of its own."""
    with open(log, "wb") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not _answers(health):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield server
    finally:
        with suppress(ProcessLookupError):  # a test may have killed it
            os.killpg(server.pid, signal.SIGTERM)  # its own session: the workers too
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False
