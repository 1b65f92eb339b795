"""Random access to the sparse activations on disk, and the seeded sample of sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from saint.evidence.rankings import hash64, ragged_rows
from saint.evidence.sparse_activations import SentenceIndex, read_sparse, sparse_path
from saint.store.activation_store import ActivationStore

ROWS_AT_ONCE = 1 << 16
_POOL_SEED = 2


@dataclass(frozen=True)
class ExampleSettings:
    """How many examples of each kind, and how wide.

    window_tokens: on each side of the strongest token. per_decile, n_random, n_near_misses: half
    of them explain, half test. pool_sentences: size of the seeded sample that negatives and
    co-activation come from.
    """

    window_tokens: int = 16
    per_decile: int = 4
    n_random: int = 20
    n_near_misses: int = 20
    pool_sentences: int = 8192
    seed: int = 0


class SparseActivations:
    """Random access to the sparse activations of all shards, and the sample of sentences."""

    def __init__(
        self,
        store: ActivationStore,
        work_dir: Path,
        index: SentenceIndex,
        settings: ExampleSettings,
    ):
        self.index, self.settings = index, settings
        self.shards = [read_sparse(sparse_path(work_dir, i)) for i in range(store.n_shards)]
        # Each rank has verified its own shards before it encoded them.
        self.token_ids = [store.read_index(i)["token_ids"] for i in range(store.n_shards)]
        usable = np.flatnonzero(index.canonical & (index.length > 0))
        order = np.argsort(
            hash64(hash64(index.sentence_ids[usable] + settings.seed) + np.uint64(_POOL_SEED))
        )
        self.pool = usable[order[: settings.pool_sentences]]

    def tokens_of(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (shard, which of `positions` lie in it, their token rows one after the other)."""
        for shard, members in groups(self.index.shard[positions]):
            chosen = positions[members]
            rows = ragged_rows(self.index.start[chosen], self.index.length[chosen])
            yield shard, members, rows

    @cached_property
    def pool_latents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What fires on the pool's tokens, token by token.

        Returns latents (n_entries,), where each token's entries begin (n_tokens + 1,), and each
        token's sentence, its place in the pool (n_tokens,).
        """
        latents, counts, owner = [np.empty(0, np.int32)], [np.zeros(1, np.int64)], []
        for shard, members, rows in self.tokens_of(self.pool):
            for part in np.array_split(rows, max(1, -(-len(rows) // ROWS_AT_ONCE))):
                held, token = self.shards[shard].entries_of(part)
                fires = self.shards[shard].values.numpy()[held] > 0
                latents.append(self.shards[shard].indices.numpy()[held[fires]])
                counts.append(np.bincount(token[fires], minlength=len(part)))
            owner.append(np.repeat(members, self.index.length[self.pool[members]]))
        owners = np.concatenate(owner) if owner else np.empty(0, np.int64)
        return np.concatenate(latents), np.concatenate(counts).cumsum(), owners

    def pooled(self, positions: np.ndarray) -> np.ndarray:
        """(n, d_model) float32 mean-pooled standardised tokens of sentences."""
        out = np.empty((len(positions), self.shards[0].pooled.shape[1]), np.float32)
        for shard, members in groups(self.index.shard[positions]):
            out[members] = self.shards[shard].pooled.numpy()[self.index.row[positions[members]]]
        return out


def groups(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each distinct key and the places where it stands, both ascending."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    for key, members in zip(distinct, np.split(order, starts[1:]), strict=True):
        yield int(key), members


def example_activations(
    sparse: SparseActivations, positions: np.ndarray, latents: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Yield (members, their token rows, one latent's activation on each row, shard), in pieces.

    positions, latents: (n,), sentence (place in the index) and latent of each example.
    """
    lengths = sparse.index.length[positions]
    for shard, in_shard in groups(sparse.index.shard[positions]):
        cuts = np.cumsum(lengths[in_shard]) // ROWS_AT_ONCE
        for members in np.split(in_shard, np.flatnonzero(np.diff(cuts)) + 1):
            rows = ragged_rows(sparse.index.start[positions[members]], lengths[members])
            wanted = np.repeat(latents[members], lengths[members]).astype(np.int32)
            held, row = sparse.shards[shard].entries_of(rows)
            hits = sparse.shards[shard].indices.numpy()[held] == wanted[row]
            activations = np.zeros(len(rows), np.float32)
            activations[row[hits]] = sparse.shards[shard].values.numpy()[held[hits]]
            yield members, rows, activations, shard
