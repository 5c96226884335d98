"""Reading a study file: strict YAML, `--set` overrides, and errors that name file, line and field, all at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sweep.study.checks import cross_checks
from sweep.study.credentials import kept_address, without_credentials
from sweep.study.domains import domain_checks
from sweep.study.plain_yaml import NotPlain, parse, read_bounded
from sweep.study.schema import Study

FieldPath = tuple[str | int, ...]
ON_COMMAND_LINE = 0  # the "line" of a value that `--set` gave
MOST_LINES, LONGEST_LINE = 40, 4000  # of an error
# Where a study runs and keeps its files may change while it runs; rank_use and published look at what has been trained.
NOT_ASKED = ("storage", "resources", "checkpoints", "rank_use", "published")


@dataclass(frozen=True)
class Problem:
    field: str  # dotted, as `--set` takes it
    message: str
    line: int | None = None  # ON_COMMAND_LINE: the value came with `--set`


class StudyError(ValueError):
    """The study cannot run as it is written. Each problem names its field and what to do."""

    def __init__(self, problems: Sequence[Problem], path: Path | None = None):
        self.problems, self.path = tuple(problems), path
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        shown = [f"{self._place(p.line)}: {f'{p.field}: ' if p.field else ''}{p.message}" for p in self.problems]
        more = [f"… and {len(shown) - MOST_LINES} problems more"] if len(shown) > MOST_LINES else []
        return [*(without_credentials(line)[:LONGEST_LINE] for line in shown[:MOST_LINES]), *more]

    def _place(self, line: int | None) -> str:
        if line == ON_COMMAND_LINE:
            return "--set"
        return f"{self.path or 'study'}{'' if line is None else f':{line}'}"


@dataclass(frozen=True)
class StudyFile:
    path: Path
    study: Study
    line_of: Mapping[FieldPath, int]

    def error(self, *problems: tuple[str, str]) -> StudyError:
        """An error about fields of this file, found after reading it: (dotted field, message)."""
        return StudyError([Problem(f, m, _line(self.line_of, tuple(f.split(".")))) for f, m in problems], self.path)


def read_study(path: Path, overrides: Sequence[str] = ()) -> StudyFile:
    """Read and check a study file.

    overrides: `dotted.key=value`, the value in YAML.
    Raises StudyError with every problem found.
    """
    try:
        root, raw = parse(read_bounded(path))
    except NotPlain as error:
        raise StudyError([Problem("", str(error), error.line)], path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError([Problem("", f"cannot be read: {getattr(error, 'strerror', None) or error}")], path) from None
    if not isinstance(raw, dict):
        raise StudyError([Problem("", "must be a mapping with name, model, task, data, arms, …", 1)], path)

    line_of: dict[FieldPath, int] = {}
    problems = [
        Problem(".".join(map(str, field)), f"key appears twice (first on line {first})", line)
        for field, first, line in _index_lines(root, (), line_of)
    ]
    for override in overrides:
        problem = _apply_override(raw, override, line_of)
        if problem:
            problems.append(problem)
    study, found = validate(raw, line_of)
    problems += found
    if problems or study is None:
        raise StudyError(sorted(problems, key=lambda p: p.line or 0), path)
    return StudyFile(path, study, line_of)


def validate(raw: dict[str, Any], line_of: Mapping[FieldPath, int]) -> tuple[Study | None, list[Problem]]:
    study, problems = None, []
    try:
        study = Study.model_validate(raw)
        sections: dict[str, Any] = {name: getattr(study, name) for name in Study.model_fields}
    except ValidationError as error:
        seen = set()
        for details in error.errors():
            field = _field_of(details["loc"], raw, details["type"] == "missing")
            message = _message(details, field)
            if (field, message) not in seen:
                seen.add((field, message))
                problems.append(Problem(".".join(map(str, field)), message, _line(line_of, field)))
        sections = _sections_that_hold(raw)
    for field, message in (*cross_checks(sections), *domain_checks(sections)):
        problems.append(Problem(".".join(field), message, _line(line_of, field)))
    return study, problems


def dump_study(study: Study) -> str:
    """The study as YAML with every default written out: what a later run is held against. No address in it has a
    password."""
    return _dump(study.model_dump())


def dump_question(study: Study) -> str:
    """The part of it that a study must not change once it has run; see NOT_ASKED."""
    return _dump(study.model_dump(exclude=set(NOT_ASKED)))


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(_kept(values), sort_keys=False, allow_unicode=True)


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kept(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_kept(below) for below in value]
    return kept_address(value) if isinstance(value, str) and "://" in value else value


def dotted(study: Study) -> dict[str, Any]:
    """Dotted key -> value, with every default."""
    return dict(_flat(study.model_dump(), ""))


def what_changed(before: str, after: str) -> list[str]:
    """The keys in which two dumps ask another question, as it ran (-) and as asked now (+); see NOT_ASKED."""
    ran, asked = _asked(before), _asked(after)
    lines = []
    for key in [*ran, *(key for key in asked if key not in ran)]:
        if ran.get(key) != asked.get(key):
            lines += [
                f"{sign} {key}: {json.dumps(side[key])}" for sign, side in (("-", ran), ("+", asked)) if key in side
            ]
    return lines


def _asked(dump: str) -> dict[str, Any]:
    """Dotted key -> value. Keys that came into the schema after the dump was written take their defaults."""
    raw = yaml.safe_load(dump)
    with suppress(ValidationError):  # written by another version: hold it as it stands
        raw = Study.model_validate(raw).model_dump()
    return {key: value for key, value in _flat(raw, "") if key.split(".")[0] not in NOT_ASKED}


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, below in value.items():
        yield from _flat(below, f"{key}.{name}" if key else str(name))


def _index_lines(
    node: yaml.Node | None, path: FieldPath, line_of: dict[FieldPath, int]
) -> Iterator[tuple[FieldPath, int, int]]:
    """Fill line_of; yield (field, first line, line) for each key that appears again."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in line_of:
                yield here, line_of[here], line
            line_of[here] = line
            yield from _index_lines(value, here, line_of)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            line_of[(*path, i)] = value.start_mark.line + 1
            yield from _index_lines(value, (*path, i), line_of)


