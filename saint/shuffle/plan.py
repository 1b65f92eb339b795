"""A seeded, global shuffle of a store's rows in bounded memory.

Every row is dealt to a random one of many output files, and each file is permuted: together that is
a uniform permutation of all rows. Where all rows fit into the memory that is allowed, they are read
once and go straight to their places. Otherwise pass 1 deals them to unordered files on disk, and
pass 2 permutes one file at a time. All randomness is seeded by shard and file, so the bytes depend
neither on that choice nor on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saint.shuffle.statistics import RowStatistics
from saint.stage.errors import UserError
from saint.stage.manifests import verify_file, verify_size
from saint.store.activation_store import ActivationStore
from saint.store.dataset import held_out_mask
from saint.store.row_format import StoredRows, read_tensors
from saint.store.shuffled_rows import SPLITS, Split, rows_name

_BLOCK_BYTES = 16 << 20
_BLOCK_COPIES = 4  # a block as it was read, as it is sorted, what tracks it, and some as float32
_TRACKING_BYTES = 32  # per row: where it goes, and its place in a permutation


@dataclass(frozen=True)
class OutputFile:
    """One file of shuffled rows: its name, how many rows it gets, and the shuffle's seed."""

    split: Split
    index: int
    n_rows: int
    seed: int

    @property
    def name(self) -> str:
        """File name."""
        return rows_name(self.split, self.index)

    def order(self) -> np.ndarray:
        """Return (n_rows,) which of the rows that were dealt to the file each of its rows is."""
        seed = [self.seed, SPLITS.index(self.split) + 1, self.index]
        return np.random.default_rng(seed).permutation(self.n_rows)

    def positions(self) -> np.ndarray:
        """Return (n_rows,) where the row that was dealt to the file as its i-th ends up."""
        positions = np.empty(self.n_rows, np.int64)
        positions[self.order()] = np.arange(self.n_rows)
        return positions


