"""Small files that appear whole or not at all, and tell when they are no longer what was written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_whole(path: Path, content: bytes) -> None:
    """Put a file into its place, or leave what was there; it is on the disk on return. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with open(half, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Values as JSON, with a digest that `read_json` checks. Raises OSError."""
    write_whole(path, json.dumps({"sha256": _digest(content), "content": content}, indent=1, allow_nan=False).encode())


def read_json(path: Path) -> Any:
    """The values that `write_json` put there; None where the file is missing or damaged, for them to be found anew."""
    try:
        read = json.loads(path.read_bytes())
        return read["content"] if read["sha256"] == _digest(read["content"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def file_sha256(path: Path) -> str:
    """Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
