"""The job script for Slurm, with a stand-in for `srun` that runs on this machine what it should run on others."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import clusters
import psutil
import pytest
import ray_units as units
from driving import records_of, undisturbed
from fakes import make_study
from test_lost_workers import found
from worker_units import is_alive, wait_for

from sweep.study.file import dump_study
from sweep.study.home import Home

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm-ray.sh"
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >> srun-options; shift; done
exec "$@"
"""


def submit(root: Path, seconds: float) -> subprocess.Popen[str]:
    """As Slurm starts the job on the first of two nodes, with one CPU each."""
    (root / "bin").mkdir(exist_ok=True)
    (root / "marks").mkdir(exist_ok=True)
    command = shlex.join([sys.executable, "-c", units.COMMAND, str(root / "marks"), str(seconds)])
    for name, text in {"srun": SRUN, "sweep": f'#!/bin/bash\nexec {command} "$@"\n'}.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    (root / "fake.yaml").write_text(dump_study(make_study()))
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NUM_NODES": "2", "CPUS_ON_NODE": "1", "CPUS_PER_TASK": "1"}
    clean = {k: v for k, v in clusters.environment().items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        ["bash", str(SCRIPT), "fake.yaml", "--home", "home"],
        cwd=root,
        env={
            **clean,
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            "SLURMD_NODENAME": socket.gethostname(),
            "PATH": f"{root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.fault(
    case="a Slurm job whose time is over, with a stand-in for srun that starts all nodes on one machine",
    happens="the study stops with its state saved and nothing is left on the nodes; the same job goes on",
    lost="nothing",
)
def test_a_job_runs_on_all_its_nodes_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    job = submit(tmp_path, 2.0)
    clusters.soon(lambda: len({pid for pid in units.begun(tmp_path / "marks")}) == 2 or job.poll() is not None, 120)
    assert job.poll() is None, units.finish(job)
    assert {psutil.Process(pid).nice() for pid in units.begun(tmp_path / "marks")} == {os.nice(0)}, "at full speed"
    family = [job.pid, *(process.pid for process in psutil.Process(job.pid).children(recursive=True))]
    job.send_signal(signal.SIGTERM)
    code, lines = units.finish(job)
    assert code == 130, lines
    assert "interrupted; the state is saved, and the same command goes on from there" in lines
    for pid in family:
        wait_for(lambda pid=pid: not is_alive(pid), "the end of what the job started")
    code, lines = units.finish(submit(tmp_path, 0.0))
    assert code == 0, lines
    options = set((tmp_path / "srun-options").read_text().split())
    assert options == {"--overlap", "--nodes=1", "--ntasks=1", f"--exclude={socket.gethostname()}"}
    study, home, calm = make_study(), Home(tmp_path / "home"), undisturbed(tmp_path / "calm")
    assert records_of(home, study).finished_at and found(home, study) == found(calm, study)


def test_the_script_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111
