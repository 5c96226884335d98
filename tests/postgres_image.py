"""What the official PostgreSQL image does before its server starts, with Debian's programs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgres import as_postgres, find_binaries


def make_cluster(data: Path, user: str, password: str, database: str, scripts: Sequence[str]) -> None:
    """Make the data folder with one role and its database, and run `scripts`, SQL, in it as that role.

    data: an empty folder, to be reached by all: it becomes that of the user that the server runs as.
    """
    programs, lower = find_binaries(), as_postgres()
    with tempfile.NamedTemporaryFile("w", suffix=".password") as secret:
        secret.write(password)
        secret.flush()
        if lower:
            for path in (data, secret.name):
                shutil.chown(path, lower["user"], lower["group"])
        words = ["initdb", f"--pgdata={data}", f"--username={user}", f"--pwfile={secret.name}", "--no-sync"]
        words += ["--auth-host=scram-sha-256", "--auth-local=trust", "--encoding=UTF8", "--locale=C.UTF-8"]
        _call([str(programs / words[0]), *words[1:]], lower)
    for name, script in [("postgres", f'CREATE DATABASE "{database}"'), *((database, script) for script in scripts)]:
        # No server, so nobody who could connect. With -j an empty line ends a statement.
        _call(
            [str(programs / "postgres"), "--single", "-j", "-D", str(data), name], lower, f"{script.rstrip(';')};\n\n"
        )


def server_words(data: Path, address: str, port: int) -> list[str]:
    """The command of a server on TCP at `address` and `port`, and on a socket in its data folder."""
    options = [f"listen_addresses={address}", f"port={port}", f"unix_socket_directories={data}"]
    return [str(find_binaries() / "postgres"), "-D", str(data), *(word for o in options for word in ("-c", o))]


def _call(words: Sequence[str], lower: Mapping[str, Any], typed: str = "") -> None:
    done = subprocess.run(words, input=typed, text=True, capture_output=True, check=False, cwd="/", **lower)
    assert done.returncode == 0, done.stdout + done.stderr
