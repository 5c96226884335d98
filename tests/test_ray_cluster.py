"""Joining a Ray cluster, being refused by one, and the one that a command starts for itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import clusters
import psutil
import pytest
from clusters import Nodes, is_in_a_unit, soon, title
from servers import free_port
from worker_units import is_alive

import sweep
from sweep.execution.ray import RayExecutor
from sweep.study.schema import Resources


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with clusters.cluster(2) as found:
        yield found


# A driver as the command is one: in a process whose environment Ray has not seen, with a line for what it raises.
DRIVER = """
import os, sys
import sweep
from sweep.execution.ray import RayExecutor
from sweep.study.schema import Resources
try:
    executor = RayExecutor(Resources.model_validate_json(sys.argv[1]), sys.argv[2] or None, 30)
    print(executor.describe(), flush=True)
    print(executor.submit(eval, sys.argv[3]).result(), flush=True)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
sys.stdin.read(1)
executor.shutdown()
"""


def driver(address: str, asked: str = "{}", unit: str = "0", cwd: Path | None = None, **joined: str) -> str:
    """All that a driver with no Ray settings but these prints, the end of it where it ends in an error."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, asked, address, unit],
        env=outsider(**joined),
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def outsider(**joined: str) -> dict[str, str]:
    return {**{k: v for k, v in clusters.environment().items() if not k.startswith("RAY_")}, **joined}


def test_with_the_token_a_driver_is_let_in_and_nothing_else_is_printed(nodes: Nodes) -> None:
    assert driver(nodes.address, RAY_AUTH_TOKEN=clusters.TOKEN) == "1 worker on 1 Ray node\n0\n"


@pytest.mark.parametrize("joined", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": "0" * 64}], ids=str)
def test_without_the_token_of_the_cluster_a_driver_is_refused_in_a_line(
    nodes: Nodes, joined: dict[str, str], tmp_path: Path
) -> None:
    began = time.monotonic()
    said = driver(nodes.address, **joined, HOME=str(tmp_path))
    assert said == (
        f"NoWorkers: the Ray cluster at {nodes.address} does not take this command: "
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of its nodes\n"
    )
    assert time.monotonic() - began < 30


def test_where_no_cluster_is_a_line_says_so_at_once() -> None:
    address, began = f"127.0.0.1:{free_port()}", time.monotonic()
    said = f"NoWorkers: RAY_ADDRESS: no Ray cluster answers at {address}; start its head, or unset it for one here\n"
    assert driver(address) == said
    assert (
        driver("auto")
        == driver("ray://10.0.0.1:10001")
        == ("NoWorkers: RAY_ADDRESS: give HOST:PORT of the head, and run the command on a node of the cluster\n")
    )
    assert time.monotonic() - began < 30


def test_without_ray_a_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError")
    said = driver("", PYTHONPATH=os.pathsep.join([str(tmp_path), clusters.paths()["PYTHONPATH"]]))
    assert said == "NoWorkers: --executor ray needs Ray: pip install 'lora-sweep[ray]'\n"


@pytest.mark.slow
def test_workers_share_a_gpu_and_without_one_they_see_none(nodes: Nodes) -> None:
    node = nodes.add(2, gpus=1)
    for asked, expected in [
        ('{"gpus": 0.5}', "2 workers on 1 Ray node\n0 1\n"),
        ('{"gpus": 0.0, "workers": 1}', "1 worker on 1 Ray node\n 2\n"),
    ]:
        unit = "__import__('os').environ['CUDA_VISIBLE_DEVICES'] + ' ' + __import__('os').environ['OMP_NUM_THREADS']"
        assert driver(nodes.address, asked, unit, **clusters.JOINED) == expected
    nodes.kill(node)


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["none", "another", "edited"])
def test_nodes_without_this_lora_sweep_are_told_of_before_patience_is_lost(
    nodes: Nodes, tmp_path: Path, theirs: str
) -> None:
    package = tmp_path / "there" / "sweep"
    missing = "raise ModuleNotFoundError(\"No module named 'sweep'\")"
    if theirs == "edited":
        shutil.copytree(Path(sweep.__file__).parent, package)
        with open(package / "lora" / "optim.py", "a") as file:
            file.write("# other\n")
    else:
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('__version__ = "0.0.1"' if theirs == "another" else missing)
    if theirs == "another":
        for room in ("execution", "study"):
            (package / room).symlink_to(Path(sweep.__file__).with_name(room))
    node = nodes.add(1, gpus=1, PYTHONPATH=str(package.parent))
    said = driver(nodes.address, '{"gpus": 1.0}', cwd=tmp_path, **clusters.JOINED)
    ours = (
        rf"lora-sweep {re.escape(sweep.__version__)} \(files \w{{8}}\), torch [\d.]+, transformers [\d.]+, peft [\d.]+"
    )
    why = {
        "none": "ModuleNotFoundError: No module named 'sweep'",
        "another": rf"lora-sweep 0\.0\.1 .*, not {ours}",
        "edited": rf"{ours}, not {ours}",
    }
    expected = (
        rf"NoWorkers: no worker starts on the nodes of the Ray cluster \({why[theirs]}\): each needs {ours}, and the "
        r"token of this command; then run the same command again"
    )
    assert re.fullmatch(expected, said.splitlines()[1]), said
    good = nodes.add(1, gpus=1)
    said = driver(nodes.address, '{"gpus": 1.0}', cwd=tmp_path, **clusters.JOINED)
    assert re.fullmatch(rf"1 worker on 1 Ray node; none on \S+ \({why[theirs]}\)\n0\n", said), said
    nodes.kill(node)
    nodes.kill(good)


