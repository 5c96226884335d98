"""What a report's figures carry: the numbers behind them, drawings that a page can hold, colours that all can tell."""

from __future__ import annotations

import base64
import csv
import math
import re
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from scipy import stats
from synthetic import FLOOR, SOURCE_LOSS, quickstart, write_study
from test_domains_report import LANGUAGES, SHOWN, not_run
from test_domains_report import made_up as made_up_domains
from test_latency import made_up as made_up_latency

from sweep.report.domains_report import write_domains_report
from sweep.report.report import write_report
from sweep.report.style import SERIES, VARIABLES
from sweep.study.arms import Arm
from sweep.study.file import read_study
from sweep.study.records import COMPLETE, CONFIRM, SEARCH
from sweep.tracking.analyses import write_analysis
from sweep.tracking.journal import StudyRecord, TrialRecord

STYLE_SHEET = Path(__file__).parents[1] / "sweep" / "report" / "templates" / "style.css"


def numbers(out: Path, name: str) -> list[dict[str, str]]:
    with open(out / "figures" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def values(row: dict[str, str], *heads: str) -> list[float | None]:
    return [float(row[head]) if row[head] else None for head in heads]


def interval(losses: Iterable[float]) -> list[float]:
    """Mean and 95 % t-interval, as scipy gives them."""
    losses = list(losses)
    return [
        float(np.mean(losses)),
        *map(float, stats.t.interval(0.95, len(losses) - 1, np.mean(losses), stats.sem(losses))),
    ]


def complete(record: StudyRecord, phase: str) -> list[TrialRecord]:
    return [trial for trial in record.trials if trial.spec.phase == phase and trial.state == COMPLETE]


def forgets(arm: Arm, seed: int, step: int) -> float:
    return (0.5 if arm.is_full else 0.05) * step / 40 + 0.004 * seed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyRecord, Path]:
    """A study with forgetting and latency."""
    folder = tmp_path_factory.mktemp("figures")
    study = quickstart("forgetting={source: source.txt}")
    record = write_study(folder / "home" / "quickstart", study, forgets=forgets)
    write_analysis(record.folder, "latency", made_up_latency())
    write_report(study, record, folder / "out")
    return record, folder / "out"


LOSS = ("test loss (nats)", "95 % interval, low (nats)", "95 % interval, high (nats)")


def test_every_figure_has_its_numbers_beside_it_in_the_page_and_in_markdown(made: tuple[StudyRecord, Path]) -> None:
    out = made[1]
    html, markdown = ((out / name).read_text() for name in ("report.html", "report.md"))
    linked = dict(re.findall(r'<a download="([\w-]+)\.csv" href="data:text/csv;charset=utf-8,([^"]*)"', html))
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert len(names) == 9 and set(linked) == names
    for name in names:
        text = (out / "figures" / f"{name}.csv").read_text()
        assert unquote(linked[name]) == text and len(text.splitlines()) > 2
        assert f"](figures/{name}.csv)" in markdown


