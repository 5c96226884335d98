"""The report: one self-contained HTML file, its Markdown twin, the trials as CSV and the figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from sweep.report.alpha_section import alpha_section
from sweep.report.costs import costs_section
from sweep.report.drawing import Drawn, draw
from sweep.report.forgetting_section import forgetting_section
from sweep.report.latency import latency_section
from sweep.report.loss_figures import loss_by_rank, pareto
from sweep.report.prefix_section import prefix_section
from sweep.report.provenance import provenance_facts
from sweep.report.published_section import published_section
from sweep.report.rank_use import rank_use_section
from sweep.report.results import Findings
from sweep.report.search_figures import loss_by_rate, rank_by_ratio
from sweep.report.sections import Section
from sweep.report.statistics import find
from sweep.report.svg import share_letters
from sweep.report.tables import calibration_table, chance_line, confirmed_table, measured, search_table
from sweep.report.training_figures import learning_curves, memory
from sweep.report.traps import power_line
from sweep.report.trials import write_trials
from sweep.report.verdict_figure import verdicts
from sweep.report.words import join, rate, without_paths
from sweep.study.file import dump_study
from sweep.study.schema import Study
from sweep.tracking.analyses import read_analysis
from sweep.tracking.journal import StudyRecord

FIGURE = re.compile(r"\]\(figures/([\w-]+)\.png\)")  # as Markdown names it


def write_report(study: Study, record: StudyRecord, to: Path) -> Findings:
    """Write report.html, report.md, trials.csv and figures/ into `to`. The same records give the same files.

    Unfinished studies are reported as far as they went. Raises OSError where it cannot write.
    """
    findings = find(study, record)
    folder = to / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        draw(verdicts, folder, study, findings),
        draw(loss_by_rank, folder, study, findings),
        draw(learning_curves, folder, study, record, findings),
        draw(rank_by_ratio, folder, study, findings),
        draw(loss_by_rate, folder, study, record, findings),
        draw(memory, folder, study, record),
        draw(pareto, folder, study, findings),
    ]
    sections = analysis_sections(study, record, findings, folder)
    view = _view(study, record, findings, [d for d in drawn if d is not None], sections)
    page("report", to, view, study)
    write_trials(record, to / "trials.csv")
    return findings


def page(template: str, to: Path, view: dict[str, Any], study: Study) -> None:
    """Render a template's two kinds into report.html and report.md, with the study file."""
    render(template, to, {**view, "study_file": shown_file(study)})


def shown_file(study: Study) -> str:
    """The study file as a report shows it: where Optuna's storage lies is no part of the question, and its URL may hold
    a password."""
    return without_paths("".join(_without_storage(dump_study(study))))


