"""What one pass of the encoder leaves on disk: sparse activations per shard, and who lies where."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from torch import Tensor

from llama_3.model import to_device
from sae import TopKSparseAutoencoder
from saint.evidence.rankings import (
    Chunk,
    Tally,
    batches_of_sentences,
    first_of_equals,
    hash_sentences,
    ragged_rows,
)
from saint.kernels.fastest import Encode, fastest_encode
from saint.stage.errors import UserError, log
from saint.stage.manifests import verify_file, verify_size
from saint.stage.program import progress
from saint.stage.workers import Workers
from saint.store.activation_store import INDEX_TENSORS, ActivationStore, Shard, open_stores
from saint.store.row_format import read_tensors, write_tensors

_PROBED_TOKENS = 4096
_SPOOLED_BYTES = 64 << 20


def open_matching_store(data_dir: Path, sae: TopKSparseAutoencoder) -> ActivationStore:
    """Open the layer that the SAE was trained on. Raises UserError if the store has another."""
    config = sae.config
    stores = open_stores(data_dir)
    held = ", ".join(store.layer_dir for store in stores)
    matching = [
        store
        for store in stores
        if config.layer in (None, store.facts["layer"])
        and config.hook_point == store.facts["hook_point"]
    ]
    if len(matching) != 1:
        layer = "unknown" if config.layer is None else config.layer
        raise UserError(
            f"{data_dir} holds {held}; the SAE's layer is {layer} and its hook point "
            f"{config.hook_point}: name the right --data_dir, or --layer and --hook_point"
        )
    facts = matching[0].facts
    theirs = {
        name: getattr(config, name) for name in ("d_model", "prepend_bos", "model_fingerprint")
    }
    for name, value in theirs.items():
        if value is not None and facts[name] != value:
            raise UserError(f"{data_dir} has {name} {facts[name]}, the SAE has {value}")
    return matching[0]


@dataclass(frozen=True)
class SparseShard:
    """A shard's activations after the encoder.

    Token i's entries are entries[i] to entries[i + 1] of values (n_entries,) float32 and indices
    (n_entries,) int32; entries: (n_tokens + 1,) int64. pooled: (n_sentences, d_model) float16, the
    mean of each sentence's normalised tokens. offsets: (n_sentences + 1,) int64.
    """

    values: Tensor
    indices: Tensor
    entries: Tensor
    pooled: Tensor
    offsets: Tensor

    def entries_of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which entries some tokens have, and each one's place in `tokens`."""
        entries = self.entries.numpy()
        counts = entries[tokens + 1] - entries[tokens]
        return ragged_rows(entries[tokens], counts), np.repeat(np.arange(len(tokens)), counts)


def sparse_path(work_dir: Path, index: int) -> Path:
    """Return where a shard's sparse activations lie."""
    return work_dir / f"sparse_{index:05d}.safetensors"


def write_sparse(path: Path, shard: SparseShard) -> None:
    """Write a shard's sparse activations atomically."""
    write_tensors(path, vars(shard))


def read_sparse(path: Path) -> SparseShard:
    """Memory-map a shard's sparse activations. Raises UserError when they cannot be read."""
    return SparseShard(**read_tensors(path, tuple(SparseShard.__dataclass_fields__)))


@dataclass(frozen=True)
class SentenceIndex:
    """Where every sentence of the store lies; all (n_sentences,), ascending by sentence_id.

    canonical: whether no sentence with a smaller id has the same tokens.
    """

    sentence_ids: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    canonical: np.ndarray

    @classmethod
    def of(cls, store: ActivationStore) -> SentenceIndex:
        """Read token ids and offsets of all shards, which are verified when they are encoded.

        Raises UserError when one is missing or damaged, as far as can be seen without its rows.
        """
        columns: list[list[np.ndarray]] = [[] for _ in range(6)]
        for i in range(store.n_shards):
            verify_size(*store.recorded(i))
            try:
                parts = _sentences_of(store.read_index(i), i)
            except (ValueError, IndexError, OverflowError, MemoryError) as error:
                verify_file(*store.recorded(i))
                raise AssertionError(f"{store.shard_path(i)} makes no sense") from error
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
        ids, *others, hashes = map(np.concatenate, columns)
        order = np.argsort(ids)
        first = first_of_equals(hashes, ids)
        return cls(*(column[order] for column in (ids, *others, first)))

    def find(self, sentence_ids: np.ndarray) -> np.ndarray:
        """Return positions in this index of sentence ids that are in it."""
        return np.searchsorted(self.sentence_ids, sentence_ids)


def _sentences_of(index: dict[str, Tensor], shard: int) -> tuple[np.ndarray, ...]:
    """Return (n_sentences,) ids, shard, row, start, length, hash. Raises where offsets are wild."""
    token_ids, offsets, ids = (index[name].numpy() for name in INDEX_TENSORS)
    lengths, n = np.diff(offsets), len(ids)
    if len(lengths) != n or offsets[0] or offsets[-1] != len(token_ids) or (lengths < 0).any():
        raise ValueError("offsets that are no offsets")
    hashes = hash_sentences(token_ids, offsets)
    return ids.copy(), np.full(n, shard), np.arange(n), offsets[:-1].copy(), lengths, hashes


@torch.inference_mode()
def entries_per_token(sae: TopKSparseAutoencoder, store: ActivationStore) -> float:
    """Return k, or of a rule without one how many latents fire on a token of the first shard."""
    if sae.config.activation == "topk" or not store.n_shards:
        return sae.config.k
    shard = store.read_shard(0)
    x = shard.read(slice(0, _PROBED_TOKENS)).to(sae.W_enc.device)
    return len(sae.encode(sae.normalise(x)[0]).values) / max(1, len(x))