def test_numbers_of_losses_are_those_of_the_trials(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    tested: dict[str, dict[int, float]] = {}
    for trial in complete(record, CONFIRM):
        assert trial.last is not None
        tested.setdefault(trial.spec.arm.name, {})[trial.spec.seed] = trial.last.test_metrics["test_loss"]
    names = {arm: "full fine-tuning" if arm == "full" else arm for arm in tested}
    rows = numbers(out, "loss-by-rank")
    for arm, losses in tested.items():
        here = {row["what"]: row for row in rows if row["arm"] == names[arm]}
        assert values(here.pop("mean"), *LOSS) == pytest.approx(interval(losses.values()))
        assert {what: float(row[LOSS[0]]) for what, row in here.items()} == {f"seed {s}": x for s, x in losses.items()}
    (limit,) = [row for row in rows if row["what"] == "line"]
    assert float(limit[LOSS[0]]) == pytest.approx(np.mean(list(tested["r64-ratio2"].values())) + 0.05)
    for row in numbers(out, "pareto"):
        arm = "full" if row["arm"] == "full fine-tuning" else row["arm"]
        assert values(row, *LOSS) == pytest.approx(interval(tested[arm].values()))
        rank = next(t.spec.arm.r for t in record.trials if t.spec.arm.name == arm)
        assert float(row["trainable parameters"]) == (9216 * rank + 1925 if rank else 22_713_216)


def test_numbers_of_learning_curves_are_means_and_ranges_over_the_seeds(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    rows = numbers(out, "learning-curves")
    for kind, curve in (("training", "train_curve"), ("validation", "eval_curve")):
        at: dict[int, list[float]] = {}
        for trial in record.trials:
            if (trial.spec.phase, trial.spec.arm.name) == (CONFIRM, "r4-ratio2"):
                for step, loss in getattr(trial, curve):
                    at.setdefault(step, []).append(loss)
        here = [row for row in rows if (row["arm"], row["loss"]) == ("r4-ratio2", kind)]
        told = {int(row["step"]): values(row, *list(row)[3:]) for row in here}
        assert told == {step: pytest.approx([np.mean(x), min(x), max(x)]) for step, x in at.items()}


def test_long_curves_are_drawn_by_means_of_steps_in_a_row(tmp_path: Path) -> None:
    study = quickstart("train.steps=400", "search.rungs=[100,200,400]", "arms.rank=[64]", "arms.alpha_ratio=[1]")
    record = write_study(tmp_path / "home", study, ends={})
    write_report(study, record, tmp_path / "out")
    rows = [row for row in numbers(tmp_path / "out", "learning-curves") if row["loss"] == "training"]
    here = [row for row in rows if row["arm"] == "r64-ratio1"]
    assert [int(row["step"]) for row in here] == [*range(3, 400, 3), 400]
    curves = [[loss for _, loss in t.train_curve] for t in complete(record, CONFIRM) if t.spec.arm.r == 64]
    second = [curve[3:6] for curve in curves]
    assert values(here[1], *list(here[1])[3:]) == pytest.approx([np.mean(second), np.min(second), np.max(second)])
    assert "Each point of the training loss stands for 3 steps in a row" in (tmp_path / "out" / "report.md").read_text()


def test_numbers_of_the_search_and_of_memory_are_those_of_the_journal(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    ended = [t for t in record.trials if t.spec.phase == SEARCH and t.last is not None]
    told = {(row["arm"], float(row["learning rate"])): row for row in numbers(out, "loss-by-learning-rate")}
    for trial in ended:
        row = told[trial.spec.arm.name, trial.spec.learning_rate]
        loss = None if trial.state == "diverged" else trial.last.eval_loss  # type: ignore[union-attr]
        assert (row["state"], int(row["last step"])) == (trial.state, trial.step)
        assert values(row, "validation loss (nats)") == [loss]
    for row in numbers(out, "rank-by-ratio"):
        scores = [
            (t.last.eval_loss, t.spec.learning_rate)
            for t in ended
            if t.spec.arm.name == row["arm"] and t.state == COMPLETE and t.last is not None
        ]
        best = min(scores, default=(None, None))  # type: ignore[type-var]
        assert values(row, "best validation loss (nats)", "learning rate") == list(best)
    for row, rank in zip(numbers(out, "memory"), (2, 4, 8, 64, 0), strict=True):
        (cost,) = [c for key, c in record.costs.items() if key.startswith(f"r{rank}-" if rank else "full")]
        assert float(row["measured peak (bytes)"]) == cost.peak_memory_bytes
        assert {kind: float(row[f"{kind} (bytes)"]) for kind in cost.memory} == cost.memory


def test_numbers_of_forgetting_and_of_latency_are_those_measured(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    rows = numbers(out, "learning-forgetting")
    for trial in complete(record, CONFIRM):
        if trial.spec.arm.r == 8:
            rises = {m.stop: m.forgetting_loss - SOURCE_LOSS for m in (rung.measurement for rung in trial.rungs)}  # type: ignore[operator]
            here = [r for r in rows if r["what"] == f"seed {trial.spec.seed}" and r["arm"].startswith("rank 8")]
            told = {int(row["step"]): float(row["rise of the loss on source text (nats)"]) for row in here}
            assert told == pytest.approx({0: 0.0, **rises})
    found = made_up_latency()
    for row in numbers(out, "latency"):
        (cell,) = [c for c in found["cells"] if str(c["batch"]) == row["batch"]]
        pairs = zip(cell["seconds"][row["variant"]], cell["seconds"]["base"], strict=True)
        longer = sorted(100 * (ours / base - 1) for ours, base in pairs)
        expected = [np.median(longer), longer[1], longer[7]]  # of nine: the second and the eighth
        assert values(row, "median overhead (%)", "low (%)", "high (%)") == pytest.approx(expected)


def test_numbers_of_prefixes_are_paired_differences(tmp_path: Path) -> None:
    prefixed = ("arms.method=[lora,prefix,lora+prefix]", "arms.prefix_length=[4]", "arms.alpha_ratio=[1]")
    study = quickstart(*prefixed, "confirm.finalists=arm", "tune.prefix={learning_rate: [0.03, 0.1, 0.3]}")
    losses = {("lora", s): 0.5 + 0.01 * s for s in range(1, 6)} | {("prefix", s): 0.6 + 0.02 * s for s in range(1, 6)}

    def loss(arm: Arm, seed: int) -> float:
        return losses.get((arm.method, seed), FLOOR[0])

    write_report(study, write_study(tmp_path / "home", study, loss, ends={}), tmp_path / "out")
    pairs = [losses["prefix", s] - losses["lora", s] for s in study.confirm.seeds]
    rows = [row for row in numbers(tmp_path / "out", "prefix-or-lora") if row["difference"] == "prefix − LoRA"]
    assert len(rows) == 4
    for row in rows:
        assert values(row, "mean (nats)", *LOSS[1:]) == pytest.approx(interval(pairs))
        assert row["paired seeds"] == "5"


def test_numbers_across_domains_are_those_measured(tmp_path: Path) -> None:
    study = read_study(LANGUAGES).study
    write_domains_report(study, made_up_domains(SHOWN), not_run(study, tmp_path), tmp_path / "out")
    told = {(r["text"], r["adapter"], r["rank"]): r for r in numbers(tmp_path / "out", "domain-losses")}
    of = "(nats a token)"
    heads = (f"change of test loss, mean {of}", f"95 % interval, low {of}", f"95 % interval, high {of}")
    for place, by_rank in SHOWN.items():
        adapter, text = place.split(">")
        for rank, changes in by_rank.items():
            assert values(told[text, adapter, str(rank)], *heads) == pytest.approx(interval(changes))
    gains = [r for r in numbers(tmp_path / "out", "gain-by-distance") if r["domain"] == "fr"]
    bits = 100 / (math.log(2) * 300)  # of a nat a token, in bits a byte
    own = SHOWN["fr>fr"]
    by_seed = [bits * (low - high) for low, high in zip(own[2], own[64], strict=True)]
    mean, *seeds = gains
    assert values(mean, *list(mean)[2:]) == pytest.approx([4 * bits, *interval(by_seed)])
    assert [float(row["loss of rank 2 − rank 64 (bits a byte)"]) for row in seeds] == pytest.approx(by_seed)
    assert "](figures/gain-by-distance.csv)" in (tmp_path / "out" / "report.md").read_text()


def test_drawings_of_a_page_do_not_share_names_and_take_its_colours(made: tuple[StudyRecord, Path]) -> None:
    html = (made[1] / "report.html").read_text()
    names = re.findall(r' id="([^"]+)"', html)
    assert len(names) == len(set(names))
    referred = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert len(referred) > 500 and set(referred) <= set(names)
    drawings = re.findall(r'<svg class="(?:wide|narrow)".*?</svg>', html, re.DOTALL)
    assert len(drawings) == 2 * 9
    known = set(re.findall(r"--([\w-]+):", STYLE_SHEET.read_text()))
    assert set(VARIABLES.values()) <= known
    for drawing in drawings:
        assert not set(re.findall(r"#[0-9a-f]{6}\b", drawing)) & set(VARIABLES)
        assert set(re.findall(r"var\(--([\w-]+)\)", drawing)) <= known


def test_the_largest_reasonable_study_stays_under_three_megabytes(tmp_path: Path) -> None:
    study = quickstart(
        "arms.rank=[1,2,4,8,16,32,64]", "arms.alpha_ratio=[1,2]", "arms.method=[lora,rslora]", "confirm.finalists=arm",
        "train.steps=1000", "search.rungs=[250,500,1000]", "forgetting={source: source.txt}",
    )  # fmt: skip
    record = write_study(tmp_path / "home", study, ends={}, forgets=forgets)
    write_analysis(record.folder, "latency", made_up_latency())
    write_report(study, record, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").stat().st_size < 2_500_000


def test_figures_that_only_an_earlier_report_had_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    study, out = quickstart(), tmp_path / "out"
    write_report(study, write_study(tmp_path / "whole", study), out)
    (out / "figures" / "mine.png").write_bytes(b"a reader's own")
    unfinished = write_study(tmp_path / "part", study, stop_after=10)
    write_report(study, unfinished, out)
    assert {path.name for path in (out / "figures").iterdir()} == {
        "mine.png",
        *(f"{name}.{kind}" for name in ("rank-by-ratio", "loss-by-learning-rate") for kind in ("png", "csv")),
    }


# Machado, Oliveira & Fernandes 2009, table 1, severity 1.0: from linear RGB to what is seen.
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65, of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    light, dark = sorted((float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palette(dark: bool) -> dict[str, str]:
    """The style sheet's colours."""
    light_part, _, rest = STYLE_SHEET.read_text().partition("@media screen and (prefers-color-scheme: dark)")
    text = rest.partition("* { box-sizing")[0] if dark else light_part
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_series_can_be_told_apart_with_every_kind_of_colour_vision(dark: bool) -> None:
    colours = palette(dark)
    series = [colours[VARIABLES[colour]] for colour in SERIES]
    kinds: list[Callable[[np.ndarray], np.ndarray]] = [lambda rgb: rgb]
    kinds += [lambda rgb, matrix=matrix: np.array(matrix) @ rgb for matrix in SEEN.values()]
    for see in kinds:
        seen = [lab(see(linear(colour))) for colour in series]
        assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 10  # a just noticeable one is 2.3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_in_figures_have_the_contrast_that_wcag_asks_for(dark: bool) -> None:
    colours = palette(dark)
    words = ["ink", "soft", "blue", *(name for name in VARIABLES.values() if name.endswith("-text"))]
    assert len(words) == 8
    for name in words:
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def test_heat_maps_are_in_the_page_itself(made: tuple[StudyRecord, Path]) -> None:
    """No figure is a file that a mail or a printed page would lack."""
    html = (made[1] / "report.html").read_text()
    for image in re.findall(r'<image[^>]*href="data:image/png;base64,([^"]*)"', html, re.DOTALL):
        assert base64.b64decode(image).startswith(b"\x89PNG")
    assert not re.findall(r"<img", html)


def test_numbers_of_the_verdicts_are_scipys_on_the_trials(made: tuple[StudyRecord, Path]) -> None:
    record, out = made
    losses: dict[str, dict[int, float]] = {}
    for t in record.trials:
        if t.spec.phase == CONFIRM and t.state == COMPLETE and t.last is not None:
            losses.setdefault(t.spec.arm.name, {})[t.spec.seed] = t.last.test_metrics["test_loss"]
    rows = list(csv.DictReader((out / "figures" / "verdicts.csv").open()))
    assert {(r["against"], r["arm"]) for r in rows} == {
        *(("rank 64", f"r{rank}-ratio2") for rank in (2, 4, 8)),
        *(("full fine-tuning", f"r{rank}-ratio2") for rank in (2, 4, 8, 64)),
    }
    for row in rows:
        ours, theirs = losses[row["arm"]], losses["r64-ratio2" if row["against"] == "rank 64" else "full"]
        seeds = sorted(ours.keys() & theirs.keys())
        paired = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
        interval = paired.confidence_interval(0.95)
        one_sided = stats.ttest_rel(
            [ours[s] for s in seeds], [theirs[s] for s in seeds], alternative="less"
        ).confidence_interval(0.95)
        bounds = ("95 % interval, low (nats)", "95 % interval, high (nats)", "one-sided 95 % bound (nats)")
        found = [float(row[name]) for name in bounds]
        assert found == pytest.approx([interval.low, interval.high, one_sided.high])
        assert int(row["pairs"]) == len(seeds)
