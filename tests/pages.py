"""A report of each kind, of made-up studies, and what of its tables a press on a head would put into a wrong order."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from ran_studies import GPU, OTHER_MODEL, made
from synthetic import quickstart, write_study
from test_alpha import study_of
from test_domains_report import LANGUAGES, SHOWN, not_run
from test_domains_report import made_up as made_up_domains
from test_latency import made_up as made_up_latency
from test_prefix import PREFIXED

from sweep.report.compare import write_comparison
from sweep.report.domains_report import write_domains_report
from sweep.report.report import write_report
from sweep.study.file import read_study
from sweep.study.records import CONFIRM, DIVERGED
from sweep.tracking.analyses import write_analysis

KINDS = ("finished", "unfinished", "rates", "prefix", "domains", "compare")
PUBLISHED = "published=[{source: 'Paper, table 1', rank: {1: 1.23, 8: 1.18}, alpha_ratio: {0.25: 1.2, 1: 1.1}}]"
# A number, with a sign and a unit or not; digits within a word (a fingerprint's) are none.
NUMBER = re.compile(r"[+−<-]? ?\d[\d.,]*(e[+−-]?\d+)?(?!\w)")
# What has no order: a value a study, each row of another kind; and sentences.
OF_ALL_KINDS, SENTENCES = "What is not the same in all", "Of what"


def write_pages(folder: Path) -> None:
    """A folder with a report.html for each of KINDS."""
    study = quickstart("forgetting={source: source.txt}")
    finished = write_study(folder / "a", study, forgets=lambda arm, seed, step: 0.001 * step * (1 + arm.is_full))
    write_analysis(finished.folder, "latency", made_up_latency())
    write_report(study, finished, folder / "finished")
    write_report(quickstart(), write_study(folder / "b", quickstart(), stop_after=20), folder / "unfinished")
    write_report(*study_of(folder / "c", 0.5, PUBLISHED), folder / "rates")
    prefixes = quickstart(*PREFIXED)
    write_report(prefixes, write_study(folder / "d", prefixes, ends={}), folder / "prefix")
    languages = read_study(LANGUAGES).study
    write_domains_report(languages, made_up_domains(SHOWN), not_run(languages, folder / "e"), folder / "domains")
    studies = [
        made(folder / "f", "bbc", ends={(CONFIRM, "r2-ratio1", 4): DIVERGED}),
        made(folder / "f", "other", "arms.rank=[4,16,64]", found=OTHER_MODEL | GPU, seed=2),
        made(folder / "f", "begun", stop_after=17),
    ]
    write_comparison(studies, folder / "compare")


def numbers_without_value(page: Path) -> list[tuple[str, str, str]]:
    """(caption, head, text) of the cells that would be sorted by their text though they begin with a number."""
    found = []
    text_of_page = page.read_text(encoding="utf-8").replace("<wbr>", "")  # else it is XML within a table
    for written in re.findall(r"<table>.*?</table>", text_of_page, flags=re.DOTALL):
        table = ElementTree.fromstring(written)
        caption = words(table.find("caption"))
        heads = [words(head) for head in table.iterfind("thead/tr/th")]
        for row in table.iterfind("tbody/tr"):
            for head, cell in zip(heads, row, strict=True):
                text = words(cell.find("span"))
                ordered = caption != OF_ALL_KINDS and head != SENTENCES
                if ordered and NUMBER.match(text) and "data-value" not in cell.attrib:
                    found.append((caption, head, text))
    return found


def words(element: ElementTree.Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())
