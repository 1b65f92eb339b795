"""Capturing one shard: which sentences, the batched forward passes, and writing the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llama_3 import HookPoint, Llama, Tokenizer
from saint.activation_store import (
    SENTENCES,
    Shard,
    layer_dir_name,
    part_name,
    read_shard,
    shard_name,
    write_shard,
)
from saint.packing import batches_by_length, pack
from saint.runtime import atomic_path
from saint.sentences import Sampler


@dataclass(frozen=True)
class ShardJob:
    """The sentences of one shard: sentence_ids and texts in the sampled order."""

    index: int
    sentence_ids: list[int]
    texts: list[str]


def shard_sizes(num_samples: int, per_shard: int, kept: Sequence[int]) -> list[int]:
    """Return the sentences of each shard: those an earlier, smaller run made, then new ones."""
    sizes, remaining = list(kept), num_samples - sum(kept)
    while remaining > 0:
        sizes.append(min(per_shard, remaining))
        remaining -= sizes[-1]
    return sizes


def shard_jobs(sampler: Sampler, sizes: Sequence[int]) -> Iterator[ShardJob]:
    """Cut the sample into shards; the last may be short where the dataset ends."""
    stream = iter(sampler)
    for index, size in enumerate(sizes):
        rows = [row for _, row in zip(range(size), stream, strict=False)]
        if not rows:
            return
        yield ShardJob(index, [i for i, _ in rows], [text for _, text in rows])


@dataclass(frozen=True)
class Capture:
    """What every shard needs: the model, its tokenizer and how to run it."""

    model: Llama
    tokenizer: Tokenizer
    hooks: list[HookPoint]
    prepend_bos: bool
    max_token_length: int
    batch_tokens: int

    @property
    def bos(self) -> list[int]:
        """What is put before a sentence in the forward pass and not stored."""
        return [self.tokenizer.bos_id] if self.prepend_bos else []

    def tokenise(self, job: ShardJob) -> list[list[int]]:
        """Return each sentence's token ids, cut to the limit, without BOS."""
        encoded = self.tokenizer.encode_batch(job.texts, bos=False)
        return [tokens[: self.max_token_length] for tokens in encoded]

    @torch.inference_mode()
    def run(self, token_lists: list[list[int]], bar: Any) -> dict[HookPoint, Tensor]:
        """Return {hook: (n_tokens, d_model) bfloat16, in sentence order, without BOS}.

        The rows stay on the device until the shard is whole: one copy, no wait per batch.
        """
        lengths = np.array([len(tokens) for tokens in token_lists])
        starts = lengths.cumsum() - lengths
        device, shape = self.model.device, (int(lengths.sum()), self.model.args.dim)
        rows = {
            hook: torch.empty(shape, dtype=torch.bfloat16, device=device) for hook in self.hooks
        }
        for batch in batches_by_length(lengths, self.batch_tokens, extra=len(self.bos)):
            packed = pack([token_lists[i] for i in batch], bos=self.bos)
            captured = self.model.capture(
                packed.tokens.to(device), self.hooks, seq_lens=packed.seq_lens
            )
            own = packed.own.nonzero().squeeze(1).to(device)
            spans = zip(starts[batch].tolist(), lengths[batch].tolist(), strict=True)
            target = np.concatenate([np.arange(s, s + n) for s, n in spans])
            target = torch.from_numpy(target).to(device)
            for hook, activations in captured.items():
                rows[hook].index_copy_(0, target, activations[own].to(torch.bfloat16))
            bar.update(len(target))
        return rows


def follow_shards(capture: Capture, jobs: Iterator[ShardJob], bar: Any) -> int:
    """Take part in the forward passes of shards that the tensor-parallel group's first rank writes.

    A job cannot be finished by the writer before this rank has taken it up, so both see the same
    jobs as missing. Returns the tokens stored: none.
    """
    for job in jobs:
        capture.run(capture.tokenise(job), bar)
    return 0


def shard_paths(output_dir: Path, hooks: Sequence[HookPoint], index: int) -> dict[HookPoint, Path]:
    """Return where each hook's shard lies."""
    return {h: output_dir / layer_dir_name(*h) / shard_name(index) for h in hooks}


def is_complete(output_dir: Path, hooks: Sequence[HookPoint], job: ShardJob) -> bool:
    """Whether an earlier run finished exactly this shard."""
    part = output_dir / SENTENCES / part_name(job.index)
    paths = list(shard_paths(output_dir, hooks, job.index).values())
    if not part.exists() or not all(path.exists() for path in paths):
        return False
    return all(read_shard(path).sentence_ids.tolist() == job.sentence_ids for path in paths)


def write_job(
    output_dir: Path,
    job: ShardJob,
    token_lists: list[list[int]],
    rows: dict[HookPoint, Tensor],
) -> None:
    """Write a shard's sentences and the activations of every hook point."""
    part = pa.table(
        {
            "sentence_id": pa.array(job.sentence_ids, pa.int64()),
            "text": pa.array(job.texts, pa.string()),
            "token_ids": pa.array(token_lists, pa.list_(pa.int32())),
        }
    )
    with atomic_path(output_dir / SENTENCES / part_name(job.index)) as temporary:
        pq.write_table(part, temporary, compression="zstd")
    lengths = torch.tensor([0] + [len(tokens) for tokens in token_lists])
    token_ids = torch.tensor([t for tokens in token_lists for t in tokens], dtype=torch.int32)
    for hook, path in shard_paths(output_dir, list(rows), job.index).items():
        shard = Shard(
            activations=rows[hook].cpu(),
            token_ids=token_ids,
            offsets=lengths.cumsum(0),
            sentence_ids=torch.tensor(job.sentence_ids),
        )
        write_shard(path, shard)
