"""Checkpoints at a URL, through fsspec: s3://, gs://, sftp:// and what else it knows. Imported for a URL alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from sweep.study.credentials import holds_secret, without_credentials
from sweep.study.errors import FieldError, in_one_line

_EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol → our extra that brings its package
_HAS_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss")  # without folders that must be made


class PlaceError(OSError):
    """The place of the checkpoints cannot be used now; one line. No trial's fault: the same command goes on later."""


def is_url(place: str) -> bool:
    return "://" in place


def as_place(given: str) -> str:
    """A place as it is written into journals: a URL, or the absolute path of a folder. "" stays "".

    Raises FieldError where it holds a password or a key, or is no URL that fsspec could read.
    """
    if holds_secret(given):
        where = "AWS_SECRET_ACCESS_KEY, FSSPEC_SFTP_PASSWORD and the like"
        raise FieldError(("checkpoints", f"the URL holds a password or a key: give it in the environment ({where})"))
    protocol, colon, path = given.partition("://")
    if colon and protocol not in ("file", "local"):
        if not path.strip("/"):
            raise FieldError(("checkpoints", f"{given} names no bucket or folder"))
        _connect(given)
        return given.rstrip("/")
    path = path if colon else given
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def upload(folder: Path, names: Sequence[str], url: str) -> None:
    """Copy files of a folder, in this order."""
    with _telling(url):
        files, root = _connect_to_write(url)
        for name in names:
            files.put_file(str(folder / name), f"{root}/{name}")


def download(url: str, names: Sequence[str], to: Path) -> None:
    """Copy files into a folder; those that are not there are left out."""
    with _telling(url):
        files, root = _connect(url)
        for name in names:
            try:
                files.get_file(f"{root}/{name}", str(to / name))
            except FileNotFoundError:
                (to / name).unlink(missing_ok=True)


def remove(url: str, is_kept: Callable[[str], bool]) -> None:
    """Remove every file below whose path, relative to the URL, is not kept."""
    with _telling(url):
        files, root = _connect(url)
        files.invalidate_cache()  # others write there too
        paths = {path: path[len(root.strip("/")) + 1 :] for path in (p.lstrip("/") for p in files.find(root))}
        unwanted = [path for path, relative in paths.items() if not is_kept(relative)]
        if unwanted:
            files.rm(unwanted)


def exists(place: str) -> bool:
    """Whether anything lies at a URL, or there is such a folder."""
    if not is_url(place):
        return os.path.isdir(place)
    with _telling(place):
        files, root = _connect(place)
        files.invalidate_cache()
        return bool(files.exists(root))


@lru_cache(maxsize=64)
def try_writing(place: str) -> None:
    """Write a small file and remove it, once a process. Raises PlaceError, or FieldError where a package is missing."""
    name = f".write-test-{uuid4().hex}"
    with _telling(place):
        if is_url(place):
            files, root = _connect_to_write(place)
            files.pipe_file(f"{root}/{name}", b"sweep")
            files.rm_file(f"{root}/{name}")
        else:
            os.makedirs(place, exist_ok=True)
            Path(place, name).write_bytes(b"sweep")
            Path(place, name).unlink()


def _connect(url: str) -> tuple[Any, str]:
    """The file system, and the path in it. Raises FieldError where fsspec cannot serve the URL at all."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'lora-sweep[{extra}]'" if extra else " ".join(str(error).split())
        raise FieldError(("checkpoints", f"the package for {protocol}:// is not installed: {hint}")) from None
    except ValueError as error:
        known = ", ".join(sorted(known_implementations))
        why = f"fsspec knows no {protocol}://; it knows {known}" if "Protocol" in str(error) else in_one_line(error)
        raise FieldError(("checkpoints", without_credentials(why))) from None
    return files, str(root).rstrip("/")


def _connect_to_write(url: str) -> tuple[Any, str]:
    """The same, with the folder made; a bucket is none: one whose name is mistyped must not come into being."""
    files, root = _connect(url)
    if url.partition("://")[0] not in _HAS_BUCKETS:
        files.makedirs(root, exist_ok=True)
    return files, root


@contextmanager
def _telling(place: str) -> Iterator[None]:
    """Whatever a file system raises, as one line that names the place."""
    try:
        yield
    except (FieldError, PlaceError):
        raise
    except PermissionError as error:
        raise PlaceError(f"checkpoints: {without_credentials(place)}: access denied ({_reason(error)})") from None
    except FileNotFoundError as error:
        raise PlaceError(
            f"checkpoints: {without_credentials(place)}: no such bucket or folder ({_reason(error)})"
        ) from None
    except Exception as error:
        raise PlaceError(f"checkpoints: {without_credentials(place)} cannot be used: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return without_credentials(in_one_line(error))
