"""Exact top sentences per latent, streamed: no loop over sentences or latents, bounded memory.

A chunk of tokens becomes (sentence, latent) pairs in one pass in C++, or without a compiler by one
sort of 32-bit integers and a segmented reduction. Each ranking counts values per latent in
logarithmic bins, which bounds the N-th value from below: a pair under the bound is dropped, the few
others wait, and one sort at the end ranks them. All orders are total (value, then the smaller
sentence_id), so that the result does not depend on the order in which shards or ranks are merged.
This runs on the CPU, beside the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from saint.kernels import cpu
from saint.stage.files import atomic_path

EMPTY = -1
RANKINGS = ("mean", "max", "last")
_BITS = np.uint32(0x7FFFFFFF)  # of a non-negative float32, which sort as integers do
_SMALLEST = np.float32(2.0**-149)
_N_BINS, _BIN_SHIFT = 256, 19  # 16 bins per power of two, over 16 of them
_MIN_ROWS = 1 << 15
_CHUNK_ENTRIES = 1 << 18
# splitmix64 (Steele et al., 2014).
_GAMMA, _MIX_1, _MIX_2 = (
    np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def hash64(x: np.ndarray) -> np.ndarray:
    """Hash integers (any type) element by element to uint64, by splitmix64's finaliser."""
    x = np.asarray(x).astype(np.uint64) + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def priority(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return float32 pseudo-random scores of at least 1 from pairs of well-mixed hashes.

    The reciprocals are uniform, so the pairs of highest score are a uniform sample without
    replacement, whatever the order in which they are met.
    """
    drawn = ((hashes ^ others) * _MIX_1) >> np.uint64(40)
    return np.float32(1 << 24) / (drawn + np.uint64(1)).astype(np.float32)


@dataclass(frozen=True)
class Pairs:
    """(sentence, latent) pairs with any activation above 0, each once.

    sentences: (n,), index of the sentence in its chunk. latents: (n,). n_tokens: (n,),
    on how many the latent fires. sums: (n,) float64, added up in token order. maxima: (n,) float32.
    """

    sentences: np.ndarray
    latents: np.ndarray
    n_tokens: np.ndarray
    sums: np.ndarray
    maxima: np.ndarray

    def where(self, kept: np.ndarray) -> Pairs:
        """Return the pairs that a mask keeps."""
        return Pairs(*(column[kept] for column in vars(self).values()))


def reduce_by_sentence(values: np.ndarray, indices: np.ndarray, offsets: np.ndarray) -> Pairs:
    """Sum and maximum of every latent over every sentence in which it fires.

    values: (n_entries,) float32, 0 where the latent does not fire. indices: (n_entries,) latents,
    distinct on a token. offsets: (n_sentences + 1,), sentence i is entries offsets[i] to
    offsets[i + 1], in token order.
    """
    n_entries = len(values)
    entry_bits = max(1, (n_entries - 1).bit_length())
    latent_bits = int(indices.max(initial=0)).bit_length()
    # The entry's number rides in the low bits: a plain sort keeps the order of tokens within a
    # latent, and one of 32-bit integers is several times faster than one of 64 bits or an argsort.
    dtype = np.uint32 if entry_bits + latent_bits <= 32 else np.uint64
    keys = indices.astype(dtype) << dtype(entry_bits)
    keys |= np.arange(n_entries, dtype=dtype)
    fires = values > 0
    if not fires.all():
        keys = keys[fires]
    keys.sort()
    # `take` with native integers, and a 32-bit running count, are 2 and 10 times their defaults.
    entries = (keys & dtype((1 << entry_bits) - 1)).astype(np.intp)
    keys >>= dtype(entry_bits)
    owner = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    sentences = owner.take(entries)
    new = _differs_from_previous(keys)
    new[1:] |= sentences[1:] != sentences[:-1]
    starts = np.flatnonzero(new)
    ordered = values.take(entries)
    if not len(starts):
        nothing = np.zeros(0, np.intp)
        return Pairs(nothing, nothing, nothing, ordered.astype(np.float64), ordered)
    return Pairs(
        sentences=sentences.take(starts).astype(np.intp),
        latents=keys.take(starts).astype(np.intp),
        n_tokens=run_lengths(starts, len(keys)),
        # In token order and float64, as np.add.reduceat would, in a third of the time.
        sums=np.bincount(np.cumsum(new, dtype=np.int32) - 1, weights=ordered),
        maxima=np.maximum.reduceat(ordered, starts),
    )


def _differs_from_previous(keys: np.ndarray) -> np.ndarray:
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    return new


def run_starts(keys: np.ndarray) -> np.ndarray:
    """Return where each run of equal sorted keys starts."""
    return np.flatnonzero(_differs_from_previous(keys))


def run_lengths(starts: np.ndarray, end: int) -> np.ndarray:
    """Return the lengths of runs that start at `starts`, the last up to `end`."""
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = end - starts[-1:]
    return lengths


def ragged_rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, … for each of several ranges, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


@dataclass(frozen=True)
class Chunk:
    """Whole sentences after the encoder.

    values, indices: (n_entries,) float32 and int32. entries: (n_tokens + 1,), where each token's
    begin. offsets: (n_sentences + 1,), where each sentence's tokens begin. Both from 0.
    sentence_ids: (n_sentences,) int64. canonical: (n_sentences,) bool, False for a sentence whose
    tokens another one with a smaller id has too: it is counted, but not ranked.
    """

    values: np.ndarray
    indices: np.ndarray
    entries: np.ndarray
    offsets: np.ndarray
    sentence_ids: np.ndarray
    canonical: np.ndarray

    def split(self, n_entries: int) -> Iterator[Chunk]:
        """Yield chunks of at most n_entries entries (or one longer sentence)."""
        for first, end in batches_of_sentences(self.entries[self.offsets], n_entries):
            start, stop = int(self.offsets[first]), int(self.offsets[end])
            held = slice(int(self.entries[start]), int(self.entries[stop]))
            yield Chunk(
                self.values[held],
                self.indices[held],
                self.entries[start : stop + 1] - held.start,
                self.offsets[first : end + 1] - start,
                self.sentence_ids[first:end],
                self.canonical[first:end],
            )


def _order(latents: np.ndarray, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the permutation that sorts by latent, then value descending, then id ascending."""
    keys = (latents.astype(np.int64) << 32) | (_BITS ^ values.view(np.uint32))
    order = np.argsort(keys)
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    if same.any():  # equal values are few: order only those by id
        tied = np.zeros(len(keys), bool)
        tied[1:] |= same
        tied[:-1] |= same
        places = np.flatnonzero(tied)
        order[places] = order[places][np.lexsort((ids[order[places]], keys[places]))]
    return order


class TopN:
    """The n best rows of every latent: values descending, ties by the smaller id.

    values: (n_latents, n) float32, 0 where there is no row. ids: (n_latents, n) int64, -1 there.
    payload: (n_latents, n) float32, whatever else came with a row. All complete after `merge`.
    Offered rows wait in a buffer of about 2 · n_latents × n rows.
    """

    def __init__(self, n_latents: int, n: int, *, largest: float | None = None):
        """largest: about the largest value to come; None takes it from the first rows."""
        self.values = np.zeros((n_latents, n), np.float32)
        self.ids = np.full((n_latents, n), EMPTY, np.int64)
        self.payload = np.zeros((n_latents, n), np.float32)
        self._threshold = np.full(n_latents, _SMALLEST, np.float32)
        self._counts = np.zeros(n_latents * _N_BINS, np.int32)
        self._highest = None if largest is None else self._bin(largest)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._n_waiting = self._n_unseen = 0
        self._limit = max(32 * _MIN_ROWS, 2 * n_latents * n)

    @staticmethod
    def _bin(largest: float) -> int:
        return int(np.float32(largest).view(np.uint32) >> np.uint32(_BIN_SHIFT))

    def offer(
        self,
        latents: np.ndarray,
        values: np.ndarray,
        rows: np.ndarray,
        ids: np.ndarray,
        payload: np.ndarray | None = None,
    ) -> None:
        """Consider rows of latents, values and payload (m,); those with value ≤ 0 are no rows.

        rows: (m,), where in `ids` each one's id is. A row whose value equals the latent's last one
        may still win by its smaller id.
        """
        kept = np.flatnonzero(values >= self._threshold.take(latents))
        if not len(kept):
            return
        extra = values if payload is None else payload
        waiting = (
            latents.take(kept).astype(np.int32),
            values.take(kept),
            ids.take(rows.take(kept)),
            extra.take(kept),
        )
        self._count(*waiting[:2])
        self._waiting.append(waiting)
        self._n_waiting += len(kept)
        self._n_unseen += len(kept)
        if self._n_unseen >= max(_MIN_ROWS, self._limit // 8):
            self._raise_thresholds()
        if self._n_waiting >= self._limit:
            self._compact()

    def _count(self, latents: np.ndarray, values: np.ndarray) -> None:
        if self._highest is None:
            self._highest = self._bin(4 * float(values.max()))
        # Bin 0 is the highest, the last holds all that is lower.
        bins = self._highest - (values.view(np.uint32) >> np.uint32(_BIN_SHIFT)).astype(np.int64)
        bins = bins.clip(0, _N_BINS - 1) + latents.astype(np.int64) * _N_BINS
        np.add.at(self._counts, bins, np.int32(1))

    def _raise_thresholds(self) -> None:
        """Set each latent's threshold to the lower edge of the bin that holds its n-th value."""
        self._n_unseen = 0
        assert self._highest is not None
        counts = self._counts.reshape(-1, _N_BINS)
        for start in range(0, len(counts), 1024):
            enough = counts[start : start + 1024].cumsum(axis=1, dtype=np.int32)
            enough = enough >= self.values.shape[1]
            bins = enough.argmax(axis=1)
            known = enough.any(axis=1) & (bins < _N_BINS - 1)
            edges = np.maximum(self._highest - bins, 0).astype(np.uint32) << np.uint32(_BIN_SHIFT)
            rows = self._threshold[start : start + 1024]
            np.maximum(rows, np.where(known, edges.view(np.float32), 0), out=rows)

    def _drop(self) -> None:
        """Drop waiting rows under the thresholds."""
        self._raise_thresholds()
        latents, values, ids, payload = self._joined()
        kept = values >= self._threshold[latents]
        self._waiting = [(latents[kept], values[kept], ids[kept], payload[kept])]
        self._n_waiting = len(self._waiting[0][0])

    def _compact(self) -> None:
        """Drop waiting rows under the thresholds, and rank them all if that is not enough."""
        self._drop()
        if self._n_waiting > 3 * self._limit // 4:
            self.merge()

    def _joined(self) -> tuple[np.ndarray, ...]:
        return tuple(map(np.concatenate, zip(*self._waiting, strict=True)))

    def merge(self) -> None:
        """Merge the waiting rows into the kept ones."""
        if not self._n_waiting:
            return
        self._drop()
        held = np.nonzero(self.ids != EMPTY)
        kept = (held[0].astype(np.int32), self.values[held], self.ids[held], self.payload[held])
        self._waiting.append(kept)
        latents, values, ids, payload = self._joined()
        self._waiting, self._n_waiting = [], 0
        order = _order(latents, values, ids)
        latents = latents[order]
        counts = np.bincount(latents, minlength=len(self.ids))
        rank = np.arange(len(latents)) - np.repeat(np.cumsum(counts) - counts, counts)
        best = rank < self.ids.shape[1]
        order, place = order[best], (latents[best], rank[best])
        self.values[place], self.ids[place] = values[order], ids[order]
        self.payload[place] = payload[order]
        self._threshold = np.maximum(self.values[:, -1], _SMALLEST)

    def state(self) -> dict[str, np.ndarray]:
        """Return what `absorb` takes."""
        self.merge()
        return {"values": self.values, "ids": self.ids, "payload": self.payload}

    def absorb(self, state: dict[str, np.ndarray]) -> None:
        """Merge another TopN's state, made from other rows."""
        held = np.nonzero(state["ids"] != EMPTY)
        values, ids, payload = (state[name][held] for name in ("values", "ids", "payload"))
        self.offer(held[0].astype(np.int32), values, np.arange(len(ids)), ids, payload)
        self.merge()


class Tally:
    """Everything that one pass over the shards counts; exactly mergeable.

    tops: "mean" (over all tokens of the sentence, zeros included), "max", "last", and "sample": a
    uniform sample of the sentences in which the latent fires, their maximum as payload.
    n_firing_tokens, n_firing_sentences: (n_latents,) int64. maxima: (n_latents,) float32.
    """

    def __init__(self, n_latents: int, n: int, n_sample: int, seed: int):
        self.tops = {name: TopN(n_latents, n) for name in RANKINGS}
        if n_sample:
            self.tops["sample"] = TopN(n_latents, n_sample, largest=2.0**16)
        self.n_firing_tokens = np.zeros(n_latents, np.int64)
        self.n_firing_sentences = np.zeros(n_latents, np.int64)
        self.maxima = np.zeros(n_latents, np.float32)
        self._compiled = cpu.is_available()
        self._latent_hashes = hash64(
            hash64(np.array([seed])) + np.arange(n_latents, dtype=np.uint64)
        )

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return len(self.maxima)

    def add(self, chunk: Chunk) -> None:
        """Count a chunk of whole sentences."""
        # As many entries as `reduce_by_sentence` can number in 32 bits.
        limit = 1 << max(0, 32 - (self.n_latents - 1).bit_length())
        parts = list(chunk.split(min(limit, _CHUNK_ENTRIES)))
        with ThreadPoolExecutor(1) as pool:  # a part is reduced while the one before is ranked
            pairs = pool.submit(self._reduce, parts[0]) if parts else None
            for part, following in zip_longest(parts, parts[1:]):
                assert pairs is not None
                found = pairs.result()
                pairs = pool.submit(self._reduce, following) if following else None
                self._count(found)
                self._rank(part, found)

    def _reduce(self, part: Chunk) -> Pairs:
        arrays = part.values, part.indices, part.entries[part.offsets]
        if self._compiled:
            return Pairs(*cpu.reduce_by_sentence(*arrays, self.n_latents))
        return reduce_by_sentence(*arrays)

    def _count(self, pairs: Pairs) -> None:
        n = self.n_latents
        self.n_firing_sentences += np.bincount(pairs.latents, minlength=n)
        n_tokens = np.bincount(pairs.latents, weights=pairs.n_tokens, minlength=n)
        self.n_firing_tokens += n_tokens.astype(np.int64)
        higher = np.flatnonzero(pairs.maxima > self.maxima.take(pairs.latents))
        np.maximum.at(self.maxima, pairs.latents[higher], pairs.maxima[higher])

    def _rank(self, chunk: Chunk, pairs: Pairs) -> None:
        lengths, ids, tops = np.diff(chunk.offsets), chunk.sentence_ids, self.tops
        if not chunk.canonical.all():
            pairs = pairs.where(chunk.canonical[pairs.sentences])
        latents, sentences = pairs.latents, pairs.sentences
        means = (pairs.sums / lengths.take(sentences)).astype(np.float32)
        tops["mean"].offer(latents, means, sentences, ids)
        tops["max"].offer(latents, pairs.maxima, sentences, ids)
        if "sample" in tops:
            drawn = priority(self._latent_hashes.take(latents), hash64(ids).take(sentences))
            tops["sample"].offer(latents, drawn, sentences, ids, pairs.maxima)
        ended = np.flatnonzero(chunk.canonical & (lengths > 0))
        last = chunk.offsets[1:][ended] - 1
        counts = chunk.entries[last + 1] - chunk.entries[last]
        held = ragged_rows(chunk.entries[last], counts)
        owner = np.repeat(ended, counts)
        tops["last"].offer(chunk.indices[held], chunk.values[held], owner, ids)

    def finish(self) -> None:
        """Merge what waits; call before reading the results."""
        with ThreadPoolExecutor(2) as pool:  # each takes memory of its own
            list(pool.map(TopN.merge, self.tops.values()))

    def state(self) -> dict[str, np.ndarray]:
        """Return all results for `absorb` on another rank."""
        names = ("n_firing_tokens", "n_firing_sentences", "maxima")
        state = {name: getattr(self, name) for name in names}
        for name, top in self.tops.items():
            state |= {f"{name}.{key}": column for key, column in top.state().items()}
        return state

    def absorb(self, state: dict[str, np.ndarray]) -> None:
        """Add the state of a tally over other sentences."""
        self.n_firing_tokens += state["n_firing_tokens"]
        self.n_firing_sentences += state["n_firing_sentences"]
        self.maxima = np.maximum(self.maxima, state["maxima"])
        for name, top in self.tops.items():
            top.absorb({key: state[f"{name}.{key}"] for key in ("values", "ids", "payload")})


def batches_of_sentences(offsets: np.ndarray, n_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield [first, end) sentences of at most n_tokens tokens (or one longer sentence)."""
    first = 0
    while first < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[first] + n_tokens, side="right")) - 1
        end = max(end, first + 1)
        yield first, end
        first = end


def hash_sentences(token_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return (n_sentences,) uint64 hashes of sentences' token ids, in their order and number.

    token_ids: (n_tokens,). offsets: (n_sentences + 1,).
    """
    lengths = np.diff(offsets)
    position = np.arange(len(token_ids)) - np.repeat(offsets[:-1], lengths)
    hashed = hash64(hash64(token_ids) + position.astype(np.uint64))
    sums = np.zeros(len(lengths), np.uint64)
    filled = lengths > 0
    if filled.any():
        sums[filled] = np.add.reduceat(hashed, offsets[:-1][filled])
    return hash64(sums + lengths.astype(np.uint64))


def first_of_equals(hashes: np.ndarray, sentence_ids: np.ndarray) -> np.ndarray:
    """Return (n_sentences,) bool: True for the smallest sentence_id among equal hashes."""
    order = np.lexsort((sentence_ids, hashes))
    ordered = hashes[order]
    first = np.zeros(len(order), bool)
    first[order[run_starts(ordered)]] = True
    return first


def write_top_sentences(path: Path, values: np.ndarray, ids: np.ndarray) -> None:
    """Write `{latent: [[value, sentence_id], …]}` as YAML, values ascending, atomically.

    values, ids: (n_latents, n), descending, id -1 where there is no row. Nine significant digits
    give float32 back exactly, and `#` keeps the point that YAML 1.1 wants in a float.
    """
    counts = (ids != EMPTY).sum(axis=1).tolist()
    templates = {n: "- [%#.9g, %d]\n" * n for n in set(counts)}
    rows = np.empty((values.shape[1], 2), dtype=object)
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
        for latent, n in enumerate(counts):
            if not n:
                file.write(f"{latent}: []\n")
                continue
            rows[:n, 0] = values[latent, :n][::-1].tolist()
            rows[:n, 1] = ids[latent, :n][::-1].tolist()
            file.write(f"{latent}:\n" + templates[n] % tuple(rows[:n].ravel()))