def render(template: str, to: Path, view: dict[str, Any]) -> None:
    """Render a template's two kinds into report.html and report.md.

    Figures of an earlier report here that this one no longer has are removed, so that none is taken for its own.
    """
    templates = _templates()
    html = templates.get_template(f"{template}.html").render(**view)
    markdown = templates.get_template(f"{template}.md").render(**view)
    for name in _figures_named(to / "report.md") - set(FIGURE.findall(markdown)):
        for kind in ("png", "csv"):
            (to / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    (to / "report.html").write_text(share_letters(html), encoding="utf-8")
    (to / "report.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")


def analysis_sections(study: Study, record: StudyRecord, findings: Findings, figures: Path) -> list[Section]:
    """What analyses found about this study, one section each; their figures are drawn into the folder `figures`."""
    sections = [
        alpha_section(study, record, figures),
        prefix_section(study, findings, figures),
        forgetting_section(study, record, findings, figures),
        costs_section(study, record),
    ]
    rank_use = read_analysis(record.folder, "rank-use")
    if rank_use is not None:
        sections.append(rank_use_section(study, record, rank_use, figures))
    latency = read_analysis(record.folder, "latency")
    if latency is not None:
        sections.append(latency_section(study, latency, figures))
    sections.append(published_section(study, findings))
    return [section for section in sections if section is not None]


def _view(
    study: Study, record: StudyRecord, findings: Findings, figures: list[Drawn], sections: list[Section]
) -> dict[str, Any]:
    """What both templates show."""
    pick = findings.result(findings.recommended)
    verdict = ""
    if pick is not None:
        verdict = (
            "the reference itself"
            if pick.verdict == "reference"
            else f"{pick.verdict} to {findings.reference_title(study)}"
        )
    return {
        "study": study,
        "title": study.question or f"The study {study.name}",
        "findings": findings,
        "pick": pick,
        "pick_facts": []
        if pick is None
        else [
            ("rank", str(pick.arm.r)),
            ("alpha ratio", f"{pick.arm.alpha_ratio:g}"),
            ("learning rate", rate(pick.learning_rate)),
            ("verdict", verdict),
        ],
        "confirmed": confirmed_table(study, findings),
        "search": search_table(findings),
        "figures": figures,
        "sections": sections,
        "trained": any(d.name in ("learning-curves", "memory") for d in figures),
        "measured": measured(study, record, findings),
        "calibration": calibration_table(record.prepared),
        "provenance": provenance_facts(study, [record]),
        "chance": chance_line(study, findings),
        "table_note": " ".join(filter(None, (_table_note(study, findings), power_line(study, findings)))),
        "limits": _limits(study, record),
    }


def _table_note(study: Study, findings: Findings) -> str:
    reference, epsilon = findings.reference_title(study), f"{study.confirm.epsilon:g}"
    or_full = ", or above full fine-tuning" if study.arms.full_finetuning else ""
    return (
        "Differences are paired by seed; a difference above 0 is a higher, worse loss. "
        f"Non-inferior: shown to lie less than ε = {epsilon} above {reference}{or_full} "
        "(one-sided paired t test at 5 %, from the largest rank down, stopping at the first that is not shown). "
        "Inferior: shown to lie more than ε above it (the same test, with Holm's correction). "
        f"{_families(study, findings)} "
        "The intervals are two-sided at 95 % and so a little wider than what these tests need. "
        "Memory, step time and parameters are from solo probes."
        + (" Forgetting: the rise of the loss on source text; above 0 is forgotten." if study.forgetting else "")
    )


def _families(study: Study, findings: Findings) -> str:
    """What share of studies may hold a false claim, of each kind."""
    aside = any(not r.in_sequence and r.verdict is not None for r in findings.arms)
    kinds = ["non-inferior in the sequence", *(["non-inferior outside it (Holm)"] if aside else []), "inferior (Holm)"]
    again = ", and again against full fine-tuning" if study.arms.full_finetuning else ""
    return f"The chance of any false claim is at most 5 % for each kind: {join(kinds)}; against the reference{again}."


def _limits(study: Study, record: StudyRecord) -> list[str]:
    """What the numbers do not tell."""
    device = record.prepared.device if record.prepared else ""
    memory = "the resident high-water mark over the loaded base" if device.startswith("cpu") else "of the device"
    return [
        "Test losses come from one split of one data set: the intervals tell how much seeds matter, not how another "
        "split or data set would turn out.",
        "Nothing is said about longer training: the verdicts hold at the steps, the batch size and the schedule above.",
        f"Cost is from a solo probe: the arm alone in a fresh process, a few steps after warm-up, the median step "
        f"time. Peak memory is {memory}. Alpha is a factor and changes no cost, so arms of a rank share one.",
        "Trials trained in packs; a pack's time and memory are joint and are not reported as any trial's own.",
        "The exported adapter is chosen by validation loss among the confirm trials; the test split chooses nothing.",
        *(
            [
                "As in PEFT, a layer with a rank of its own keeps the arm's lora_alpha unless an alpha pattern names "
                "it: its scaling is lora_alpha over that rank, so arms of different rank patterns differ by layer in "
                "scaling too, and what is shown of them may come from either."
            ]
            if any(arm.rank_pattern for arm in study.list_arms())
            else []
        ),
    ]


def _without_storage(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if not line.startswith("storage:")]


def _figures_named(markdown: Path) -> set[str]:
    """The figures that an earlier report shows."""
    return set(FIGURE.findall(markdown.read_text(encoding="utf-8"))) if markdown.exists() else set()


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("sweep.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    environment.filters["unbroken"] = _unbroken
    environment.filters["breakable"] = _breakable
    environment.filters["slug"] = _slug
    environment.filters["quoted"] = _quoted
    return environment


def _unbroken(text: str) -> str:
    """No line ends between a number and its per cent sign, or within "ε = 0.05"."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _breakable(text: str) -> Markup:
    """HTML in which a line may end after the dots of a layer's name."""
    return Markup(re.sub(r"(?<=\w)\.(?=[a-z])", ".<wbr>", str(escape(text))))  # noqa: S704 (escaped here)


def _slug(title: str) -> str:
    """A heading's name in addresses."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _quoted(text: str) -> str:
    """Text as a data: address takes it."""
    return quote(text, safe=",:;()/+=")


def _markdown(text: str) -> str:
    """Text that Markdown and its tables take as it stands."""
    for sign in "\\|*_<`[":
        text = text.replace(sign, "\\" + sign)
    return text