class _Column:
    """Entries that come in parts. Beyond `_SPOOLED_BYTES` they lie in an unnamed file."""

    def __init__(self, dtype: torch.dtype, directory: Path) -> None:
        self.parts, self.directory = [torch.empty(0, dtype=dtype)], directory
        self.file: IO[bytes] | None = None

    def add(self, part: Tensor) -> None:
        """Take what comes next."""
        self.parts.append(part)
        if sum(part.nbytes for part in self.parts) > _SPOOLED_BYTES:
            self.file = self.file or tempfile.TemporaryFile(dir=self.directory)
            for held in self.parts:
                self.file.write(held.contiguous().numpy().data)
            self.parts = [self.parts[0][:0]]

    def whole(self) -> Tensor:
        """Return all of it, in memory or mapped."""
        if self.file is None:
            return torch.cat(self.parts)
        for held in self.parts:
            self.file.write(held.contiguous().numpy().data)
        self.file.flush()
        return torch.from_numpy(np.memmap(self.file, self.parts[0].numpy().dtype, mode="c"))


@torch.inference_mode()
def encode_shard(
    sae: TopKSparseAutoencoder,
    encode: Encode,
    shard: Shard,
    batch_tokens: int,
    bar: Any,
    work_dir: Path,
) -> SparseShard:
    """Run `encode`, the SAE's, over a shard; returns sparse activations and sentence means on CPU.

    Of equal pre-activations, the C++ encoder keeps the first latent's, whatever the batch. However
    many latents fire on a token, memory holds a batch of them; work_dir has room for the rest.
    """
    values, indices = _Column(torch.float32, work_dir), _Column(torch.int32, work_dir)
    counts = [torch.zeros(1, dtype=torch.int64)]
    means = torch.zeros(len(shard.sentence_ids), sae.config.d_model, dtype=torch.float16)
    for first, end in batches_of_sentences(shard.offsets.numpy(), batch_tokens):
        rows = slice(int(shard.offsets[first]), int(shard.offsets[end]))
        x = to_device(shard.read(rows), sae.W_enc.device)
        z = sae.normalise(x)[0]
        active = encode(z)
        values.add(active.values.cpu())
        indices.add(active.indices.to(torch.int32).cpu())
        counts.append(active.offsets.diff().cpu())
        lengths = (shard.offsets[first + 1 : end + 1] - shard.offsets[first:end]).to(z.device)
        pooled = torch.segment_reduce(z, "mean", lengths=lengths, axis=0, initial=0)
        means[first:end] = pooled.cpu()
        bar.update(len(x))
    return SparseShard(
        values=values.whole(),
        indices=indices.whole(),
        entries=torch.cat(counts).cumsum(0),
        pooled=means,
        offsets=shard.offsets.clone(),
    )


def tally_store(
    sae: TopKSparseAutoencoder,
    store: ActivationStore,
    index: SentenceIndex,
    tally: Tally,
    work_dir: Path,
    batch_tokens: int,
    workers: Workers,
) -> int:
    """Encode and tally this rank's shards; rank 0's tally then holds all ranks' shards.

    Shards that an interrupted run encoded are read from work_dir. Returns how many sentences this
    run encoded, on all ranks.
    """
    n_resumed, n_encoded, encode = 0, 0, fastest_encode(sae)

    def count(sparse: SparseShard, ids: np.ndarray) -> None:
        canonical = index.canonical[index.find(ids)]
        values, indices, entries, offsets = (
            column.numpy()
            for column in (sparse.values, sparse.indices, sparse.entries, sparse.offsets)
        )
        tally.add(Chunk(values, indices, entries, offsets, ids, canonical))

    own = range(workers.rank, store.n_shards, workers.world_size)
    n_tokens = int(index.length[np.isin(index.shard, own)].sum())
    bar = progress(n_tokens, unit="tok", description=workers.label("encode"), unit_scale=True)
    with bar, ThreadPoolExecutor(1) as counting:  # beside the encoder, in the order of the shards
        counted: Future[None] | None = None
        for i in own:
            shard, path = store.read_shard(i), sparse_path(work_dir, i)
            if path.exists():
                n_resumed += 1
                bar.update(len(shard.token_ids))
            else:
                sparse = encode_shard(sae, encode, shard, batch_tokens, bar, work_dir)
                write_sparse(path, sparse)
                del sparse
                n_encoded += len(shard.sentence_ids)
            if counted is not None:
                counted.result()
            counted = counting.submit(count, read_sparse(path), shard.sentence_ids.numpy())
        if counted is not None:
            counted.result()
    if n_resumed:
        log.info("resumed: %d of %d shards were encoded already", n_resumed, store.n_shards)
    tally.finish()
    merge_ranks(tally, work_dir, workers)
    return sum(workers.gather(n_encoded))


def merge_ranks(tally: Tally, work_dir: Path, workers: Workers) -> None:
    """Add the other ranks' tallies, handed over as files, to rank 0's."""
    paths = [work_dir / f"tally_{rank:05d}.safetensors" for rank in range(workers.world_size)]
    if not workers.is_main:
        state = {name: torch.from_numpy(array) for name, array in tally.state().items()}
        write_tensors(paths[workers.rank], state)
    workers.barrier()
    if workers.is_main:
        for path in paths[1:]:
            tally.absorb(load_arrays(path))
