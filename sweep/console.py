"""What the commands print: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweep.study.arms import FULL
from sweep.study.credentials import without_credentials
from sweep.study.finalists import count_confirm_trials, count_finalists, count_search_trials
from sweep.study.records import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED, SEARCH, Prepared, StudyForecast
from sweep.study.schema import Study, rate_values
from sweep.tracking.journal import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from sweep.adapters.answers import Answer
    from sweep.adapters.mix import Mixed
    from sweep.adapters.peft_format import PeftAdapter
    from sweep.doctor import Check
    from sweep.driver.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
WIDTH_OF_NO_TERMINAL = 200


def console() -> Console:
    """Numbers and paths as they are: no colours of rich's own choosing; where there is no terminal, no cut tables."""
    return Console(
        highlight=False, emoji=False, markup=False, width=None if sys.stdout.isatty() else WIDTH_OF_NO_TERMINAL
    )


@contextmanager
def watching(out: Console) -> Iterator[Callable[[Progress], None]]:
    """Shows a study's progress while it runs; yields what the driver tells it to."""
    if not out.is_terminal:
        yield _line_printer(out)
        return
    with Live(console=out, refresh_per_second=4, transient=True) as live:

        def show(progress: Progress) -> None:
            live.update(_progress_table(progress))

        yield show


def _line_printer(out: Console) -> Callable[[Progress], None]:
    """A line when the phase or the message changes, and otherwise one every few seconds."""
    last: dict[str, Any] = {"at": 0.0, "phase": None, "message": None, "line": None}

    def show(progress: Progress) -> None:
        line = _progress_line(progress)
        turned = (progress.phase, progress.message) != (last["phase"], last["message"])
        if line == last["line"] or not (turned or time.monotonic() - last["at"] >= SECONDS_BETWEEN_LINES):
            return
        last.update(at=time.monotonic(), phase=progress.phase, message=progress.message, line=line)
        out.print(line)

    return show


def _progress_line(progress: Progress) -> str:
    parts = [f"{progress.phase}: {progress.done} of {progress.total} trials done"]
    parts += [
        f"{number} {word}"
        for word, number in (
            ("running", progress.running),
            ("pruned", progress.pruned),
            ("diverged", progress.diverged),
            (INFEASIBLE, progress.infeasible),
            ("failed", progress.failed),
        )
        if number
    ]
    if progress.best_arm is not None:
        parts.append(f"best so far {_best(progress)}")
    if progress.seconds_left is not None:
        parts.append(f"{clock(progress.seconds_left)} left")
    if progress.message:
        parts.append(progress.message)
    return without_credentials(", ".join(parts))


def _progress_table(progress: Progress) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = [
        "phase",
        "trials",
        "done",
        "running",
        "pruned",
        "diverged",
        INFEASIBLE,
        "failed",
        "best so far",
        "time left",
    ]
    for name in heads:
        table.add_column(name, no_wrap=True)
    table.add_row(
        progress.phase,
        str(progress.total),
        str(progress.done),
        str(progress.running),
        str(progress.pruned),
        _alarm(progress.diverged),
        _alarm(progress.infeasible),
        _alarm(progress.failed),
        _best(progress) if progress.best_arm is not None else "–",
        clock(progress.seconds_left) if progress.seconds_left is not None else "–",
    )
    whole = Table.grid()
    whole.add_row(table)
    whole.add_row(ProgressBar(total=max(progress.steps_total, 1), completed=progress.steps_done, width=60))
    whole.add_row(Text(without_credentials(progress.message or ""), style="dim"))
    return whole


def _alarm(number: int) -> Text:
    return Text(str(number), style="red" if number else "")


def _best(progress: Progress) -> str:
    rate = "" if progress.best_rate is None else f" at {progress.best_rate:.4g}"
    loss = "" if progress.best_loss is None else f", loss {progress.best_loss:.4f}"
    return f"{progress.best_arm}{rate}{loss}"