@pytest.mark.slow
def test_a_cluster_of_ones_own_listens_on_this_machine_alone_and_leaves_nothing(tmp_path: Path) -> None:
    command = own_cluster(tmp_path, '{"workers": 2}', "__import__('os').environ['OMP_NUM_THREADS']")
    assert command.stdout is not None
    assert command.stdout.readline() == "2 workers on 1 Ray node\n" and command.stdout.readline() == "1\n"
    family = family_of(command)
    open_to = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert open_to and open_to <= {"127.0.0.1", "::ffff:127.0.0.1"}
    folder = folder_of(family)
    assert folder.exists()
    assert command.communicate("\n", timeout=60) == ("", None) and command.returncode == 0
    soon(lambda: not any(is_alive(process.pid) for process in family), 20)
    assert not folder.exists()
    assert not list(tmp_path.rglob("*")), "neither a token nor logs"


@pytest.mark.slow
def test_what_a_killed_driver_left_of_its_own_cluster_ends_by_itself_and_its_folder_goes_with_the_next() -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as short:  # and nobody else's
        killed, alive = (own_cluster(Path(short), "{}", unit) for unit in ("__import__('time').sleep(600)", "0"))
        family = [*family_of(killed), *family_of(alive)]
        try:
            for command, said in ((killed, []), (alive, ["0\n"])):
                assert command.stdout is not None
                assert [command.stdout.readline() for _ in range(1 + len(said))] == ["1 worker on 1 Ray node\n", *said]
            soon(lambda: any(is_in_a_unit(process) for process in family_of(killed)))
            orphans = family_of(killed)
            family = [*orphans, *family_of(alive)]
            folder, other = folder_of(orphans), folder_of(family_of(alive))
            assert {process.name() for process in orphans} >= {"raylet", "gcs_server"}
            workers = [process for process in orphans if title(process).startswith(("ray::Actor", "ray::IDLE"))]
            killed.kill()
            killed.communicate(timeout=60)
            wait_gone(workers, 30)
            assert folder.exists()
            assert driver("", TMPDIR=short, HOME=short) == "1 worker on 1 Ray node\n0\n"
            assert not folder.exists() and other.exists()
            wait_gone(orphans, 120)  # Ray's agents take a minute to see that their node is gone
            assert not folder.exists()
            assert alive.communicate("\n", timeout=60) == ("", None) and alive.returncode == 0
            assert not other.exists()
        finally:
            for process in family:  # where the test failed
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def own_cluster(root: Path, asked: str, unit: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, asked, "", unit],
        env=outsider(TMPDIR=str(root), HOME=str(root)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def family_of(command: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]


def wait_gone(family: list[psutil.Process], seconds: float) -> None:
    """Until they have ended, with nobody's help."""
    deadline = time.monotonic() + seconds
    while left := [process for process in family if is_alive(process.pid) and process.is_running()]:
        assert time.monotonic() < deadline, f"still there after {seconds:g} s: {left}"
        time.sleep(0.1)


def folder_of(family: list[psutil.Process]) -> Path:
    """All that a cluster of one's own writes is in it."""
    sessions = {word.split("=")[1] for p in family for word in p.cmdline() if word.startswith("--session-dir=")}
    (folder,) = {next(p for p in Path(session).parents if p.name.startswith("sweep-ray-")) for session in sessions}
    return folder


def test_a_cluster_of_ones_own_that_would_be_too_small_is_not_even_started() -> None:
    assert driver("", '{"gpus": 1.0, "workers": 9}').startswith("FieldError: resources.gpus: 9 workers with 1 GPU each")


def test_the_handler_of_sigterm_stays(nodes: Nodes) -> None:
    import signal

    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    came: list[int] = []
    ours = signal.getsignal(signal.SIGTERM)
    try:
        RayExecutor(Resources(), nodes.address, 30.0).shutdown()
        assert signal.getsignal(signal.SIGTERM) is ours
        os.kill(os.getpid(), signal.SIGTERM)
        soon(lambda: came == [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)
