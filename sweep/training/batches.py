"""Which rows a step trains on, and how rows become a batch, padded. A function of (seed, step), nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from sweep.training.data import AnySplit, Split
from sweep.training.images import ImageSplit

WINDOW = 16  # batches that are sorted by length together, so that rows of one batch are about equally long


@dataclass(frozen=True)
class Batch:
    """R rows padded to their longest, T tokens."""

    input_ids_RT: np.ndarray  # int64
    attention_mask_RT: np.ndarray  # int64, 0 on padding
    labels: np.ndarray  # classification: int64 (R,); causal-lm: bool (R, T), true where the token is a target
    source_R: np.ndarray  # which row of the split each is

    @property
    def tokens(self) -> int:
        """Padding not counted."""
        return int(self.attention_mask_RT.sum())

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Under the names that the model's forward gives them."""
        return {"input_ids": self.input_ids_RT, "attention_mask": self.attention_mask_RT}

    def part(self, chosen: np.ndarray) -> Batch:
        """Those rows alone."""
        longest = int(self.attention_mask_RT[chosen].sum(1).max())
        labels = self.labels[chosen]
        return Batch(
            self.input_ids_RT[chosen, :longest],
            self.attention_mask_RT[chosen, :longest],
            labels[:, :longest] if labels.ndim == 2 else labels,
            self.source_R[chosen],
        )


@dataclass(frozen=True)
class ImageBatch:
    """R images of one size, with what a `Batch` has."""

    pixel_values_RCHW: np.ndarray  # float32
    labels: np.ndarray  # int64 (R,)
    source_R: np.ndarray

    @property
    def tokens(self) -> int:
        """An image counts as one."""
        return len(self.labels)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {"pixel_values": self.pixel_values_RCHW}

    def part(self, chosen: np.ndarray) -> ImageBatch:
        return ImageBatch(self.pixel_values_RCHW[chosen], self.labels[chosen], self.source_R[chosen])


AnyBatch = Batch | ImageBatch


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Row indices (batches of the epoch, batch_size): shuffled, then sorted by length within windows, then shuffled.

    What doesn't fill a batch is left out; another epoch leaves out other rows.
    """
    rng = np.random.default_rng([seed, epoch])
    count = len(lengths) // batch_size
    rows = rng.permutation(len(lengths))[: count * batch_size]
    window = WINDOW * batch_size
    parts = [rows[i : i + window] for i in range(0, len(rows), window)]
    by_length = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    return by_length.reshape(count, batch_size)[rng.permutation(count)]


def step_rows(lengths: np.ndarray, batch_size: int, seed: int, start: int, stop: int) -> Iterator[np.ndarray]:
    """The row indices of the steps start+1 … stop."""
    per_epoch = len(lengths) // batch_size
    epoch, batches = -1, np.empty((0, 0), dtype=np.int64)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = epoch_batches(lengths, batch_size, seed, epoch)
        yield batches[step % per_epoch]


@overload
def collate(split: Split, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch: ...
@overload
def collate(split: AnySplit, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> AnyBatch: ...
def collate(split: AnySplit, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> AnyBatch:
    """The rows, in order; texts padded on the right to the longest of them."""
    rows = np.asarray(rows)
    if isinstance(split, ImageSplit):
        return ImageBatch(split.read(rows), split.labels[rows], rows)
    longest = int(split.lengths[rows].max())
    input_ids_RT = np.full((len(rows), longest), pad_token_id, dtype=np.int64)
    attention_mask_RT = np.zeros((len(rows), longest), dtype=np.int64)
    per_token = split.labels.dtype == np.int8
    labels = np.zeros((len(rows), longest), dtype=bool) if per_token else split.labels[rows].astype(np.int64)
    for i, row in enumerate(rows):
        here = slice(split.offsets[row], split.offsets[row + 1])
        n = here.stop - here.start
        input_ids_RT[i, :n] = split.input_ids[here]
        attention_mask_RT[i, :n] = 1
        if per_token:
            labels[i, :n] = split.labels[here] != 0
    return Batch(input_ids_RT, attention_mask_RT, labels, rows)


def split_batch(batch: AnyBatch, trials: int, rows: int | None) -> Iterator[tuple[int, AnyBatch]]:
    """The pack's batch in parts of at most `rows` rows a trial, each with the place of its first row in a trial's."""
    per_trial = len(batch.source_R) // trials
    if rows is None or rows >= per_trial:
        yield 0, batch
        return
    for first in range(0, per_trial, rows):
        own = np.arange(first, min(first + rows, per_trial))
        chosen = (np.arange(trials)[:, None] * per_trial + own).reshape(-1)
        yield first, batch.part(chosen)