def clock(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plan(
    study: Study, prepared: Prepared, forecast: StudyForecast, an_hour: float | None
) -> tuple[list[str], Table, list[str]]:
    """What a dry run shows: (lines, a table with a row an arm, lines below it). an_hour: what an hour costs."""
    from sweep.driver.pricing import price_arms, shortage
    from sweep.report import words
    from sweep.report.truncation import truncation_lines

    arms = study.list_arms()
    rates = {arm.name: rate_values(study.rates(arm)) for arm in arms}
    finalists = count_finalists(study)
    searches, confirms = count_search_trials(study), count_confirm_trials(study)
    lines = [
        f"{study.model} with {prepared.total_params:,} parameters on {prepared.device}; "
        f"packs of up to {prepared.pack_size} in {prepared.precision} with {prepared.attention} attention; rows: "
        + ", ".join(f"{rows} {part}" for part, rows in prepared.rows.items()),
        *truncation_lines(prepared, study.task),
        f"{len(arms)} arms, {searches} search trials, at most {confirms} confirm trials "
        f"({finalists} finalists on {len(study.confirm.seeds)} seeds), {study.train.steps} steps each",
        f"rungs {', '.join(map(str, study.rungs))}; at each, {study.search.keep:.0%} of a rank's trials go on",
        f"learning rates {_rates(rates[arms[0].name])}"
        + (f"; full fine-tuning {_rates(rates[FULL])}" if FULL in rates else "")
        + (f"; prefixes alone {_rates(rate_values(study.tune.prefix.learning_rate))}" if study.tune.prefix else ""),
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm")
    heads = ("trainable parameters", "peak memory", "a step", "a trial", "its search", "its confirm phase", "fits")
    for name in heads:
        table.add_column(name, justify="right")
    for row in price_arms(study, forecast):
        found = row.forecast
        table.add_row(
            row.arm.name,
            f"{found.trainable_params:,}",
            words.size(found.peak_memory_bytes),
            words.duration(found.step_time_s),
            *(words.NOTHING if s is None else clock(s) for s in (row.trial_s, row.search_s, row.confirm_s)),
            "yes" if found.fits else f"no: {shortage(forecast, found)}",
        )
    return lines, table, _whole(forecast, an_hour)


def _whole(forecast: StudyForecast, an_hour: float | None) -> list[str]:
    """What the whole study takes, and how that was found."""
    from sweep.report.words import size

    probed = [arm.cost_key for arm in forecast.arms if arm.probed]
    others = len(forecast.arms) > len(probed)
    return [
        *_at_most("the whole study", [forecast], an_hour),
        "with pruning and evaluation; without preparation, loading, checkpoints, the solo probes at the end and the "
        "report" + ("; arms that are not expected to fit are not in it" if forecast.doubtful else ""),
        "its search: the arm's share of its rank's steps, pruning counted; its confirm phase: if it is a finalist; "
        "both one trial after the other",
        (f"probed alone for a few steps: {', '.join(probed)}" if probed else "no arm could be probed")
        + ("; the others are scaled from these" if others and probed else "")
        + f"; a trial may take {size(forecast.memory_limit_bytes)}",
        *(f"note: {arm.cost_key}: {arm.note}" for arm in forecast.arms if arm.note and arm.fits),
    ]


def plan_of_all(parts: Sequence[StudyForecast], an_hour: float | None) -> list[str]:
    """What a dry run over domains shows last: the sums over the parts, which run one after the other."""
    return _at_most(f"in all, {len(parts)} studies", parts, an_hour)


def _at_most(what: str, parts: Sequence[StudyForecast], an_hour: float | None) -> list[str]:
    """Hours and money of all parts, in packs and one by one; each part priced."""
    told = []
    for how, times in (
        ("in packs, as it will run", [part.packed_s for part in parts]),
        ("one trial after the other", [part.alone_s for part in parts]),
    ):
        seconds = sum(s for s in times if s is not None)
        price = "" if an_hour is None else f", {seconds / 3600 * an_hour:,.2f} at {an_hour:g} an hour"
        told.append(f"{what} {how}: at most {seconds / 3600:.2f} hours ({clock(seconds)}){price}")
    return told


def _rates(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def studies_table(records: Mapping[str, StudyRecord], planned: Mapping[str, int], running: Container[str]) -> Table:
    """How far each study is. planned: trials in all, as the log counts; running: those that a driver works on now."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    ends = (COMPLETE, PRUNED, DIVERGED, INFEASIBLE, FAILED)
    for name in ("study", "now", "phase", "trials done", *ends, "open", "best of the search"):
        table.add_column(name, no_wrap=name != "best of the search")
    for name, record in records.items():
        states = [trial.state for trial in record.trials]
        table.add_row(
            name,
            "running" if name in running else "complete" if record.finished_at else "stopped",
            _phase(record),
            f"{len(states) - states.count(None)} of {planned[name]}",
            *(str(states.count(state)) for state in (*ends, None)),
            _best_trial(record),
        )
    return table


def _phase(record: StudyRecord) -> str:
    if record.finished_at:
        return "finished"
    return record.trials[-1].spec.phase if record.trials else "preparing"


def _best_trial(record: StudyRecord) -> str:
    """The lowest validation loss of the search at the furthest rung, as `sweep run` shows it; one seed is no result."""
    measured = [trial for trial in record.trials if trial.spec.phase == SEARCH and trial.last is not None]
    best = min(measured, key=lambda trial: (-trial.step, validation_loss(trial)), default=None)
    if best is None:
        return "–"
    return f"{best.spec.arm.name} at {best.spec.learning_rate:.4g}, loss {validation_loss(best):.4f}"


def validation_loss(trial: TrialRecord) -> float:
    """The last one; infinite where there is none."""
    loss = trial.last.eval_loss if trial.last else None
    return float("inf") if loss is None else loss


def checks_table(checks: Sequence[Check]) -> Table:
    """What the doctor found, a row a check."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for check in checks:
        mark = Text("ok", style="green") if check.ok else Text("!!" if check.needed else "–", style="red")
        table.add_row(mark, check.name, check.found, "" if check.ok else check.advice)
    return table


def adapters_table(adapters: Mapping[str, PeftAdapter]) -> Table:
    """A row an adapter: what it is, where it sits and how large it is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("adapter", "method", "rank", "modules", "replaces", "numbers", "base"):
        table.add_column(name, overflow="fold", justify="right" if name in ("rank", "numbers") else "left")
    for name, adapter in adapters.items():
        ranks = sorted(set(adapter.ranks.values()))
        endings = sorted({module.rpartition(".")[2] for module in adapter.ranks})
        method = "rslora" if adapter.use_rslora and adapter.method == "lora" else adapter.method
        table.add_row(
            name,
            method,
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            f"{len(adapter.ranks)}: {', '.join(endings)}",
            ", ".join(adapter.saved) or "–",
            f"{adapter.parameters:,}",
            adapter.base_model or "–",
        )
    return table


def answers_table(answers: Sequence[Answer]) -> Table:
    """A row an answer; a text stands with the first of its own."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    language = any(answer.loss is not None for answer in answers)
    for name in ("text", "adapter", "next token" if language else "class", "probability"):
        table.add_column(name, overflow="fold", max_width=60, justify="right" if name == "probability" else "left")
    if language:
        table.add_column("loss of the text", justify="right")
    before = None
    for answer in answers:
        loss = ["–" if answer.loss is None else f"{answer.loss:.4f}"] if language else []
        shown = answer.text if answer.text != before else ""
        before = answer.text
        table.add_row(shown, answer.adapter or "base", answer.said, f"{answer.probability:.3f}", *loss)
    return table


def losses_table(mixed: Mixed, rank: int) -> Table:
    """What a smaller rank loses of every layer's update, the worst first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "rank", "‖ΔW‖", "lost of ‖ΔW‖²"):
        table.add_column(name, overflow="fold", justify="left" if name == "layer" else "right")
    for module in sorted(mixed.spectra, key=lambda module: -mixed.lost(module, rank)):
        norm, lost = float(mixed.spectra[module].norm()), mixed.lost(module, rank)
        table.add_row(module, str(mixed.adapter.ranks[module]), f"{norm:.4g}", f"{lost:.2%}")
    return table
