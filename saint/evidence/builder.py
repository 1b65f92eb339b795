"""From tallies to evidence: windows of text, negatives, co-activation, neighbours, promoted tokens.

Works on the sparse activations that the first pass left on disk, a block of latents at a time:
memory is bounded by a block, one seeded sample of sentences, and an index of all sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_3 import load_llama
from sae import TopKSparseAutoencoder
from saint.evidence.file import KINDS, N_BINS, ROWS_PER_GROUP, SPLITS, Examples, LatentBlock
from saint.evidence.rankings import (
    RANKINGS,
    Tally,
    TopN,
    hash64,
    ragged_rows,
    run_lengths,
    run_starts,
)
from saint.evidence.sample import SparseActivations, example_activations
from saint.stage.devices import pick_dtype
from saint.stage.errors import log

_N_RELATED = 10
_ENTRIES_AT_ONCE = 1 << 22
_N_PROMOTED = 10
_N_TOP_WINDOWS = 20
_RANDOM_SEED, _POSITION_SEED = 1, 3


@dataclass(frozen=True)
class Windows:
    """Windows of n examples. start, position, length: (n,). The rest holds them in a row."""

    start: np.ndarray
    position: np.ndarray
    length: np.ndarray
    token_ids: np.ndarray
    activations: np.ndarray


def cut_windows(
    sparse: SparseActivations, positions: np.ndarray, latents: np.ndarray, fires: np.ndarray
) -> Windows:
    """Cut ± window_tokens around each example's strongest token (the first of equals).

    positions, latents: (n,). fires: (n,) bool; where False the place is drawn by a seeded hash.
    """
    n, width = len(positions), sparse.settings.window_tokens
    lengths = sparse.index.length[positions]
    hashes = hash64(sparse.index.sentence_ids[positions] + sparse.settings.seed + _POSITION_SEED)
    position = _below(hash64(hashes + latents.astype(np.uint64)), lengths)
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for members, rows, activations, shard in example_activations(sparse, positions, latents):
        offsets = np.cumsum(lengths[members]) - lengths[members]
        strongest = np.repeat(np.maximum.reduceat(activations, offsets), lengths[members])
        places = np.flatnonzero(activations == strongest)
        owner = np.searchsorted(offsets, places, side="right") - 1
        _, first = np.unique(owner, return_index=True)
        found = places[first] - offsets
        position[members] = np.where(fires[members], found, position[members])
        start = np.maximum(position[members] - width, 0)
        end = np.minimum(position[members] + width + 1, lengths[members])
        kept = ragged_rows(offsets + start, end - start)
        tokens = sparse.token_ids[shard].numpy()[rows[kept]]
        pieces.append((members, tokens, activations[kept]))
    start = np.maximum(position - width, 0)
    length = np.minimum(position + width + 1, lengths) - start
    token_ids, activations = np.empty(length.sum(), np.int32), np.empty(length.sum(), np.float32)
    before = np.cumsum(length) - length
    for members, tokens, values in pieces:
        target = ragged_rows(before[members], length[members])
        token_ids[target], activations[target] = tokens, values
    assert len(start) == n
    return Windows(start, position, length, token_ids, activations)


def _below(hashes: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    return ((hashes >> np.uint64(32)).astype(np.int64)) % limit


def stratify(
    ids: np.ndarray, activations: np.ndarray, per_decile: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose a latent's examples over its activation deciles, from a uniform sample.

    ids, activations: (n_latents, m), in random order, id -1 where there is none. Deciles are those
    of the sample. Returns ids, deciles and splits, (n_latents, 10 · per_decile), strongest decile
    first, id -1 where empty; splits alternate, so that both see every decile.
    """
    filled = ids >= 0
    n = filled.sum(axis=1, keepdims=True)
    by_strength = np.argsort(np.where(filled, activations, np.inf), axis=1, kind="stable")
    rank = np.empty_like(by_strength)
    np.put_along_axis(rank, by_strength, np.arange(ids.shape[1])[None], axis=1)
    # However few there are, the strongest is in decile 9.
    decile = np.where(filled, ((rank + 1) * 10 - 1) // np.maximum(n, 1), -1)
    for d in range(10):
        mine = decile == d
        decile[mine & (np.cumsum(mine, axis=1) > per_decile)] = -1
    chosen = np.argsort(-decile, axis=1, kind="stable")[:, : 10 * per_decile]
    decile = np.take_along_axis(decile, chosen, axis=1)
    kept = np.where(decile >= 0, np.take_along_axis(ids, chosen, axis=1), -1)
    return kept, decile, _alternate(kept.shape)


def _alternate(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(SPLITS.index("explain") + np.arange(shape[1]) % 2, shape)


class NegativeSampler:
    """Sentences of the pool in which a latent does not fire: any, and those like its top ones."""

    def __init__(self, sparse: SparseActivations, device: torch.device):
        self.sparse, self.device = sparse, device
        latents, entries, owner = sparse.pool_latents
        n_pool = len(sparse.pool)
        keys = latents.astype(np.int64) * n_pool
        keys += np.repeat(owner, np.diff(entries))
        keys.sort()
        keys = keys[run_starts(keys)]
        self._latents, self._sentences = np.divmod(keys, max(1, n_pool))
        pooled = sparse.pooled(sparse.pool)
        self._centre = pooled.mean(axis=0) if n_pool else 0.0
        self._pooled = self._unit(pooled)

    def _unit(self, pooled: np.ndarray) -> Tensor:
        centred = torch.from_numpy(pooled - self._centre).to(self.device)
        return torch.nn.functional.normalize(centred, dim=1)

    def draw(self, latents: np.ndarray, top_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return random (n, n_random) and near-miss (n, n_near_misses) sentence ids, -1 if none.

        latents: (n,) consecutive. top_ids: (n, m) their top sentences, -1 where none; a latent
        without any gets no negatives. No sentence is in both results.
        """
        settings, n_pool = self.sparse.settings, len(self.sparse.pool)
        n = len(latents)
        excluded = np.zeros((n, n_pool), bool)
        low, high = np.searchsorted(self._latents, [latents[0], latents[-1] + 1])
        excluded[self._latents[low:high] - latents[0], self._sentences[low:high]] = True
        excluded[top_ids[:, 0] < 0] = True
        # The pool is in random order: consecutive sentences from a random place are a sample.
        first = _below(hash64(latents + settings.seed + _RANDOM_SEED), max(1, n_pool))
        tried = (first[:, None] + np.arange(min(n_pool, 512))) % max(1, n_pool)
        free = ~np.take_along_axis(excluded, tried, axis=1)
        free &= np.cumsum(free, axis=1) <= settings.n_random
        drawn = self._compact(tried, free, settings.n_random)
        rows, columns = np.nonzero(free)
        excluded[rows, tried[rows, columns]] = True
        return drawn, self._nearest(top_ids, excluded)

    def _compact(self, pool_places: np.ndarray, kept: np.ndarray, n: int) -> np.ndarray:
        """Sentence ids of the kept places, moved to the left of an (n_latents, n) matrix."""
        order = np.argsort(~kept, axis=1, kind="stable")[:, :n]
        ids = self.sparse.index.sentence_ids[self.sparse.pool]
        places = np.take_along_axis(pool_places, order, axis=1)
        return np.where(np.take_along_axis(kept, order, axis=1), ids[places], -1)

    def _nearest(self, top_ids: np.ndarray, excluded: np.ndarray) -> np.ndarray:
        n = min(self.sparse.settings.n_near_misses, excluded.shape[1])
        filled = top_ids >= 0
        tops = torch.zeros(len(top_ids), self._pooled.shape[1], device=self.device)
        found = self._unit(self.sparse.pooled(self.sparse.index.find(top_ids[filled])))
        owner = torch.from_numpy(np.nonzero(filled)[0]).to(self.device)
        tops.index_add_(0, owner, found)
        similarity = torch.nn.functional.normalize(tops, dim=1) @ self._pooled.T
        similarity[torch.from_numpy(excluded).to(self.device)] = -torch.inf
        best = similarity.topk(n, dim=1)
        return self._compact(
            best.indices.cpu().numpy(), torch.isfinite(best.values).cpu().numpy(), n
        )


class CoactivationCounter:
    """Which latents fire on the same tokens of the pool."""

    def __init__(self, sparse: SparseActivations, n_latents: int):
        self.n_latents = n_latents
        self._latents, self._entries, _ = sparse.pool_latents
        self._order = np.argsort(self._latents, kind="stable")
        self._starts = np.searchsorted(self._latents, np.arange(n_latents + 1), sorter=self._order)
        self._n_firing = np.diff(self._starts)

    def strongest(self, latents: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n_latents, n) partners, -1 where none, and their Jaccard indices, descending.

        latents: consecutive.
        """
        entries = self._order[self._starts[latents[0]] : self._starts[latents[-1] + 1]]
        token = np.searchsorted(self._entries, entries, side="right") - 1
        counts = self._entries[token + 1] - self._entries[token]
        partners = self._latents[ragged_rows(self._entries[token], counts)]
        own = np.repeat(self._latents[entries].astype(np.int64) - latents[0], counts)
        keys = own * self.n_latents + partners
        keys = keys[partners != own + latents[0]]
        # Only pairs that occur are counted: a dense table is mostly zeros.
        keys = keys.astype(np.uint32 if len(latents) * self.n_latents < 1 << 32 else np.uint64)
        keys.sort()
        starts = run_starts(keys)
        both = run_lengths(starts, len(keys))
        own, partners = np.divmod(keys[starts].astype(np.int64), self.n_latents)
        either = self._n_firing[latents[own]] + self._n_firing[partners] - both
        best = TopN(len(latents), n)
        best.offer(own, (both / either).astype(np.float32), np.arange(len(own)), partners)
        best.merge()
        return best.ids, best.values


def stable_topk(scores: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values and columns of each row's n largest scores, ties by the smaller column."""
    best = scores.topk(min(n, scores.shape[1]), dim=1)
    columns, order = best.indices.sort(dim=1)
    values, again = best.values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values.cpu().numpy(), columns.gather(1, again).cpu().numpy()


def histograms(sparse: SparseActivations, maxima: np.ndarray) -> np.ndarray:
    """Return (n_latents, N_BINS) exact counts of tokens in equal bins over (0, maximum]."""
    counts = np.zeros(len(maxima) * N_BINS, np.int64)
    scale = np.divide(N_BINS, maxima, where=maxima > 0, out=np.zeros_like(maxima))
    for shard in sparse.shards:
        for start in range(0, len(shard.values), _ENTRIES_AT_ONCE):
            part = slice(start, start + _ENTRIES_AT_ONCE)
            values = shard.values[part].numpy()
            latents = shard.indices[part].numpy()[values > 0].astype(np.int64)
            bins = np.ceil(values[values > 0] * scale[latents]).astype(np.int64).clip(1, N_BINS) - 1
            counts += np.bincount(latents * N_BINS + bins, minlength=len(counts))
    return counts.reshape(-1, N_BINS)


@dataclass(frozen=True)
class Directions:
    """Decoder directions (n_latents, d_model), and how to read them as tokens, where known.

    unembed: (n, d_model) directions to (n, vocabulary) float32 logits.
    """

    decoder: Tensor
    unembed: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(
        cls, sae: TopKSparseAutoencoder, model_dir: Path | None, device: torch.device, n_vocab: int
    ) -> Directions:
        """Take the decoder of an SAE, and the final norm and unembedding of a model directory.

        A unit direction leaves the final norm with length √d_model, scaled by the norm's weight.
        """
        decoder = sae.W_dec.detach()
        if model_dir is None:
            return cls(decoder, None)
        model, _ = load_llama(model_dir, device=device, dtype=pick_dtype("auto", device))
        assert model.norm is not None
        scale = model.norm.weight.detach().float() * model.args.dim**0.5
        weight = model.unembedding.detach()[:n_vocab].float() * scale
        return cls(decoder, lambda directions: directions @ weight.T)

    def neighbours(self, latents: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n_latents, n) latents of largest decoder cosine, and the cosines."""
        rows = torch.from_numpy(latents).to(self.decoder.device)
        cosines = (self.decoder[rows] @ self.decoder.T).float()
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        values, found = stable_topk(cosines, min(n, len(self.decoder) - 1))
        return found, values

    def promoted(
        self, latents: np.ndarray, n: int
    ) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple[np.ndarray, np.ndarray] | None]:
        """Return token ids and logits (n_latents, n): raised and lowered most; None if unknown."""
        if self.unembed is None:
            return None, None
        rows = torch.from_numpy(latents).to(self.decoder.device)
        logits = self.unembed(self.decoder[rows].float())
        raised, lowered = stable_topk(logits, n), stable_topk(-logits, n)
        return (raised[1], raised[0]), (lowered[1], -lowered[0])


class EvidenceBuilder:
    """Makes the rows of evidence, block by block."""

    def __init__(
        self, sparse: SparseActivations, tally: Tally, directions: Directions, n_tokens: int
    ):
        self.sparse, self.directions, self.n_tokens = sparse, directions, n_tokens
        self.n_latents = tally.n_latents
        self.maxima = tally.maxima
        self.n_firing_tokens = tally.n_firing_tokens
        self.n_firing_sentences = tally.n_firing_sentences
        self.tops = {name: (tally.tops[name].values, tally.tops[name].ids) for name in RANKINGS}
        self.sample = (tally.tops["sample"].ids, tally.tops["sample"].payload)
        self.histograms = histograms(sparse, self.maxima)
        self.negatives = NegativeSampler(sparse, directions.decoder.device)
        self.coactivation = CoactivationCounter(sparse, self.n_latents)

    def blocks(self) -> Iterator[LatentBlock]:
        """Yield blocks of ROWS_PER_GROUP latents, in order."""
        for start in range(0, self.n_latents, ROWS_PER_GROUP):
            yield self.block(np.arange(start, min(start + ROWS_PER_GROUP, self.n_latents)))

    def block(self, latents: np.ndarray) -> LatentBlock:
        """Return the rows of consecutive latents."""
        promoted, suppressed = self.directions.promoted(latents, _N_PROMOTED)
        return LatentBlock(
            latents=latents,
            density=self.n_firing_tokens[latents] / max(1, self.n_tokens),
            n_firing_tokens=self.n_firing_tokens[latents],
            n_firing_sentences=self.n_firing_sentences[latents],
            max_activation=self.maxima[latents],
            histogram=self.histograms[latents],
            tops={name: (v[latents], i[latents]) for name, (v, i) in self.tops.items()},
            examples=self._examples(latents),
            promoted=promoted,
            suppressed=suppressed,
            neighbours=self.directions.neighbours(latents, _N_RELATED),
            coactive=self.coactivation.strongest(latents, _N_RELATED),
        )

    def _examples(self, latents: np.ndarray) -> Examples:
        top_ids = self.tops["max"][1][latents, :_N_TOP_WINDOWS]
        sampled = stratify(
            self.sample[0][latents], self.sample[1][latents], self.sparse.settings.per_decile
        )
        random, near = self.negatives.draw(latents, top_ids)
        columns = {
            "top": (top_ids, np.full_like(top_ids, 9), np.zeros_like(top_ids)),
            "quantile": sampled,
            "near_miss": (near, np.full_like(near, -1), _alternate(near.shape)),
            "random": (random, np.full_like(random, -1), _alternate(random.shape)),
        }
        ids, decile, split = (
            np.concatenate([columns[kind][i] for kind in KINDS], axis=1) for i in range(3)
        )
        kind = np.repeat(np.arange(len(KINDS)), [columns[k][0].shape[1] for k in KINDS])
        filled = ids >= 0
        kind = np.broadcast_to(kind, ids.shape)[filled]
        owner = latents[np.nonzero(filled)[0]]
        windows = cut_windows(
            self.sparse, self.sparse.index.find(ids[filled]), owner, kind < KINDS.index("near_miss")
        )
        before = np.cumsum(windows.length) - windows.length
        return Examples(
            counts=filled.sum(axis=1),
            kind=kind,
            decile=decile[filled],
            split=split[filled],
            value=windows.activations[before + windows.position - windows.start],
            sentence_id=ids[filled],
            start=windows.start,
            position=windows.position,
            lengths=windows.length,
            token_ids=windows.token_ids,
            activations=windows.activations,
        )


def compare_maxima(sae: TopKSparseAutoencoder, tally: Tally) -> None:
    """Say so when the SAE file's largest activations are not those seen here."""
    if sae.max_activations is None:
        return
    known, seen = sae.max_activations.cpu(), torch.from_numpy(tally.maxima)
    n_differ = int(((known - seen).abs() > 1e-2 * known.clamp_min(1e-3)).sum())
    if n_differ:
        log.info(
            "%d latents have another maximum here than in the SAE file: it was trained on other "
            "sentences, or their activations were rounded differently",
            n_differ,
        )
