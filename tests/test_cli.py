"""The commands as a user meets them: what they print, their exit codes, and what they import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import sweep
from fakes import make_study

from sweep import cli, console
from sweep.driver.progress import Progress
from sweep.driver.question import hold_lock
from sweep.exits import Refused
from sweep.study.asked import keep_study
from sweep.study.file import dump_study
from sweep.study.home import Home
from sweep.study.records import TrialSpec
from sweep.tracking.journal import append, append_asked, append_end

HEAVY = {"torch", "transformers", "optuna", "mlflow", "datasets", "pandas", "numpy", "scipy", "matplotlib", "pydantic"}


def modules_after(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def begin_study(home: Home, name: str, ends: Sequence[str | None]) -> None:
    """A study that has run so far: a trial for each of `ends`."""
    study = make_study(name=name)
    folder = home.study(name)
    append(folder.journal, "started", versions={})
    keep_study(folder.study_file, study)
    for number, end in enumerate(ends):
        spec = TrialSpec(number, study.list_arms()[0], 0.01, 0, "search", str(folder.trial(number)))
        append_asked(spec)
        if end:
            append_end(spec, end)


def test_help_and_import_load_nothing_heavy() -> None:
    helped = (
        "from sweep.cli import main\nsys.argv = ['sweep', '--help']\ntry:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert not HEAVY & modules_after(helped)
    assert not HEAVY & modules_after("import sweep")


def test_help_names_every_command(tmp_path: Path) -> None:
    done = sweep("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("run", "status", "report", "compare", "dashboard", "export", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["walk"],
        ["run"],
        ["run", "x.yaml", "--executor", "cloud"],
        ["export", "x"],
        ["dashboard", "--port", "0"],
        ["export", "x", "--to", "y", "--arm", "r2-ratio1", "--trial", "3"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(tmp_path: Path, words: list[str]) -> None:
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_study_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    for command in (["status", "x"], ["report", "x"], ["export", "x", "--to", "y"], ["dashboard", "x"], ["run", "x"]):
        empty = sweep(*command, "--home", str(home.root), cwd=tmp_path)
        assert (empty.returncode, "no study has" in empty.stderr) == (2, True)
    begin_study(home, "one", [])
    begin_study(home, "two", [])
    done = sweep("report", "x", cwd=tmp_path, SWEEP_HOME=str(home.root))
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"no study 'x' has run in {home.root}; those that have: one, two")


def test_another_kind_of_file_is_not_taken_for_a_studys_name(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Read me")
    done = sweep("run", "README.md", "--home", "home", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "README.md is not a study file: the name of one ends in .yaml\n")


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "study.yaml").write_text(dump_study(make_study()))
    done = sweep("run", "study.yaml", "--home", "file/home", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/file/home cannot be written" in done.stderr
    done = sweep("run", "study.yaml", "--home", "file", cwd=tmp_path)
    assert done.returncode == 2 and "file cannot be written (it is a file)" in done.stderr


def test_status_counts_and_tells_who_runs(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    begin_study(home, "mine", ["complete", "complete", "pruned", "diverged", "infeasible", "failed", None])
    resting = sweep("status", "--home", str(home.root), cwd=tmp_path)
    assert resting.returncode == 0
    # Of 15 search trials, and 3 finalists on 2 seeds, 6 have ended: the log of `sweep run` would say "6 of 21".
    assert " ".join(resting.stdout.splitlines()[-2].split()).startswith("mine stopped search 6 of 21 2 1 1 1 1 1 ")
    with hold_lock(home.study("mine")) as lock:
        lock.write(str(os.getpid()))
        lock.flush()
        running = sweep("status", "mine", "--home", str(home.root), cwd=tmp_path)
    assert running.stdout.splitlines()[-2].split()[:2] == ["mine", "running"]


def test_status_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"from sweep.cli import status\nfrom pathlib import Path\nstatus(None, Path({str(tmp_path)!r}))"
    assert not (HEAVY - {"pydantic"}) & modules_after(code)


def test_an_unexpected_error_is_one_line_unless_debugged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("the sky fell\nand more")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: the sky fell\nset SWEEP_DEBUG=1 for the trace-back\n"
    monkeypatch.setenv("SWEEP_DEBUG", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("Traceback") and said.endswith("the sky fell\nand more\n")


def test_a_refusal_keeps_its_lines_and_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise Refused("no", "because", code=1)

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "no\nbecause\n"


def test_sigterm_interrupts_as_ctrl_c_does(tmp_path: Path) -> None:
    script = (
        "import sweep.cli, time\nsweep.cli.app = lambda: (print('up', flush=True), time.sleep(60))\nsweep.cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 130
    process.stdout.close()
    assert time.monotonic() - began < 10


def progress(message: str, done: int = 0, phase: str = "search") -> Progress:
    return Progress(phase, 50, done, 4, 1, 0, 0, 0, "r2-ratio1", 0.01, 0.5, 10, 100, 75.0, message)


def test_plain_lines_come_on_news_only(capsys: pytest.CaptureFixture[str]) -> None:
    with console.watching(console.console()) as listen:
        for event in (progress("a"), progress("a"), progress("a", done=1), progress("b", done=1)):
            listen(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "search: 0 of 50 trials done, 4 running, 1 pruned, best so far r2-ratio1 at 0.01, loss 0.5000, "
        "1 min 15 s left, a",
        "search: 1 of 50 trials done, 4 running, 1 pruned, best so far r2-ratio1 at 0.01, loss 0.5000, "
        "1 min 15 s left, b",
    ]


def test_clock() -> None:
    assert [console.clock(s) for s in (0.4, 59, 61, 3725)] == ["0 s", "59 s", "1 min 01 s", "1 h 02 min"]
