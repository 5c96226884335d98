"""The report's part on cost: each arm alone, what was forecast of it, and each kind of time under its own name."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sweep.report.infeasible import never_fitted
from sweep.report.sections import Section
from sweep.report.tables import Cell, Row, Table
from sweep.report.words import NOTHING, cost_title, count, duration, join, number, plural, signed, size
from sweep.study.arms import Arm
from sweep.study.records import SEARCH, UNEVEN, Cost, Forecast
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord

KINDS = ("weights", "gradients", "optimizer", "activations")
FAR_OFF = 3  # times: about twice what the worst step time forecast of the studies in reports/ was off
COLUMNS = ("Weights", "Gradients", "Optimizer state", "Activations and workspace")


@dataclass(frozen=True)
class Priced:
    """The arms of one cost: what was measured of them alone after the study, and what had been forecast."""

    title: str
    cost: Cost | None
    forecast: Forecast | None
    fits: bool  # False: trials were tried, and none found memory

    @property
    def memory_error(self) -> float | None:
        """Forecast over measured, less 1."""
        if self.cost is None or self.forecast is None:
            return None
        return self.forecast.peak_memory_bytes / self.cost.peak_memory_bytes - 1

    @property
    def time_error(self) -> float | None:
        if self.cost is None or self.forecast is None or self.forecast.step_time_s is None:
            return None
        return self.forecast.step_time_s / self.cost.step_time_s - 1

    @property
    def uneven(self) -> bool:
        return self.cost is not None and self.cost.uneven


def costs_section(study: Study, record: StudyRecord) -> Section | None:
    """None where nothing has run and nothing was forecast."""
    rows = price_list(study, record)
    times = times_table(study, record)
    if not times.rows and not any(row.cost or row.forecast or not row.fits for row in rows):
        return None
    uneven = [row.title for row in rows if row.uneven]
    told = [forecast_sentence(rows), whole_sentence(record), packing_sentence(record, sure=not uneven)]
    if uneven:
        told.append(
            f"The probe steps of {join(uneven)} differed much (median over {UNEVEN} times the shortest): batches of "
            "different lengths, or other work on the machine. Their times, and sums made of them, say little."
        )
    tables = [("Each arm alone, by solo probes after the last trial", _table(study, rows))]
    if times.rows:
        tables.append(("Times, each under its own name", times))
    return Section("What it costs", tuple(sentence for sentence in told if sentence), tuple(tables))


def cost_warnings(study: Study, record: StudyRecord) -> list[str]:
    """Step times that say little: they differed much among themselves, or from the probe steps of the forecast."""
    rows = price_list(study, record)
    uneven = [row.title for row in rows if row.uneven]
    told = []
    if uneven:
        told.append(f"the probe steps of {join(uneven)} differed much: their times, and sums of them, say little.")
    for row in rows:
        if row.time_error is None or row.uneven or 1 / FAR_OFF <= 1 + row.time_error <= FAR_OFF:
            continue
        assert row.cost is not None and row.forecast is not None
        if not row.forecast.probed:  # its time was scaled from others', so that a difference tells of no machine
            continue
        told.append(
            f"a step of {row.title} was forecast to take {duration(row.forecast.step_time_s)} and took "
            f"{duration(row.cost.step_time_s)}: at one of the two times the machine was busy or another one, or the "
            "forecast was wrong."
        )
    return told


def price_list(study: Study, record: StudyRecord) -> list[Priced]:
    """One entry a cost_key, in the order of the study's arms."""
    arms, unfit = study.list_arms(), never_fitted(record)
    firsts: dict[str, Arm] = {}
    for arm in arms:
        firsts.setdefault(arm.cost_key, arm)
    return [
        Priced(
            cost_title(arm, arms),
            record.costs.get(key),
            record.forecast.of(key) if record.forecast else None,
            key not in unfit,
        )
        for key, arm in firsts.items()
    ]


def forecast_sentence(rows: Sequence[Priced]) -> str:
    """How good the forecast of the arms was; empty without one."""
    if not any(row.forecast for row in rows):
        return ""
    probed = [row.title for row in rows if row.forecast and row.forecast.probed]
    how = f"{join(probed)} from a few probe steps" if probed else "no arm from probe steps"
    opening = f"Before the first trial each arm's cost was forecast: {how}, any others scaled."
    memory = _errors("peak memory", [(row.title, row.memory_error) for row in rows])
    time = _errors("step time", [(row.title, row.time_error) for row in rows])
    if not memory or not time:
        return f"{opening} How good that was is not known yet: nothing has been measured."
    return f"{opening} Against what was measured after the last trial: {memory}; {time}."


def whole_sentence(record: StudyRecord) -> str:
    """The whole study as forecast against the time that it took; empty while that is not known."""
    doubtful = record.forecast.doubtful if record.forecast else ()
    packed = _packed_wall(record, but=doubtful)
    if record.finished_at is None or record.forecast is None or not record.forecast.packed_s or not packed:
        return ""
    foretold = record.forecast.packed_s
    wall = sum(stop - start for start, stop in record.sessions)
    return (
        f"Training and evaluating in packs was forecast to take {duration(foretold)}; all rungs of all packs took "
        f"{duration(packed)} (error {_percent(foretold / packed - 1)}). {' '.join(_unlike(record))} "
        f"The whole run, with preparation, forecast and solo probes, took {duration(wall)}."
    )


def _unlike(record: StudyRecord) -> list[str]:
    """What moves the forecast of the whole study and its packed time apart."""
    assert record.forecast is not None
    told = [
        "The forecast takes all packs to be as large as calibrated, though few trials are left at late rungs and "
        "small packs take longer a trial; it takes for each finalist the slowest arm that it may be; and it "
        "leaves out loading and checkpoints, which are in the time taken."
    ]
    if record.prepared is not None and record.prepared.source_text is not None:
        told.append("The loss on source text is in the time taken alone, too.")
    if any(t.rungs and t.spec.arm.cost_key in record.forecast.doubtful for t in record.trials):
        told.append("Arms that were not expected to fit are in neither, though they ran.")
    return told


