"""What it takes to repeat a study, as the sessions that ran it wrote it down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sweep.report.words import plural, size, without_paths
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord

UNKNOWN = "not recorded"


def provenance_facts(study: Study, records: Sequence[StudyRecord]) -> list[tuple[str, str]]:
    """(what, which): command, commit, versions, machine, seeds, fingerprints. records: of the study, or of its parts.

    Where sessions differ every one of their values is told. Older journals lack some of it, which is told too.
    """
    sessions = [session for record in records for session in record.provenance]
    prepared = [record.prepared for record in records if record.prepared is not None]
    versions = [
        {**(record.prepared.versions if record.prepared else {}), **session.get("versions", {})}
        for record in records
        for session in record.provenance or [{}]
    ]
    data = [p.data_fingerprint for p in prepared]
    data += [f"{p.source_text.fingerprint} (source text)" for p in prepared if p.source_text is not None]
    elsewhere = [told for record in records if (told := _elsewhere(record))]
    facts = [
        ("Command as typed", _each(sessions, lambda s: s.get("command", ""))),
        (
            "Commit",
            _each(sessions, lambda s: s.get("commit", "") or ("" if "hardware" not in s else "none: installed")),
        ),
        ("Versions", _told(_list_versions(v) for v in versions)),
        *([("Trained on", _told(elsewhere))] if elsewhere else []),
        ("Hardware", _each(sessions, lambda s: _hardware(s.get("hardware", {})))),
        ("Operating system", _each(sessions, lambda s: s.get("system", ""))),
        ("Seeds", _seeds(study)),
        ("Data fingerprint", _told(data)),
        ("Model fingerprint", _told(p.model_fingerprint for p in prepared)),
    ]
    return [(name, without_paths(value)) for name, value in facts]


def _each(sessions: Sequence[Mapping[str, Any]], tell: Callable[[Mapping[str, Any]], str]) -> str:
    return _told(tell(session) for session in sessions)


def _told(values: Any) -> str:
    """Each different value once, in the order in which they came."""
    return "; ".join(dict.fromkeys(value for value in values if value)) or UNKNOWN


def _list_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _elsewhere(record: StudyRecord) -> str:
    """Device and versions of the worker that prepared the study, where no session's own machine can have been it."""
    prepared = record.prepared
    if prepared is None:
        return ""
    on_cpu, differing = prepared.device.startswith("cpu"), []
    for session in record.provenance:
        its, hardware = session.get("versions", {}), session.get("hardware")
        others = {name: v for name, v in prepared.versions.items() if its.get(name, v) != v}
        if not others and (on_cpu or hardware is None or hardware.get("gpus")):
            return ""
        differing.append(others)
    if not differing:
        return ""
    return prepared.device + (f", with {_list_versions(differing[0])}" if differing[0] else "")


def _hardware(hardware: Mapping[str, Any]) -> str:
    if not hardware:
        return ""
    gpus = hardware.get("gpus") or []
    return ", ".join(
        [
            str(hardware["cpu"]),
            plural(hardware["cores"], "core"),
            f"{size(hardware['memory_bytes'])} of memory",
            *(f"GPU {gpu}" for gpu in gpus),
            *([] if gpus else ["no GPU"]),
        ]
    )


def _seeds(study: Study) -> str:
    seeds = ", ".join(map(str, study.confirm.seeds))
    return f"{study.search.seed} for the search and the split of the data; {seeds} in the confirm phase"
