"""YAML as plain values, of bounded size: no objects, no aliases that grow to gigabytes, no file without an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 100_000  # of a study file; the largest of ours has 3,000
MOST_VALUES = 100_000  # with every alias written out


class NotPlain(ValueError):
    """It is not YAML, or more than a study file can need. line: counted from 1, where it is known."""

    def __init__(self, message: str, line: int | None = None):
        self.line = line
        super().__init__(message)


def read_bounded(path: Path) -> str:
    """The file's text. Raises NotPlain where it is too long, OSError or UnicodeDecodeError where it cannot be read."""
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise NotPlain(f"is longer than {MOST_BYTES:,} bytes: no study file")
    return raw.decode("utf-8")


def parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The nodes, which know their lines, and the value. Raises NotPlain."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _weigh(root, {})  # before anything is built, and aliases are written out
        return root, yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        raise NotPlain(f"not YAML: {reason}", mark.line + 1 if mark else None) from None
    except RecursionError:
        raise NotPlain("is nested too deeply") from None
    except NotPlain:
        raise
    except Exception as error:  # PyYAML's constructors let Python's own through: a 13th month, a number of 5,000 digits
        raise NotPlain(f"not YAML: {error}") from None


def _weigh(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values the node stands for with its aliases written out. Raises NotPlain where they are too many.

    known: by a node's identity what is known of it; None while its own parts are weighed.
    """
    weight = known.get(id(node), 0)
    if weight is None:
        raise NotPlain("an alias stands for what it is a part of", node.start_mark.line + 1)
    if weight:
        return weight
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    weight = 1 + sum(_weigh(part, known) for part in parts)
    if weight > MOST_VALUES:
        raise NotPlain(f"its aliases stand for more than {MOST_VALUES:,} values", node.start_mark.line + 1)
    known[id(node)] = weight
    return weight
