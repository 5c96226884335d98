"""Who may look at the MLflow UI that we serve: on this machine whoever is on it, beyond it one user with a password."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (told apart here; to this machine, the second)
SHORTEST_PASSWORD = 12  # MLflow's own rule
CONFIG = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{users}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Login:
    """The one user that may look."""

    user: str
    password: str

    def problem(self) -> str | None:
        """Why MLflow would not take it, or None."""
        if not self.user or ":" in self.user:
            return "the user's name must not be empty, and hold no colon"
        if len(self.password) < SHORTEST_PASSWORD:
            return f"the password must have {SHORTEST_PASSWORD} characters or more"
        return None


@dataclass(frozen=True)
class Served:
    """Where a UI is served."""

    host: str = "127.0.0.1"
    port: int = 5000

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def root(self, host: str = "") -> str:
        """Its address: of the machine's name where it is served on every address."""
        host = host or (socket.gethostname() if self.host in EVERYWHERE else self.host)
        return f"http://{_in_address(host)}:{self.port}"

    def probe(self) -> str:
        """Its address for a program on this machine."""
        return self.root(EVERYWHERE.get(self.host, self.host))


def limits(served: Served) -> dict[str, str]:
    """The environment in which MLflow's server answers under this machine's names alone, so that no web site can reach
    it through a name of its own that it lets point here. What the user's environment says stands."""
    names = [_in_address(name) for name in dict.fromkeys(_names(served))]
    hosts = {name.replace("[", "[[]") + ":*" for name in names}  # as fnmatch reads it; tunnels come by any port
    if served.port == 80:
        hosts |= set(names)
    ours = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(sorted(hosts)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(sorted(f"http://{host}" for host in hosts)),
    }
    return {name: os.environ.get(name) or value for name, value in ours.items()}


def authentication(login: Login, private: Path) -> dict[str, str]:
    """The environment in which MLflow's server asks for user and password, in a folder that nobody else can read.

    They are in no file and no argument; MLflow keeps the password's hash in that folder.
    """
    config = private / "auth.ini"
    config.touch(mode=0o600)
    config.write_text(CONFIG.format(users=str(private / "users.db").replace("%", "%%")), encoding="utf-8")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": login.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": login.password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def given_login(environment: Mapping[str, str]) -> Login | None:
    """`$SWEEP_DASHBOARD_USER` and `$SWEEP_DASHBOARD_PASSWORD`; None where one of them is missing."""
    user, password = (environment.get(f"SWEEP_DASHBOARD_{name}") for name in ("USER", "PASSWORD"))
    return Login(user, password) if user and password else None


def _names(served: Served) -> Iterator[str]:
    """By which names and addresses the server is reached."""
    yield from ("localhost", "127.0.0.1", "::1")
    if served.host not in EVERYWHERE:
        yield served.host
    if not served.is_local:
        yield from (socket.gethostname(), socket.getfqdn())
    if served.host not in EVERYWHERE:
        return
    import psutil

    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                yield one.address.partition("%")[0]


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
