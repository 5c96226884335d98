"""The report across studies and the command that writes it: complete, self-contained, the same for the same data."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context
from ran_studies import GPU, OTHER_DATA, Made, made
from synthetic import write_study

from sweep import cli
from sweep.driver.question import write_question
from sweep.report.compare import write_comparison
from sweep.report.compare_figures import MARKERS, cost_by_rank, to_reference_by_rank
from sweep.report.compare_numbers import compare
from sweep.report.style import STYLE
from sweep.study.domains import parts_of
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.study.records import CONFIRM, DIVERGED


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Made], Path]:
    root = tmp_path_factory.mktemp("compare")
    studies = [
        made(root, "bbc", "storage='postgresql://me:secret@host/db'", ends={(CONFIRM, "r2-ratio1", 4): DIVERGED}),
        made(root, "agnews", "arms.rank=[4,16,64]", "question='<script>a|b'", found=OTHER_DATA | GPU, seed=2),
        made(root, "begun", stop_after=17),
    ]
    write_comparison(studies, root / "out")
    return studies, root / "out"


def test_every_file_is_there_and_asks_nothing_of_the_network(report: tuple[list[Made], Path]) -> None:
    _, out = report
    assert {p.name for p in out.iterdir()} == {"report.html", "report.md", "compare.csv", "figures"}
    figures = {f"{name}.{kind}" for name in ("difference-by-rank", "cost-by-rank") for kind in ("png", "csv")}
    assert {p.name for p in (out / "figures").iterdir()} == figures
    html, markdown = ((out / name).read_text() for name in ("report.html", "report.md"))
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert "<script>a" not in html  # what a question holds is text
    assert all(s.startswith(("data:text/csv", "#")) for s in re.findall(r'(?:src|href)="([^"]{0,22})', html))
    assert html.count('role="img" aria-label="') == html.count("<figcaption>") == 2
    assert "secret" not in html + markdown and str(out.parent) not in html + markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_that_studies_are_independent_is_an_assumption_and_no_claim(tmp_path: Path) -> None:
    """Two studies of equal seeds, model and data are not independent."""
    write_comparison([made(tmp_path, "one"), made(tmp_path, "same", seed=3)], tmp_path / "out")
    assert "and treated as independent across studies (Welch's t)" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_both_pages_say_what_may_not_be_compared_and_whose_warnings_are_whose(
    report: tuple[list[Made], Path], name: str
) -> None:
    text = (report[1] / name).read_text().replace("\N{NO-BREAK SPACE}", " ").replace("&#39;", "'").replace("\\", "")
    assert "Unfinished: begun (17 of 40 trials)" in text
    assert "losses on different rows are not comparable" in text
    assert "cannot be put down to one of these" in text
    assert "figures of their own (small, below the shares) are not compared across the studies: the machine" in text
    own = text.rindex("Each study in its own words")  # the first is in the contents
    places = [
        own,
        *(text.index(n, own) for n in ("bbc", "seed 4 diverged", "agnews", "begun", "No recommendation yet")),
    ]
    assert places == sorted(places)
    assert text.index("The studies disagree") if "disagree" in text else text.index("is recommended in") < own


def test_csv_has_every_confirmed_arm_in_full_precision(report: tuple[list[Made], Path]) -> None:
    studies, out = report
    with open(out / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(c, r) for c in compare(studies) for r in c.findings.arms]
    assert [(row["study"], row["arm"]) for row in rows] == [(c.name, r.arm.name) for c, r in found]
    for row, (c, result) in zip(rows, found, strict=True):
        assert float(row["test_loss"]) == np.mean(result.test_losses)
        assert row["finished"] == str(c.name != "begun")
        if result.to_reference is not None:
            assert float(row["to_reference_high"]) == result.to_reference.high
        if c.full_cost and result.cost:
            assert float(row["share_of_full_memory"]) == result.cost.peak_memory_bytes / c.full_cost.peak_memory_bytes
    assert {row["arm"] for row in rows if row["recommended"] == "True"} == {"r4-ratio1"}


def test_same_records_give_the_same_bytes(report: tuple[list[Made], Path], tmp_path: Path) -> None:
    studies, out = report
    write_comparison(studies, tmp_path)
    for path in [p for p in out.rglob("*") if p.is_file()]:
        assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("overrides", "values", "says"),
    [
        ([], {"stop_after": 0}, "No confirm trial has ended yet"),
        (["arms.full_finetuning=false"], {}, "There is no probe of full fine-tuning in one and two"),
        ([], {"costs": False, "prepared": False}, "one has not read its data yet"),
        (["confirm.seeds=[1]"], {}, "fewer than two paired seeds"),
        (["confirm.finalists=arm", "arms.alpha_ratio=[1,2]", "arms.method=[lora,rslora]"], {}, "r4-ratio1-rslora"),
        (["arms.method=[lora,prefix]", "arms.prefix_length=[4]", "confirm.finalists=arm"], {}, "prefix 4"),
    ],
)
def test_any_studies_can_be_compared(tmp_path: Path, overrides: list[str], values: dict[str, Any], says: str) -> None:
    studies = [made(tmp_path, "one", *overrides, **values), made(tmp_path, "two", *overrides, seed=1, **values)]
    write_comparison(studies, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert says in text
    assert "nan" not in re.findall(r"\w+", text.lower())


def test_studies_are_told_apart_without_colour(tmp_path: Path) -> None:
    studies = compare([made(tmp_path, "one"), made(tmp_path, "two", "confirm.epsilon=0.03", seed=1)])
    with rc_context(STYLE):
        drawn, costs = to_reference_by_rank(studies, True), cost_by_rank(studies)
    assert drawn is not None and costs is not None
    panels = drawn[0].axes
    assert [axes.get_title("left") for axes in panels] == ["one", "two"]
    for axes, c in zip(panels, studies, strict=True):
        at_epsilon = [line for line in axes.lines if set(line.get_ydata()) == {c.study.confirm.epsilon}]
        assert len(at_epsilon) == 1
        assert [text.get_text() for text in axes.texts] == [f"ε = {c.study.confirm.epsilon:g}"]
    for axes in costs[0].axes:
        assert {line.get_marker() for line in axes.lines} >= {"o", "s"}
        assert {text.get_text() for text in axes.texts} == {"full fine-tuning", "one", "two"}
    assert len(set(MARKERS)) == len(MARKERS) == 7


def here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_writes_where_it_is_told_and_prints_the_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study that ran elsewhere is compared once its folder lies in the home; a file names a study as well."""
    made(tmp_path / "home", "one")
    made(tmp_path / "elsewhere", "two", "train.steps=200", "search.rungs=[200]", seed=1)
    shutil.copytree(tmp_path / "elsewhere" / "studies" / "two", tmp_path / "home" / "studies" / "two")
    shutil.copy(tmp_path / "home" / "studies" / "two" / "study.yaml", tmp_path / "two.yaml")
    monkeypatch.chdir(tmp_path)
    for words, folder in ((["one", "two"], "reports/compare-one-two"), (["one", "two.yaml", "--to", "x"], "x")):
        assert here(monkeypatch, "compare", *words, "--home", "home") == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "Rank 4 is recommended in both studies, with alpha ratio 1."
        assert "train.steps alone" in said[1] and said[2] == f"report: {folder}/report.html"
        assert Path(folder, "report.md").is_file()


