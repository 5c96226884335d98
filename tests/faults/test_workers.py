"""Worker processes of the real command: killed, hung, out of memory, interrupted, and orphaned by a killed driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commands import SWEEP
from soak import MARK, Soak
from test_kill import SMALL
from tiny_texts import save_tiny_llama, write_lines
from worker_units import parent_of, wait_for

from sweep.study.home import Home
from sweep.study.records import FAILED, INFEASIBLE
from sweep.tracking.journal import StudyRecord, read_study_record

TESTS = Path(__file__).parents[1]
STUDY = """
name: tiny
model: {folder}/llama
task: causal-lm
data: {{source: {folder}/texts.txt, max_length: 12, validation: 0.2, test: 0.2}}
arms: {{rank: [4, 8], alpha_ratio: [1], target_modules: [[q_proj]], full_finetuning: true}}
tune: {{learning_rate: [1.0e-3, 3.0e-3], full_finetuning: {{learning_rate: [1.0e-4, 3.0e-4]}}}}
train: {{steps: 12, batch_size: 4, precision: float32}}
search: {{rungs: [4, 12]}}
confirm: {{seeds: [1], reference: 8, epsilon: 0.05}}
"""
LOCAL = ("--executor", "local", "--set", "resources.workers=2")
RUN_AGAIN = [(signal.SIGINT, "rung"), (signal.SIGTERM, "probe")]  # once each signal, and each moment with results
# The command, with another function where the workers train or prepare.
WITH_OTHER_WORK = """
import sys
from dataclasses import replace
from functools import partial
import worker_units as units
from sweep.cli import main
from sweep.driver import driver
from sweep.execution.worker import Work
driver.run_study = partial(driver.run_study, work=replace(Work(), {work}))
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder / "llama")
    write_lines(folder / "texts.txt", 100, 0)
    (folder / "tiny.yaml").write_text(STUDY.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def calm(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """What an undisturbed run of the tiny study finds, in one process."""
    with running(tmp_path_factory.mktemp("calm"), command(tiny)) as soak:
        code, log = finish(soak)
    assert code == 0, log
    return record_of(soak)


@contextmanager
def running(root: Path, words: list[str], name: str = "tiny") -> Iterator[Soak]:
    """The command in a process group of its own, as a terminal gives it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SWEEP_", "MLFLOW_"))}
    paths = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "HF_HUB_OFFLINE": "1"}
    soak = Soak(words, Home(root / "home").study(name), {**clean, **paths}, root / "log", cwd=root)
    root.mkdir(parents=True, exist_ok=True)
    with open(soak.log, "ab") as log:
        soak.driver = subprocess.Popen(
            words,
            env={**soak.environment, MARK: str(soak.folder.path)},
            cwd=root,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield soak
    finally:
        soak.kill_survivors()
        soak.driver.wait(20)


def command(tiny: Path, *words: str) -> list[str]:
    return [*SWEEP, "run", str(tiny / "tiny.yaml"), "--home", "home", *words]


def other_work(tiny: Path, work: str, *words: str) -> list[str]:
    return [sys.executable, "-c", WITH_OTHER_WORK.format(work=work), *command(tiny, *words)[len(SWEEP) :]]


def record_of(soak: Soak) -> StudyRecord:
    return read_study_record(soak.folder)


def finish(soak: Soak, seconds: float = 900) -> tuple[int, str]:
    assert soak.driver is not None
    code = soak.driver.wait(seconds)
    soak.wait_gone()
    return code, soak.log.read_text().replace(" \n", " ")  # as it was before the console broke its lines


def wait_while_it_runs(soak: Soak, holds: Callable[[], object], what: str) -> None:
    def held() -> bool:
        assert soak.driver is not None and soak.driver.poll() is None, soak.log.read_text()
        return bool(holds())

    wait_for(held, what, 300)


def wait_for_results(soak: Soak, n: int) -> None:
    wait_while_it_runs(soak, lambda: soak.results() >= n, "results")


def wait_for_probe(soak: Soak) -> None:
    """Until a process that measures the cost of an arm is at it."""
    wait_while_it_runs(soak, lambda: "measuring the cost of" in soak.log.read_text(), "the probes")
    wait_while_it_runs(soak, lambda: probing(soak), "a probe's process")


def started_by(soak: Soak, module: bytes) -> list[int]:
    """Those of the command's processes that a module of multiprocessing started."""
    found = []
    for pid in soak.survivors():
        with suppress(OSError):  # it has ended since
            if module in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def probing(soak: Soak) -> list[int]:
    """Processes that a fork server has forked."""
    servers = started_by(soak, b"forkserver")
    return [pid for pid in servers if parent_of(pid) in servers]


def trainers(soak: Soak) -> list[int]:
    """The worker processes themselves, without what they started."""
    return started_by(soak, b"spawn_main")


def curves(record: StudyRecord) -> dict[tuple[str, float, int, str], tuple[str | None, list[float]]]:
    """By what a trial is: its number depends on which worker was ready first."""
    return {
        (t.spec.arm.name, t.spec.learning_rate, t.spec.seed, t.spec.phase): (
            t.state,
            [loss for _, loss in t.train_curve],
        )
        for t in record.trials
    }


def assert_same(found: StudyRecord, expected: StudyRecord, tolerance: float, but: str = "") -> None:
    """The same trials, states and losses, of all arms but one."""
    records = found, expected
    ours, theirs = ({cell: of for cell, of in curves(r).items() if cell[0] != but} for r in records)
    assert ours.keys() == theirs.keys() and len(found.trials) == len(curves(found))
    for cell, (state, losses) in theirs.items():
        assert ours[cell][0] == state, cell
        assert ours[cell][1] == pytest.approx(losses, abs=tolerance), cell


def go_on(root: Path, tiny: Path, calm: StudyRecord, *words: str) -> None:
    """The same command again, to its end: the trials and losses of an undisturbed run, what was acknowledged kept."""
    before = read_study_record(Home(root / "home").study("tiny"))
    with running(root, command(tiny, *words)) as soak:
        code, log = finish(soak)
    assert code == 0, log
    assert_same(record_of(soak), calm, 1e-5)
    after = {trial.spec.number: trial.rungs for trial in record_of(soak).trials}
    assert all(after[trial.spec.number][: len(trial.rungs)] == trial.rungs for trial in before.trials)


def quickstart(root: Path, *words: str) -> list[str]:
    sets = [word for override in SMALL for word in ("--set", override)]
    return [*SWEEP, "run", str(TESTS.parent / "studies/quickstart.yaml"), "--home", "home", *sets, *words]


@pytest.mark.slow
@pytest.mark.fault(
    case="a worker process killed in the middle of a step",
    happens="another takes its place and trains the pack's rung again; the command ends with exit code 0",
    lost="nothing",
)
def test_a_worker_killed_mid_step_leaves_the_loss_curves_of_an_undisturbed_run(tmp_path: Path) -> None:
    with running(tmp_path / "calm", quickstart(tmp_path), "quickstart") as calm:
        code, log = finish(calm)
        assert code == 0, log
    with running(tmp_path / "shaken", quickstart(tmp_path, *LOCAL), "quickstart") as shaken:
        for n in (1, 6):
            wait_for_results(shaken, n)
            wait_while_it_runs(shaken, lambda: len(trainers(shaken)) == 2, "both workers")
            for pid in trainers(shaken):  # one of them at least is in a step
                os.kill(pid, signal.SIGKILL)
        code, log = finish(shaken)
        assert code == 0 and "2 workers with 1 thread each" in log, log
        assert log.count("was lost, and another tries again: killed by signal 9") >= 2
    assert_same(record_of(shaken), record_of(calm), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("executor", [(), LOCAL], ids=["inline", "local"])
@pytest.mark.parametrize("moment", ["rung", "probe"])
@pytest.mark.fault(
    case="the driver killed with SIGKILL, in a rung and in a probe, with worker processes and without",
    happens="all that it started ends within seconds; the same command goes on",
    lost="nothing",
)
def test_a_killed_driver_leaves_no_process_behind(
    tmp_path: Path, tiny: Path, calm: StudyRecord, executor: tuple[str, ...], moment: str
) -> None:
    with running(tmp_path, command(tiny, *executor)) as soak:
        if moment == "rung":
            wait_for_results(soak, 1)
            assert len(trainers(soak)) == (2 if executor else 0)
        else:
            wait_for_probe(soak)
        assert soak.driver is not None
        soak.driver.kill()
        soak.driver.wait(20)
        wait_for(lambda: not soak.survivors(), "the end of all that it started", 10)
    go_on(tmp_path, tiny, calm, *executor)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["start", "rung", "probe"])
@pytest.mark.fault(
    case="Ctrl-C or SIGTERM while workers train, or probe",
    happens="workers end at once; the command says that the state is saved and ends with exit code 130; the same "
    "command goes on",
    lost="nothing",
)
def test_an_interrupt_ends_command_and_workers_within_seconds(
    tmp_path: Path, tiny: Path, calm: StudyRecord, number: signal.Signals, moment: str
) -> None:
    """Ctrl-C and Slurm's SIGTERM reach every process of the group at once."""
    with running(tmp_path, command(tiny, *LOCAL)) as soak:
        if moment == "start":
            wait_while_it_runs(soak, lambda: trainers(soak), "a worker")
        elif moment == "rung":
            wait_for_results(soak, 1)
        else:
            wait_for_probe(soak)
        assert soak.driver is not None
        began = time.monotonic()
        os.killpg(soak.driver.pid, number)
        code = soak.driver.wait(60)
        took = time.monotonic() - began
        wait_for(lambda: not soak.survivors(), "the end of all that it started", 10)
        log = soak.log.read_text()
        assert code == 130, log
        assert took < 15, f"{took} s"  # of which five may go to what is tracked
        assert "\nstopping\n" in log  # at once, before what takes seconds
        assert log.endswith("interrupted; the state is saved, and the same command goes on from there\n"), log
        assert "Traceback" not in log and "Warning" not in log, log
    if (number, moment) in RUN_AGAIN:
        go_on(tmp_path, tiny, calm, *LOCAL)


@pytest.mark.slow
@pytest.mark.fault(
    case="a worker that dies every time it trains one arm",
    happens="its trials fail after three workers, each with the reason; the others finish; exit code 1 with a line",
    lost="the trials of that arm",
)
def test_an_arm_that_kills_every_worker_fails_alone(tmp_path: Path, tiny: Path, calm: StudyRecord) -> None:
    words = other_work(tiny, "train_rung=partial(units.train_but, 'killed', 'r4-ratio1')", *LOCAL)
    with running(tmp_path, words) as soak:
        code, log = finish(soak)
    assert code == 1, log
    assert "2 trials failed; the reasons are in the report's trials.csv" in log.splitlines()[-1]
    assert "Traceback" not in log
    for trial in record_of(soak).trials:
        if trial.spec.arm.r == 4:
            reason = "its worker was lost 3 times: killed by signal 9, perhaps for want of memory"
            assert (trial.state, trial.reason) == (FAILED, reason)
    assert_same(record_of(soak), calm, 1e-5, but="r4-ratio1")
    assert record_of(soak).finished_at
    rows = (tmp_path / "reports" / "tiny" / "trials.csv").read_text()
    assert rows.count("its worker was lost 3 times") == 2


@pytest.mark.slow
@pytest.mark.fault(
    case="out of memory in one trial of a pack",
    happens="the pack is tried in halves, then the trial alone: it does not fit on this device; the others finish",
    lost="nothing: that a trial does not fit is a result",
)
def test_out_of_memory_in_one_trial_of_a_pack_spares_the_others(tmp_path: Path, tiny: Path, calm: StudyRecord) -> None:
    words = other_work(tiny, "train_rung=partial(units.train_but, 'no memory', 'r4-ratio1')", *LOCAL)
    with running(tmp_path, words) as soak:
        code, log = finish(soak)
    assert code == 0, log
    assert "failed together and are tried in halves" in log
    for trial in record_of(soak).trials:
        if trial.spec.arm.r == 4:
            assert trial.state == INFEASIBLE and trial.reason.startswith("does not fit on this device")
    assert_same(record_of(soak), calm, 1e-5, but="r4-ratio1")
    (first,) = [t.reason for t in record_of(soak).trials if t.spec.arm.r == 4 and "as trial" not in t.reason]
    assert "can't allocate memory" in first


@pytest.mark.slow
@pytest.mark.fault(
    case="a trial that hangs",
    happens="its worker is ended when its time is over, and another tries again",
    lost="nothing",
)
def test_a_hung_worker_is_ended_and_its_pack_trained_again(tmp_path: Path, tiny: Path, calm: StudyRecord) -> None:
    with running(tmp_path, command(tiny, *LOCAL, "--set", "resources.seconds_per_rung=30")) as soak:
        wait_for_results(soak, 1)
        for pid in trainers(soak):
            os.kill(pid, signal.SIGSTOP)
        code, log = finish(soak)
    assert code == 0, log
    assert "was lost, and another tries again: did nothing for 30 s" in log
    assert_same(record_of(soak), calm, 1e-5)


@pytest.mark.slow
@pytest.mark.fault(
    case="every worker dies while the study is prepared",
    happens="the command ends after the third with one line and exit code 1",
    lost="nothing",
)
def test_a_preparation_that_kills_every_worker_ends_in_one_line(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, other_work(tiny, "prepare=units.lose", *LOCAL)) as soak:
        code, log = finish(soak)
    assert code == 1
    assert log.splitlines()[-1] == (
        "the worker was lost 3 times while reading the model and the data: "
        "killed by signal 9, perhaps for want of memory"
    )
    assert "Traceback" not in log
