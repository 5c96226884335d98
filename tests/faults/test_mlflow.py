"""MLflow away, hanging, damaged or gone: the study runs as it would, and MLflow is brought up to date later."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_sweep
import pytest
from driving import journal_view, records_of, undisturbed
from fake_sweep import Options
from fakes import make_study
from servers import lasting_port
from tracked import new_database as new_database
from tracked import serving, view

from sweep.study.file import dump_study
from sweep.study.home import Home
from sweep.tracking.connection import Tracking, connect

STUDY = make_study()
TRACKED: Options = {"track": True, "track_every": 0.3}
SLOWLY: Options = {"track": True, "track_every": 0.3, "seconds": 0.4}
OLD = "nothing: MLflow is a view of the journals"
REGISTRY = "nothing measured, for MLflow is a view of the journals; models that were registered in it"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "fake.yaml").write_text(dump_study(STUDY))
    return Home(tmp_path / "home")


@pytest.fixture
def server_home(tmp_path: Path, new_database: Path) -> Path:
    (tmp_path / "server.db").write_bytes(new_database.read_bytes())
    return tmp_path


def start(home: Home, options: Options, port: int | None) -> subprocess.Popen[str]:
    server = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"} if port else {}
    words = ["run", "fake.yaml", "--home", str(home.root)]
    return fake_sweep.start(options, *words, cwd=home.root.parent, MLFLOW_HTTP_REQUEST_TIMEOUT="5", **server)


def run(home: Home, options: Options, port: int | None) -> str:
    """What the command says; it exits 0."""
    code, output = fake_sweep.finish(start(home, options, port))
    assert code == 0 and "Traceback" not in output, output
    return output


def check_warned(output: str, *says: str) -> None:
    line = output.splitlines()[-1]
    assert line.startswith("warning: MLflow at ") and "is not up to date" in line, output
    assert all(words in line for words in ("the same `sweep run` command brings it up to date", *says)), line


def check_tracked(home: Home, uri: str) -> None:
    """MLflow holds what the journals tell, each point once; and nothing is left running."""
    held, record = view(Tracking(uri, None), STUDY), records_of(home, STUDY)
    assert held.parent.info.status == "FINISHED"
    assert held.parent.data.tags["sweep.trials"] == "11 complete, 10 pruned"
    assert set(held.children) == {trial.spec.number for trial in record.trials}
    for trial in record.trials:
        run = held.children[trial.spec.number]
        points = held.points(run)
        assert points["train_loss"] == trial.train_curve
        assert points["eval_loss"] == trial.eval_curve
        assert len(points["peak_memory_bytes"]) == 1
        assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[str(trial.state)]
        assert run.info.end_time == round((trial.ended_at or 0) * 1000)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def rungs(home: Home) -> int:
    return sum(len(trial.rungs) for trial in records_of(home, STUDY).trials)


def runs_at(port: int) -> int:
    """How many runs the server holds."""
    import mlflow

    client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name("fake")
    return len(client.search_runs([experiment.experiment_id])) if experiment else 0


@pytest.mark.fault(
    case="MLflow's server down from the start, up later",
    happens="the study ends as it would, with a warning; the same command then brings MLflow up to date",
    lost=OLD,
)
def test_a_server_that_comes_up_later(home: Home, done: Home, server_home: Path) -> None:
    port = lasting_port()
    check_warned(run(home, TRACKED, port))
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))
    with serving(server_home, port):
        assert "warning" not in run(home, TRACKED, port)
        check_tracked(home, f"http://127.0.0.1:{port}")


@pytest.mark.fault(
    case="MLflow's server killed in the middle of a study, and back later",
    happens="training goes on; when the server is back, so are the runs",
    lost=OLD,
)
@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back(home: Home, done: Home, server_home: Path) -> None:
    port = lasting_port()
    back = home.root.parent / "back"
    with serving(server_home, port) as server:
        process = start(home, {**SLOWLY, "hold": [18, str(back)]}, port)
        wait_for(process, lambda: runs_at(port) > 3)
        os.killpg(server.pid, signal.SIGKILL)
    before = rungs(home)
    wait_for(process, lambda: rungs(home) > before + 5)  # training does not wait for it
    with serving(server_home, port):
        back.touch()
        code, output = fake_sweep.finish(process)
        assert code == 0 and "warning" not in output, output
        check_tracked(home, f"http://127.0.0.1:{port}")
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))


@pytest.mark.fault(
    case="MLflow's server hangs (SIGSTOP) in the middle of a study",
    happens="training goes on; the study ends as it would, with a warning where the server still hangs at its end",
    lost=OLD,
)
@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.slow
def test_a_server_that_hangs(home: Home, done: Home, server_home: Path, comes_back: bool) -> None:
    port = lasting_port()
    with serving(server_home, port) as server:
        process = start(home, SLOWLY, port)
        wait_for(process, lambda: runs_at(port) > 3)
        os.killpg(server.pid, signal.SIGSTOP)
        try:
            before = rungs(home)
            wait_for(process, lambda: rungs(home) > before + 5)
            if not comes_back:
                code, output = fake_sweep.finish(process)
                assert code == 0
                check_warned(output)
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        if comes_back:
            code, output = fake_sweep.finish(process)
            assert code == 0 and "warning" not in output, output
        else:
            assert "warning" not in run(home, TRACKED, port)
        check_tracked(home, f"http://127.0.0.1:{port}")
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))


@pytest.mark.fault(
    case="mlflow.db damaged",
    happens="the study ends as it would, with a warning that says to move the file away; the command makes it anew",
    lost=REGISTRY,
)
@pytest.mark.parametrize(
    "damage", ["no header", *(pytest.param(d, marks=pytest.mark.slow) for d in ("truncated", "flipped"))]
)
def test_a_damaged_database(home: Home, done: Home, new_database: Path, damage: str) -> None:
    home.root.mkdir()
    content = new_database.read_bytes()
    damaged = {
        "no header": b"\0" * 100 + content[100:],
        "truncated": content[: len(content) // 2],
        "flipped": bytes(byte ^ 0x55 if i > 2000 and i % 7 == 0 else byte for i, byte in enumerate(content)),
    }[damage]
    file = home.root / "mlflow.db"
    file.write_bytes(damaged)
    check_warned(run(home, TRACKED, None), "move that file away")
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))
    file.rename(home.root / "damaged.db")
    assert "warning" not in run(home, TRACKED, None)
    check_tracked(home, home.mlflow_url)


@pytest.mark.fault(
    case="mlflow.db removed, while a study runs or later",
    happens="it is made anew from the journals",
    lost=REGISTRY,
)
@pytest.mark.slow
def test_a_removed_database(home: Home, new_database: Path) -> None:
    home.root.mkdir()
    file = home.root / "mlflow.db"
    file.write_bytes(new_database.read_bytes())
    process = start(home, SLOWLY, None)
    wait_for(process, lambda: rungs(home) > 8)
    file.unlink()
    code, output = fake_sweep.finish(process)
    assert code == 0 and "warning" not in output, output
    check_tracked(home, home.mlflow_url)
    connect(Tracking(home.mlflow_url, None)).create_registered_model("mine")
    file.unlink()
    assert "warning" not in run(home, TRACKED, None)
    anew = Path(shutil.copy(file, home.root / "anew.db"))  # by its old name this process still has the one removed
    check_tracked(home, f"sqlite:///{anew}")
    assert not connect(Tracking(f"sqlite:///{anew}", None)).search_registered_models(), "no journal tells of it"