def packing_sentence(record: StudyRecord, sure: bool) -> str:
    """What packing saved, on like terms: training steps alone; empty where either side is not known.

    sure: the solo times are even enough to claim a ratio.
    """
    packed, alone = _packed_training(record), _one_by_one(record)
    if not packed or not alone:
        return ""
    factor = f", {alone / packed:.2f} times as long" if sure else ""
    return (
        f"The training steps that ran took {duration(packed)} in packs and would have taken {duration(alone)} one by "
        f"one{factor}; evaluation is left out of both. The packs were timed during the study and the solo probes after "
        "it, so what else the machine did moves the two apart."
    )


def times_table(study: Study, record: StudyRecord) -> Table:
    """Each kind of time; packed time is joint and never a trial's own."""
    found = [
        (
            "Packed wall time",
            _packed_wall(record),
            "all rungs of all packs, over all workers, with loading, evaluation and checkpoints; never a trial's own",
        ),
        ("Packed training time", _packed_training(record), "the training steps of these packs alone"),
        ("One by one", _one_by_one(record), "the steps that ran, each trial alone, by its arm's solo step time"),
        (
            "One by one without pruning",
            _one_by_one(record, study.train.steps),
            "the same with every search trial trained to its last step",
        ),
    ]
    rows = [(name, seconds, meaning) for name, seconds, meaning in found if seconds]
    if record.sessions and rows:
        wall = sum(stop - start for start, stop in record.sessions)
        sessions = plural(len(record.sessions), "session")
        rows.append(("Wall time", wall, f"{sessions}, from the start of each to its last event"))
    return Table(
        ("Time", "Length", "Of what"),
        tuple(
            Row((Cell(name), Cell(duration(seconds), value=seconds), Cell(meaning))) for name, seconds, meaning in rows
        ),
    )


def _table(study: Study, rows: Sequence[Priced]) -> Table:
    heads = ("Arm", "Trainable parameters", *COLUMNS, "Peak memory", "Step time", "Solo time of a trial")
    return Table(heads, tuple(Row(_cells(study, row)) for row in rows))


def _cells(study: Study, row: Priced) -> tuple[Cell, ...]:
    cost, foretold = row.cost, row.forecast
    peak = f"forecast {size(foretold.peak_memory_bytes)}{_off(row.memory_error)}" if foretold else ""
    step = (
        f"forecast {duration(foretold.step_time_s)}{_off(row.time_error)}" if foretold and foretold.step_time_s else ""
    )
    parameters = cost.trainable_params if cost else foretold.trainable_params if foretold else None
    if cost is None:
        empty = Cell(NOTHING)
        seen = Cell(NOTHING if row.fits else "does not fit", note=peak)
        trained = Cell(count(parameters), value=parameters)
        return Cell(row.title), trained, *[empty] * len(KINDS), seen, Cell(NOTHING, note=step), empty
    spread = f"{duration(min(cost.step_times_s))} to {duration(max(cost.step_times_s))}"
    return (
        Cell(row.title),
        Cell(count(parameters), value=parameters),
        *(Cell(size(cost.memory.get(kind)), value=cost.memory.get(kind)) for kind in KINDS),
        Cell(size(cost.peak_memory_bytes), note=peak, value=cost.peak_memory_bytes),
        Cell(duration(cost.step_time_s), spread if len(cost.step_times_s) > 1 else "", step, cost.step_time_s),
        Cell(duration(cost.step_time_s * study.train.steps), value=cost.step_time_s * study.train.steps),
    )


def _packed_wall(record: StudyRecord, but: Collection[str] = ()) -> float:
    """but: cost keys of arms whose share is left out."""
    trials = [trial for trial in record.trials if trial.spec.arm.cost_key not in but]
    return sum(rung.measurement.pack_seconds / rung.measurement.pack_size for t in trials for rung in t.rungs)


def _packed_training(record: StudyRecord) -> float | None:
    """None where a rung was not timed apart."""
    found = [rung.measurement for t in record.trials for rung in t.rungs]
    times = [m.pack_train_seconds / m.pack_size for m in found if m.pack_train_seconds is not None]
    return sum(times) if len(times) == len(found) else None


def _one_by_one(record: StudyRecord, steps_of_search: int | None = None) -> float | None:
    """Of the trials that ran, by solo probes; None where an arm of theirs was not probed.

    steps_of_search: of every search trial; without it those that it trained.
    """
    total = 0.0
    for trial in record.trials:
        cost = record.costs.get(trial.spec.arm.cost_key)
        if not trial.step:
            continue
        if cost is None:
            return None
        total += cost.step_time_s * _steps(trial, steps_of_search)
    return total


def _steps(trial: TrialRecord, of_search: int | None) -> int:
    return of_search if of_search is not None and trial.spec.phase == SEARCH else trial.step


def _errors(what: str, found: Sequence[tuple[str, float | None]]) -> str:
    """ "peak memory was off by 3 % in the median and −4 % at worst (rank 8)"; empty where nothing is known."""
    known = [(abs(error), error, title) for title, error in found if error is not None]
    if not known:
        return ""
    worst = max(known)
    middle = number(100 * statistics.median(off for off, _, _ in known), 0)
    return f"{what} was off by {middle} % in the median, at worst by {_percent(worst[1])} ({worst[2]})"


def _off(error: float | None) -> str:
    return "" if error is None else f", {_percent(error)}"


def _percent(error: float) -> str:
    return f"{signed(100 * error, 0)} %"