def _apply_override(raw: dict[str, Any], override: str, line_of: dict[FieldPath, int]) -> Problem | None:
    name, equals, text = override.partition("=")
    field = tuple(name.strip().split("."))
    if not equals or not all(field):
        return Problem("", f"{override!r} is not of the form dotted.key=value", ON_COMMAND_LINE)
    try:
        _, value = parse(text)
    except NotPlain as error:
        reason = str(error).removeprefix("not YAML: ")
        return Problem(name, f"{text[:80]!r} is not YAML: {reason}", ON_COMMAND_LINE)
    at: dict[str, Any] = raw
    for key in field[:-1]:
        if at.get(key) is None:  # missing, or `null` as in a study that has run
            at[key] = {}
        below = at[key]
        if not isinstance(below, dict):
            return Problem(name, f"{key} holds no keys of its own", ON_COMMAND_LINE)
        at = below
    at[field[-1]] = value
    for known in [known for known in line_of if known[: len(field)] == field]:
        del line_of[known]
    line_of[field] = ON_COMMAND_LINE
    return None


def _field_of(loc: tuple[str | int, ...], raw: Any, missing: bool) -> FieldPath:
    """The part of a pydantic location that exists in the file (union branches add words of their own)."""
    field: list[str | int] = []
    at = raw
    for i, part in enumerate(loc):
        if isinstance(at, dict) and isinstance(part, str) and (part in at or (missing and i == len(loc) - 1)):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        else:
            continue
        field.append(part)
    return tuple(field)


def _message(details: Mapping[str, Any], field: FieldPath) -> str:
    kind, value = details["type"], details.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(field)
    if kind == "missing":
        return "missing"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must hold keys of its own, not {value!r:.200}"
    if kind in ("float_type", "int_type", "bool_type", "list_type", "wrong_shape") and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            return f"{value!r} is text, not a number; write it without quotes, and 1e-4 as 1.0e-4 ({number:g})"
    if kind == "value_error":
        return str(details["ctx"]["error"])
    if kind == "string_pattern_mismatch":
        return f"{value!r}: use lower-case letters, digits and dashes only"
    message = str(details["msg"])
    return f"{message[0].lower()}{message[1:]}, not {value!r:.200}"


def _unknown_key(field: FieldPath) -> str:
    models: list[type[BaseModel]] = [Study]
    for part in field[:-1]:
        infos = [model.model_fields[str(part)] for model in models if str(part) in model.model_fields]
        models = [below for info in infos for below in _models_in(info.annotation)]
    known = [name for model in models for name in model.model_fields]
    close = get_close_matches(str(field[-1]), known, n=1)
    return f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known here: {', '.join(known)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _line(line_of: Mapping[FieldPath, int], field: Sequence[str | int]) -> int | None:
    """The field's line, or that of the nearest key above it."""
    for end in range(len(field), 0, -1):
        line = line_of.get(tuple(field[:end]))
        if line is not None:
            return line
    return None


def _sections_that_hold(raw: dict[str, Any]) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for name, info in Study.model_fields.items():
        kinds = _models_in(info.annotation)
        if len(kinds) == 1 and raw.get(name) is not None:
            try:
                held[name] = kinds[0].model_validate(raw[name])
            except ValidationError:
                continue
        elif not info.is_required() or not kinds:
            held[name] = raw.get(name)
    return held
