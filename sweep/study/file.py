"""Reading a study file: strict YAML, `--set` overrides, and errors that name file, line and field, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sweep.study.schema import Study, cross_checks

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    field: str  # dotted, as `--set` takes it
    message: str
    line: int | None = None


class StudyError(ValueError):
    """The study cannot run as it is written. Each problem names its field and what to do."""

    def __init__(self, problems: Sequence[Problem], path: Path | None = None):
        self.problems, self.path = tuple(problems), path
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        place = str(self.path) if self.path else "study"
        return [
            f"{place}{f':{p.line}' if p.line else ''}: {f'{p.field}: ' if p.field else ''}{p.message}"
            for p in self.problems
        ]


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError([Problem("", f"cannot be read: {error}")], path) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        raise StudyError([Problem("", f"not YAML: {reason}", mark.line + 1 if mark else None)], path) from None
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
        sections: dict[str, BaseModel] = {name: getattr(study, name) for name in Study.model_fields}
    except ValidationError as error:
        seen = set()
        for details in error.errors():
            field, message = _field_of(details["loc"], raw), _message(details)
            if (field, message) not in seen:
                seen.add((field, message))
                problems.append(Problem(".".join(map(str, field)), message, _line(line_of, field)))
        sections = _sections_that_hold(raw)
    for field, message in cross_checks(sections):
        problems.append(Problem(".".join(field), message, _line(line_of, field)))
    return study, problems


def dump_study(study: Study) -> str:
    """The study as YAML with every default written out: what a later run is held against."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def what_changed(before: str, after: str) -> list[str]:
    """The lines in which two dumps ask another question; `storage` may move."""
    drop = [[line for line in text.splitlines() if not line.startswith("storage:")] for text in (before, after)]
    diff = unified_diff(*drop, fromfile="as it ran", tofile="as asked now", lineterm="", n=0)
    return [line for line in diff if not line.startswith("@@")]


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
        return Problem("--set", f"{override!r} is not of the form dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return Problem(name, f"--set: {text!r} is not YAML")
    at: dict[str, Any] = raw
    for key in field[:-1]:
        below = at.setdefault(key, {})
        if not isinstance(below, dict):
            return Problem(name, f"--set: {key} holds no keys")
        at = below
    at[field[-1]] = value
    for known in [known for known in line_of if known[: len(field)] == field]:
        del line_of[known]  # the value no longer stands in the file
    return None


def _field_of(loc: tuple[str | int, ...], raw: Any) -> FieldPath:
    """The part of a pydantic location that exists in the file (union branches add words of their own)."""
    field: list[str | int] = []
    at = raw
    for i, part in enumerate(loc):
        if isinstance(at, dict) and isinstance(part, str) and (part in at or i == len(loc) - 1):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        else:
            continue
        field.append(part)
    return tuple(field)


def _message(details: Mapping[str, Any]) -> str:
    kind, value = details["type"], details.get("input")
    if kind == "extra_forbidden":
        return "unknown key; see the study file in the README"
    if kind == "missing":
        return "missing"
    if isinstance(value, str) and kind in ("float_type", "int_type", "list_type", "model_type", "bool_type"):
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
    return f"{message[0].lower()}{message[1:]}, not {value!r}"


def _line(line_of: Mapping[FieldPath, int], field: Sequence[str | int]) -> int | None:
    """The field's line, or that of the nearest key above it."""
    for end in range(len(field), 0, -1):
        line = line_of.get(tuple(field[:end]))
        if line is not None:
            return line
    return None


def _sections_that_hold(raw: dict[str, Any]) -> dict[str, BaseModel]:
    held: dict[str, BaseModel] = {}
    for name, info in Study.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name in raw:
            try:
                held[name] = kind.model_validate(raw[name])
            except ValidationError:
                continue
    return held
