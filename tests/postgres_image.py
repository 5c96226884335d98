"""A PostgreSQL server from Debian's packages, made as the official image makes one."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

NEEDED = "SWEEP_NEEDS_POSTGRES"


def postgres_programs() -> Path:
    """The folder of initdb, postgres and pg_isready; without one the test is skipped, or fails where `.ci/run` asks."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if pg_config := shutil.which("pg_config"):  # other places than Debian's
        found.append(Path(subprocess.check_output([pg_config, "--bindir"], text=True).strip()))
    found = [path for path in found if (path / "initdb").exists()]
    if not found:
        why = "needs PostgreSQL (Debian: apt-get install postgresql)"
        pytest.fail(why) if os.environ.get(NEEDED) else pytest.skip(why)
    return found[0]


def as_nobody() -> dict[str, Any]:
    """For subprocess: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def make_cluster(data: Path, user: str, password: str, database: str, scripts: Sequence[str] = ()) -> None:
    """A data folder with one role and its database; then `scripts`, SQL, run in it as that role.

    Its parents must be open to all: the server runs as nobody where we are root.
    """
    programs, lower = postgres_programs(), as_nobody()
    data.mkdir(parents=True, exist_ok=True)
    if lower:
        os.chown(data, lower["user"], lower["group"])
    with tempfile.NamedTemporaryFile("w", suffix=".password") as secret:
        secret.write(password)
        secret.flush()
        os.chmod(secret.name, 0o644)
        words = [programs / "initdb", f"--pgdata={data}", f"--username={user}", f"--pwfile={secret.name}"]
        words += ["--auth-host=scram-sha-256", "--auth-local=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        _call(words, lower)
    for name, script in ((database, None), *((database, script) for script in scripts)):
        single = [programs / "postgres", "--single", "-j", "-D", data]  # no server, and nobody who could connect
        sql = f'CREATE DATABASE "{name}"' if script is None else script.strip().rstrip(";")
        _call([*single, "postgres" if script is None else name], lower, f"{sql};\n\n")


def server_words(data: Path, address: str, port: int) -> list[str]:
    """The command of a server on TCP at `address` and `port`, and on a socket in the data folder's parent."""
    options = [f"listen_addresses={address}", f"port={port}", f"unix_socket_directories={data}"]
    return [str(postgres_programs() / "postgres"), "-D", str(data), *(word for o in options for word in ("-c", o))]


def _call(words: Sequence[Any], lower: Mapping[str, Any], typed: str = "") -> None:
    done = subprocess.run(
        [str(word) for word in words], input=typed, text=True, capture_output=True, check=False, cwd="/", **lower
    )
    assert done.returncode == 0, done.stdout + done.stderr
