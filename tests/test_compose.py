"""What docker-compose.yml promises, as far as it shows without an engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_file import PROFILES, ROOT, SECRETS, compose, resolved
from test_image import given, sent_to_the_build
from unboxed import MARK, Box, in_order, kill, start, texts_of, wait_healthy

from sweep import __version__

SET_IT = "set it in .env, as .env.example shows"


def services(profile: str) -> dict[str, Any]:
    return dict(resolved(profile)["services"])


def all_services() -> list[tuple[str, Any]]:
    return [pair for profile in PROFILES for pair in services(profile).items()]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_example_with_its_secrets_filled_in_is_valid(profile: str) -> None:
    found = compose("config", "--quiet", profile=profile, **SECRETS)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("profile", ["", *PROFILES])
def test_without_a_secret_nothing_starts_and_the_message_names_it(secret: str, profile: str) -> None:
    others = {name: value for name, value in SECRETS.items() if name != secret}
    found = compose("config", "--quiet", profile=profile, **others)
    assert found.returncode != 0
    assert f"required variable {secret} is missing a value: {SET_IT}" in found.stderr


def test_the_example_holds_no_secret_and_git_and_the_image_never_see_the_real_ones() -> None:
    example = dict(re.findall(r"^#?(\w+)=([^\s#]*)", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {name for name, value in example.items() if not value} == {*SECRETS, "HF_TOKEN"}
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not any(path.startswith(".env") for path in sent_to_the_build())


def test_every_variable_of_the_file_stands_in_the_example_with_its_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    defaults: dict[str, set[str]] = {}
    for name, default in re.findall(r"(?<!\$)\$\{(\w+)(?::-([^}]*))?", text):
        defaults.setdefault(name, set()).add(default)
    example = dict(re.findall(r"^#?(\w+)=([^\s#]*)", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert defaults.keys() == example.keys() - {"COMPOSE_PROFILES"}
    for name, values in defaults.items():
        assert example[name] in values, name
    assert example["COMPOSE_PROFILES"] in PROFILES


@pytest.mark.parametrize("profile", PROFILES)
def test_secrets_stand_in_environments_alone(profile: str) -> None:
    """`docker inspect` and `ps` show commands, labels and checks to more people than environments."""
    elsewhere = [{k: v for k, v in service.items() if k != "environment"} for service in services(profile).values()]
    assert not [text for text in texts_of(elsewhere) for secret in SECRETS.values() if secret in text]
    configs = texts_of(resolved(profile).get("configs", {}))
    assert not [text for text in configs for secret in SECRETS.values() if secret in text]
    held = {name for service in services(profile).values() for name, value in held_by(service)}
    assert held == {"POSTGRES_PASSWORD", "PGPASSWORD", "RAY_AUTH_TOKEN"}


def held_by(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in service["environment"].items():
        if any(secret in value for secret in SECRETS.values()):
            assert value in SECRETS.values(), f"{name} is more than the secret: a URL shows it"
            yield name, value


def test_no_secret_is_written_into_the_file() -> None:
    for line in (ROOT / "docker-compose.yml").read_text().splitlines():
        name, _, value = line.strip().partition(": ")
        if re.search(r"PASSWORD|TOKEN|SECRET|_KEY", name):
            assert value.startswith("${"), line


def test_every_image_is_pinned_and_ours_has_our_version() -> None:
    images = {service["image"] for _, service in all_services()}
    for image in images | {base.split(" AS ")[0] for base in given("FROM")}:
        assert re.match(r"\d+\.\d+(\.\d+)?-", image.partition(":")[2]), f"{image} moves"
    ours = {image.partition(":")[2] for image in images if image.startswith("lora-sweep:")}
    assert ours == {f"{__version__}-cpu", f"{__version__}-gpu"}


def test_nothing_listens_beyond_this_machine() -> None:
    published = [port for _, service in all_services() for port in service.get("ports", [])]
    assert {port["target"] for port in published} == {5000, 8080}
    assert {port.get("host_ip") for port in published} == {"127.0.0.1"}
    assert not any("network_mode" in service for _, service in all_services())


def test_every_service_has_a_health_check_or_runs_once_and_is_waited_for() -> None:
    for name, service in all_services():
        if service["restart"] == "no":
            assert name == "driver" and "healthcheck" not in service
        else:
            assert service["restart"] == "unless-stopped" and service["healthcheck"]["test"][0] == "CMD", name
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] == "service_healthy", (name, other)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_driver_comes_last_after_the_workers_of_its_profile(profile: str) -> None:
    order = in_order(services(profile))
    assert order[-1] == "driver" and order.index("postgres") < order.index("mlflow")
    workers = {name for name in order if name.startswith("ray-worker")}
    assert workers == {"ray-worker" if profile == "cpu" else "ray-worker-gpu"}
    devices = [services(profile)[name].get("deploy", {}).get("resources") for name in workers]
    assert (devices != [None]) == (profile == "gpu")


def test_without_a_profile_there_are_the_servers_alone() -> None:
    assert set(services("")) == {"postgres", "mlflow", "optuna-dashboard", "ray-head"}


@pytest.mark.parametrize("profile", PROFILES)
def test_head_workers_and_driver_see_one_home_at_one_path(profile: str) -> None:
    rays = {name: service for name, service in services(profile).items() if "RAY_ADDRESS" in service["environment"]}
    assert len(rays) == 3
    mounts = [[(v["source"], v["target"]) for v in service["volumes"]] for service in rays.values()]
    homes = {service["environment"]["SWEEP_HOME"] for service in rays.values()}
    assert all(each == mounts[0] for each in mounts) and homes == {"/sweep/home"}
    assert ("sweep", "/sweep") in mounts[0]
    assert all(int(service["shm_size"]) > object_store_of(service) for service in rays.values())
    tokens = {service["environment"]["RAY_AUTH_TOKEN"] for service in rays.values()}
    assert tokens == {SECRETS["RAY_AUTH_TOKEN"]}
    assert {service["environment"]["RAY_AUTH_MODE"] for service in rays.values()} == {"token"}


@pytest.mark.parametrize("profile", PROFILES)
def test_workers_give_way_to_no_other_service(profile: str) -> None:
    told = {
        service["environment"].get("RAY_worker_niceness")
        for name, service in services(profile).items()
        if "ray" in name
    }
    assert told == {"0"}


def object_store_of(service: dict[str, Any]) -> int:
    (size,) = re.findall(r"--object-store-memory=(\d+)", " ".join(texts_of(service)))
    return int(size)


@pytest.mark.parametrize(
    ("variable", "value", "changed"),
    [
        ("STUDY", "studies/vision.yaml", {"driver": ["command"]}),
        ("WORKERS", "7", {"ray-worker": ["scale"]}),
        ("WORKER_CPUS", "7", {"ray-worker": ["command", "cpus"]}),
        ("MLFLOW_PORT", "7000", {"mlflow": ["ports"]}),
        ("OPTUNA_PORT", "7000", {"optuna-dashboard": ["ports"]}),
        ("HF_TOKEN", "7", {name: ["environment"] for name in ("ray-head", "ray-worker", "driver")}),
    ],
)
def test_what_the_example_offers_to_change_changes_that_alone(
    variable: str, value: str, changed: dict[str, list[str]]
) -> None:
    before, after = services("cpu"), resolved(**{variable: value})["services"]
    differ = {name: sorted(key for key in before[name] if before[name][key] != after[name][key]) for name in before}
    assert {name: keys for name, keys in differ.items() if keys} == changed


def test_the_driver_runs_a_study_that_its_mounts_hold() -> None:
    driver = services("cpu")["driver"]
    assert driver["command"] == ["sweep", "run", "studies/quickstart.yaml", "--executor=ray"]
    (studies,) = [v for v in driver["volumes"] if v["target"] == f"{driver['working_dir']}/studies"]
    assert studies["read_only"] and Path(studies["source"]) == ROOT / "studies"
    assert (ROOT / driver["command"][2]).exists()


def test_the_file_has_no_keys_that_compose_passes_over() -> None:
    """`x-` keys are compose's own place for what the services share; each must be used."""
    raw = (ROOT / "docker-compose.yml").read_text()
    for anchor in re.findall(r"&(\w+)", raw):
        assert re.search(rf"\*{anchor}\b", raw), f"{anchor} is not used"
    assert all(key.startswith("x-") or key in ("name", "services", "configs", "volumes") for key in yaml.safe_load(raw))


