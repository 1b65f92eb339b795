"""Batching sentences without padding: packed one after another, similar lengths together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Sentences one after another, as `llama_3` takes them.

    tokens: (n_tokens,) int64, each sentence with bos first. seq_lens: its tokens per sentence.
    own: (n_tokens,) bool, false for bos.
    """

    tokens: Tensor
    seq_lens: list[int]
    own: Tensor


def pack(token_lists: Sequence[Sequence[int]], *, bos: Sequence[int]) -> Pack:
    """Pack sentences (lists of token ids without bos), bos before each."""
    tokens = torch.tensor([t for sentence in token_lists for t in (*bos, *sentence)])
    seq_lens = [len(bos) + len(sentence) for sentence in token_lists]
    own = torch.ones(len(tokens), dtype=torch.bool)
    if bos:
        own[torch.tensor([0, *seq_lens[:-1]]).cumsum(0)] = False
    return Pack(tokens, seq_lens, own)


def batches_by_length(
    lengths: np.ndarray, batch_tokens: int, *, extra: int
) -> Iterator[np.ndarray]:
    """Yield indices of sentences, longest first, as many as fit into batch_tokens (at least one).

    extra: tokens put before each sentence. Sentences without tokens are left out.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    ends = (lengths[order] + extra).cumsum()
    start = 0
    while start < len(order):
        limit = batch_tokens + (ends[start - 1] if start else 0)
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield order[start:stop]
        start = stop
