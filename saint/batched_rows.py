"""Shuffled activation rows on disk, and the stream of training batches read from them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from saint.activation_store import read_tensors
from saint.manifests import Manifest, read_manifest, verify_file
from saint.runtime import UserError

STAGE = "sae_preprocessing"
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


def rows_name(split: Split, index: int) -> str:
    """Return the file name of one file of rows."""
    return f"{split}_{index:05d}.safetensors"


@dataclass(frozen=True)
class BatchedRows:
    """A finished directory of shuffled rows, training and held-out apart.

    `read` and `batches` give (n, d_model) bfloat16 rows as they were captured, in the shuffled
    order, which is sequential on disk.
    """

    path: Path
    manifest: Manifest

    @property
    def facts(self) -> dict[str, Any]:
        """What capture and preprocessing decided."""
        return self.manifest.facts

    def n_rows(self, split: Split) -> int:
        """Rows of a split."""
        return sum(self.facts["rows"][split])

    def verify(self) -> None:
        """Check every file's checksum. Raises UserError naming the file that is damaged."""
        for name, expected in self.manifest.files.items():
            verify_file(self.path / name, expected)

    def read(self, split: Split, start: int, stop: int) -> Tensor:
        """Return rows start:stop of a split; positions past the end wrap around to the start."""
        n_rows = self.n_rows(split)
        pieces: list[Tensor] = []
        while start < stop:
            position = start % n_rows
            count = min(stop - start, n_rows - position)
            pieces += self._read_once(split, position, position + count)
            start += count
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read_once(self, split: Split, start: int, stop: int) -> list[Tensor]:
        ends = np.cumsum(self.facts["rows"][split])
        pieces = []
        while start < stop:
            index = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[index]) - self.facts["rows"][split][index]
            end = min(stop, int(ends[index]))
            with safe_open(self.path / rows_name(split, index), framework="pt") as file:
                pieces.append(file.get_slice("activations")[start - first : end - first])
            start = end
        return pieces

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        first_batch: int,
        n_batches: int,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Tensor]:
        """Yield batches first_batch … n_batches - 1, the next one read ahead by a thread.

        Batch i is rows i·batch_size … of the endless stream that repeats the split in its order.
        part: (rank, world_size); each rank gets its equal share of every batch.
        """
        share = batch_size // part[1]

        def load(i: int) -> Tensor:
            start = i * batch_size + part[0] * share
            return self.read(split, start, start + share)

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(load, first_batch) if first_batch < n_batches else None
            for i in range(first_batch, n_batches):
                assert ahead is not None
                rows = ahead.result()
                ahead = pool.submit(load, i + 1) if i + 1 < n_batches else None
                yield rows


def open_batched_rows(path: Path) -> BatchedRows:
    """Open a finished preprocessing directory. Raises UserError when it is incomplete."""
    rows = BatchedRows(path, read_manifest(path, STAGE))
    for name in rows.manifest.files:
        read_tensors(path / name, ("activations",))
    if rows.n_rows("train") == 0:
        raise UserError(f"{path} holds no training rows")
    return rows
