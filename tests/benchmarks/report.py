"""From raw figures to a page: reads steps, search, gpu and scale.json in a folder, writes README.md beside them.

    python -m tests.benchmarks.report [--in DIR] [--out DIR]

What has not run is said to have not run. Also writes steps.csv, crossover.csv and crossover.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .crossover import write_cells, write_crossover
from .gpu_tables import gpu_markdown
from .records import read_results
from .scale_records import read_scale
from .scale_tables import scale_markdown
from .search_tables import search_markdown
from .summary import cells
from .tables import losses, source, steps_markdown

STEPS, SEARCH, GPU, SCALE = "steps.json", "search.json", "gpu.json", "scale.json"
COMMANDS = {name: f"python -m tests.benchmarks.{name.removesuffix('.json')}" for name in (STEPS, SEARCH, GPU, SCALE)}
INTRODUCTION = """# Benchmarks

The same work side by side: (a) our packs; (b) the incumbent, Optuna + PEFT + Hugging Face Trainer in one process, in
its best precision and attention, and as it comes; (c) PEFT in a bare loop; (d) K processes of (c) at once; (e) full
fine-tuning. Under every table stand its command, machine, versions and date; the raw figures of every repetition are
in the JSON files beside this page. Nothing here was typed by hand: `python -m tests.benchmarks.report` wrote it.
"""


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--in", dest="source", type=Path, default=Path("reports/benchmarks"), metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder read from")
    given = parser.parse_args(words)
    print(write_report(given.source, given.out or given.source))


def write_report(figures: Path, out: Path) -> Path:
    """The page about the raw figures in a folder. Returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, _steps(figures, out), _search(figures, out), _gpu(figures), _scale(figures)]
    for name in (STEPS, SEARCH, GPU, SCALE):
        if figures != out and (figures / name).exists():
            shutil.copy(figures / name, out / name)
    page = out / "README.md"
    page.write_text("\n".join(parts))
    return page


def _steps(figures: Path, out: Path) -> str:
    if not (figures / STEPS).exists():
        return _not_run("## A trial and step", STEPS)
    results = read_results(figures / STEPS)
    found = cells(results)
    write_cells(found, out / "steps.csv")
    write_crossover(found, out)
    lost = sum(line.startswith("- ") for line in losses(found))
    summary = (
        f"{len(found)} cells were measured. We do not clearly win {lost} of the comparisons in them; they are below."
    )
    picture = (
        "### The crossover\n\n![Speed-up of our packs over PEFT's loop against the tokens of a pack](crossover.png)\n\n"
        "As numbers: [crossover.csv](crossover.csv).\n\n" + source(results.provenance)
    )
    text = steps_markdown(results)
    (out / "steps.md").write_text(text)
    return f"## A trial and step\n\n{summary}\n\n{text}\n{picture}\n"


def _search(figures: Path, out: Path) -> str:
    if not (figures / SEARCH).exists():
        return _not_run("## A search", SEARCH)
    text = search_markdown(json.loads((figures / SEARCH).read_text()))
    (out / "search.md").write_text(text)
    return "## A search\n\n" + text


def _gpu(figures: Path) -> str:
    if not (figures / GPU).exists():
        return _not_run("## On a GPU", GPU)
    return "## On a GPU\n\n" + gpu_markdown(json.loads((figures / GPU).read_text()))


def _scale(figures: Path) -> str:
    if not (figures / SCALE).exists():
        return _not_run("## Thousands of trials", SCALE)
    return "## Thousands of trials\n\n" + scale_markdown(read_scale(figures / SCALE))


def _not_run(title: str, name: str) -> str:
    return f"{title}\n\n**This benchmark has not run.** Its command is `{COMMANDS[name]}`.\n"


if __name__ == "__main__":
    main(sys.argv[1:])
