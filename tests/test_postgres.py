"""Where PostgreSQL is needed, its lack is a failure and no skip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEST = """
from pathlib import Path
import postgres as module
from postgres import postgres
module.BINARIES = Path("nowhere")

def test_it(postgres):
    pass
"""


@pytest.mark.parametrize(("needed", "ends"), [({}, "1 skipped"), ({"SWEEP_NEEDS_POSTGRES": "1"}, "1 error")])
def test_without_postgresql_its_tests_are_skipped_or_fail(tmp_path: Path, needed: dict[str, str], ends: str) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    kept = {k: v for k, v in os.environ.items() if k != "SWEEP_NEEDS_POSTGRES"}
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "pytest", "-rsE", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(
        command, env={**kept, **needed, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ends in done.stdout.splitlines()[-1] and "apt-get install postgresql" in done.stdout, done.stdout
    assert (done.returncode != 0) == bool(needed)


def test_ci_needs_postgresql() -> None:
    before, tests, _ = (TESTS.parent / ".ci" / "run").read_text().partition("make test")
    assert tests and re.search(r"^export .*\bSWEEP_NEEDS_POSTGRES=1\b", before, re.MULTILINE)
