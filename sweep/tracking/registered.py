"""Which adapters of a study were put into MLflow's registry: no journal tells of them, and MLflow may lose them."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from sweep.study.files import read_json, write_json
from sweep.study.home import StudyFolder
from sweep.tracking.connection import Tracking, connect, without_credentials
from sweep.tracking.models import SHA, adapter_sha


def remember_registered(folder: StudyFolder, tracking: Tracking, adapter: Path, trial: int, name: str) -> None:
    entry = {"at": without_credentials(tracking.uri), "name": name, "sha256": adapter_sha(adapter), "trial": trial}
    others = [known for known in read_json(_memory(folder)) or [] if known != entry]
    write_json(_memory(folder), [*others, entry])


def forget_lost(study: str, folder: StudyFolder, tracking: Tracking) -> list[str]:
    """A line for each adapter that MLflow holds under its name no more. It is told once: somebody may have removed it.

    Raises whatever MLflow raises.
    """
    known, at = read_json(_memory(folder)) or [], without_credentials(tracking.uri)
    here = [entry for entry in known if entry["at"] == at]
    if not here:
        return []
    client = connect(tracking)
    lost = []
    for entry in here:
        versions = client.search_model_versions(f"name = '{entry['name']}'")
        if not any(version.tags.get(SHA) == entry["sha256"] for version in versions):
            lost.append(entry)
    if lost:
        write_json(_memory(folder), [entry for entry in known if entry not in lost])
    return [
        f"MLflow at {at} has lost registered model {entry['name']} of trial {entry['trial']}: `sweep export {study} "
        f"--trial {entry['trial']} --to DIR --register {quote(entry['name'])}` registers it again"
        for entry in lost
    ]


def _memory(folder: StudyFolder) -> Path:
    return folder.path / "registered.json"
