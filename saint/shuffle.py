"""A seeded, global shuffle of a store's rows in bounded memory: two passes over the disk.

Every row goes to a random one of many files, then each file is permuted in memory; together that is
a uniform permutation of all rows. All randomness is seeded by shard and file, so the bytes do not
depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sae import standardise
from saint.activation_store import ActivationStore, Shard
from saint.batched_rows import SPLITS, Split, rows_name
from saint.manifests import file_checksum
from saint.runtime import atomic_path, progress
from saint.sentences import HELD_OUT_SEED, is_held_out

_CHUNK_ROWS = 16_384
MASSIVE_NORM_FACTOR = 20


@dataclass(frozen=True)
class Shuffle:
    """One layer directory's shuffle: where to, and how rows are dealt to files."""

    store: ActivationStore
    output_dir: Path
    seed: int
    held_out_fraction: float
    n_files: dict[Split, int]

    def deal(self, shard: Shard, index: int) -> dict[Split, tuple[np.ndarray, np.ndarray]]:
        """Return, per split, the shard's rows and the file that each goes to."""
        held_out = np.array(
            [
                is_held_out(tokens, fraction=self.held_out_fraction, seed=HELD_OUT_SEED)
                for tokens in _sentence_tokens(shard)
            ],
            dtype=bool,
        )
        lengths = np.diff(shard.offsets.numpy())
        row_held_out = np.repeat(held_out, lengths)
        generator = np.random.default_rng([self.seed, 0, index])
        draw = generator.random(len(row_held_out))
        dealt: dict[Split, tuple[np.ndarray, np.ndarray]] = {}
        for split in SPLITS:
            rows = np.flatnonzero(row_held_out if split == "val" else ~row_held_out)
            dealt[split] = (rows, (draw[rows] * self.n_files[split]).astype(np.int64))
        return dealt

    def bucket_path(self, split: Split, index: int) -> Path:
        """Where a file's rows are gathered before they are permuted."""
        return self.output_dir / f".{split}_{index:05d}.rows.tmp"

    def stats_path(self, index: int) -> Path:
        """Marks a shard as dealt; holds its sums and its tokens' norms."""
        return self.output_dir / f".shard_{index:05d}.stats.npz"


def _sentence_tokens(shard: Shard) -> Iterable[np.ndarray]:
    tokens, offsets = shard.token_ids.numpy(), shard.offsets.tolist()
    return (tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True))


def count_rows(shuffle: Shuffle, index: int) -> dict[Split, np.ndarray]:
    """Return how many of a shard's rows go to each file of each split."""
    dealt = shuffle.deal(shuffle.store.read_shard(index), index)
    return {s: np.bincount(f, minlength=shuffle.n_files[s]) for s, (_, f) in dealt.items()}


def deal_shard(job: tuple[Shuffle, int, dict[Split, np.ndarray]]) -> int:
    """Pass 1: write a shard's rows to their files, at the given first rows. Idempotent."""
    shuffle, index, first_rows = job
    torch.set_num_threads(1)
    shard = shuffle.store.read_shard(index)
    rows_int = shard.activations.view(torch.int16)
    row_bytes = rows_int.shape[1] * 2
    dealt = shuffle.deal(shard, index)
    for split, (rows, files) in dealt.items():
        order = np.argsort(files, kind="stable")
        ends = np.cumsum(np.bincount(files, minlength=shuffle.n_files[split]))
        for file, chosen in enumerate(np.split(rows[order], ends[:-1])):
            if not len(chosen):
                continue
            with open(shuffle.bucket_path(split, file), "r+b") as bucket:
                block = rows_int[torch.from_numpy(chosen)].numpy()
                offset = int(first_rows[split][file]) * row_bytes
                os.pwrite(bucket.fileno(), block.tobytes(), offset)
                os.fsync(bucket.fileno())
    with atomic_path(shuffle.stats_path(index)) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **shard_statistics(shard, dealt["train"][0]))
    return len(shard.token_ids)


