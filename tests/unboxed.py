"""The services of docker-compose.yml without containers: their own commands and environments, wired the same way.

What an engine would give to each is given by other means: an address and free ports (127.a.b.c), folders for volumes,
a home and a temp folder of its own, and an end to all of its processes at once. Nothing else of the file is changed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from postgres import as_postgres, find_binaries
from postgres_image import make_cluster, server_words
from servers import free_port

MARK = "UNBOXED"  # in the environment of every process of a box: what an engine knows by its control group
RESTARTS = 2  # of a Ray node until it is healthy
PGDATA = "/var/lib/postgresql/data"
# Its own address, which in a container programs find out: here they would take one that the outside can reach.
SHIMS = {
    "ray": """#!/bin/sh
[ "$1" = start ] && shift && exec {ray} start --node-ip-address={address} "$@"
exec {ray} "$@"
""",
    "hostname": """#!/bin/sh
[ "$*" = -i ] && echo {address}
""",
}


@dataclass(frozen=True)
class Wires:
    """Where the services are."""

    root: Path  # that containers' paths are under
    addresses: Mapping[str, str]  # of a service's first container; the others' follow
    ports: Mapping[tuple[str, int], int]  # (service, its port) → the free one that it has here


@dataclass(frozen=True)
class Box:
    """One container of a service, unboxed."""

    name: str
    service: Mapping[str, Any]
    words: tuple[str, ...]
    env: Mapping[str, str]
    health: tuple[str, ...]
    address: str
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"


def unbox(config: Mapping[str, Any], root: Path) -> dict[str, list[Box]]:
    """The boxes of every service of a resolved compose file. `root` must have a short name, for Ray's sockets."""
    services: dict[str, Any] = config["services"]
    wires = _wire(services, root)
    volumes = [volume for service in services.values() for volume in service.get("volumes", [])]
    for volume in sorted(volumes, key=lambda volume: len(volume["target"])):  # one may lie in another
        _mount(root, volume)
    return {
        name: [_box(name, number, service, config, wires) for number in range(service.get("scale", 1))]
        for name, service in services.items()
    }


def with_command(box: Box, *words: str) -> Box:
    """As `docker compose run SERVICE WORDS`: another command behind the same entrypoint."""
    keep = len(box.service.get("entrypoint") or [])
    return replace(box, words=(*box.words[:keep], *words))


def up(boxes: Mapping[str, Sequence[Box]], *services: str) -> dict[str, subprocess.Popen[bytes]]:
    """Start the services, each once those it depends on are as it wants them. Returns every box's first process."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    for name in in_order({name: each[0].service for name, each in boxes.items()}, services):
        for box in boxes[name]:
            for other, wanted in box.service.get("depends_on", {}).items():
                if other not in boxes and not wanted["required"]:
                    continue
                assert wanted["condition"] == "service_healthy", wanted
                for each in boxes[other]:
                    started[each.name] = wait_healthy(each, started[each.name])
            started[box.name] = start(box)
    return started


def start(box: Box) -> subprocess.Popen[bytes]:
    (box.folder / "tmp").mkdir(parents=True, exist_ok=True)
    lower = as_postgres() if is_postgres(box) else {}
    cwd = box.service.get("working_dir")
    with open(box.log, "ab") as log:
        return subprocess.Popen(
            box.words,
            env=dict(box.env),
            cwd=box.env["MOUNTS"] + cwd if cwd else "/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **lower,
        )


def wait_healthy(box: Box, first: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Until the service's own health check passes, within the time that it allows; returns its first process.

    A Ray node that ends meanwhile is started again, as by Docker where the service says so: on a busy machine it takes
    longer to start than Ray waits for it. What else ends is broken.
    """
    check = box.service["healthcheck"]
    allowed = _seconds(check["start_period"]) + check["retries"] * _seconds(check["interval"])
    deadline = time.monotonic() + allowed
    again = RESTARTS if box.name.startswith("ray-") and box.service.get("restart") == "unless-stopped" else 0
    while not is_healthy(box):
        alive, in_time = first.poll() is None, time.monotonic() < deadline
        assert (alive or again) and in_time, f"{box.name} is not healthy:\n{box.log.read_text()[-4000:]}"
        if not alive:
            kill(box)
            first, again = start(box), again - 1
        time.sleep(0.5)
    return first


def is_healthy(box: Box) -> bool:
    """What the service's own health check says, now."""
    return trouble_of(box) is None


def trouble_of(box: Box) -> str | None:
    """What the service's own health check complains of, now."""
    seconds = _seconds(box.service["healthcheck"]["timeout"])
    try:
        done = subprocess.run(box.health, env=dict(box.env), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:g} s"
    return None if done.returncode == 0 else done.stderr.decode()


def processes_in(box: Box) -> list[psutil.Process]:
    """All that were started in the box and live, daemons too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == str(box.folder):
                found.append(process)
    return found


def kill(box: Box) -> None:
    """As `docker kill`, a power cut, or the end of a container's first process: all at once, with no word."""
    while found := processes_in(box):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=5)


def stop(box: Box, first: subprocess.Popen[bytes], seconds: float = 20) -> list[psutil.Process]:
    """As `docker stop`: a signal to the first process, then an end to all. Returns what had to be killed."""
    number = signal.SIGINT if is_postgres(box) else signal.SIGTERM  # as its image says
    if first.poll() is None:
        first.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            first.wait(seconds)
    deadline = time.monotonic() + 5  # children that the first one has told to end
    while (left := processes_in(box)) and time.monotonic() < deadline:
        time.sleep(0.2)
    kill(box)
    first.wait(5)
    return left


