"""The longest files begin first (with `--no-loadscope-reorder`): else one process is left alone with one at the end."""

from __future__ import annotations

import pytest

LONGEST = ("test_workers", "test_twin", "test_real_soak", "test_ray", "test_soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
