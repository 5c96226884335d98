"""Files that are damaged, and results that come too late: for real, on real files."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_sweep
import numpy as np
import pytest
import yaml
from driving import Killed, journal_view, optuna_view, records_of, run, trials_of, undisturbed
from fakes import fake_work, make_study, train_rung
from hostile_models import Trap

from sweep.exits import explain
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit
from sweep.tracking.journal import JournalError, StudyRecord, TrialRecord, append
from sweep.training.data import SPLITS, read_cache, write_cache
from sweep.training.tokens import Split

STUDY, NOTHING = make_study(), "nothing"
IN_THE_NAME = len('{"event": "')  # of a line's event
MADE_AGAIN = "found by its hash; that trial alone is trained anew to there, the others go on; a warning in the report"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "a home")  # advice is a command that takes spaces too


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


def interrupt(home: Home, rungs: int = 8, work: Any = None) -> StudyRecord:
    """A run that is killed once so many packs were trained; all that they found is acknowledged."""
    trained = 0

    def train(unit: Unit) -> tuple[Measurement, ...]:
        nonlocal trained
        trained += 1
        if trained > rungs:
            raise Killed
        return (work or train_rung)(unit)

    with pytest.raises(Killed):
        run(home, STUDY, fake_work(train))
    return records_of(home, STUDY)


def living(record: StudyRecord) -> TrialRecord:
    return next(trial for trial in record.trials if trial.state is None and trial.kept)


def check_undisturbed(home: Home, done: Home, warnings: int = 0) -> None:
    """Every trial, loss and end as if nothing had been, each once, and so many warnings."""
    found, expected = records_of(home, STUDY), records_of(done, STUDY)
    assert journal_view(found)[:-1] == journal_view(expected)[:-1]
    assert len(found.warnings) == len(expected.warnings) + warnings
    assert optuna_view(trials_of(home, STUDY)) == optuna_view(trials_of(done, STUDY))


def results(record: StudyRecord) -> dict[tuple[str, float, int, str], Any]:
    """What every trial found, by what it is; a trial that was removed has another number."""
    keys = [(t.spec.arm.name, t.spec.learning_rate, t.spec.seed, t.spec.phase) for t in record.trials]
    assert len(set(keys)) == len(keys), "a trial counts twice"
    return dict(zip(keys, [(t.state, t.train_curve, t.eval_curve) for t in record.trials], strict=True))


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def put_trap(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.parents[4] / "ran")))


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "spoil"),
        [
            pytest.param(name, spoil, marks=pytest.mark.fault(case=case, happens=MADE_AGAIN, lost=NOTHING), id=case)
            for case, name, spoil in (
                (
                    "a checkpoint's file is truncated",
                    "weights.safetensors",
                    lambda path: os.truncate(path, path.stat().st_size // 2),
                ),
                ("a byte of a checkpoint's weights flips", "weights.safetensors", lambda path: flip(path, 9)),
                ("a byte of a checkpoint's optimizer flips", "optimizer.safetensors", lambda path: flip(path, 9)),
                ("a byte of checkpoint.json flips", "checkpoint.json", lambda path: flip(path, 9)),
                ("a checkpoint is gone", "checkpoint.json", lambda path: shutil.rmtree(path.parent)),
                ("a malicious pickle lies where a checkpoint's weights were", "weights.safetensors", put_trap),
            )
        ],
    )
    def test_damage_costs_its_own_trial_a_few_steps(
        self, home: Home, done: Home, name: str, spoil: Callable[[Path], None]
    ) -> None:
        trial = living(interrupt(home))
        assert trial.kept is not None
        spoil(Path(trial.spec.folder, trial.kept.name, name))
        again: list[Unit] = []

        def train(unit: Unit) -> tuple[Measurement, ...]:
            again.extend([unit] if unit.start == 0 and unit.stop > 1 else [])
            return train_rung(unit)

        run(home, STUDY, fake_work(train))
        check_undisturbed(home, done, warnings=1)
        assert [[t.number for t in unit.trials] for unit in again] == [[trial.spec.number]], "others were trained anew"
        assert not list(home.root.parent.rglob("ran")), "the pickle was read"

    @pytest.mark.fault(
        case="a worker believed dead hands in its checkpoint late",
        happens="each attempt of a rung writes a folder of its own; the late one counts for nothing and is removed",
        lost=NOTHING,
    )
    def test_a_late_attempt(self, home: Home, done: Home, tmp_path: Path) -> None:
        """A process that nobody waits for writes a rung's checkpoints once they count, other ones than those."""
        late: list[subprocess.Popen[bytes]] = []
        program = (
            "import sys, pickle; sys.path.insert(0, sys.argv[1]); from fakes import measure\n"
            "unit, steps = pickle.load(open(sys.argv[2], 'rb'))\n"
            "for trial in unit.trials: measure(unit, trial)"
        )

        def train(unit: Unit) -> tuple[Measurement, ...]:
            found = train_rung(unit)
            if len(late) < 3:
                attempt = tmp_path / f"{len(late)}.unit"
                attempt.write_bytes(pickle.dumps((replace(unit, setup=None), 0)))
                words = [sys.executable, "-c", program, str(Path(__file__).parents[1]), str(attempt)]
                late.append(subprocess.Popen(words))
            else:
                assert [process.wait(60) for process in late] == [0] * 3
            return found

        run(home, STUDY, fake_work(train))
        check_undisturbed(home, done)
        named = {trial.last.checkpoint for trial in records_of(home, STUDY).trials if trial.last}
        assert {f"checkpoints/{folder.name}" for folder in home.root.rglob("checkpoints/*")} <= named


