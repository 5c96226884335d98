"""A trial that hangs with every worker that trains it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from driving import run
from fakes import make_study
from test_lost_workers import found
from test_workers import finish, running

from sweep.study.file import dump_study
from sweep.study.home import Home
from sweep.study.records import FAILED

# The command with the fake trainer in worker processes: those that train full fine-tuning stand still.
COMMAND = """
import sys
from functools import partial
from pathlib import Path
import fake_sweep
import worker_units as units
from sweep.driver import driver
driver.run_study = partial(driver.run_study, work=units.with_fault(Path(sys.argv[1]), "stopped", "full"))
sys.argv[1] = "{}"
fake_sweep.main()
"""


@pytest.mark.slow
@pytest.mark.fault(
    case="a trial that hangs with every worker",
    happens="three workers are ended when their time is over, and the trial fails with that reason; the others finish; "
    "exit code 1 with a line",
    lost="that trial",
)
def test_a_trial_that_hangs_every_time_fails_alone(tmp_path: Path) -> None:
    rates = {"learning_rate": [1e-2], "full_finetuning": {"learning_rate": [1e-4]}}
    study, calm = make_study(tune=rates, resources={"workers": 2, "seconds_per_rung": 5}), Home(tmp_path / "calm")
    run(calm, make_study(tune=rates))
    (tmp_path / "fake.yaml").write_text(dump_study(study))
    words = [sys.executable, "-c", COMMAND, str(tmp_path / "marks"), "run", "fake.yaml"]
    with running(tmp_path, [*words, "--home", "home", "--executor", "local"], "fake") as soak:
        code, log = finish(soak, 120)
    assert code == 1 and "1 trial failed" in log.splitlines()[-1] and "Traceback" not in log, log
    there, expected = found(Home(tmp_path / "home"), study), found(calm, study)
    failed = {cell: reason for cell, (_, state, reason) in there.items() if state == FAILED}
    assert [cell[0] for cell in failed] == ["full"]
    assert list(failed.values()) == ["its worker was lost 3 times: did nothing for 5 s"]
    others = {cell: entry for cell, entry in expected.items() if cell[0] != "full"}
    assert {cell: entry for cell, entry in there.items() if cell not in failed} == others
