"""Where this run of a study keeps its checkpoints: found out, tried and written down before anything is trained."""

from __future__ import annotations

from uuid import uuid4

from sweep.study.errors import FieldError
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, append_twice, read_study_record
from sweep.tracking.remote import PlaceError, as_place, exists, try_writing


def settle_place(asked: str, study: Study, known: StudyRecord) -> StudyRecord:
    """The record, its trials' checkpoints where they are from now on.

    asked: a folder or a URL; "" for where they have been, the home at first. Below it each run of a study has a folder
    of its own, so that two homes with studies of one name do not collide.
    Raises FieldError where it cannot be used as it stands, PlaceError where it cannot be reached or written now.
    """
    place = _find_place(as_place(asked), study, known)
    if place:
        if place == known.place and _has_checkpoints(known) and not exists(place):
            raise PlaceError(f"checkpoints: {place} holds none of study {study.name} any more: is it mounted?")
        try_writing(place)
    if place == known.place:
        return known
    append_twice(known.folder, "checkpoints", place=place)
    return read_study_record(known.folder)


def _find_place(asked: str, study: Study, known: StudyRecord) -> str:
    mine = f"{asked}/{study.name}/"
    if not asked or known.place.startswith(mine):
        return known.place
    if not _has_checkpoints(known):
        return mine + uuid4().hex[:12]
    if known.place:
        moved = mine + known.place.rpartition("/")[2]
        if exists(moved):
            return moved
        how = f"copy {known.place} to {moved} first, or give the place as it was"
    else:
        how = "leave it out, or give the study another name"
    raise FieldError(("checkpoints", f"those of study {study.name} lie in {known.place or 'its home'}: {how}"))


def _has_checkpoints(known: StudyRecord) -> bool:
    return any(trial.kept for trial in known.trials)
