"""docker-compose.yml as the real `docker compose` reads it; no engine is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECRETS = {"POSTGRES_PASSWORD": "canary-of-postgres", "RAY_AUTH_TOKEN": "canary-of-ray"}
PROFILES = ("cpu", "gpu")


def compose(*words: str, profile: str = "cpu", **environment: str) -> subprocess.CompletedProcess[str]:
    """`docker compose WORDS` with the variables of .env.example, and over them those of `environment`."""
    command = [str(Path(sys.executable).with_name("docker-compose")), "--project-directory", str(ROOT)]
    command += ["--file", str(ROOT / "docker-compose.yml"), "--env-file", str(ROOT / ".env.example")]
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"COMPOSE_PROFILES": profile, **environment}
    return subprocess.run([*command, *words], env=env, capture_output=True, text=True, check=False, timeout=60)


@cache
def resolved(profile: str = "cpu", **environment: str) -> dict[str, Any]:
    """The whole file with every variable and default filled in, as an engine would be asked for it. To be read only."""
    found = compose("config", "--format", "json", profile=profile, **{**SECRETS, **environment})
    assert found.returncode == 0, found.stderr
    return dict(json.loads(found.stdout, object_hook=_without_escapes))


def _without_escapes(found: dict[str, Any]) -> dict[str, Any]:
    """`config` writes $ as $$, so that it can be read again."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.replace("$$", "$") if isinstance(value, str) else value

    return {key: plain(value) for key, value in found.items()}
