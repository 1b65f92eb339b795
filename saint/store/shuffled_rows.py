"""Shuffled activation rows on disk, and the stream of training batches read from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saint.stage.errors import UserError
from saint.stage.manifests import Manifest, read_manifest, verify_file
from saint.store.row_format import Stored, decode_rows, map_rows

STAGE = "sae_preprocessing"
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
_PAGE_BYTES = 4096
_N_AHEAD = 2


def rows_name(split: Split, index: int) -> str:
    """Return the file name of one file of rows."""
    return f"{split}_{index:05d}.safetensors"


def positions_name(split: Split, index: int) -> str:
    """Return the file name of what leads back to a file's rows, see `MovedRows`."""
    return f"positions_{split}_{index:05d}.safetensors"


@dataclass(frozen=True)
class BatchedRows:
    """A finished directory of shuffled rows, training and held-out apart.

    `read` and `batches` give (n, d_model) rows as they were captured (bfloat16 or float16; float32
    where they are stored as int8), in the shuffled order, which is sequential on disk. Where they
    can, these are views of the mapped files: not to be written to.
    """

    path: Path
    manifest: Manifest
    _maps: dict[tuple[Split, int], Stored] = field(default_factory=dict, compare=False, repr=False)

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
        pieces = [decode_rows(piece) for piece in self._pieces(split, start, stop)]
        if not pieces:
            return decode_rows({name: t[:0] for name, t in self._map(split, 0).items()})
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _pieces(self, split: Split, start: int, stop: int) -> Iterator[Stored]:
        """Yield the stretches of mapped files that make up rows start:stop."""
        ends = np.cumsum(self.facts["rows"][split])
        while start < stop:
            position = start % int(ends[-1])
            index = int(np.searchsorted(ends, position, side="right"))
            first = int(ends[index]) - self.facts["rows"][split][index]
            count = min(stop - start, int(ends[index]) - position)
            rows = slice(position - first, position - first + count)
            yield {name: tensor[rows] for name, tensor in self._map(split, index).items()}
            start += count

    def _map(self, split: Split, index: int) -> Stored:
        if (split, index) not in self._maps:
            self._maps[split, index] = map_rows(self.path / rows_name(split, index))
        return self._maps[split, index]

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        first_batch: int,
        n_batches: int,
        part: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
    ) -> Iterator[Tensor]:
        """Yield batches first_batch … n_batches - 1; a thread reads the next ones ahead.

        Batch i is rows i·batch_size … of the endless stream that repeats the split in its order.
        part: (rank, world_size); each rank gets its equal share of every batch. device: where the
        batches are wanted; to a GPU they are copied ahead too, through pinned memory. By default
        they stay where they are.
        """
        share = batch_size // part[1]
        stream = None
        if device is not None and device.type == "cuda":
            stream = torch.cuda.Stream(device)

        def load(i: int) -> tuple[Tensor, Any]:
            start = i * batch_size + part[0] * share
            for piece in self._pieces(split, start, start + share):
                _touch(piece)
            rows = self.read(split, start, start + share)
            return (rows, None) if stream is None else _upload(rows, stream)

        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future[tuple[Tensor, Any]]] = deque()
            for i in range(first_batch, n_batches):
                for j in range(i + len(ahead), min(i + _N_AHEAD, n_batches)):
                    ahead.append(pool.submit(load, j))
                rows, arrived = ahead.popleft().result()
                if arrived is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(arrived)
                    rows.record_stream(current)
                yield rows


def _touch(piece: Stored) -> None:
    """Read one value of every page, so that whoever gets the rows finds them in memory."""
    for tensor in piece.values():
        tensor.reshape(-1)[:: max(1, _PAGE_BYTES // tensor.element_size())].sum()


def _upload(rows: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, Any]:
    """Start copying rows to the stream's device; return them and the event of their arrival."""
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
    with torch.cuda.stream(stream):
        return pinned.to(stream.device, non_blocking=True), stream.record_event()


def open_batched_rows(path: Path) -> BatchedRows:
    """Open a finished preprocessing directory. Raises UserError when it is incomplete."""
    layers = sorted(p.parent.name for p in path.glob(f"*/{STAGE}.manifest.json"))
    if layers:
        raise UserError(f"{path} holds {', '.join(layers)}: name one, such as {path / layers[0]}")
    rows = BatchedRows(path, read_manifest(path, STAGE))
    for split in SPLITS:
        for index in range(len(rows.facts["rows"][split])):
            map_rows(path / rows_name(split, index))
    if rows.n_rows("train") == 0:
        raise UserError(f"{path} holds no training rows")
    return rows