def shard_statistics(shard: Shard, train_rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return float64 sums over the standardised training rows, and every token's raw norm."""
    d_model = shard.activations.shape[1]
    total, squares = torch.zeros(d_model).double(), torch.zeros(d_model).double()
    norms = torch.empty(len(shard.token_ids))
    is_train = torch.zeros(len(norms), dtype=torch.bool)
    is_train[torch.from_numpy(train_rows)] = True
    for start in range(0, len(norms), _CHUNK_ROWS):
        block = slice(start, start + _CHUNK_ROWS)
        raw = shard.activations[block].float()
        norms[block] = torch.linalg.vector_norm(raw, dim=1)
        z = standardise(raw)[0][is_train[block]].double()
        total += z.sum(dim=0)
        squares += z.square().sum(dim=0)
    return {"sum": total.numpy(), "squares": squares.numpy(), "norms": norms.numpy()}


def permute_file(job: tuple[Shuffle, Split, int, int, int]) -> dict[str, Any]:
    """Pass 2: permute one file's rows and write it in its final form; return its checksum."""
    shuffle, split, index, n_rows, d_model = job
    torch.set_num_threads(1)
    bucket, final = shuffle.bucket_path(split, index), shuffle.output_dir / rows_name(split, index)
    if bucket.exists():
        rows = np.fromfile(bucket, dtype=np.int16).reshape(n_rows, d_model)
        seed = [shuffle.seed, 1 if split == "train" else 2, index]
        order = np.random.default_rng(seed).permutation(n_rows)
        shuffled = torch.from_numpy(rows[order]).view(torch.bfloat16)
        with atomic_path(final) as temporary:
            save_file({"activations": shuffled}, temporary)
        bucket.unlink()
    return file_checksum(final)


def shuffle_rows(shuffle: Shuffle, pool_map: Callable[..., Iterable[Any]]) -> dict[str, Any]:
    """Run both passes, resuming from what is there; return rows per file and checksums."""
    indices = range(shuffle.store.n_shards)
    counts = [count_rows(shuffle, i) for i in indices]
    rows = {s: np.sum([c[s] for c in counts], axis=0) for s in SPLITS}
    finals: list[tuple[Split, int]] = [(s, f) for s in SPLITS for f in range(shuffle.n_files[s])]
    d_model = shuffle.store.facts["d_model"]
    for split, file in finals:
        bucket = shuffle.bucket_path(split, file)
        if not (shuffle.output_dir / rows_name(split, file)).exists():
            with bucket.open("ab") as handle:
                handle.truncate(int(rows[split][file]) * d_model * 2)
    first = {s: np.zeros(shuffle.n_files[s], dtype=np.int64) for s in SPLITS}
    jobs = []
    for i in indices:
        if not shuffle.stats_path(i).exists():
            jobs.append((shuffle, i, {s: first[s].copy() for s in SPLITS}))
        first = {s: first[s] + counts[i][s] for s in SPLITS}
    with progress(
        sum(shuffle.store.manifest.counts["shard_tokens"][j[1]] for j in jobs),
        unit="rows",
        description="deal",
        unit_scale=True,
    ) as bar:
        for n_tokens in pool_map(deal_shard, jobs):
            bar.update(n_tokens)
    permutations = [(shuffle, s, f, int(rows[s][f]), d_model) for s, f in finals]
    with progress(len(finals), unit="file", description="permute") as bar:
        checksums = {}
        for (split, file), checksum in zip(
            finals, pool_map(permute_file, permutations), strict=True
        ):
            checksums[rows_name(split, file)] = checksum
            bar.update()
    return {"rows": {s: rows[s].tolist() for s in SPLITS}, "checksums": checksums}


def mean_and_norms(shuffle: Shuffle, n_train: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the mean (d_model,) in the SAE's input space, and facts about variance and norms."""
    stats = [np.load(shuffle.stats_path(i)) for i in range(shuffle.store.n_shards)]
    total = np.sum([s["sum"] for s in stats], axis=0)
    squares = np.sum([s["squares"] for s in stats], axis=0)
    mean = total / n_train
    norms = np.concatenate([s["norms"] for s in stats])
    median = float(np.median(norms))
    edges = np.geomspace(max(norms.min(), 1e-6), norms.max() * (1 + 1e-6), 41)
    return torch.from_numpy(mean).float(), {
        "variance": float(np.sum(squares / n_train - mean**2)),
        "norm_median": median,
        "norm_histogram": {
            "edges": edges.tolist(),
            "counts": np.histogram(norms, edges)[0].tolist(),
        },
        "massive_tokens": massive_tokens(shuffle.store, norms, median),
    }


def massive_tokens(store: ActivationStore, norms: np.ndarray, median: float) -> dict[str, int]:
    """Return {token text: count} of tokens whose norm is over 20 × the median."""
    massive = np.flatnonzero(norms > MASSIVE_NORM_FACTOR * median)
    if not len(massive):
        return {}
    token_ids = np.concatenate(
        [store.read_shard(i).token_ids.numpy() for i in range(store.n_shards)]
    )
    ids, counts = np.unique(token_ids[massive], return_counts=True)
    texts = store.token_texts()
    common = np.argsort(-counts, kind="stable")[:10]
    return {texts[ids[i]]: int(counts[i]) for i in common}
