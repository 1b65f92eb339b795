"""The shuffle where all rows fit into memory: each file's rows are gathered from all shards.

The shards are mapped, not copied: to fill as much fresh memory costs more than all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from saint.shuffle.plan import OutputFile, Portion, Result, ShufflePlan, file_kinds, opaque
from saint.shuffle.statistics import RowStatistics, make_scratch
from saint.stage.manifests import verify_file
from saint.store.row_format import map_rows, write_pieces


class Gathering:
    """The mapped shards, and which of their rows each output file is dealt."""

    def __init__(self, plan: ShufflePlan) -> None:
        self.plan = plan
        shuffle = plan.shuffle
        self.rows = [map_rows(shuffle.store.shard_path(shard)) for shard in shuffle.shards]
        self._opaque = [{name: opaque(t) for name, t in rows.items()} for rows in self.rows]
        # File by file, in the order of dealing:
        self._shard, self._row = np.empty((2, plan.n_rows), np.int32)

    def deal(self, shard: int) -> list[Portion]:
        """Note where a shard's rows go."""
        blocks = list(self.plan.shuffle.blocks(shard, self.plan.first_places[shard].copy()))
        for block in blocks:
            where = self.plan.starts[block.file] + block.place
            self._shard[where] = shard
            self._row[where] = block.first_row + np.arange(block.n_rows)
        return blocks

    def count(self, shard: int, block: Portion) -> RowStatistics:
        """Return the statistics of a block's rows."""
        part = {name: t[block.first_row :][: block.n_rows] for name, t in self.rows[shard].items()}
        is_train = block.file < self.plan.shuffle.n_files["train"]
        return RowStatistics.of(part, is_train, make_scratch(part["activations"].shape[1]))

    def write(self, number: int) -> dict[str, Any]:
        """Write an output file; return its checksum."""
        file, start = self.plan.files[number], self.plan.starts[number]
        source = start + file.order()
        path = self.plan.shuffle.output_dir / file.name
        return write_pieces(path, file_kinds(self.plan, file), self._pieces(file, source))

    def _pieces(self, file: OutputFile, source: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        n_chunk = self.plan.shuffle.chunk_rows
        chunk = self.plan.shuffle.memory(min(n_chunk, file.n_rows))
        for name, out in chunk.items():
            for start in range(0, file.n_rows, n_chunk):
                part = source[start : start + n_chunk]
                self._gather(name, part, opaque(out))
                yield name, out[: len(part)]

    def _gather(self, name: str, part: np.ndarray, out: np.ndarray) -> None:
        """Put rows into out, in the order of part (n,), which points into `_shard` and `_row`."""
        shards, rows = self._shard[part], self._row[part]
        order = np.argsort(shards, kind="stable")
        ends = np.cumsum(np.bincount(shards, minlength=len(self.rows)))
        for shard in np.unique(shards):
            here = order[ends[shard - 1] if shard else 0 : ends[shard]]
            out[here] = self._opaque[shard][name][rows[here]]


def shuffle_in_memory(plan: ShufflePlan, pool: ThreadPoolExecutor, bar: Any) -> Result:
    """Gather and write each file, and count the rows while the disk is busy."""
    shuffle, gathering = plan.shuffle, Gathering(plan)

    def count(job: tuple[int, Portion]) -> RowStatistics:
        statistics = gathering.count(*job)
        bar.update(job[1].n_rows)
        return statistics

    # Verifying and counting read from first to last, which a slow disk needs; gathering does not.
    verified = [pool.submit(verify_file, *shuffle.recorded(shard)) for shard in shuffle.shards]
    blocks = list(pool.map(gathering.deal, shuffle.shards))
    jobs = [(shard, block) for shard in shuffle.shards for block in blocks[shard]]
    counted = pool.map(count, jobs)
    for future in verified:
        future.result()
    with ThreadPoolExecutor(shuffle.n_workers) as writers:
        checksums = list(writers.map(gathering.write, range(len(plan.files))))
    statistics = [RowStatistics() for _ in shuffle.shards]
    for (shard, _), part in zip(jobs, counted, strict=True):
        statistics[shard].append(part)
    for shard, found in zip(shuffle.shards, statistics, strict=True):
        found.refuse_infinite(shuffle.store.shard_path(shard))
    names = [file.name for file in plan.files]
    return Result(plan, dict(zip(names, checksums, strict=True)), lambda shard: statistics[shard])