@pytest.mark.parametrize(
    ("name", "restart", "ends", "comes_up"),
    [
        ("ray-worker-1", "unless-stopped", 2, True),
        ("ray-worker-1", "unless-stopped", 3, False),
        ("ray-worker-1", "no", 1, False),
        ("mlflow-1", "unless-stopped", 1, False),
    ],
)
def test_a_ray_node_that_ends_before_it_is_healthy_is_started_again_twice_and_nothing_else_is(
    tmp_path: Path, name: str, restart: str, ends: int, comes_up: bool
) -> None:
    """As by Docker where the service says so, in the twin without containers. Here it ends so many times."""
    begun, up = tmp_path / "begun", tmp_path / "up"
    words = ("sh", "-c", f"echo >> {begun}; test $(wc -l < {begun}) -gt {ends} || exit 1; touch {up}; exec sleep 60")
    checks = {"start_period": "20s", "retries": 1, "interval": "1s", "timeout": "5s"}
    service = {"image": "it", "restart": restart, "healthcheck": checks}
    env = {"PATH": "/usr/bin:/bin", MARK: str(tmp_path)}
    box = Box(name, service, words, env, ("test", "-e", str(up)), "127.0.0.1", tmp_path)
    first = start(box)
    try:
        if comes_up:
            assert wait_healthy(box, first).poll() is None and first.poll() is not None
        else:
            with pytest.raises(AssertionError, match=f"{name} is not healthy"):
                wait_healthy(box, first)
    finally:
        kill(box)
