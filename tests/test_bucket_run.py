"""The real command with its checkpoints in a bucket: killed, taken up with nothing in the cache, reported, exported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import SWEEP
from object_stores import SECRET, Bucket, bucket
from test_kill import SMALL, curves, environment, record_of, rungs_of
from test_kill import run as run_at_home

from sweep.study.home import Home


@pytest.fixture
def s3() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


@pytest.mark.slow
def test_a_real_study_in_a_bucket_is_the_one_at_home_killed_and_moved_to_an_empty_cache(
    tmp_path: Path, s3: Bucket
) -> None:
    calm, home = tmp_path / "calm", tmp_path / "home"
    undisturbed = run_at_home(calm, tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr

    sets = [word for override in SMALL for word in ("--set", override)]
    run = [*SWEEP, "run", str(Path("studies/quickstart.yaml").absolute()), "--home", str(home), *sets]
    there = {**environment(), "SWEEP_CHECKPOINTS": s3.url, "PYTHONPATH": os.getcwd()}
    driver = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, env=there)
    deadline = time.monotonic() + 600
    while rungs_of(home) < 5:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    shutil.rmtree(Home(home).cache)
    resumed = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path, env=there)
    assert resumed.returncode == 0, resumed.stderr

    expected, found = curves(record_of(calm)), curves(record_of(home))
    assert expected.keys() == found.keys()
    for number, (*what, curve) in expected.items():
        assert list(found[number][:-1]) == what
        assert [loss for _, loss in found[number][-1]] == pytest.approx([loss for _, loss in curve], abs=1e-5)
    assert not list(home.rglob("checkpoints"))
    kept = {f"{t.spec.number}/{t.kept.name}" for t in record_of(home).trials if t.kept}
    assert {"/".join(name.split("/")[2:5]) for name in s3.names()} == kept

    exported = next(t for t in record_of(home).trials if t.spec.phase == "confirm" and not t.spec.arm.is_full)
    assert exported.kept is not None
    read = {name: value for name, value in there.items() if name != "SWEEP_CHECKPOINTS"}  # the journal knows where
    for words in (
        ("report", "quickstart", "--to", "report"),
        ("export", "quickstart", "--trial", str(exported.spec.number), "--to", "adapter"),
        ("rank-use", "quickstart"),
    ):
        done = subprocess.run(
            [*SWEEP, *words, "--home", str(home)], capture_output=True, text=True, check=False, cwd=tmp_path, env=read
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    told = [path for path in home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not told

    folder = f"{exported.spec.place.removeprefix(f'{s3.url}/')}/{exported.kept.name}"
    s3.write(f"{folder}/weights.safetensors", b"cut short")
    words = ["export", "quickstart", "--trial", str(exported.spec.number), "--to", "other", "--home", str(home)]
    refused = subprocess.run([*SWEEP, *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=read)
    (line,) = refused.stderr.strip().splitlines()
    assert refused.returncode == 1 and line.startswith(f"the checkpoint of trial {exported.spec.number} (")
    assert f"remove the folder {exported.spec.folder} and `sweep run` the study again" in line
    assert not (tmp_path / "other").exists()

    shutil.rmtree(exported.spec.folder)
    again = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path, env=there)
    assert again.returncode == 0, again.stderr
    new = max(record_of(home).trials, key=lambda trial: trial.spec.number)
    assert new.spec.number == len(expected) and new.spec.seed == exported.spec.seed
    curve = [loss for _, loss in new.train_curve]
    assert curve == pytest.approx([loss for _, loss in exported.train_curve], abs=1e-5)
    words[3] = str(new.spec.number)
    assert subprocess.run([*SWEEP, *words], check=False, cwd=tmp_path, env=read).returncode == 0
