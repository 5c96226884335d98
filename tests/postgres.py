"""A PostgreSQL server of the tests' own: from Debian's packages, on 127.0.0.1, with a password, stopped by its id.

With SWEEP_NEEDS_POSTGRES=1, as `.ci/run` sets it, a test without PostgreSQL fails; else it is skipped with the reason.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from servers import lasting_port

NEEDED = "SWEEP_NEEDS_POSTGRES"
BINARIES = Path("/usr/lib/postgresql")
USER, PASSWORD = "sweep", "c4nary-hunter2"
SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 20
superuser_reserved_connections = 0
shared_buffers = 8MB
"""


def as_postgres() -> dict[str, Any]:
    """For subprocess: as root PostgreSQL does not start."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


class Postgres:
    """A server in a folder of its own, owned by a user that is not root: as root PostgreSQL does not start."""

    def __init__(self, binaries: Path, folder: Path):
        self.binaries, self.port, self.databases, self.folder = binaries, lasting_port(), count(), folder
        self.process: subprocess.Popen[bytes] | None = None
        (self.folder / "password").write_text(PASSWORD)
        self.as_user = as_postgres()
        if self.as_user:
            for path in (self.folder, self.folder / "password"):
                shutil.chown(path, self.as_user["user"], self.as_user["group"])
        command = [binaries / "initdb", "-D", self.data, "-U", USER, "-A", "scram-sha-256", "-N", "-E", "UTF8"]
        command += ["--locale=C", f"--pwfile={self.folder / 'password'}"]
        subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=60, **self.as_user)
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(f"{SETTINGS}port = {self.port}\n")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a database of its own."""
        name = f"optuna{next(self.databases)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def start(self) -> None:
        """Start and wait until it answers."""
        with open(self.folder / "log", "ab") as log:
            command = [self.binaries / "postgres", "-D", self.data]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", start_new_session=True, **self.as_user
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                said = (self.folder / "log").read_text()
                assert self.process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.05)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: transactions in progress are rolled back; SIGQUIT: at once, and recovered at the next start."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def restart(self, number: int = signal.SIGINT) -> None:
        self.stop(number)
        self.start()


def find_binaries() -> Path:
    """The folder of initdb and postgres; without one the test is skipped, or fails."""
    found = sorted(BINARIES.glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        why = "needs PostgreSQL (Debian: apt-get install postgresql)"
        pytest.fail(why) if os.environ.get(NEEDED) else pytest.skip(why)
    return found[-1]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="sweep-postgres-") as folder:
        server = Postgres(find_binaries(), Path(folder))
        try:
            server.start()
            yield server
        finally:
            if server.process is not None and server.process.poll() is None:
                server.stop(signal.SIGQUIT)


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The URL of a new database on a server that runs."""
    return postgres.new_database()
