"""A seeded, global shuffle of a store's rows in bounded memory.

Every row is dealt to a random one of many output files, and each file is permuted: together that is
a uniform permutation of all rows. Where all rows fit into the memory that is allowed, they are read
once and go straight to their places. Otherwise pass 1 deals them to unordered files on disk, and
pass 2 permutes one file at a time. All randomness is seeded by shard and file, so the bytes depend
neither on that choice nor on the number of workers.

Workers are threads: all heavy work (reading, hashing, sums, moving rows, writing) happens outside
Python's lock, they start at once, share memory, and die together when the program is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saint.activation_store import INDEX_TENSORS, ActivationStore
from saint.batched_rows import SPLITS, Split, positions_name, rows_name
from saint.manifests import file_checksum, verify_file, verify_size
from saint.row_format import (
    StoredRows,
    TensorFile,
    read_tensors,
    write_tensors,
)
from saint.row_statistics import RowStatistics
from saint.runtime import UserError, progress
from saint.sentences import held_out_mask

_CHUNK_BYTES = 32 << 20
_TRACKING_BYTES = 32  # per row: where it goes, and its place in a permutation
_DEALING_COPIES = 4  # a chunk as it was read, as it is sorted, and as float32

Rows = Mapping[str, Tensor]
Put = Callable[[Rows, np.ndarray, np.ndarray], None]
"""put(rows, file, place): takes rows, each dealt to a file (a number) as its place-th row."""


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

    def positions(self) -> np.ndarray:
        """Return (n_rows,) where the row that was dealt to the file as its i-th ends up."""
        seed = [self.seed, SPLITS.index(self.split) + 1, self.index]
        positions = np.empty(self.n_rows, np.int64)
        order = np.random.default_rng(seed).permutation(self.n_rows)
        positions[order] = np.arange(self.n_rows)
        return positions


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a shard, whole sentences. file: (n_rows,) each one's output file,
    numbered over both splits, training first.
    """

    first_row: int
    n_rows: int
    file: np.ndarray


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
        path = self.store.shard_path(shard)
        return path, self.store.manifest.files[f"{self.store.layer_dir}/{path.name}"]

    def index_of(self, shard: int) -> dict[str, Tensor]:
        """Map a shard's tokens, offsets and sentence ids, wherever its rows are."""
        return read_tensors(self.store.shard_path(shard), INDEX_TENSORS)

    def blocks(self, shard: int, n_rows: int) -> Iterator[Block]:
        """Yield where a shard's rows go, in blocks of about n_rows; the same for any n_rows."""
        index = self.index_of(shard)
        offsets, token_ids = index["offsets"].numpy(), index["token_ids"].numpy()
        generator = np.random.default_rng([self.seed, 0, shard])
        n_train, n_val = self.n_files["train"], self.n_files["val"]
        first = 0
        while first < len(offsets) - 1:
            end = int(np.searchsorted(offsets, offsets[first] + n_rows, side="right")) - 1
            part = offsets[first : max(first + 1, end) + 1]
            held_out = held_out_mask(token_ids, part, fraction=self.held_out_fraction)
            held_out = np.repeat(held_out, np.diff(part))
            draw = generator.random(len(held_out))
            file = (draw * np.where(held_out, n_val, n_train)).astype(np.int64)
            yield Block(int(part[0]), len(file), file + held_out * n_train)
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
    def chunk_rows(self) -> int:
        """Rows that a worker deals at once: in half of its share of the memory, at most 32 MB."""
        share = self.memory_bytes // (2 * _DEALING_COPIES * self.n_workers)
        return max(256, min(_CHUNK_BYTES, share) // self.bytes_per_row)

    @property
    def dealing_bytes(self) -> int:
        """Memory of all workers while they deal."""
        return _DEALING_COPIES * self.n_workers * self.chunk_rows * self.bytes_per_row


@dataclass(frozen=True)
class Plan:
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
        return self.n_rows * s.bytes_per_row + s.dealing_bytes <= s.memory_bytes

    @property
    def n_permuting(self) -> int:
        """Files that are permuted at once. Raises UserError if the memory holds not even one."""
        s = self.shuffle
        each = (max(file.n_rows for file in self.files) + s.chunk_rows) * s.bytes_per_row
        if each > s.memory_bytes:
            raise UserError(
                f"one file of rows takes {each / 1e9:.2f} GB of memory: raise --memory_gb or lower "
                "--rows_per_file"
            )
        return min(s.n_workers, s.memory_bytes // each)


def make_plan(shuffle: Shuffle) -> Plan:
    """Count, from the sentences alone, how many rows of each shard go to each file.

    Raises UserError when a shard is missing or has another size than it should.
    """
    n_files = sum(shuffle.n_files.values())
    counts = np.zeros((len(shuffle.shards), n_files), np.int64)
    for shard in shuffle.shards:
        if not shuffle.is_replaced(shard):
            verify_size(*shuffle.recorded(shard))
        for block in shuffle.blocks(shard, shuffle.chunk_rows):
            counts[shard] += np.bincount(block.file, minlength=n_files)
    names: list[tuple[Split, int]] = [
        (split, i) for split in SPLITS for i in range(shuffle.n_files[split])
    ]
    sizes = zip(names, counts.sum(axis=0).tolist(), strict=True)
    files = [OutputFile(split, i, n, shuffle.seed) for (split, i), n in sizes]
    return Plan(shuffle, files, np.cumsum(counts, axis=0) - counts)


def deal_shard(plan: Plan, shard: int, put: Put) -> RowStatistics:
    """Verify a shard, hand its rows to `put` a chunk at a time, and return its statistics.

    Raises UserError when the shard is damaged or holds a value that is not finite.
    """
    shuffle = plan.shuffle
    path, expected = shuffle.recorded(shard)
    verify_file(path, expected)
    stored, memory = StoredRows(path), shuffle.memory(shuffle.chunk_rows)
    places, statistics = plan.first_places[shard].copy(), RowStatistics()
    for block in shuffle.blocks(shard, shuffle.chunk_rows):
        if block.n_rows > shuffle.chunk_rows:  # one sentence that is longer than a chunk
            memory = shuffle.memory(block.n_rows)
        rows = stored.read_into(memory, block.first_row, block.n_rows)
        statistics.add(rows, block.file < shuffle.n_files["train"])
        put(rows, block.file, next_places(block.file, places))
    if not statistics.is_finite:
        raise UserError(f"{path} holds activations that are not finite")
    return statistics


def next_places(file: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the place of each row in its file, and move places (n_files,) on by their number."""
    counts = np.bincount(file, minlength=len(places))
    order = np.argsort(file, kind="stable")
    place = np.empty(len(file), np.int64)
    place[order] = np.repeat(places - (np.cumsum(counts) - counts), counts) + np.arange(len(file))
    places += counts
    return place


def opaque(tensor: Tensor) -> np.ndarray:
    """Return a view (n,) of a tensor's rows as opaque bytes, which move faster than numbers."""
    flat = tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
    return flat.view(f"V{max(1, flat.shape[1])}")[:, 0]


def shuffle_in_memory(plan: Plan, pool: ThreadPoolExecutor, bar: Any) -> Result:
    """Read every shard once, put each row where it belongs, and write the files."""
    shuffle, starts = plan.shuffle, plan.starts
    memory = shuffle.memory(plan.n_rows)
    slots = {name: opaque(tensor) for name, tensor in memory.items()}
    in_file = pool.map(OutputFile.positions, plan.files)
    target = np.concatenate([a + p for a, p in zip(starts, in_file, strict=True)])

    def put(rows: Rows, file: np.ndarray, place: np.ndarray) -> None:
        where = target[starts[file] + place]
        for name, tensor in rows.items():
            slots[name][where] = opaque(tensor)
        bar.update(len(where))

    def write(file: OutputFile, start: int) -> dict[str, Any]:
        part = {name: t[start : start + file.n_rows] for name, t in memory.items()}
        return write_tensors(shuffle.output_dir / file.name, part)

    statistics = list(pool.map(lambda i: deal_shard(plan, i, put), shuffle.shards))
    checksums = list(pool.map(write, plan.files, starts.tolist()))
    names = [file.name for file in plan.files]
    return Result(plan, dict(zip(names, checksums, strict=True)), lambda i: statistics[i])


def deal_to_disk(plan: Plan, shard: int, bar: Any) -> None:
    """Pass 1: add a shard's rows to the buckets on disk; in place, they then leave the shard."""
    shuffle = plan.shuffle
    kinds = bucket_kinds(plan)
    sorted_rows = {}

    def put(rows: Rows, file: np.ndarray, place: np.ndarray) -> None:
        order = np.argsort(file, kind="stable")
        for name, tensor in rows.items():
            sorted_rows[name] = tensor[torch.from_numpy(order)]
        present, first = np.unique(file[order], return_index=True)
        ends = [*first[1:].tolist(), len(order)]
        for number, start, end in zip(present.tolist(), first.tolist(), ends, strict=True):
            with TensorFile(shuffle.bucket_path(plan.files[number]), kinds[number]) as bucket:
                for name, tensor in sorted_rows.items():
                    bucket.write(name, int(place[order[start]]), tensor[start:end])
        bar.update(len(file))

    if not shuffle.statistics_path(shard).exists():
        statistics = deal_shard(plan, shard, put)
        for file, kind in zip(plan.files, kinds, strict=True):
            with TensorFile(shuffle.bucket_path(file), kind) as bucket:
                bucket.sync()
        statistics.save(shuffle.statistics_path(shard))
    if shuffle.in_place and not shuffle.is_replaced(shard):
        replace_shard(plan, shard)


def bucket_kinds(plan: Plan) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Return the tensors of each file's bucket, as `TensorFile` takes them."""
    memory = plan.shuffle.memory(0)
    return [
        {name: (t.dtype, (file.n_rows, *t.shape[1:])) for name, t in memory.items()}
        for file in plan.files
    ]


def replace_shard(plan: Plan, shard: int) -> None:
    """Put a small file in a shard's place, which says where its rows have gone (`MovedRows`)."""
    shuffle, places = plan.shuffle, plan.first_places[shard].copy()
    blocks = [
        (block.file, next_places(block.file, places))
        for block in shuffle.blocks(shard, shuffle.chunk_rows)
    ]
    index = {name: tensor.clone() for name, tensor in shuffle.index_of(shard).items()}
    columns = (np.concatenate(column).astype(np.int32) for column in zip(*blocks, strict=True))
    moved = dict(zip(("row_file", "row"), map(torch.from_numpy, columns), strict=True))
    ordered = {name: index[name] for name in ("offsets", "sentence_ids", "token_ids")}
    write_tensors(shuffle.store.shard_path(shard), ordered | moved)


def permute_file(plan: Plan, file: OutputFile) -> dict[str, dict[str, Any]]:
    """Pass 2: bring a bucket's rows into their final order; return what was written, by name.

    In place, the way back to each row is written beside them.
    """
    shuffle = plan.shuffle
    bucket, final = shuffle.bucket_path(file), shuffle.output_dir / file.name
    ways_back = shuffle.output_dir / positions_name(file.split, file.index)
    if not final.exists():
        positions = file.positions()
        if shuffle.in_place:
            back = torch.from_numpy(positions.astype(np.int32))
            write_tensors(ways_back, {"positions": back})
        stored = StoredRows(bucket)
        memory, chunk = stored.empty(file.n_rows), stored.empty(shuffle.chunk_rows)
        slots = {name: opaque(tensor) for name, tensor in memory.items()}
        for start in range(0, file.n_rows, shuffle.chunk_rows):
            n_rows = min(shuffle.chunk_rows, file.n_rows - start)
            for name, tensor in stored.read_into(chunk, start, n_rows).items():
                slots[name][positions[start : start + n_rows]] = opaque(tensor)
        checksum = write_tensors(final, memory)
    else:
        checksum = file_checksum(final)
    bucket.unlink(missing_ok=True)
    written = {file.name: checksum}
    if shuffle.in_place:
        written[ways_back.name] = file_checksum(ways_back)
    return written


def shuffle_on_disk(plan: Plan, pool: ThreadPoolExecutor, bar: Any) -> Result:
    """Run both passes, resuming from what is there."""
    shuffle = plan.shuffle
    n_permuting = plan.n_permuting
    for file, kind in zip(plan.files, bucket_kinds(plan), strict=True):
        if not (shuffle.output_dir / file.name).exists():
            TensorFile(shuffle.bucket_path(file), kind).close()
    todo = [i for i in shuffle.shards if not shuffle.is_replaced(i)]
    if shuffle.in_place:  # there is no way back: look before the first step
        list(pool.map(lambda i: verify_file(*shuffle.recorded(i)), todo))
        shuffle.store.record_move(shuffle.output_dir, None)
    list(pool.map(lambda i: deal_to_disk(plan, i, bar), todo))
    checksums: dict[str, Any] = {}
    with (
        ThreadPoolExecutor(n_permuting, initializer=torch.set_num_threads, initargs=(1,)) as fewer,
        progress(len(plan.files), unit="file", description="permute") as files_bar,
    ):
        for written in fewer.map(lambda file: permute_file(plan, file), plan.files):
            checksums |= written
            files_bar.update()
    return Result(plan, checksums, lambda i: RowStatistics.load(shuffle.statistics_path(i)))


@dataclass(frozen=True)
class Result:
    """A finished shuffle: its plan, the checksums of its files, and statistics by shard."""

    plan: Plan
    checksums: dict[str, dict[str, Any]]
    statistics: Callable[[int], RowStatistics]

    @property
    def rows(self) -> dict[Split, list[int]]:
        """Rows of each file of each split."""
        return {s: [f.n_rows for f in self.plan.files if f.split == s] for s in SPLITS}

    def clean_up(self) -> None:
        """Remove what only served to resume."""
        shuffle = self.plan.shuffle
        for path in map(shuffle.statistics_path, shuffle.shards):
            path.unlink(missing_ok=True)
        for path in map(shuffle.bucket_path, self.plan.files):
            path.unlink(missing_ok=True)


def run_shuffle(plan: Plan) -> Result:
    """Shuffle, in memory or over the disk."""
    shuffle = plan.shuffle
    in_memory = plan.fits_in_memory and not shuffle.in_place
    with (
        ThreadPoolExecutor(
            shuffle.n_workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        progress(plan.n_rows, unit="rows", description="shuffle", unit_scale=True) as bar,
    ):
        return (shuffle_in_memory if in_memory else shuffle_on_disk)(plan, pool, bar)
