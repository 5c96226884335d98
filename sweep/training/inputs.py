"""Whether this machine has the data and the model that the study began with: a worker may have come later."""

from __future__ import annotations

from functools import lru_cache

from sweep.study.errors import FieldError
from sweep.study.records import Prepared, Setup
from sweep.training.data import TokenisedData
from sweep.training.locate import ModelPlace, model_fingerprint


def refuse_other_inputs(setup: Setup, prepared: Prepared, data: TokenisedData, place: ModelPlace) -> None:
    """Raise FieldError where data or model here are not those that were prepared."""
    compared = [
        ("data.source", setup.data.source, prepared.data_fingerprint, data.fingerprint),
        ("model", setup.model, prepared.model_fingerprint, _model_fingerprint(place)),
    ]
    problems = [
        (
            field,
            f"{name} is not on this worker's machine what the study began with (was {was}, here {here}): make it so",
        )
        for field, name, was, here in compared
        if was != here
    ]
    if problems:
        raise FieldError(*problems)


@lru_cache(maxsize=8)
def _model_fingerprint(place: ModelPlace) -> str:
    """Once a process, as the model is loaded once."""
    return model_fingerprint(place)
