"""Tables are sorted by what their numbers are worth, whatever unit and sign they are written with."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import KINDS, numbers_without_value, write_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_pages(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_that_begins_with_a_number_says_by_what_it_is_sorted(pages: Path, kind: str) -> None:
    page = pages / kind / "report.html"
    assert page.read_text().count("data-value=") > 20
    assert numbers_without_value(page) == []
