"""Images as arrays: prepared once by the model's own image processor, cached, mapped from the file.

Shapes: N rows of a split, C channels, H×W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sweep.study.errors import FieldError, first_line
from sweep.training.locate import ModelPlace, quiet
from sweep.training.pictures import decode
from sweep.training.trust import reading, unusable

PROCESSOR = "preprocessor_config.json"
_CODE_VERSION = 1  # raise it when the same images would become other pixels
_AT_ONCE = 64  # images that are decoded at a time
_PATCH = 16 * 16  # pixels that count as much as a token


@dataclass(frozen=True)
class ImageSplit:
    """Rows of one split, all of one size. What the model sees is pixels · scale + shift.

    pixels_NCHW: uint8 as resized and cropped, or float32 where the processor does more than scale and shift them.
    labels: int64 (N,), an index into the classes.
    """

    pixels_NCHW: np.ndarray
    scale_C11: np.ndarray
    shift_C11: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """An image counts as one."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def longest(self) -> int:
        """How many tokens a row takes in a forward pass, roughly: one for 16×16 pixels."""
        return max(1, int(np.prod(self.pixels_NCHW.shape[2:])) // _PATCH)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """float32 (rows, C, H, W), as the model sees them."""
        seen = self.pixels_NCHW[rows].astype(np.float32)
        seen *= self.scale_C11
        seen += self.shift_C11
        return seen


def load_image_processor(place: ModelPlace) -> Any:
    """The model's own. Raises FieldError on `model`."""
    from transformers import AutoImageProcessor

    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(
                place.path, local_files_only=place.local, backend="pil", **reading(place)
            )
    except Exception as error:  # transformers raises many kinds; all mean the same to the study
        raise unusable(place, f": its image processor ({PROCESSOR}) cannot be loaded", error) from None


def image_splits(
    rows: dict[str, list[dict[str, Any]]], labels: tuple[str, ...], place: ModelPlace, fingerprint: str, cache: Path
) -> dict[str, ImageSplit]:
    """The pixels of every split; from the cache where they lie there. fingerprint: of rows and splits."""
    processor = load_image_processor(place)
    settings = json.dumps([_CODE_VERSION, version("transformers"), fingerprint, processor.to_dict()], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    factors = _scale_and_shift(processor, _decoded(rows["train"][0], processor))
    index = {label: i for i, label in enumerate(labels)}
    splits = {}
    for name, own in rows.items():
        path = cache / f"pixels-{key}-{name}.npy"
        pixels_NCHW = _mapped(path, len(own))
        if pixels_NCHW is None:
            _write(path, own, processor, plain=factors is not None)
            pixels_NCHW = np.load(path, mmap_mode="r", allow_pickle=False)
        scale, shift = factors or (np.ones(1, np.float32), np.zeros(1, np.float32))
        classes = np.array([index[row["label"]] for row in own], dtype=np.int64)
        splits[name] = ImageSplit(pixels_NCHW, scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1), classes)
    return splits


def _scale_and_shift(processor: Any, image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """What the processor does to resized pixels, as (scale, shift) by channel; None where it does anything else.

    Seen on an image: uint8 pixels take a quarter of the room, and are kept where nothing is lost by it.
    """
    scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    normalises = getattr(processor, "do_normalize", False)
    mean, std = (np.atleast_1d(x) for x in ((processor.image_mean, processor.image_std) if normalises else (0.0, 1.0)))
    factors = (scale / std).astype(np.float32), (-mean / std).astype(np.float32)
    seen = _process(processor, [image_HWC], plain=False)
    try:
        plain = _process(processor, [image_HWC], plain=True)
    except FieldError:  # a processor that cannot leave them out
        return None
    if plain.dtype != np.uint8 or plain.shape != seen.shape:
        return None
    ours = ImageSplit(plain, factors[0].reshape(-1, 1, 1), factors[1].reshape(-1, 1, 1), np.zeros(1)).read(np.arange(1))
    return factors if np.allclose(ours, seen, rtol=0, atol=1e-5) else None


def _decoded(row: dict[str, Any], processor: Any) -> np.ndarray:
    """uint8 (H, W, C); greys where the processor speaks of one channel."""
    image, mean = decode(row["image"]), getattr(processor, "image_mean", None)
    greys = isinstance(mean, list | tuple) and len(mean) == 1
    return np.asarray(image.convert("L"))[..., None] if greys else np.asarray(image)


def _process(processor: Any, images: Sequence[np.ndarray], plain: bool) -> np.ndarray:
    """(N, C, H, W); plain: resized and cropped alone."""
    leave_out = {"do_rescale": False, "do_normalize": False} if plain else {}
    try:
        found = processor(list(images), return_tensors="np", input_data_format="channels_last", **leave_out)
    except Exception as error:  # whatever it raises, these images are not for this model
        raise FieldError(("model", f"its image processor refuses the images: {first_line(error)}")) from None
    pixels_NCHW: np.ndarray = found["pixel_values"]
    return pixels_NCHW


def _write(path: Path, rows: Sequence[dict[str, Any]], processor: Any, plain: bool) -> None:
    """Into a .npy file, a few images at a time, its sha256 behind it; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    array = None
    try:
        for at in range(0, len(rows), _AT_ONCE):
            some = rows[at : at + _AT_ONCE]
            pixels = _process(processor, [_decoded(row, processor) for row in some], plain)
            if array is None:
                shape = (len(rows), *pixels.shape[1:])
                array = np.lib.format.open_memmap(aside, mode="w+", dtype=pixels.dtype, shape=shape)
            if pixels.shape[1:] != array.shape[1:]:
                sizes = f"{pixels.shape[1:]} and {array.shape[1:]}"
                raise FieldError(("model", f"its image processor makes images of several sizes: {sizes}"))
            array[at : at + len(some)] = pixels
        if array is not None:
            array.flush()
        with open(aside, "rb+") as file:
            file.write(hashlib.file_digest(file, "sha256").digest())  # it has read to the end
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _mapped(path: Path, rows: int) -> np.ndarray | None:
    """The cached array, not in memory yet; None where it is missing or damaged."""
    try:
        if not _is_whole(path):
            return None
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 4 and len(found) == rows else None


def _is_whole(path: Path) -> bool:
    """Whether what stands before the digest at the end is what was written."""
    digest, left = hashlib.sha256(), path.stat().st_size - hashlib.sha256().digest_size
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        return left == 0 and file.read() == digest.digest()
