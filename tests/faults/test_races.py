"""Several drivers at once: in one home, in two homes with one storage; and one that is killed between two writes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_sweep
import mlflow
import optuna
import pytest
from driving import journal_view, optuna_view, records_of, undisturbed
from fake_sweep import Options
from fakes import make_study
from postgres import database as database
from postgres import postgres as postgres

from sweep.study.file import dump_study
from sweep.study.home import Home
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

STUDY = make_study()
SLOWLY: Options = {"seconds": 0.2}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


def command(folder: Path, home: Home, url: str = "", study: Study = STUDY) -> list[str]:
    file = folder / f"{study.name}.yaml"
    file.write_text(dump_study(study))
    return ["run", file.name, "--home", str(home.root), *(["--set", f"storage={url}"] if url else [])]


def at_once(folder: Path, options: Options, commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each: they begin when all of them have loaded their libraries."""
    gate = folder / "gate"
    gate.mkdir()
    started = [fake_sweep.start({**options, "gate": str(gate)}, *words, cwd=folder) for words in commands]
    for process in started:
        wait_until(process, lambda: len(list(gate.iterdir())) == len(started))
    (gate / "open").touch()
    ended = [fake_sweep.finish(process) for process in started]
    assert not any("Traceback" in output for _, output in ended), ended
    return ended


def check_undisturbed(home: Home, done: Home, url: str = "") -> None:
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))
    assert optuna_view(trials_in(url or home.optuna_url)) == optuna_view(trials_in(done.optuna_url))


def trials_in(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="fake", storage=optuna.storages.RDBStorage(url)).trials


def refusals(ended: Sequence[tuple[int, str]]) -> list[str]:
    """The last line of each that did not end well."""
    assert {code for code, _ in ended} <= {0, 1}, ended
    return [output.splitlines()[-1] for code, output in ended if code]


@pytest.mark.fault(
    case="four first launches of one study at once, in a new home",
    happens="one runs it, the others say in one line who does, and exit 1",
    lost="nothing",
)
def test_four_first_launches_of_one_study(tmp_path: Path, done: Home) -> None:
    home = Home(tmp_path / "home")
    refused = refusals(at_once(tmp_path, SLOWLY, [command(tmp_path, home)] * 4))
    assert len(refused) == 3 and all("another `sweep run` works on" in line for line in refused)
    check_undisturbed(home, done)


@pytest.mark.fault(
    case="a second driver of a study while one runs",
    happens="it says in one line which process runs it, and exits 1; the first is not disturbed",
    lost="nothing",
)
def test_a_second_driver_while_one_runs(tmp_path: Path, done: Home) -> None:
    home, go = Home(tmp_path / "home"), tmp_path / "go"
    words = command(tmp_path, home)
    first = fake_sweep.start({"hold": [2, str(go)]}, *words, cwd=tmp_path)
    try:
        wait_until(first, lambda: rungs_of(home) >= 2)
        code, output = fake_sweep.run({}, *words, cwd=tmp_path)
    finally:
        go.touch()
        ended, _ = fake_sweep.finish(first)
    line = output.strip().splitlines()[-1]
    assert code == 1 and f"another `sweep run` works on {home.study(STUDY.name).path} (process {first.pid})" in line
    assert ended == 0 and "Traceback" not in output, output
    check_undisturbed(home, done)