def texts_of(found: Any) -> Iterator[str]:
    if isinstance(found, Mapping):
        for value in found.values():
            yield from texts_of(value)
    elif isinstance(found, list):
        for value in found:
            yield from texts_of(value)
    elif isinstance(found, str):
        yield found


def _wire(services: Mapping[str, Any], root: Path) -> Wires:
    """A port is what others reach a service by, as NAME:PORT anywhere in the file, or what it publishes."""
    texts, block = "\n".join(texts_of(services)), f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
    ports = {}
    for name, service in services.items():
        named = {int(port) for port in re.findall(rf"(?<![\w.-]){name}:(\d+)", texts)}
        for port in named | {int(port["target"]) for port in service.get("ports", [])}:
            ports[name, port] = free_port()
    return Wires(root, {name: f"{block}.{10 * index + 1}" for index, name in enumerate(services)}, ports)


def _box(name: str, number: int, service: Mapping[str, Any], config: Mapping[str, Any], wires: Wires) -> Box:
    block, _, last = wires.addresses[name].rpartition(".")
    address, folder = f"{block}.{int(last) + number}", wires.root / f"{name}-{number + 1}"

    def here(words: Sequence[str] | None) -> tuple[str, ...]:
        return tuple(_unboxed(word, name, service, address, wires) for word in words or [])

    own = dict(zip(service["environment"], here(list(service["environment"].values())), strict=True))
    box = Box(
        name=folder.name,
        service=service,
        words=here(service.get("entrypoint")) + here(service.get("command")),
        env=_environment(folder, address, own),
        health=here(service.get("healthcheck", {}).get("test"))[1:],
        address=address,
        folder=folder,
    )
    return _as_image_starts(box, config, wires) if is_postgres(box) else box


def is_postgres(box: Box) -> bool:
    return str(box.service["image"]).startswith("postgres:")


def _unboxed(text: str, name: str, service: Mapping[str, Any], address: str, wires: Wires) -> str:
    """A text of a service as it is here: hosts and ports, its own address, its own port, paths on its volumes."""
    for (other, port), free in wires.ports.items():
        text = re.sub(rf"(?<![\w.-]){other}:{port}(?!\d)", f"{wires.addresses[other]}:{free}", text)
    text = re.sub(r"(?<![\w.])(0\.0\.0\.0|127\.0\.0\.1|localhost)(?![\w.])", address, text)
    for (other, port), free in wires.ports.items():
        if other == name:
            text = re.sub(rf"(?<!\d){port}(?!\d)", str(free), text)
    for volume in service.get("volumes", []):
        text = re.sub(rf"(?<![\w./-]){volume['target']}(?![\w.-])", f"{wires.root}{volume['target']}", text)
    return text


def _mount(root: Path, volume: Mapping[str, Any]) -> None:
    place = Path(f"{root}{volume['target']}")
    place.parent.mkdir(parents=True, exist_ok=True)
    if volume["type"] == "volume":
        place.mkdir(exist_ok=True)
    elif not place.exists():
        place.symlink_to(volume["source"])


def _environment(folder: Path, address: str, own: Mapping[str, str]) -> dict[str, str]:
    """Nothing of ours but where programs are; what the service says goes over it."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    venv = Path(sys.executable).parent
    for name, text in SHIMS.items():
        (programs / name).write_text(text.format(ray=venv / "ray", address=address))
        (programs / name).chmod(0o755)
    path = [programs, venv, find_binaries(), "/usr/bin", "/bin"]
    passed = {name: os.environ[name] for name in ("PYTHONPATH", "HF_HUB_OFFLINE") if name in os.environ}
    return {
        "PATH": ":".join(map(str, path)),
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": f"{folder}/tmp",
        "RAY_TMPDIR": f"{folder}/tmp",
        "MOUNTS": str(folder.parent),
        MARK: str(folder),
        **passed,
        **own,
    }


def _as_image_starts(box: Box, config: Mapping[str, Any], wires: Wires) -> Box:
    """What the official image does before it starts the server: the data folder, user, database and scripts."""
    env, data, port = box.env, Path(f"{wires.root}{PGDATA}"), wires.ports["postgres", 5432]
    scripts = [
        config["configs"][entry["source"]]["content"]
        for entry in box.service.get("configs", [])
        if entry["target"].startswith("/docker-entrypoint-initdb.d/")
    ]
    make_cluster(data, env["POSTGRES_USER"], env["POSTGRES_PASSWORD"], env["POSTGRES_DB"], scripts)
    assert not box.words, "the image's own command is meant"
    return replace(box, words=tuple(server_words(data, box.address, port)), env={**env, "PGPORT": str(port)})


def in_order(services: Mapping[str, Any], wanted: Sequence[str] = ()) -> list[str]:
    """The services that are wanted (all) and all that they need, each after those that it depends on."""
    order: list[str] = []

    def add(name: str) -> None:
        for other in services[name].get("depends_on", {}):
            if other in services:
                add(other)
        if name not in order:
            order.append(name)

    for name in wanted or services:
        add(name)
    return order


def _seconds(duration: str) -> float:
    """Of "1m30s", as `docker compose config` writes durations."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(value) * units[unit] for value, unit in re.findall(r"([\d.]+)([hms])", duration))
