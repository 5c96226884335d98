"""The longest files begin first (with `--no-loadscope-reorder`): else one process is left alone with one at the end.

And after each test nothing that it started may live.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from soak import alive_with

LONGEST = ("test_workers", "test_twin", "test_real_soak", "test_ray", "test_soak")
MARK = "FAULT_TEST"  # in the environment of all that a test starts
SECONDS_TO_END = 10.0
# What serves several tests: servers of a module that a test starts again, and Ray's agents outlive by a minute a node
# that is killed.
BY_DESIGN = ("postgres", "/ray/", "ray::")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def nothing_is_left_running(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What fixtures of a module start begins before this one and has no mark."""
    name = request.node.nodeid
    monkeypatch.setenv(MARK, name)
    yield
    deadline = time.monotonic() + SECONDS_TO_END
    while left := _left(name):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.1)


def _left(name: str) -> list[str]:
    found = []
    for pid in alive_with(MARK, name):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            words = " ".join(process.cmdline())
            our_tracker = process.ppid() == os.getpid() and "multiprocessing.resource_tracker" in words
            if not our_tracker and not any(word in words for word in BY_DESIGN):
                found.append(f"{pid} {words[:200]}")
    return found