def events_of(path: Path) -> list[str]:
    return re.findall(r'^\{"event": "(\w+)"', path.read_text(), re.MULTILINE)


def damaged(run_it: Callable[[], Any]) -> str:
    """The line that a damaged journal is told in."""
    with pytest.raises(JournalError) as caught:
        run_it()
    (line,), code = explain(caught.value)
    assert code == 1
    return line


class TestJournals:
    @pytest.mark.fault(
        case="a byte of a trial's journal flips",
        happens="found by the line's checksum, though it be within a number; the command names file and line, and what "
        "to do: without its folder the trial is trained anew, with the same losses",
        lost="that trial's results until then, said in one line; exit 1",
    )
    def test_the_advice_for_a_trials_journal_is_right(self, tmp_path: Path, done: Home) -> None:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY.model_dump(exclude_none=True)))
        words, home = ("run", "study.yaml", "--home", "home"), Home(tmp_path / "home")
        killed, _ = fake_sweep.run({"kill": ["sweep.driver.session", "append_rung", "after", 20]}, *words, cwd=tmp_path)
        assert killed == -9
        trial = living(records_of(home, STUDY))
        journal = Path(trial.spec.folder) / "journal.jsonl"
        at = journal.read_bytes().index(b'"train_loss": [') + 15
        assert journal.read_bytes()[at : at + 1].isdigit()
        flip(journal, at)
        code, said = fake_sweep.run({}, *words, cwd=tmp_path)
        (line,) = said.strip().splitlines()
        assert code == 1 and line.startswith(f"{journal}: line 2 is damaged, not what was written: ")
        advice = re.search(r"remove the folder (\S+) and run the study again", line)
        assert advice is not None
        shutil.rmtree(advice[1])
        code, said = fake_sweep.run({}, *words, cwd=tmp_path)
        assert code == 0, said
        assert results(records_of(home, STUDY)) == results(records_of(done, STUDY))

    @pytest.mark.fault(
        case="a trial of a finished study is removed, since its journal or its weights are damaged",
        happens="the same command trains it anew and no other",
        lost=NOTHING,
    )
    def test_what_a_finished_study_lacks_is_trained_anew(self, home: Home, done: Home) -> None:
        run(home, STUDY)
        trial = next(t for t in records_of(home, STUDY).trials if t.spec.phase == "confirm")
        shutil.rmtree(trial.spec.folder)
        trained: list[int] = []

        def train(unit: Unit) -> tuple[Measurement, ...]:
            trained.extend(trial.number for trial in unit.trials)
            return train_rung(unit)

        run(home, STUDY, fake_work(train))
        assert results(records_of(home, STUDY)) == results(records_of(done, STUDY))
        assert len(set(trained)) == 1
        run(home, STUDY, fake_work(train))
        assert len(set(trained)) == 1, "it is complete again"

    @pytest.mark.fault(
        case="a byte of the study's journal flips",
        happens="found by the line's checksum; the command says what the line told, and which command removes it where "
        "that can be found out again: costs are measured again, finalists chosen again from the same search; what "
        "model and data are, and where checkpoints lie, a second journal tells too",
        lost="no result; a time, a forecast or a warning that the line told, said in one line, exit 1",
    )
    @pytest.mark.parametrize("byte", [IN_THE_NAME, 40])
    def test_the_advice_for_a_studys_journal_is_right(self, home: Home, done: Home, byte: int) -> None:
        run(home, STUDY)
        journal = home.study("fake").journal
        whole, kinds = journal.read_bytes(), events_of(journal)
        assert set(kinds) == {"started", "prepared", "forecast", "cost", "finalists", "finished"}
        for number in range(len(kinds), 0, -1):
            journal.write_bytes(whole)
            flip(journal, sum(len(line) + 1 for line in whole.split(b"\n")[: number - 1]) + byte)
            line = damaged(lambda: run(home, STUDY))
            unknown = "it told what is found out again, or journal-2.jsonl tells too; "
            told = unknown if byte == IN_THE_NAME else "it told "
            assert line.startswith(f"{journal}: line {number} is damaged, not what was written: {told}")
            advice = re.search(r"remove that line \((sed .*)\)", line)
            assert advice is not None, line
            subprocess.run(shlex.split(advice[1]), check=True)
            run(home, STUDY)
            check_undisturbed(home, done)
            again = set(events_of(journal)) | {"started", "forecast"}
            assert again | set(events_of(home.study("fake").second_journal)) >= set(kinds), "it was not found out again"

    def test_a_second_journal_that_is_damaged_too_is_not_believed(self, home: Home, done: Home) -> None:
        record = interrupt(home, rungs=4)
        journal, second = record.folder.journal, record.folder.second_journal
        for byte in (40, IN_THE_NAME):
            flip(second, byte)
            line = damaged(lambda: run(home, STUDY))
            assert line == f"{second}: line 1 is damaged, not what was written: {journal.name} tells the same; " + (
                f"remove that line (sed -i.bak 1d '{second}') and run the study again"
            )
        inside = journal.read_bytes().index(b'"prepared": {') + 14
        flip(journal, inside)
        anew = f"without one, remove the folder {journal.parent} and run the study anew"
        line = damaged(lambda: run(home, STUDY))
        assert line.startswith(f"{second}: line 1 ") and line.endswith(anew), "neither line can be believed"
        second.unlink()
        line = damaged(lambda: run(home, STUDY))
        assert line.startswith(f"{journal}: line 2 ") and line.endswith(anew)
        append(second, "checkpoints", place="")  # it is there, and yet tells nothing of model and data
        assert damaged(lambda: run(home, STUDY)) == line
        flip(journal, inside)
        run(home, STUDY)
        check_undisturbed(home, done)

    def test_no_flipped_byte_of_any_journal_is_believed(self, home: Home) -> None:
        """Every byte of every line, one at a time, by one of its bits; the end of the last line among them."""
        record = interrupt(home, rungs=4)
        for journal in (record.folder.journal, Path(record.trials[0].spec.folder) / "journal.jsonl"):
            whole = journal.read_bytes()
            for at in range(len(whole)):
                flip(journal, at, bit=at % 8)
                line = damaged(lambda: records_of(home, STUDY))
                number = whole[:at].count(b"\n") + 1
                assert f"{journal}: line {number} is damaged" in line, f"byte {at}: {line}"
                journal.write_bytes(whole)

    @pytest.mark.fault(
        case="a journal's last line is torn, or the last lines are gone",
        happens="a torn line was never acknowledged and is cut off; what is gone is trained again, losses and all",
        lost=NOTHING,
    )
    @pytest.mark.parametrize("lines", [0, 1])
    def test_a_torn_or_lost_end(self, home: Home, done: Home, lines: int) -> None:
        trial = next(t for t in interrupt(home).trials if t.state is None and len(t.rungs) == 2)
        journal = Path(trial.spec.folder) / "journal.jsonl"
        kept = journal.read_bytes().split(b"\n")[: 3 - lines]
        journal.write_bytes(b"\n".join(kept) + b'\n{"event": "rung", "time": 17')
        run(home, STUDY)
        check_undisturbed(home, done, warnings=lines)


class TestCaches:
    @pytest.mark.fault(
        case="a byte of the cached tokens flips, or their file is truncated",
        happens="found by the file's checksums; the tokens are made anew",
        lost=NOTHING,
    )
    def test_damaged_tokens_are_never_believed(self, tmp_path: Path) -> None:
        rng, path = np.random.default_rng(0), tmp_path / "tokens.npz"

        def split() -> Split:
            offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 6, 5))]).astype(np.int64)
            ids, labels = rng.integers(0, 30_000, offsets[-1]), rng.integers(0, 3, 5)
            return Split(ids.astype(np.int32), offsets, labels.astype(np.int64))

        tokens = {name: split() for name in SPLITS}
        write_cache(path, (tokens, 7))
        whole, found_out = path.read_bytes(), 0
        for at in range(0, len(whole), 3):
            flip(path, at, bit=at % 8)
            found = read_cache(path, SPLITS)
            found_out += found is None
            assert found is None or (found[1] == 7 and all(same(found[0][name], tokens[name]) for name in SPLITS)), at
            path.write_bytes(whole)
            if at % 60 == 0:
                os.truncate(path, at)
                assert read_cache(path, SPLITS) is None
                path.write_bytes(whole)
        assert found_out > len(whole) / 3 / 2, "but for padding, every flip is found out"


def same(one: Split, other: Split) -> bool:
    arrays = ("input_ids", "offsets", "labels")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return equal and one.truncation == other.truncation
