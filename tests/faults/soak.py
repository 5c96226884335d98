"""Random faults, one after another, on a study that is taken up after each: nothing may be lost, doubled or left over.

The seed decides which faults come, after how many results and with which delays; what each finds to hit, and when, does
not repeat to the millisecond.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sweep.study.home import StudyFolder
from sweep.tracking.journal import StudyRecord, read_study_record

MARK = "SWEEP_TEST_SOAK"  # in the environment of all that a soak starts, so that survivors are found
BUSY = "another `sweep run` works"  # what a driver says, with exit code 1, that is not the only one of its study
SECONDS_TO_END = 300.0  # a start takes most of a minute on a slow machine with much else to do


@dataclass
class Soak:
    """A study under faults."""

    command: Sequence[str]
    folder: StudyFolder
    environment: Mapping[str, str]
    log: Path
    seed: int = 0
    acknowledged: dict[tuple[int, int], tuple[float | None, tuple[float, ...]]] = field(default_factory=dict)
    came: Counter[str] = field(default_factory=Counter)
    random: random.Random = field(default_factory=random.Random)  # of the fault whose turn it is
    driver: subprocess.Popen[bytes] | None = None
    cwd: Path | None = None
    said_before: int = 0  # bytes of the log when the driver was started

    def start(self) -> subprocess.Popen[bytes]:
        self.said_before = self.log.stat().st_size if self.log.exists() else 0
        self.driver = self.begin(self.log)
        return self.driver

    def begin(self, log: Path) -> subprocess.Popen[bytes]:
        """One more driver of the study, that says in `log` what it says."""
        mark = {MARK: str(self.folder.path)}
        with open(log, "ab") as out:
            return subprocess.Popen(
                self.command, env={**self.environment, **mark}, cwd=self.cwd, stdout=out, stderr=out
            )

    def said(self) -> str:
        """By the driver that was started last, and by what it started."""
        return self.log.read_bytes()[self.said_before :].decode(errors="replace")

    def kill_survivors(self) -> None:
        for pid in self.survivors():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> int:
        assert self.driver is not None
        code = self.driver.wait(SECONDS_TO_END)
        self.driver = None
        return code

    def survivors(self) -> list[int]:
        """Every process that this soak started and that still lives."""
        return alive_with(MARK, str(self.folder.path))

    def workers(self) -> list[int]:
        """Those that the driver started."""
        assert self.driver is not None
        return [pid for pid in self.survivors() if pid != self.driver.pid]

    def results(self) -> int:
        """Acknowledged results, counted cheaply."""
        journals = self.folder.trials.glob("*/journal.jsonl")
        return sum(path.read_bytes().count(b'"event": "rung"') for path in journals)

    def check(self) -> StudyRecord:
        """What was acknowledged once is there still, and once."""
        record = read_study_record(self.folder)
        found = [
            ((t.spec.number, r.measurement.stop), (r.measurement.eval_loss, r.measurement.train_loss))
            for t in record.trials
            for r in t.rungs
        ]
        counts = Counter(key for key, _ in found)
        assert max(counts.values(), default=1) == 1, f"counted twice: {counts.most_common(3)}"
        missing = self.acknowledged.items() - dict(found).items()
        assert not missing, f"lost or changed: {sorted(missing)[:3]}"
        self.acknowledged.update(found)
        return record

    def wait_gone(self) -> None:
        """Once the driver has ended nothing that it started lives on."""
        deadline = time.monotonic() + 10
        while left := self.survivors():
            assert time.monotonic() < deadline, f"left running: {left}"
            time.sleep(0.02)


def alive_with(name: str, value: str) -> list[int]:
    """Every process that lives and was started with this in its environment."""
    mark, found = f"{name}={value}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            alive = b"\nState:\tZ" not in place.joinpath("status").read_bytes()
            if alive and mark in place.joinpath("environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:
            continue
    return sorted(found)


Fault = Callable[[Soak], bool]  # whether there was anything to hit


def driver_is_killed(soak: Soak) -> bool:
    return _signal(soak, signal.SIGKILL, -signal.SIGKILL)


def driver_is_asked_to_end(soak: Soak) -> bool:
    return _signal(soak, signal.SIGTERM, 130)


def ctrl_c(soak: Soak) -> bool:
    return _signal(soak, signal.SIGINT, 130)


def a_worker_is_killed(soak: Soak) -> bool:
    return bool(_kill(soak.workers(), soak.random, signal.SIGKILL))


def all_workers_are_killed(soak: Soak) -> bool:
    return any([_kill([pid], soak.random, signal.SIGKILL) for pid in soak.workers()])


def a_worker_stands_still_for_a_while(soak: Soak) -> bool:
    seconds = soak.random.uniform(0, 0.3)  # drawn before how many workers there are decides what is drawn
    stopped = _kill(soak.workers(), soak.random, signal.SIGSTOP)
    time.sleep(seconds)
    return bool(_kill(stopped, soak.random, signal.SIGCONT))


def a_second_driver_comes(soak: Soak) -> bool:
    log = soak.log.with_suffix(f".second-{soak.came[a_second_driver_comes.__name__]}.log")
    code = soak.begin(log).wait(SECONDS_TO_END)
    said = log.read_text()
    assert code == 0 or (code == 1 and BUSY in said), f"a second driver: exit {code}: {said[-1000:]}"
    return code == 1  # 0: the first had just finished, and nothing was broken


def a_checkpoint_is_cut_short(soak: Soak) -> bool:
    _resting(soak)
    path = _some_checkpoint_file(soak)
    if path:
        os.truncate(path, soak.random.randrange(max(1, path.stat().st_size)))
    return path is not None


def a_byte_of_a_checkpoint_flips(soak: Soak) -> bool:
    _resting(soak)
    path = _some_checkpoint_file(soak)
    if path:
        content = bytearray(path.read_bytes())
        content[soak.random.randrange(len(content))] ^= 1 << soak.random.randrange(8)
        path.write_bytes(content)
    return path is not None


def a_checkpoint_is_gone(soak: Soak) -> bool:
    _resting(soak)
    path = _some_checkpoint_file(soak)
    if path:
        shutil.rmtree(path.parent)
    return path is not None


def a_journal_ends_in_half_a_line(soak: Soak) -> bool:
    _resting(soak)
    journals = sorted(soak.folder.path.glob("**/journal.jsonl"))
    if journals:
        with open(soak.random.choice(journals), "ab") as journal:
            journal.write(b'{"event": "rung", "time": 17')
    return bool(journals)


def the_search_is_gone(soak: Soak) -> bool:
    """Optuna's storage is not the truth about measurements: that of an unfinished study is made again."""
    _resting(soak)
    if read_study_record(soak.folder).finished_at is not None:
        return False
    found = list(soak.folder.path.parent.parent.glob("optuna.db*"))
    for path in found:
        path.unlink()
    return bool(found)


FAULTS: tuple[Fault, ...] = (
    driver_is_killed,
    driver_is_asked_to_end,
    ctrl_c,
    a_worker_is_killed,
    all_workers_are_killed,
    a_worker_stands_still_for_a_while,
    a_second_driver_comes,
    a_checkpoint_is_cut_short,
    a_byte_of_a_checkpoint_flips,
    a_checkpoint_is_gone,
    a_journal_ends_in_half_a_line,
    the_search_is_gone,
)


def soak_through(soak: Soak, faults: Sequence[Fault], at_most: int, results_between: int) -> StudyRecord:
    """Run the study to its end with at most so many faults on the way; returns its record. Raises AssertionError."""
    starts = tried = 0
    while True:
        if soak.driver is None:
            starts += 1
            assert starts <= 3 * at_most + 10, "it is started again and again"
            soak.start()
        assert soak.driver is not None
        soak.random = random.Random(f"{soak.seed}-{tried}")  # what was drawn before, and when, is nothing to this fault
        fault = soak.random.choice(faults)
        wanted = soak.results() + soak.random.randint(0, results_between)
        delay = soak.random.uniform(0, 0.05)
        deadline = time.monotonic() + 10 * SECONDS_TO_END
        while soak.driver.poll() is None and (soak.results() < wanted or soak.came.total() >= at_most):
            assert time.monotonic() < deadline, "no result came"
            time.sleep(0.005)
        if soak.driver.poll() is None:
            time.sleep(delay)
            tried += 1
            hit = fault(soak)
            soak.came[fault.__name__] += hit
            soak.check()
        if soak.driver is not None and soak.driver.poll() is not None:
            code = soak.end()
            soak.wait_gone()
            record = soak.check()
            if code == 0:
                assert record.finished_at is not None
                return record
            came_second = code == 1 and BUSY in soak.said()
            assert code == 130 or came_second, f"exit {code}, and nobody had asked it to end"
        elif soak.driver is None:
            soak.wait_gone()


def _signal(soak: Soak, number: signal.Signals, code: int) -> bool:
    """Send the driver a signal and see how it ends; it may have been done already, or be so new that it is Python."""
    assert soak.driver is not None
    handles = _handles_signals(soak.driver.pid)
    soak.driver.send_signal(number)
    found = soak.driver.wait(SECONDS_TO_END)
    interrupted_start = found == 1 and "Fatal Python error: init_" in soak.said()
    as_python = not handles and (found == -number or interrupted_start)
    assert found in (code, 0) or as_python, f"{number.name}: exit {found}, handlers {handles}: {soak.said()[-1000:]}"
    soak.driver = None
    return found != 0


def _handles_signals(pid: int) -> bool:
    """Whether the command's own handlers are installed: not yet while Python starts, no more while it ends.

    Python itself handles SIGINT from early on, but SIGTERM never.
    """
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _resting(soak: Soak) -> None:
    driver_is_killed(soak)
    soak.wait_gone()


def _kill(pids: Sequence[int], rng: random.Random, number: signal.Signals) -> list[int]:
    """Send one of the processes a signal; returns it, or none where it ended meanwhile."""
    for pid in rng.sample(list(pids), min(1, len(pids))):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return []
        return [pid]
    return []


def _some_checkpoint_file(soak: Soak) -> Path | None:
    files = sorted(p for p in soak.folder.trials.glob("*/checkpoints/[0-9]*/*") if p.is_file() and p.stat().st_size)
    return soak.random.choice(files) if files else None
