"""What holds for the tables and figures of every kind of report."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from pages import KINDS, numbers_without_value, write_pages

from sweep.report import drawing

OF_LOSS = re.compile(r"loss|difference|interval|bound|epsilon|^low$|^high$")
NAMES_OF_CURVES = {"loss", "difference"}  # columns that say which loss, or of which two


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The reports' folder, and the labels of the axes of all their figures."""
    labels = set()
    inline_svg = drawing.inline_svg

    def seen(figure: Figure, prefix: str) -> str:
        axes = [label for a in figure.axes for label in (a.get_xlabel(), a.get_ylabel())]
        labels.update([*axes, figure.get_supxlabel(), figure.get_supylabel()])
        return inline_svg(figure, prefix)

    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawing, "inline_svg", seen)
        write_pages(folder)
    return folder, labels


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_that_begins_with_a_number_says_by_what_it_is_sorted(
    pages: tuple[Path, set[str]], kind: str
) -> None:
    page = pages[0] / kind / "report.html"
    assert page.read_text().count("data-value=") > 20
    assert numbers_without_value(page) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_of_a_figures_numbers_name_the_unit_of_losses(pages: tuple[Path, set[str]], kind: str) -> None:
    heads = set()
    for path in (pages[0] / kind / "figures").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            heads |= {(path.stem, head) for head in next(csv.reader(file))}
    of_loss = {(name, head) for name, head in heads if OF_LOSS.search(head) and head not in NAMES_OF_CURVES}
    assert of_loss and {(name, head) for name, head in of_loss if not head.endswith(")")} == set()


def test_axes_of_losses_name_their_unit(pages: tuple[Path, set[str]]) -> None:
    of_loss = {" ".join(label.split()) for label in pages[1] if "loss" in label}
    assert len(of_loss) >= 9
    assert {label for label in of_loss if "(nats" not in label and "(bits" not in label} == set()
