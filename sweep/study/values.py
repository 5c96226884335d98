"""The kinds of values that a study file holds: numbers within bounds, and unions that a value's shape tells apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag

from sweep.study.arms import ALL_LINEAR
from sweep.study.credentials import holds_secret

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Number = TypeVar("Number", int, float)


def _without_secret(url: str) -> str:
    if holds_secret(url):
        raise ValueError("the URL holds a password or a key: give it in the environment (AWS_SECRET_ACCESS_KEY, …)")
    return url


PlaceName = Annotated[str, Field(min_length=1), AfterValidator(_without_secret)]


def _shape(value: Any) -> str | None:
    """Which branch of a union a YAML value is meant for, so that errors speak of that branch alone."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return None if _is_number(value) else "text"
    if isinstance(value, list):
        return "list"
    return "mapping" if isinstance(value, dict | BaseModel) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def has_repeats(values: Sequence[Hashable]) -> bool:
    return len(set(values)) < len(values)


def _modules_shape(value: Any) -> str | None:
    return "text" if value == ALL_LINEAR else "list" if isinstance(value, list) else None


def one_of(message: str, shape: Callable[[Any], str | None] = _shape) -> Discriminator:
    return Discriminator(shape, custom_error_type="wrong_shape", custom_error_message=message)


# A share of the rows, or the name of a split that the source has.
Part = Annotated[
    Annotated[Fraction, Tag("number")] | Annotated[str, Field(min_length=1), Tag("text")],
    one_of("must be a fraction between 0 and 1, or the name of a split"),
]
Modules = Annotated[
    Annotated[Literal["all-linear"], Tag("text")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), Tag("list")],
    one_of("each entry is a list of module-name endings, as in [[query, value]], or all-linear", _modules_shape),
]


def _is_regex(key: str) -> str:
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(
            f"{key!r} is no regular expression ({error}); write dots of module names as they are"
        ) from None
    return key


ModuleKey = Annotated[str, Field(min_length=1), AfterValidator(_is_regex)]
RankPatterns = Annotated[
    Annotated[dict[ModuleKey, Count], Tag("mapping")]
    | Annotated[list[dict[ModuleKey, Count]], Field(min_length=1), Tag("list")],
    one_of("must be a mapping of module names to ranks, or a list of such mappings, {} for one rank throughout"),
]
AlphaPatterns = Annotated[
    Annotated[dict[ModuleKey, Positive], Tag("mapping")]
    | Annotated[list[dict[ModuleKey, Positive]], Field(min_length=1), Tag("list")],
    one_of("must be a mapping of module names to lora_alpha, or a list of such mappings, {} for one throughout"),
]


def patterns(given: dict[str, Number] | list[dict[str, Number]]) -> list[tuple[tuple[str, Number], ...]]:
    return [tuple(one.items()) for one in (given if isinstance(given, list) else [given])]


def _tell_domains_apart(domains: list[str]) -> list[str]:
    if has_repeats(domains):
        raise ValueError("names a domain twice")
    for name in ("mixed", "none"):  # as the report calls the mixture, and the base alone
        if name in domains:
            raise ValueError(f"{name!r} has a meaning in the report: name the domain otherwise")
    return domains


Domains = Annotated[
    list[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]], Field(min_length=2), AfterValidator(_tell_domains_apart)
]
