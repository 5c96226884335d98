"""Where a browser is needed, its lack is a failure and no skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(("needed", "ends"), [({}, "1 skipped"), ({"SWEEP_NEEDS_BROWSER": "1"}, "1 error")])
def test_without_chromium_browser_tests_are_skipped_or_fail(tmp_path: Path, needed: dict[str, str], ends: str) -> None:
    (tmp_path / "test_it.py").write_text("from browsing import browser\n\ndef test_it(browser):\n    pass\n")
    kept = {k: v for k, v in os.environ.items() if k != "SWEEP_NEEDS_BROWSER"}
    environment = {**kept, **needed, "PATH": str(tmp_path), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-rsE", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ends in done.stdout.splitlines()[-1] and "needs chromium and chromedriver" in done.stdout
    assert (done.returncode != 0) == bool(needed)


def test_ci_needs_a_browser() -> None:
    lines = (TESTS.parent / ".ci" / "run").read_text().splitlines()
    (needs,) = [at for at, line in enumerate(lines) if line.startswith("export ") and "SWEEP_NEEDS_BROWSER=1" in line]
    tests = [at for at, line in enumerate(lines) if "make test" in line]
    assert tests and needs < min(tests)
