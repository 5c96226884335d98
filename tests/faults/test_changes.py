"""A study that goes on with something changed: what would spoil the answer is refused, the rest is told."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_sweep
import pytest
from driving import journal_view, records_of, undisturbed
from fake_sweep import Options
from fakes import make_study
from peft_reference import MINILM
from tracked import new_database as new_database
from tracked import view

from sweep.report.report import write_report
from sweep.study.file import dump_study
from sweep.study.home import Home
from sweep.study.schema import Study
from sweep.tracking.journal import read_events
from sweep.tracking.mlflow import find_tracking, project
from sweep.training.locate import locate_model

STUDY = make_study()
DAY, YEAR = 86_400.0, 31_536_000.0


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def command(home: Home, options: Options, study: Study = STUDY) -> tuple[int, str]:
    folder = home.root.parent
    (folder / "fake.yaml").write_text(dump_study(study))
    return fake_sweep.run(options, "run", "fake.yaml", "--home", str(home.root), cwd=folder)


def begin(home: Home, rungs: int = 9, study: Study = STUDY, **options: Any) -> None:
    """Begin the study in a process that is killed after some rungs."""
    kill: Options = {"kill": ["sweep.driver.session", "append_rung", "after", rungs], **options}  # type: ignore[typeddict-item]
    assert command(home, kill, study)[0] == -signal.SIGKILL


def contents(home: Home) -> dict[str, bytes]:
    """Every file but the cache, where new data are put beside the old, and the lock, which names who held it last."""
    files = sorted(path for path in home.root.rglob("*") if path.is_file())
    return {
        str(path): path.read_bytes() for path in files if not path.is_relative_to(home.cache) and path.name != "lock"
    }


@pytest.mark.fault(
    case="resuming with a changed study file",
    happens="refused with the lines that differ, exit 2; with the file as it was the same command goes on",
    lost="nothing",
)
def test_a_changed_study_file(home: Home, done: Home) -> None:
    begin(home)
    before = contents(home)
    code, output = command(home, {}, make_study(train={"steps": 4, "batch_size": 2}))
    assert code == 2 and "Traceback" not in output
    assert "give this one another name" in output and "- train.batch_size: 1\n+ train.batch_size: 2" in output
    assert contents(home) == before
    assert command(home, {})[0] == 0
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))


@pytest.mark.fault(
    case="resuming with changed data, or with other weights of the model",
    happens="refused in a line that names the field; with both as they were the same command goes on",
    lost="nothing",
)
@pytest.mark.parametrize(
    ("file", "field"),
    [("rows.csv", "data.source"), pytest.param("model/model.safetensors", "model", marks=pytest.mark.slow)],
)
def test_changed_data_and_another_model(tmp_path: Path, home: Home, file: str, field: str) -> None:
    """Real files and their real fingerprints; only the training is not."""
    texts = [f"{'A late goal' if i % 2 else 'Rates may fall'}, as no. {i} tells," for i in range(40)]
    rows = "".join(f'"{text}",{"sport" if i % 2 else "business"}\n' for i, text in enumerate(texts))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    model = tmp_path / "model"
    shutil.copytree(locate_model(MINILM).path, model, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.onnx"))
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    data = {"source": str(tmp_path / "rows.csv"), "max_length": 16, "validation": 0.2, "test": 0.2}
    study = make_study(model=str(model), data=data)

    begin(home, 5, study, inputs=True)
    before, changed = contents(home), tmp_path / file
    content = changed.read_bytes()
    changed.write_bytes(content.replace(b"goal", b"gaol") if field == "data.source" else content[:-1] + b"\0")
    code, output = command(home, {"inputs": True}, study)
    assert code == 2 and "Traceback" not in output
    assert f"{field}: " in output and "has changed since the study began" in output
    assert contents(home) == before
    changed.write_bytes(content)
    assert command(home, {"inputs": True}, study)[0] == 0
    assert records_of(home, study).finished_at


@pytest.mark.fault(
    case="resuming with other versions of packages, as their metadata tell them",
    happens="the study goes on; journal, log and report name what changed",
    lost="nothing",
)
def test_changed_versions(tmp_path: Path, home: Home, done: Home) -> None:
    begin(home, 5, versions={"torch": "2.99.0", "mlflow": "9.0"})
    begin(home, 5)
    code, output = command(home, {})
    record = records_of(home, STUDY)
    (warning,) = record.warnings
    assert code == 0 and f"warning: {warning}" in " ".join(output.split())
    assert re.search(r"\(torch 2\.99\.0 → 2\.\d+\.\d+\S*\)", warning)
    without = replace(record, warnings=())
    assert journal_view(without) == journal_view(records_of(done, STUDY))
    write_report(STUDY, record, tmp_path / "report")
    assert "torch 2.99.0 → 2." in (tmp_path / "report" / "report.md").read_text()
    assert "torch 2.99.0 → 2." in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.fault(
    case="the clock, as Python tells it to the command, jumps while a study runs, or is set between two sessions: back "
    "a day, ahead a year",
    happens="journals, sessions, reports and MLflow tell times in the order in which things happened",
    lost="nothing",
)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param([3, -DAY], None, id="back a day"),
        pytest.param([3, YEAR], None, id="ahead a year", marks=pytest.mark.slow),
        pytest.param(None, [-1, -DAY], id="set back between sessions", marks=pytest.mark.slow),
        pytest.param([-1, YEAR], None, id="was a year ahead at first"),
    ],
)
def test_clock_jumps(
    tmp_path: Path,
    home: Home,
    done: Home,
    new_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: list[float] | None,
    then: list[float] | None,
) -> None:
    begin(home, 9, **({"jump": first} if first else {}))
    code, output = command(home, {"jump": then} if then else {})
    assert code == 0, output
    record = records_of(home, STUDY)
    assert journal_view(record) == journal_view(records_of(done, STUDY))

    folder = home.study("fake")
    told = [event["time"] for event in read_events(folder.journal)]
    assert told == sorted(told)
    for trial in record.trials:
        times = [trial.asked_at, *(rung.time for rung in trial.rungs), trial.ended_at or 0.0]
        assert times == sorted(times) and told[0] <= times[0] and times[-1] <= told[-1]
    (began, stopped), (again, ended) = record.sessions
    assert began < stopped < again < ended and ended - began < 600, "seconds, not days"

    write_report(STUDY, record, tmp_path / "report")
    (wall,) = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "Wall time" in line]
    assert re.search(r"\| \d+(\.\d+)? m?s \|", wall), wall
    assert all(float(left) < 600 for left in re.findall(r"(-?[\d.]+) s left", output))

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (home.root / "mlflow.db").write_bytes(new_database.read_bytes())
    project(STUDY, folder, find_tracking(home))
    held = view(find_tracking(home), STUDY)
    for each in (held.parent, *held.children.values()):
        points = [
            p.timestamp for key in each.data.metrics for p in held.client.get_metric_history(each.info.run_id, key)
        ]
        assert all(each.info.start_time <= at <= each.info.end_time for at in points)
        assert 0 <= each.info.end_time - each.info.start_time < 600_000
