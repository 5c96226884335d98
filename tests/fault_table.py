"""The table of faults: every test marked `fault` is a row of what happens and what is lost, as it was seen in the run.

`pytest tests/faults -m "not whole" --fault-table reports/reliability.md` writes it.
A case of which a test failed says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

HEAD = """# What happens when something breaks

Each row is a fault that a test injects: signals, full disks, damaged files, stopped servers and killed nodes are real.
A row names what stands in for the real thing: for the clock, for other versions of packages, for Slurm.
Where it does not matter what is trained, a trainer that computes next to nothing stands in for the engine.
Unless a row says otherwise, the tests check that no acknowledged result is lost and none counted twice, that the other
trials finish, and, where a study trains on, that its loss curves are those of an undisturbed run.
After each test no process that it started may live; left out are PostgreSQL and Ray's daemons, which serve several.
A rung in training that was not acknowledged yet is trained again, with the same losses: that counts as nothing lost.
Where a result or a trial is lost the command says why in one line and does not exit 0.
Models that were registered are lost with `mlflow.db`, and yet the command exits 0, since nothing that was measured is
lost: it warns of a damaged file, and names, once, what `sweep export --register` had put into one that is gone.

This page is written by the run itself:
`.venv/bin/pytest tests/faults -m "not whole" --fault-table reports/reliability.md`.
`-m whole` runs the quickstart over two Ray nodes, one of them killed on the way, with the answer of a run without them.

| fault | what happens | what is lost | tests |
| --- | --- | --- | --- |
"""
OPTION, PROPERTY, FIELDS = "--fault-table", "fault", ("case", "happens", "lost")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, metavar="FILE", help="write the table of injected faults")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(case, happens, lost): a row of reports/reliability.md")
    path = config.getoption(OPTION)
    if path is not None and not hasattr(config, "workerinput"):  # where pytest-xdist runs tests, its controller writes
        config.pluginmanager.register(_Table(path), "fault table")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            if mark.args or set(mark.kwargs) != set(FIELDS):
                raise pytest.UsageError(f"{item.nodeid}: fault takes {', '.join(FIELDS)}, each by its name")
            item.user_properties.append((PROPERTY, dict(mark.kwargs)))


class _Table:
    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[tuple[str, str, str], dict[str, bool]] = {}  # row -> test -> whether it held

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, fault in report.user_properties:
            if name == PROPERTY and (report.when == "call" or not report.passed):
                assert isinstance(fault, Mapping)
                tests = self.outcomes.setdefault(tuple(str(fault[field]) for field in FIELDS), {})  # type: ignore[arg-type]
                tests[report.nodeid] = tests.get(report.nodeid, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        rows = [(min(tests), row, tests) for row, tests in self.outcomes.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(HEAD + "".join(_line(row, tests) for _, row, tests in sorted(rows)), encoding="utf-8")


def _line(row: Sequence[str], tests: Mapping[str, bool]) -> str:
    files = sorted({node.partition("::")[0] for node in tests})
    links = ", ".join(f"[{Path(file).stem.removeprefix('test_')}](../{file})" for file in files)
    failed = sum(not held for held in tests.values())
    seen = links + (f", **{failed} failed**" if failed else "")
    cells = [*row, seen]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"
