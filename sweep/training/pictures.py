"""Reading images from where they lie: folders of class folders, columns of tables, scikit-learn's digits."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sweep.study.errors import FieldError, first_line
from sweep.study.files import read_json, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """An image that is decoded when it is needed: its file, its encoded bytes, or uint8 pixels (H, W, 3)."""

    source: Path | bytes | np.ndarray
    where: str  # for messages


def as_picture(cell: Any, folder: Path | None, where: str) -> Picture | None:
    """The picture in a cell of a column: {"bytes", "path"} as `datasets` stores it, bytes, or a path (relative to
    `folder`); None where the cell is empty. Raises FieldError for anything else.
    """
    if isinstance(cell, dict) and set(cell) <= {"bytes", "path"}:
        cell = cell.get("bytes") or cell.get("path")
    if cell is None or cell == "":
        return None
    if isinstance(cell, bytes):
        return Picture(cell, where)
    if isinstance(cell, str):
        path = (folder or Path()) / cell
        if not path.is_file():
            raise FieldError(("data.image", f"{where}: there is no file {path}"))
        return Picture(path, str(path))
    raise FieldError(("data.image", f"{where} holds no image but {type(cell).__name__} {cell!r:.60}"))


def class_folders(folder: Path) -> list[dict[str, Any]]:
    """One row an image, its folder's name the label; hidden files are passed over."""
    rows = []
    for below in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        for path in sorted(p for p in below.iterdir() if not p.name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                known = ", ".join(SUFFIXES)
                raise FieldError(("data.source", f"{path}: a class folder of images may hold {known} files only"))
            rows.append({"image": Picture(path, str(path)), "label": below.name})
    return rows


def digits() -> list[dict[str, Any]]:
    """scikit-learn's 1,797 images of handwritten digits, 8×8 pixels of 17 greys."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError:
        message = "sklearn:digits needs scikit-learn: `pip install scikit-learn`"
        raise FieldError(("data.source", message)) from None
    found = load_digits()
    grey_NHW = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return [
        {"image": Picture(np.repeat(grey_HW[..., None], 3, axis=2), f"digit {i}"), "label": str(label)}
        for i, (grey_HW, label) in enumerate(zip(grey_NHW, found.target, strict=True))
    ]


def decode(picture: Picture) -> Image:
    """In RGB of 8 bits, turned as its camera says. Raises FieldError where it cannot be decoded, or has 32 bits."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise FieldError(("data.image", "images need Pillow: `pip install pillow`")) from None
    if isinstance(picture.source, np.ndarray):
        return Image.fromarray(picture.source)
    try:
        with Image.open(io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source) as image:
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I;16"):  # Pillow itself would clip all above 255 to white
                turned = Image.fromarray(np.rint(np.asarray(turned) / 257).astype(np.uint8))
            rgb = turned.convert("RGB")
    except Exception as error:  # Pillow raises many kinds; all mean that this is no image
        raise FieldError(("data.image", f"{picture.where} cannot be decoded: {first_line(error)}")) from None
    if turned.mode in ("I", "F"):
        raise FieldError(("data.image", f"{picture.where} has 32 bits a pixel, of no known range; save it with 16"))
    return rgb


def with_pixel_digests(rows: Sequence[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """The rows with `pixels`, a digest of the decoded image: images of the same pixels have the same, however encoded.

    Decoding takes longer than all the rest, so the digests are cached by the encoded images' content.
    """
    encoded = [_digest(_content(row["image"])) for row in rows]
    path = cache / f"images-{_digest(''.join(encoded).encode())}.json"
    known: list[str] | None = read_json(path)
    if known is None:
        known = [_pixel_digest(decode(row["image"])) for row in rows]
        write_json(path, known)
    return [{**row, "pixels": pixels} for row, pixels in zip(rows, known, strict=True)]


def _content(picture: Picture) -> bytes:
    if isinstance(picture.source, Path):
        try:
            return picture.source.read_bytes()
        except OSError as error:
            raise FieldError(("data.source", f"{picture.where} cannot be read: {first_line(error)}")) from None
    return picture.source.tobytes() if isinstance(picture.source, np.ndarray) else picture.source


def _pixel_digest(image: Image) -> str:
    return _digest(f"{image.width}×{image.height}".encode() + image.tobytes())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
