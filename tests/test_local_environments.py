"""How local workers share the cores and GPUs of a machine, and what is refused because it cannot be given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from commands import sweep

from sweep.execution import devices
from sweep.execution.choose import ExecutorName, describe, local_environments, open_executor
from sweep.execution.executor import InlineExecutor
from sweep.study.errors import FieldError
from sweep.study.schema import Resources


def of(**asked: Any) -> Resources:
    return Resources.model_validate(asked)


@pytest.mark.parametrize(
    ("resources", "gpus", "cores", "devices", "threads", "line"),
    [
        (None, "", 8, [""], 8, "1 worker with 8 threads"),
        (of(workers=2), "", 8, ["", ""], 4, "2 workers with 4 threads each"),
        (of(workers=2), "", 2, ["", ""], 1, "2 workers with 1 thread each"),
        (of(workers=3), "", 2, ["", "", ""], 1, "3 workers with 1 thread each"),
        (of(workers=2, cpus=3), "", 8, ["", ""], 3, "2 workers with 3 threads each"),
        (None, "0123", 8, list("0123"), 2, "4 workers, one a GPU"),
        (of(workers=2), "0123", 8, ["0", "1"], 4, "2 workers, one a GPU"),
        (of(gpus=0.5), "01", 8, list("0101"), 2, "4 workers on 2 GPUs"),
        (of(workers=2, gpus=0.5), "0", 8, ["0", "0"], 4, "2 workers on 1 GPU"),
        (of(gpus=0), "01", 8, [""], 8, "1 worker with 8 threads"),
        (of(workers=2, gpus=0), "01", 8, ["", ""], 4, "2 workers with 4 threads each"),
        (of(seconds_per_rung=5), "7", 8, ["7"], 8, "1 worker, one a GPU"),
    ],
)
def test_workers_share_gpus_and_cores(
    resources: Resources | None, gpus: str, cores: int, devices: list[str], threads: int, line: str
) -> None:
    found = local_environments(resources, list(gpus), cores)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == devices
    assert {one["OMP_NUM_THREADS"] for one in found} == {one["MKL_NUM_THREADS"] for one in found} == {str(threads)}
    assert describe(found) == line


@pytest.mark.parametrize(("omp", "threads"), [("1", "1"), ("99", "4"), ("", "4"), ("4,2", "4")])
def test_no_worker_takes_more_threads_than_the_command_was_given(omp: str, threads: str) -> None:
    assert {one["OMP_NUM_THREADS"] for one in local_environments(of(workers=2), [], 8, omp)} == {threads}


@pytest.mark.parametrize(
    ("resources", "gpus", "field", "words"),
    [
        (of(gpus=0.5), "", "resources.gpus", "no GPU is here"),
        (of(workers=3, gpus=0.5), "0", "resources.workers", "more than the 1 GPU here holds"),
        (of(workers=4, cpus=3), "", "resources.cpus", "more than the 8 cores here"),
    ],
)
def test_more_than_there_is_is_refused(resources: Resources, gpus: str, field: str, words: str) -> None:
    with pytest.raises(FieldError) as caught:
        local_environments(resources, list(gpus), 8)
    ((found, message),) = caught.value.problems
    assert found == field and words in message


LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-90a1)
  MIG 3g.40gb     Device  0: (UUID: MIG-11)
  MIG 3g.40gb     Device  1: (UUID: MIG-22)
"""


@pytest.mark.parametrize(
    ("outer", "found"),
    [
        (None, ["0", "MIG-11", "MIG-22"]),
        ("1,0", ["1", "0"]),
        ("GPU-90a1", ["GPU-90a1"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_counted_without_torch_and_within_what_the_command_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str | None, found: list[str]
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{LISTING}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    assert devices.visible_gpus() == found


def test_a_machine_without_gpus_has_none_whatever_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "ask_nvidia_smi", lambda: "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.visible_gpus() == []


@pytest.mark.parametrize("asked", [{"workers": 2}, {"cpus": 1}, {"gpus": 0}, {"seconds_per_rung": 5}])
def test_what_the_inline_executor_cannot_give_is_refused(asked: dict[str, float]) -> None:
    from fakes import make_study

    with pytest.raises(FieldError, match="--executor local") as caught:
        open_executor(ExecutorName.inline, make_study(resources=asked))
    assert [field for field, _ in caught.value.problems] == [f"resources.{next(iter(asked))}"]
    executor, line = open_executor(ExecutorName.inline, make_study(resources={"workers": 1}))
    assert isinstance(executor, InlineExecutor) and line == "trials run in this process"


def test_a_wrong_combination_is_refused_in_one_line_that_names_the_field(tmp_path: Path) -> None:
    study = Path("studies/quickstart.yaml").absolute()
    done = sweep("run", str(study), "--home", "home", "--set", "resources.workers=2", cwd=tmp_path)
    assert done.returncode == 2
    reason = "asks for workers: run it with --executor local or ray, in processes of their own, or leave it out"
    assert done.stderr == f"--set: resources.workers: {reason}\n"
    for asked in ("workers=0", "gpus=1.5", "gpus=-1", "cpus=0", "seconds_per_rung=0", "wrkers=1", "workers=1.5"):
        done = sweep("run", str(study), "--home", "home", "--set", f"resources.{asked}", cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(f"--set: resources.{asked.split('=')[0]}: ")
