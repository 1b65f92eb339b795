"""Where each token stands in the captured store: an inverted index, and rows found through it.

`token_index.safetensors`, written by the evidence pass beside the evidence: `starts` (n_ids + 1,)
int64 and `rows` (n_rows,) int64; the rows of token t are rows[starts[t]:starts[t + 1]], numbered
over all shards in order. At most `LIMIT` rows are kept per token, the first in the store's (seeded)
order, so that the file stays small at any size of the store. Without the file the same rows are
found by reading the shards' token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from saint.stage.errors import UserError
from saint.store.activation_store import ActivationStore, Shard, open_stores, read_shard
from saint.store.row_format import write_tensors

NAME = "token_index.safetensors"
LIMIT = 1024
_SAMPLE_SEED = 20


def write_token_index(path: Path, store: ActivationStore, *, limit: int = LIMIT) -> None:
    """Index a finished store, a shard at a time; equal stores give equal bytes."""
    kept: list[np.ndarray] = []
    seen = np.zeros(0, np.int64)
    first = 0
    for shard in range(store.n_shards):
        ids = store.read_index(shard)["token_ids"].numpy().astype(np.int64)
        n_ids = int(ids.max(initial=-1)) + 1
        if n_ids > len(seen):
            seen = np.concatenate([seen, np.zeros(n_ids - len(seen), np.int64)])
        order = np.argsort(ids, kind="stable")
        counts = np.bincount(ids, minlength=len(seen))
        rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        room = rank + np.repeat(seen, counts) < limit
        kept.append(np.stack([ids[order][room], order[room] + first]))
        seen += counts
        first += len(ids)
    pairs = np.concatenate(kept, axis=1) if kept else np.zeros((2, 0), np.int64)
    order = np.argsort(pairs[0], kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(pairs[0], minlength=len(seen)))])
    write_tensors(
        path,
        {
            "starts": torch.from_numpy(starts.astype(np.int64)),
            "rows": torch.from_numpy(pairs[1][order].copy()),
        },
    )


class StoredTokens:
    """The tokens of a captured store: found by their text, read row by row."""

    def __init__(self, store: ActivationStore, index_path: Path | None = None):
        self.store = store
        self._index: dict[str, np.ndarray] | None = None
        if index_path is not None and index_path.exists():
            try:
                self._index = load_file(index_path)
            except Exception as error:  # safetensors raises a class of its own
                raise UserError(f"{index_path} is not a readable token index: {error}") from None
            if int(self._index["rows"].max(initial=-1)) >= store.n_tokens:
                raise UserError(f"{index_path} belongs to another store than {store.root}")

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return [self.store.read_index(i)["token_ids"].numpy() for i in range(self.store.n_shards)]

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._shards)])

    def counts(self) -> np.ndarray:
        """Return how often each token id stands in the store, up to its largest, (n_ids,)."""
        n = max(int(ids.max(initial=-1)) + 1 for ids in self._shards)
        return np.sum([np.bincount(ids, minlength=n) for ids in self._shards], axis=0)

    def rows_of(self, token: int, *, limit: int = LIMIT) -> np.ndarray:
        """Return up to `limit` rows of one token id, ascending."""
        if self._index is not None:
            starts = self._index["starts"]
            if token + 1 >= len(starts):
                return np.zeros(0, np.int64)
            return self._index["rows"][starts[token] : starts[token + 1]][:limit]
        found, n = [], 0
        for first, ids in zip(self._firsts, self._shards, strict=False):
            found.append(np.flatnonzero(ids == token) + first)
            n += len(found[-1])
            if n >= limit:
                break
        return np.concatenate(found)[:limit] if found else np.zeros(0, np.int64)

    def find(self, forms: Sequence[Sequence[int]], *, limit: int) -> np.ndarray:
        """Return the rows of all tokens of every occurrence of any of the token sequences."""
        found = [np.zeros(0, np.int64)]
        for form in forms:
            places = [self.rows_of(token) for token in form]
            rarest = int(np.argmin([len(rows) for rows in places]))
            begins = places[rarest] - rarest
            begins = begins[(begins >= 0) & (begins + len(form) <= self.store.n_tokens)]
            for offset, token in enumerate(form):
                if len(begins):
                    begins = begins[self.token_ids(begins + offset) == token]
            found += [begins + offset for offset in range(len(form))]
        return np.unique(np.concatenate(found))[:limit]

    def token_ids(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids at rows."""
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        out = np.empty(len(rows), np.int64)
        for shard in np.unique(shards):
            members = shards == shard
            out[members] = self._shards[shard][rows[members] - self._firsts[shard]]
        return out

    def around(self, rows: np.ndarray, *, before: int, after: int) -> list[list[int]]:
        """Return the token ids around each row, within its sentence."""
        offsets = np.concatenate(
            [
                self.store.read_index(i)["offsets"].numpy()[:-1] + first
                for i, first in enumerate(self._firsts[:-1])
            ]
        )
        found = []
        for row in rows.tolist():
            sentence = int(np.searchsorted(offsets, row, side="right")) - 1
            ends = [*offsets[sentence + 1 : sentence + 2].tolist(), self.store.n_tokens]
            begin, end = max(int(offsets[sentence]), row - before), min(ends[0], row + after)
            found.append(self.token_ids(np.arange(begin, end)).tolist())
        return found

    def _shard(self, index: int) -> Shard:
        """A shard as it lies: verifying a whole one for a few rows would take its whole length."""
        if self.store.moved_to is not None:
            return self.store.read_shard(index)
        return read_shard(self.store.shard_path(index))

    def sample(self, n: int) -> np.ndarray:
        """Return a seeded sample of rows, ascending."""
        if n >= self.store.n_tokens:
            return np.arange(self.store.n_tokens)
        draw = np.random.default_rng(_SAMPLE_SEED)
        return np.sort(draw.choice(self.store.n_tokens, n, replace=False))

    def activations(self, rows: np.ndarray) -> Tensor:
        """Return (n, d_model) raw activations of rows, in their order."""
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        out: Tensor | None = None
        for shard in np.unique(shards):
            members = np.flatnonzero(shards == shard)
            read = self._shard(int(shard))
            inside = rows[members] - self._firsts[shard]
            parts = torch.cat([read.read(slice(int(i), int(i) + 1)) for i in inside])
            if out is None:
                out = parts.new_empty((len(rows), parts.shape[1]))
            out[torch.from_numpy(members)] = parts
        assert out is not None, "no rows to read"
        return out


def open_tokens(
    data_dir: Path, *, layer: int | None, hook_point: str, index_path: Path | None = None
) -> StoredTokens:
    """Open a captured store's layer for finding tokens. Raises UserError if it has no such one."""
    stores = open_stores(data_dir, layer=layer, hook_point=hook_point)
    if len(stores) != 1:
        raise UserError(f"{data_dir} does not hold layer {layer} {hook_point}, the SAE's")
    return StoredTokens(stores[0], index_path)
