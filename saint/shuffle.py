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

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
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
from saint.row_statistics import RowStatistics, make_scratch
from saint.runtime import UserError, progress, sync_file
from saint.sentences import held_out_mask

_BLOCK_BYTES = 16 << 20
_BLOCK_COPIES = 4  # a block as it was read, as it is sorted, what tracks it, and some as float32
_TRACKING_BYTES = 32  # per row: where it goes, and its place in a permutation

Rows = Mapping[str, Tensor]
Put = Callable[[Rows, "Block", "Workspace"], None]
"""put(rows, block, workspace): takes a block's rows and puts them where they are dealt to."""


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
        path = self.store.shard_path(shard)
        return path, self.store.manifest.files[f"{self.store.layer_dir}/{path.name}"]

    def index_of(self, shard: int) -> dict[str, Tensor]:
        """Map a shard's tokens, offsets and sentence ids, wherever its rows are."""
        return read_tensors(self.store.shard_path(shard), INDEX_TENSORS)

    def blocks(self, shard: int, places: np.ndarray) -> Iterator[Block]:
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
            yield Block(int(part[0]), file, next_places(file, places))
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
    def n_moving(self) -> int:
        """Workers that move blocks at once, in at most half of the memory."""
        return max(1, min(self.n_workers, self.memory_bytes // (2 * _BLOCK_COPIES * _BLOCK_BYTES)))


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
        moving = s.n_moving * _BLOCK_COPIES * _BLOCK_BYTES
        return self.n_rows * s.bytes_per_row + moving <= s.memory_bytes

    @property
    def n_permuting(self) -> int:
        """Files that are permuted at once. Raises UserError if the memory holds not even one."""
        s = self.shuffle
        each = (max(file.n_rows for file in self.files) + s.block_rows) * s.bytes_per_row
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
        for _ in shuffle.blocks(shard, counts[shard]):
            pass
    names: list[tuple[Split, int]] = [
        (split, i) for split in SPLITS for i in range(shuffle.n_files[split])
    ]
    sizes = zip(names, counts.sum(axis=0).tolist(), strict=True)
    files = [OutputFile(split, i, n, shuffle.seed) for (split, i), n in sizes]
    return Plan(shuffle, files, np.cumsum(counts, axis=0) - counts)


@dataclass
class Workspace:
    """Memory that workers use again and again; fresh pages cost more than what is done in them."""

    rows: dict[str, Tensor]
    sorted_rows: dict[str, Tensor]
    numbers: Tensor

    @classmethod
    def make(cls, shuffle: Shuffle, n_rows: int) -> Workspace:
        """Allocate memory for blocks of n_rows."""
        rows = shuffle.memory(n_rows)
        return cls(rows, shuffle.memory(n_rows), make_scratch(rows["activations"].shape[1]))


class Mover:
    """Moves the rows of shards, block by block, on all workers of a pool."""

    def __init__(self, plan: Plan, pool: ThreadPoolExecutor, put: Put, bar: Any) -> None:
        self.plan, self.pool, self.put, self.bar = plan, pool, put, bar
        self.spaces: SimpleQueue[Workspace] = SimpleQueue()
        self.n_spaces = plan.shuffle.n_moving
        for _ in range(self.n_spaces):
            self.spaces.put(Workspace.make(plan.shuffle, plan.shuffle.block_rows))

    def move(self, shard: int) -> RowStatistics:
        """Verify a shard and hand its rows to `put`; return its statistics.

        Raises UserError when the shard is damaged or holds a value that is not finite.
        """
        shuffle = self.plan.shuffle
        path, expected = shuffle.recorded(shard)
        verified = self.pool.submit(verify_file, path, expected)
        stored, statistics = StoredRows(path), RowStatistics()
        moving: deque[Future[RowStatistics]] = deque()
        for block in shuffle.blocks(shard, self.plan.first_places[shard].copy()):
            if len(moving) > self.n_spaces:
                statistics.append(moving.popleft().result())
            moving.append(self.pool.submit(self._move_block, stored, block))
        for future in moving:
            statistics.append(future.result())
        verified.result()
        if not statistics.is_finite:
            raise UserError(f"{path} holds activations that are not finite")
        return statistics

    def _move_block(self, stored: StoredRows, block: Block) -> RowStatistics:
        shuffle, space = self.plan.shuffle, self.spaces.get()
        try:
            used = space
            if block.n_rows > shuffle.block_rows:  # a single sentence that is longer
                used = Workspace.make(shuffle, block.n_rows)
            rows = stored.read_into(used.rows, block.first_row, block.n_rows)
            is_train = block.file < shuffle.n_files["train"]
            statistics = RowStatistics.of(rows, is_train, used.numbers)
            self.put(rows, block, used)
        finally:
            self.spaces.put(space)
        self.bar.update(block.n_rows)
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

    def put(rows: Rows, block: Block, _: Workspace) -> None:
        where = target[starts[block.file] + block.place]
        for name, tensor in rows.items():
            slots[name][where] = opaque(tensor)

    def write(file: OutputFile, start: int) -> dict[str, Any]:
        part = {name: t[start : start + file.n_rows] for name, t in memory.items()}
        return write_tensors(shuffle.output_dir / file.name, part)

    statistics = [Mover(plan, pool, put, bar).move(i) for i in shuffle.shards]
    checksums = list(pool.map(write, plan.files, starts.tolist()))
    names = [file.name for file in plan.files]
    return Result(plan, dict(zip(names, checksums, strict=True)), lambda i: statistics[i])


def deal_to_disk(plan: Plan, pool: ThreadPoolExecutor, bar: Any) -> None:
    """Pass 1: add every shard's rows to the buckets; in place, they then leave the shard."""
    shuffle, kinds = plan.shuffle, bucket_kinds(plan)

    def put(rows: Rows, block: Block, space: Workspace) -> None:
        order = np.argsort(block.file, kind="stable")
        for name, tensor in rows.items():
            out = space.sorted_rows[name][: block.n_rows]
            torch.index_select(tensor, 0, torch.from_numpy(order), out=out)
        present, first = np.unique(block.file[order], return_index=True)
        ends = [*first[1:].tolist(), len(order)]
        for number, start, end in zip(present.tolist(), first.tolist(), ends, strict=True):
            with TensorFile(shuffle.bucket_path(plan.files[number]), kinds[number]) as bucket:
                for name in rows:
                    part = space.sorted_rows[name][start:end]
                    bucket.write(name, int(block.place[order[start]]), part)

    mover = Mover(plan, pool, put, bar)
    for shard in shuffle.shards:
        if shuffle.is_replaced(shard):
            continue
        if not shuffle.statistics_path(shard).exists():
            statistics = mover.move(shard)
            list(pool.map(sync_file, map(shuffle.bucket_path, plan.files)))
            statistics.save(shuffle.statistics_path(shard))
        if shuffle.in_place:
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
    shuffle = plan.shuffle
    blocks = list(shuffle.blocks(shard, plan.first_places[shard].copy()))
    index = {name: tensor.clone() for name, tensor in shuffle.index_of(shard).items()}
    moved = {
        "row_file": torch.from_numpy(np.concatenate([b.file for b in blocks]).astype(np.int32)),
        "row": torch.from_numpy(np.concatenate([b.place for b in blocks]).astype(np.int32)),
    }
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
        memory, chunk = stored.empty(file.n_rows), stored.empty(shuffle.block_rows)
        slots = {name: opaque(tensor) for name, tensor in memory.items()}
        for start in range(0, file.n_rows, shuffle.block_rows):
            n_rows = min(shuffle.block_rows, file.n_rows - start)
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
    if shuffle.in_place:  # there is no way back: look before the first step
        todo = [i for i in shuffle.shards if not shuffle.is_replaced(i)]
        list(pool.map(lambda i: verify_file(*shuffle.recorded(i)), todo))
        shuffle.store.record_move(shuffle.output_dir, None)
    deal_to_disk(plan, pool, bar)
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