def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home(tmp_path / "home")
    made(home.root, "one", stop_after=0)
    languages = read_study(Path(__file__).parents[1] / "studies" / "languages.yaml").study
    home.study(languages.name).path.mkdir(parents=True)
    write_question(languages, home.study(languages.name))
    long = ["a" * 90, "b" * 90, "c" * 90]
    for name in long:
        made(home.root, name, stop_after=0)
    for words, reason in (
        (["one"], "one alone: name two studies or more"),
        (["one", "one"], "one is named twice"),
        (["one", "three"], "no study 'three' has run in"),
        (["one", "languages"], f"no study '{parts_of(languages)[0].name}' has run in"),
        (["one", "languages", "languages"], f"{parts_of(languages)[0].name} is named twice"),
        (long, "--to: name a folder"),
        (["one", str(tmp_path / "none.yaml")], "cannot be read"),
    ):
        assert here(monkeypatch, "compare", *words, "--home", str(home.root)) == 2
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1
    assert here(monkeypatch, "compare") == 2


def test_a_study_over_domains_is_compared_by_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    languages = read_study(Path(__file__).parents[1] / "studies" / "languages.yaml").study
    for part in (languages, *parts_of(languages)):
        if part != languages:
            write_study(
                home.study(part.name).path, part, lambda arm, seed: 3 + 0.01 * seed, ends={}, chance=(None, None)
            )
        home.study(part.name).path.mkdir(parents=True, exist_ok=True)
        write_question(part, home.study(part.name))
    to = tmp_path / "out"
    assert here(monkeypatch, "compare", "languages", "--home", str(home.root), "--to", str(to)) == 0
    assert f"in all {len(parts_of(languages))} studies" in capsys.readouterr().out
    with open(to / "compare.csv", newline="") as file:
        assert {row["study"] for row in csv.DictReader(file)} == {part.name for part in parts_of(languages)}
