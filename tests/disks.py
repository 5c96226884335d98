"""Small file systems of a test's own, to be filled or made read-only.

With SWEEP_NEEDS_MOUNT=1, as `.ci/run` sets it, a test that may not mount one fails; else it is skipped with the reason.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDED = "SWEEP_NEEDS_MOUNT"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        why = (
            f"mounts a small file system, and that is not permitted here ({mounted.stderr.strip()}): "
            "run it as root, in a container with --cap-add SYS_ADMIN"
        )
        pytest.fail(why) if os.environ.get(NEEDED) else pytest.skip(why)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves not a byte."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast
