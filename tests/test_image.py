"""What the Dockerfile promises, as far as it shows without an engine."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from compose_file import PROFILES, ROOT, resolved
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from unboxed import texts_of

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's: (RUN, its words)."""
    joined = re.sub(r"\\\n", " ", "".join(line for line in DOCKERFILE.splitlines(True) if not line.startswith("#")))
    split = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in split]


def given(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def sent_to_the_build() -> set[str]:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return set(exclude_paths(str(ROOT), patterns))


def test_what_the_image_copies_is_there_and_reaches_the_build() -> None:
    sent = sent_to_the_build()
    sources = [word for rest in given("COPY") if "--from=" not in rest for word in shlex.split(rest)[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and source in sent, source
    tops = {path.split("/")[0] for path in sent} - {".dockerignore", "Dockerfile"}
    assert tops == {source.split("/")[0] for source in sources}, "the build is sent what it does not copy"
    assert any(path.startswith("sweep/report/templates/") for path in sent)
    assert not [path for path in sent if "__pycache__" in path]


def test_the_image_has_the_pinned_versions_and_a_python_that_suits_them() -> None:
    (python,) = {base.split(" AS ")[0] for base in given("FROM")}
    version = re.match(r"python:([\d.]+)-", python)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version and version[1] in SpecifierSet(project["requires-python"])
    assert f"on Python {version[1].rpartition('.')[0]}." in (ROOT / "constraints.txt").read_text()
    installs = [rest for rest in given("RUN") if "pip install" in rest]
    assert len(installs) == 4 and not any("==" in rest for rest in installs)
    before = instructions()[: instructions().index(("RUN", installs[0]))]
    assert ("COPY", "constraints.txt ./") in before
    assert ("WORKDIR", "/build") in before and "PIP_CONSTRAINT=/build/constraints.txt" in before[1][1]
    assert "torch" in pinned()


def test_our_containers_run_without_root_and_without_privileges() -> None:
    assert given("USER") == ["1000:1000"]
    assert instructions()[-1][0] == "CMD" and instructions()[-2][0] == "USER"
    for service in (s for profile in PROFILES for s in resolved(profile)["services"].values()):
        assert not service.get("privileged") and "user" not in service
        if service["image"].startswith("lora-sweep:"):
            assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def pinned() -> dict[str, str]:
    lines = (line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(line[0]): line[1] for line in lines if len(line) == 2}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_command_comes_from_a_pinned_package_that_the_image_installs(profile: str) -> None:
    installed = installed_with(extras_of(profile))
    assert installed - pinned().keys() - {"lora-sweep"} <= linux_cuda() | {"pip"}
    for name, service in resolved(profile)["services"].items():
        if not service["image"].startswith("lora-sweep:"):
            continue
        for program in programs_of(service):
            if program in ("sh", "python", "hostname"):  # every Debian image has them
                continue
            path = shutil.which(program, path=str(Path(sys.executable).parent))
            assert path, f"{name} runs {program}, which is not there"
            assert owner_of(program) in installed, f"{name} runs {program}, which the image does not install"
        if "postgresql://" in " ".join(texts_of(service)):
            assert {"psycopg", "psycopg-binary"} <= installed


def extras_of(profile: str) -> list[str]:
    """Of the image of the workers: the build argument, else the Dockerfile's default."""
    worker = resolved(profile)["services"]["ray-worker" if profile == "cpu" else "ray-worker-gpu"]
    (default,) = (rest.partition("=")[2] for rest in given("ARG") if rest.startswith("EXTRAS="))
    return str(worker["build"]["args"].get("EXTRAS", default)).split(",")


def installed_with(extras: list[str]) -> set[str]:
    """Every package that `pip install lora-sweep[extras]` brings, by the metadata of those installed here."""
    found: set[str] = set()
    wanted = [Requirement(f"lora-sweep[{','.join(extras)}]")]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        asked = {*requirement.extras} or {""}
        found.add(name)
        for text in requires_of(name):
            needed = Requirement(text)
            if any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in asked):
                known = canonicalize_name(needed.name) in found and needed.extras <= {""}
                if not known:
                    wanted.append(needed)
    return found


def requires_of(name: str) -> list[str]:
    if name == "lora-sweep":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        optional = project["optional-dependencies"]
        return [*project["dependencies"], *(f"{r}; extra == '{e}'" for e in optional for r in optional[e])]
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


def linux_cuda() -> set[str]:
    """What torch's CUDA build brings is pinned by torch itself."""
    return {canonicalize_name(Requirement(r).name) for r in distribution("torch").requires or [] if "nvidia" in r}


def programs_of(service: dict[str, Any]) -> set[str]:
    """The first words of a service's entrypoint, command and check, and of the commands that its shell runs."""
    check = service.get("healthcheck", {}).get("test", [])[1:]
    commands = [words for words in (service.get("entrypoint"), service.get("command"), check) if words]
    found = {words[0] for words in commands}
    for _, _, script in (words[:3] for words in commands if words[0] == "sh"):
        words = list(shlex.shlex(script, posix=True, punctuation_chars=";()"))
        begins = {";", "(", "exec"}
        begun = {word for before, word in zip([";", *words], words, strict=False) if before in begins}
        found |= {word for word in begun - {"exec"} if not word.startswith("$")}  # arguments: they are the command
    return found


def owner_of(program: str) -> str:
    """The package whose command it is."""
    for name in {name for names in packages_distributions().values() for name in names}:
        scripts = distribution(name).entry_points.select(group="console_scripts")
        if program in {script.name for script in scripts}:
            return canonicalize_name(name)
    return "nobody"