@dataclass(frozen=True)
class Portion:
    """Consecutive rows of a shard, whole sentences, and where they go.

    file: (n_rows,) each row's output file, numbered over both splits, training first. place:
    (n_rows,) as which of the file's rows it was dealt.
    """

    first_row: int
    file: np.ndarray
    place: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the block."""
        return len(self.file)


@dataclass(frozen=True)
class Shuffle:
    """One layer directory's shuffle: what, where to, and in how much memory."""

    store: ActivationStore
    output_dir: Path
    seed: int
    held_out_fraction: float
    n_files: dict[Split, int]
    memory_bytes: int
    n_workers: int
    in_place: bool = False

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(self.store.n_shards)

    def recorded(self, shard: int) -> tuple[Path, dict[str, Any]]:
        """Return a shard's path and what the manifest says of it."""
        return self.store.recorded(shard)

    def index_of(self, shard: int) -> dict[str, Tensor]:
        """Map a shard's tokens, offsets and sentence ids, wherever its rows are."""
        return self.store.read_index(shard)

    def blocks(self, shard: int, places: np.ndarray) -> Iterator[Portion]:
        """Deal a shard's rows, in blocks of about `block_rows`.

        places: (n_files,) int64, rows that each file has got before; moved on with each block.
        """
        index = self.index_of(shard)
        offsets, token_ids = index["offsets"].numpy(), index["token_ids"].numpy()
        generator = np.random.default_rng([self.seed, 0, shard])
        n_train, n_val = self.n_files["train"], self.n_files["val"]
        first = 0
        while first < len(offsets) - 1:
            limit = offsets[first] + self.block_rows
            end = int(np.searchsorted(offsets, limit, side="right")) - 1
            part = offsets[first : max(first + 1, end) + 1]
            held_out = held_out_mask(token_ids, part, fraction=self.held_out_fraction)
            held_out = np.repeat(held_out, np.diff(part))
            draw = generator.random(len(held_out))
            file = (draw * np.where(held_out, n_val, n_train)).astype(np.int64)
            file += held_out * n_train
            yield Portion(int(part[0]), file, next_places(file, places))
            first += len(part) - 1

    def is_replaced(self, shard: int) -> bool:
        """Whether a shard's rows have moved, so that its file only says where to."""
        return self.in_place and not read_tensors(
            self.store.shard_path(shard), (), ("activations",)
        )

    def bucket_path(self, file: OutputFile) -> Path:
        """Where a file's rows are gathered in the order in which they are dealt."""
        return self.output_dir / f".{file.split}_{file.index:05d}.rows.tmp"

    def statistics_path(self, shard: int) -> Path:
        """Marks a shard as dealt to the buckets; holds its statistics."""
        return self.output_dir / f".shard_{shard:05d}.stats.npz"

    @cached_property
    def _some_rows(self) -> StoredRows:
        paths = [self.store.shard_path(i) for i in self.shards if not self.is_replaced(i)]
        paths += [p for p in self.output_dir.glob(".*.rows.tmp")]
        return StoredRows([*paths, self.output_dir / rows_name("train", 0)][0])

    def memory(self, n_rows: int) -> dict[str, Tensor]:
        """Return uninitialised memory for rows in the store's number format."""
        return self._some_rows.empty(n_rows)

    @cached_property
    def bytes_per_row(self) -> int:
        """Memory that a row and keeping track of it take."""
        return sum(t.nbytes for t in self.memory(1).values()) + _TRACKING_BYTES

    @property
    def block_rows(self) -> int:
        """Rows that a worker moves at once; the same whatever the memory and the workers."""
        return max(1, _BLOCK_BYTES // self.bytes_per_row)

    @property
    def chunk_rows(self) -> int:
        """Rows of a bucket that are read at once while a file is permuted."""
        return max(1, self.block_rows // 4)

    @property
    def n_moving(self) -> int:
        """Workers that move blocks at once, in at most half of the memory."""
        return max(1, min(self.n_workers, self.memory_bytes // (2 * _BLOCK_COPIES * _BLOCK_BYTES)))

    @property
    def moving_bytes(self) -> int:
        """Memory of all workers that move blocks."""
        return self.n_moving * _BLOCK_COPIES * _BLOCK_BYTES


@dataclass(frozen=True)
class ShufflePlan:
    """All output files, and the place in each of them of each shard's first row."""

    shuffle: Shuffle
    files: list[OutputFile]
    first_places: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """(n_files,) rows in the files before each."""
        n_rows = np.array([file.n_rows for file in self.files])
        return np.cumsum(n_rows) - n_rows

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(file.n_rows for file in self.files)

    @property
    def fits_in_memory(self) -> bool:
        """Whether all rows may be in memory at once, so that none need go to disk in between."""
        s = self.shuffle
        return self.n_rows * s.bytes_per_row + s.moving_bytes <= s.memory_bytes

    @property
    def n_permuting(self) -> int:
        """Files that are permuted at once. Raises UserError if the memory holds not even one."""
        s = self.shuffle
        each = (max(file.n_rows for file in self.files) + s.chunk_rows) * s.bytes_per_row
        # What pass 1 has freed may not have gone back to the system.
        allowed = max(s.memory_bytes - s.moving_bytes, s.memory_bytes // 2)
        if each > allowed:
            raise UserError(
                f"one file of rows takes {each / 1e9:.2f} GB of memory: raise --memory_gb or lower "
                "--rows_per_file"
            )
        return min(s.n_workers, allowed // each)

    @property
    def disk_bytes(self) -> int:
        """What the shuffle still takes of the disk at most."""
        s = self.shuffle
        per_row = sum(t.nbytes for t in s.memory(1).values())
        largest = max(file.n_rows for file in self.files) * per_row
        if s.in_place:
            shard_bytes = max(s.store.shard_path(i).stat().st_size for i in s.shards)
            return s.n_workers * max(largest, shard_bytes)
        n_bytes = self.n_rows * per_row
        if not self.fits_in_memory:
            n_bytes += self.n_permuting * largest
        held = (path.stat().st_blocks * 512 for path in s.output_dir.iterdir())
        return max(0, n_bytes - sum(held))


def make_plan(shuffle: Shuffle) -> ShufflePlan:
    """Count, from the sentences alone, how many rows of each shard go to each file.

    Raises UserError when a shard is missing or damaged, as far as can be seen without its rows.
    """
    problem: Exception | None = None
    try:
        plan = _make_plan(shuffle)
        if plan.n_rows == shuffle.store.n_tokens:
            return plan
    except UserError:
        raise
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        problem = error
    for shard in shuffle.shards:  # offsets that make no sense: whose?
        if not shuffle.is_replaced(shard):
            verify_file(*shuffle.recorded(shard))
    raise AssertionError("a row was lost or doubled") from problem


def _make_plan(shuffle: Shuffle) -> ShufflePlan:
    n_files = sum(shuffle.n_files.values())
    counts = np.zeros((len(shuffle.shards), n_files), np.int64)
    for shard in shuffle.shards:
        if not shuffle.is_replaced(shard):
            verify_size(*shuffle.recorded(shard))
        for _ in shuffle.blocks(shard, counts[shard]):
            pass
    names: list[tuple[Split, int]] = [
        (split, i) for split in SPLITS for i in range(shuffle.n_files[split])
    ]
    sizes = zip(names, counts.sum(axis=0).tolist(), strict=True)
    files = [OutputFile(split, i, n, shuffle.seed) for (split, i), n in sizes]
    return ShufflePlan(shuffle, files, np.cumsum(counts, axis=0) - counts)


def next_places(file: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the place of each row in its file, and move places (n_files,) on by their number."""
    counts = np.bincount(file, minlength=len(places))
    order = np.argsort(file, kind="stable")
    place = np.empty(len(file), np.int64)
    place[order] = np.repeat(places - (np.cumsum(counts) - counts), counts) + np.arange(len(file))
    places += counts
    return place


def file_kinds(
    plan: ShufflePlan, file: OutputFile
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the tensors of a file, and of its bucket, as `TensorFile` takes them."""
    memory = plan.shuffle.memory(0)
    return {name: (t.dtype, (file.n_rows, *t.shape[1:])) for name, t in memory.items()}


def opaque(tensor: Tensor) -> np.ndarray:
    """Return a view (n,) of a tensor's rows as opaque bytes, which move faster than numbers."""
    flat = tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).view(torch.uint8).numpy()
    return flat.view(f"V{max(1, flat.shape[1])}")[:, 0]


@dataclass(frozen=True)
class Result:
    """A finished shuffle: its plan, the checksums of its files, and statistics by shard.

    share: of the work, what was left to this run by interrupted ones.
    """

    plan: ShufflePlan
    checksums: dict[str, dict[str, Any]]
    statistics: Callable[[int], RowStatistics]
    share: float = 1.0

    @property
    def rows(self) -> dict[Split, list[int]]:
        """Rows of each file of each split."""
        return {s: [f.n_rows for f in self.plan.files if f.split == s] for s in SPLITS}