@pytest.mark.fault(
    case="four first launches of four studies at once, in a new home",
    happens="all of them run; each database is made once",
    lost="nothing",
)
@pytest.mark.slow
@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_four_first_launches_of_four_studies(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    home, studies = Home(tmp_path / "home"), [make_study(name=f"fake-{i}") for i in range(4)]
    url = request.getfixturevalue("database") if where == "postgresql" else ""
    commands = [command(tmp_path, home, url, study) for study in studies]
    track = where == "sqlite"
    assert [code for code, _ in at_once(tmp_path, {"track": track}, commands)] == [0] * 4
    views = [optuna_view(optuna.load_study(study_name=s.name, storage=url or home.optuna_url).trials) for s in studies]
    assert all(view == views[0] for view in views) and len(views[0]) == 21
    assert all(records_of(home, study).finished_at for study in studies)
    if track:
        client = mlflow.MlflowClient(home.mlflow_url)
        for study in studies:
            experiment = client.get_experiment_by_name(study.name)
            assert experiment is not None and len(client.search_runs([experiment.experiment_id])) == 1 + 21


@pytest.mark.fault(
    case="two homes begin one study at once, with one PostgreSQL",
    happens="one runs it; the other says in one line that it is another home's, and exits 1",
    lost="nothing",
)
def test_two_homes_begin_one_study_with_one_server(tmp_path: Path, done: Home, database: str) -> None:
    homes = [Home(tmp_path / "a"), Home(tmp_path / "b")]
    ended = at_once(tmp_path, SLOWLY, [command(tmp_path, home, database) for home in homes])
    (refused,) = refusals(ended)
    assert "another home began" in refused and "c4nary" not in refused
    winner = homes[[code for code, _ in ended].index(0)]
    check_undisturbed(winner, done, database)


@pytest.mark.slow
def test_a_study_that_another_home_left_unfinished_is_refused(tmp_path: Path, done: Home, database: str) -> None:
    theirs, ours = Home(tmp_path / "theirs"), Home(tmp_path / "ours")
    kill: Options = {"kill": ["sweep.driver.session", "append_rung", "after", 9]}
    assert fake_sweep.run(kill, *command(tmp_path, theirs, database), cwd=tmp_path)[0] == -signal.SIGKILL
    for _ in range(2):  # the second time this home has a journal, too
        code, output = fake_sweep.run({}, *command(tmp_path, ours, database), cwd=tmp_path)
        assert code == 1 and "another home began" in output.splitlines()[-1]
    assert fake_sweep.run({}, *command(tmp_path, theirs, database), cwd=tmp_path)[0] == 0
    check_undisturbed(theirs, done, database)


@pytest.mark.fault(
    case="a home and a copy of it go on with one study at once, with one PostgreSQL",
    happens="whoever finds a trial that is not its own says so in one line and exits 1; run alone, the command goes on",
    lost="nothing",
)
@pytest.mark.slow
def test_a_home_and_its_copy_go_on_at_once(tmp_path: Path, done: Home, database: str) -> None:
    home, copy = Home(tmp_path / "home"), Home(tmp_path / "copy")
    kill: Options = {"kill": ["sweep.driver.session", "append_rung", "after", 3]}
    assert fake_sweep.run(kill, *command(tmp_path, home, database), cwd=tmp_path)[0] == -signal.SIGKILL
    shutil.copytree(home.root, copy.root)
    refused = refusals(at_once(tmp_path, SLOWLY, [command(tmp_path, each, database) for each in (home, copy)]))
    assert refused and all("somebody else creates trials" in line for line in refused)
    code, output = fake_sweep.run({}, *command(tmp_path, home, database), cwd=tmp_path)
    assert code == 0, output
    assert curves(home) == curves(done)
    states = Counter(trial.state.name for trial in trials_in(database) if trial.user_attrs["slot"])
    assert states == Counter(trial.state.name for trial in trials_in(done.optuna_url))
    assert not records_of(home, STUDY).warnings


def curves(home: Home) -> list[Any]:
    """What every trial was and found; not its number."""
    found = records_of(home, STUDY).trials
    return sorted(
        (t.spec.phase, t.spec.arm.name, t.spec.learning_rate, t.spec.seed, t.state, t.train_curve) for t in found
    )


POINTS = [
    ("append_asked", "before", 3),  # between ask and dispatch: Optuna has the trial, there is no journal of it
    ("append_asked", "after", 2),  # there is a journal, it was not dispatched
    ("append_rung", "before", 2),  # between result and tell: the checkpoint is there, the journal knows nothing
    ("append_rung", "after", 2),  # the journal knows, Optuna does not
    ("append_end", "after", 1),  # the journal knows that it ended
    ("tell", "after", 0),  # Optuna knows too
]


@pytest.mark.fault(
    case="the driver killed (SIGKILL) between ask and dispatch, and between result and tell",
    happens="the same command takes the study up from the journals",
    lost="nothing",
)
@pytest.mark.parametrize("where", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_a_driver_killed_between_two_writes(
    tmp_path: Path, done: Home, where: str, request: pytest.FixtureRequest
) -> None:
    home, url = Home(tmp_path / "home"), request.getfixturevalue("database") if where == "postgresql" else ""
    words = command(tmp_path, home, url)
    for name, when, call in POINTS:
        code, output = fake_sweep.run({"kill": ["sweep.driver.session", name, when, call]}, *words, cwd=tmp_path)
        assert code == -signal.SIGKILL, (name, when, output)
    code, output = fake_sweep.run({}, *words, cwd=tmp_path)
    assert code == 0, output
    check_undisturbed(home, done, url)


@pytest.mark.fault(
    case="Ctrl-C or SIGTERM within 0.2 s after an acknowledged rung, training in the command's own process; nothing is "
    "published",
    happens="what was acknowledged is kept, exit 130; the same command goes on",
    lost="nothing",
)
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ctrl_c_and_sigterm_after_a_rung_keep_what_was_acknowledged(tmp_path: Path, done: Home, seed: int) -> None:
    home, chance, options = Home(tmp_path / "home"), random.Random(seed), Options(seconds=0.03)
    words = command(tmp_path, home)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        before = rungs_of(home)
        process = fake_sweep.start(options, *words, cwd=tmp_path)
        wait_until(process, lambda before=before: rungs_of(home) > before)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.2))
        acknowledged = records_of(home, STUDY)
        process.send_signal(number)
        code, output = fake_sweep.finish(process)
        assert code == 130 and "Traceback" not in output, output
        check_kept(home, acknowledged)
    acknowledged = records_of(home, STUDY)
    assert fake_sweep.run({}, *words, cwd=tmp_path)[0] == 0
    check_kept(home, acknowledged)
    check_undisturbed(home, done)


def check_kept(home: Home, acknowledged: StudyRecord) -> None:
    now = {trial.spec.number: trial.rungs for trial in records_of(home, STUDY).trials}
    assert all(now[trial.spec.number][: len(trial.rungs)] == trial.rungs for trial in acknowledged.trials)


def rungs_of(home: Home) -> int:
    return sum(len(trial.rungs) for trial in records_of(home, STUDY).trials)


def wait_until(process: subprocess.Popen[str], reached: Any) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
