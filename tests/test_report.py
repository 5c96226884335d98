"""The report's files: complete, self-contained, the same for the same data."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from matplotlib import rc_context
from matplotlib.transforms import Bbox
from synthetic import quickstart, write_study

from sweep.report.loss_figures import loss_by_rank
from sweep.report.report import write_report
from sweep.report.statistics import find
from sweep.report.style import NARROW_STYLE, STYLE
from sweep.report.tables import confirmed_table
from sweep.report.words import count, duration, number, share, signed, size, without_paths
from sweep.study.records import CONFIRM, DIVERGED
from sweep.tracking.journal import StudyRecord, append, read_study_record

FIGURES = {"verdicts", "loss-by-rank", "pareto", "learning-curves", "memory", "rank-by-ratio", "loss-by-learning-rate"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyRecord, Path]:
    folder = tmp_path_factory.mktemp("report")
    study = quickstart()
    record = write_study(folder / "home" / "quickstart", study)
    write_report(study, record, folder / "out")
    return record, folder / "out"


def test_an_accuracys_interval_ends_at_one(tmp_path: Path) -> None:
    study = quickstart("confirm.seeds=[1,2]")
    record = write_study(tmp_path / "study", study, lambda arm, seed: 0.3 * (seed == 1), ends={})
    for arm in find(study, record).arms:  # accuracies 0.9 and 1.0: by t alone 0.315 to 1.585
        assert (arm.metric_low, arm.metric_high) == (pytest.approx(0.95 - 12.7062 * 0.05, abs=1e-4), 1.0)


def test_every_file_is_there_and_small(made: tuple[StudyRecord, Path]) -> None:
    _, out = made
    figures = list((out / "figures").glob("*.png"))
    assert {f.stem for f in figures} == FIGURES
    assert sum(f.stat().st_size for f in figures) < 600_000
    assert (out / "report.html").stat().st_size < 3_000_000


def test_html_asks_nothing_of_the_network(made: tuple[StudyRecord, Path]) -> None:
    html = (made[1] / "report.html").read_text()
    assert (
        "http://" not in html
        and "https://" not in html
        and "@import" not in html
        and "url(" not in html.replace("url(#", "")
    )
    addresses = re.findall(r'(?:src|href)="([^"]{0,5})', html)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert html.count('role="img" aria-label="') == html.count("<figcaption>") == len(FIGURES)


def test_recommendation_comes_first(made: tuple[StudyRecord, Path]) -> None:
    for name in ("report.html", "report.md"):
        text = (made[1] / name).read_text()
        assert text.index("Use rank 4, alpha ratio 2") < text.index("What was confirmed") < text.rindex("inconclusive")


def test_no_path_of_this_machine_is_told(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    for name in ("report.html", "report.md", "trials.csv"):
        text = (out / name).read_text()
        assert "/home/someone" not in text and str(record.folder.path) not in text


def test_every_trial_is_a_row(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    with open(out / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == [t.spec.number for t in record.trials]
    assert {row["state"] for row in rows} == {"complete", "pruned", "diverged", "failed"}
    tested = {int(row["number"]): float(row["test_loss"]) for row in rows if row["test_loss"]}
    assert tested == {
        t.spec.number: t.last.test_metrics["test_loss"] for t in record.trials if t.last and t.last.test_metrics
    }
    assert all(row["phase"] == CONFIRM for row in rows if row["test_loss"])


def test_search_scores_are_not_in_the_confirmed_table(tmp_path: Path) -> None:
    """The search scores are set apart from all else; the confirmed table and sentences hold none of them."""
    study = quickstart()
    record = write_study(tmp_path / "home", study, lambda arm, seed: 0.5 + 0.01 * seed + arm.r / 1000)
    findings = write_report(study, record, tmp_path / "out")
    shown = " ".join(c.text + c.below for row in confirmed_table(study, findings).rows for c in row.cells)
    scores = [f"{row.best_loss:.3f}" for row in findings.search if row.best_loss is not None]
    assert scores and not any(score in shown + " ".join(findings.sentences) for score in scores)


def test_same_records_give_the_same_bytes(made: tuple[StudyRecord, Path], tmp_path: Path) -> None:
    record, out = made
    write_report(quickstart(), record, tmp_path)
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 2 * len(FIGURES) + 3
    for path in files:
        assert (tmp_path / path).read_bytes() == (out / path).read_bytes(), path


def test_markdown_tables_are_sound(made: tuple[StudyRecord, Path]) -> None:
    text = (made[1] / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(tables) == 5  # confirmed, costs, times, search, calibration
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (made[1] / image).is_file()


@pytest.mark.parametrize(
    ("overrides", "how", "says"),
    [
        ([], {"stop_after": 0}, "Unfinished: 0 of 52 trials."),
        ([], {"stop_after": 10}, "No confirm trial has ended yet"),
        ([], {"stop_after": 30}, "Unfinished: 30 of 52 trials."),
        (["confirm.seeds=[1]"], {}, "no interval"),
        (["arms.rank=[64]", "arms.alpha_ratio=[1]", "arms.full_finetuning=false"], {"ends": {}}, "no smaller rank"),
        (["tune.learning_rate=[0.01]", "tune.full_finetuning.learning_rate=[0.001]"], {}, "was not tuned"),
        ([], {"costs": False, "prepared": False}, "Use rank 4"),
        ([], {"ends": {(CONFIRM, "r64-ratio2", s): DIVERGED for s in range(1, 6)}}, "has no confirmed loss"),
        (["arms.method=[lora, rslora]", "confirm.finalists=arm"], {}, "more finalists are left out"),
    ],
)
def test_any_study_can_be_reported(tmp_path: Path, overrides: list[str], how: dict[str, object], says: str) -> None:
    study = quickstart(*overrides)
    write_report(study, write_study(tmp_path / "home", study, **how), tmp_path / "out")  # type: ignore[arg-type]
    html = (tmp_path / "out" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert says in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("finance", "").split()


def test_text_from_the_study_is_escaped(tmp_path: Path) -> None:
    study = quickstart("question='<script>alert(1)</script> a|b'", "storage='postgresql://me:secret@host/db'")
    write_report(study, write_study(tmp_path / "home", study, stop_after=3), tmp_path / "out")
    html, markdown = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert html.count("<script") == 1 and "<script>alert" not in html and "secret" not in html + markdown
    assert "\\<script>" in markdown.split("```yaml")[0]


def test_warnings_of_the_run_are_told(tmp_path: Path) -> None:
    study = quickstart()
    record = write_study(tmp_path / "home", study, stop_after=3)
    append(record.folder.journal, "warning", message="the worker in /tmp/a/b died once")
    findings = write_report(study, read_study_record(record.folder), tmp_path / "out")
    assert "the worker in …/b died once" in findings.warnings


def test_chance_is_told_where_it_is_known(made: tuple[StudyRecord, Path], tmp_path: Path) -> None:
    line, far = "Always answering by the labels' frequencies: loss 1.604, accuracy 23.2", "has a loss of 1.604, outside"
    text = (made[1] / "report.md").read_text()
    assert text.index("**rank 4") < text.index(line) < text.index("paired by seed") and far in text
    assert "Always answering by the labels&#39; frequencies: loss 1.604" in (made[1] / "report.html").read_text()
    study = quickstart()
    write_report(study, write_study(tmp_path / "old", study, chance=(None, None)), tmp_path / "out")
    assert "frequencies" not in (tmp_path / "out" / "report.md").read_text()
    write_report(study, write_study(tmp_path / "near", study, chance=(0.28, 0.9)), tmp_path / "out")
    assert "The dotted line is the loss of always answering" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("style", [STYLE, NARROW_STYLE], ids=["wide", "narrow"])
@pytest.mark.parametrize("overrides", [[], ["confirm.finalists=arm"]])
def test_no_label_of_the_first_figure_covers_a_mark_or_another(
    tmp_path: Path, overrides: list[str], style: dict[str, object]
) -> None:
    study = quickstart(*overrides)
    with rc_context(style):
        made = loss_by_rank(study, find(study, write_study(tmp_path, study, chance=(0.26, 0.9))))
        assert made is not None
        figure = made[0]
        figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    lines = 3 if style == STYLE else 0  # named in the legend where it is narrow
    assert len(boxes) == lines + (1 if overrides else 4)
    points = [axes.transData.transform(line.get_xydata()) for line in axes.lines if len(line.get_xdata())]
    for i, (text, box) in enumerate(zip(axes.texts, boxes, strict=True)):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :]), text.get_text()
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
        if box.x0 < axes.bbox.x1:
            ends = [Bbox([p.min(axis=0), p.max(axis=0)]) for p in points if len(set(p[:, 0])) == 1]
            assert not any(box.overlaps(end) for end in ends), text.get_text()


def test_words() -> None:
    assert (count(55_300), count(22_713_216), count(812)) == ("55.3 k", "22.7 M", "812")
    assert (size(2**20 * 1.5), size(900), size(None)) == ("1.50 MiB", "900 B", "–")
    assert (duration(0.18), duration(95), duration(4000)) == ("180 ms", "95.0 s", "66.7 min")
    assert (number(float("nan"), 3), signed(-0.0001, 3), signed(-0.04, 3)) == ("–", "0.000", "−0.040")
    assert (share(6.6, 100), share(1, 600), share(96, 100)) == ("6.6 %", "0.17 %", "96 %")
    assert without_paths("see /root/x/y.txt, package:a/b/c and https://h/a/b") == (
        "see …/y.txt, package:a/b/c and https://h/a/b"
    )
