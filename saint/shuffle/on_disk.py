"""The two passes of a shuffle, on all workers: rows to buckets (in memory or on disk), and on.

Workers are threads: all heavy work (reading, hashing, sums, moving rows, writing) happens outside
Python's lock, they start at once, share memory, and die together when the program is killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saint.shuffle.in_memory import shuffle_in_memory
from saint.shuffle.plan import OutputFile, Portion, Result, Shuffle, ShufflePlan, file_kinds, opaque
from saint.shuffle.statistics import RowStatistics, make_scratch
from saint.stage.files import sync_file
from saint.stage.manifests import file_checksum, verify_file
from saint.stage.program import progress
from saint.store.activation_store import ActivationStore
from saint.store.row_format import (
    StoredRows,
    TensorFile,
    write_tensors,
)
from saint.store.shuffled_rows import positions_name

Rows = Mapping[str, Tensor]
Put = Callable[[Rows, "Portion", "Workspace"], None]
"""put(rows, block, workspace): takes a block's rows and puts them where they are dealt to."""


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

    def __init__(self, plan: ShufflePlan, pool: ThreadPoolExecutor, put: Put, bar: Any) -> None:
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
        statistics.refuse_infinite(path)
        return statistics

    def _move_block(self, stored: StoredRows, block: Portion) -> RowStatistics:
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


def deal_to_disk(plan: ShufflePlan, pool: ThreadPoolExecutor, bar: Any) -> int:
    """Pass 1: add every shard's rows to the buckets; in place, they then leave the shard.

    Returns how many rows had not been added yet.
    """
    shuffle, kinds = plan.shuffle, [file_kinds(plan, file) for file in plan.files]

    def put(rows: Rows, block: Portion, space: Workspace) -> None:
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

    mover, n_dealt = Mover(plan, pool, put, bar), 0
    for shard in shuffle.shards:
        if shuffle.is_replaced(shard):
            continue
        if not shuffle.statistics_path(shard).exists():
            statistics = mover.move(shard)
            list(pool.map(sync_file, map(shuffle.bucket_path, plan.files)))
            statistics.save(shuffle.statistics_path(shard))
            n_dealt += len(shuffle.index_of(shard)["token_ids"])
        if shuffle.in_place:
            replace_shard(plan, shard)
    return n_dealt


def replace_shard(plan: ShufflePlan, shard: int) -> None:
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


def permute_file(plan: ShufflePlan, file: OutputFile) -> dict[str, dict[str, Any]]:
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


def shuffle_on_disk(plan: ShufflePlan, pool: ThreadPoolExecutor, bar: Any) -> Result:
    """Run both passes, resuming from what is there."""
    shuffle = plan.shuffle
    n_permuting = plan.n_permuting
    to_permute = [file for file in plan.files if not (shuffle.output_dir / file.name).exists()]
    for file in to_permute:
        TensorFile(shuffle.bucket_path(file), file_kinds(plan, file)).close()
    if shuffle.in_place:  # there is no way back: look before the first step
        todo = [i for i in shuffle.shards if not shuffle.is_replaced(i)]
        list(pool.map(lambda i: verify_file(*shuffle.recorded(i)), todo))
        shuffle.store.record_move(shuffle.output_dir, None)
    n_moved = deal_to_disk(plan, pool, bar) + sum(file.n_rows for file in to_permute)
    checksums: dict[str, Any] = {}
    with (
        ThreadPoolExecutor(n_permuting, initializer=torch.set_num_threads, initargs=(1,)) as fewer,
        progress(len(plan.files), unit="file", description="permute") as files_bar,
    ):
        for written in fewer.map(lambda file: permute_file(plan, file), plan.files):
            checksums |= written
            files_bar.update()
    share = n_moved / (2 * plan.n_rows)
    return Result(plan, checksums, lambda i: RowStatistics.load(shuffle.statistics_path(i)), share)


def clean_up(store: ActivationStore, output_dir: Path) -> None:
    """Remove what only served to resume, and what a killed run was replacing."""
    for pattern in (".*.rows.tmp", ".*.stats.npz"):
        for path in output_dir.glob(pattern):
            path.unlink()
    if store.moved_to is not None:
        for pattern in (f"{store.layer_dir}/.*.tmp", ".*.manifest.json.*.tmp"):
            for path in store.root.glob(pattern):
                path.unlink()


def run_shuffle(plan: ShufflePlan) -> Result:
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
