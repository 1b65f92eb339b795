"""What an SAE is trained for: which latents are active, and which reconstructions count.

An objective is one small class: `choose` says which latents of a batch are active, `prefixes` of
which nested dictionaries the reconstructions are summed up in the loss, and `activation` how the
trained SAE finds its active latents where there is no batch. To add one, write such a class, name
it in OBJECTIVES, and give its gradients a reference in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sae import ActiveLatents
from saint.kernels.torch_ops import TopK, complete
from saint.stage.workers import Workers

_MATRYOSHKA_SHARES = (16, 8, 4, 2, 1)  # prefixes are n_latents divided by these


class Objective(Protocol):
    """What the trainer asks of an objective."""

    @property
    def activation(self) -> str:
        """Which of `sae.ACTIVATIONS` the trained SAE has."""
        ...

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """Return sizes of the nested dictionaries that are to reconstruct, ascending."""
        ...

    def choose(
        self, top: TopK, inputs: Sequence[Tensor], k: int, n_latents: int, workers: Workers
    ) -> tuple[list[ActiveLatents], Tensor] | None:
        """Return the active latents of each micro-batch, and the least activation among them ().

        None: each token's k largest, which the step finds by itself. inputs: this rank's
        micro-batches (n, d_model), the encoder's inputs x − b_pre. k: mean number per token.
        """
        ...


@dataclass(frozen=True)
class TopKObjective:
    """Each token's k largest latents (Gao et al., arXiv:2406.04093)."""

    activation: str = "topk"

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return (n_latents,)

    def choose(
        self, top: TopK, inputs: Sequence[Tensor], k: int, n_latents: int, workers: Workers
    ) -> None:
        """See `Objective`."""


@dataclass(frozen=True)
class BatchTopK:
    """The k · n_tokens largest of a batch of n_tokens (Bussmann et al., arXiv:2412.06410).

    The batch is that of all ranks and micro-batches; of exactly equal ones all are taken. Without a
    batch there is one threshold, calibrated on training rows at the end.
    """

    activation: str = "batchtopk"

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return (n_latents,)

    def choose(
        self, top: TopK, inputs: Sequence[Tensor], k: int, n_latents: int, workers: Workers
    ) -> tuple[list[ActiveLatents], Tensor]:
        """See `Objective`."""
        return largest_of_batch(top, inputs, k, n_latents, workers)


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK, of which nested dictionaries reconstruct too (Bussmann et al., arXiv:2503.17547).

    The loss is the mean over the first 1/16, 1/8, 1/4, 1/2 of the latents, and all.
    """

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return tuple(sorted({max(1, n_latents // share) for share in _MATRYOSHKA_SHARES}))


OBJECTIVES: dict[str, Objective] = {
    "topk": TopKObjective(),
    "batchtopk": BatchTopK(),
    "matryoshka": Matryoshka(),
}


@torch.no_grad()
def largest_of_batch(
    top: TopK, inputs: Sequence[Tensor], k: int, n_latents: int, workers: Workers
) -> tuple[list[ActiveLatents], Tensor]:
    """Return the k · n_tokens largest latents of all tokens, and the least of their activations.

    The k · n_tokens-th largest of every token's 2 k largest is at most the wanted cut, so what lies
    below need not be looked at; where a token's 2 k all lie above it, more of it are.
    """
    n_active = k * sum(map(len, inputs)) * workers.world_size
    found = [top(a, min(2 * k, n_latents)) for a in inputs]
    floor = _nth_largest([values for values, _ in found], n_active, workers)
    parts = [
        complete(top, a, floor, pair, n_latents) for a, pair in zip(inputs, found, strict=True)
    ]
    cut = _nth_largest([part.values for part in parts], n_active, workers)
    return [_at_least(part, cut) for part in parts], cut


def _at_least(active: ActiveLatents, cut: Tensor) -> ActiveLatents:
    kept = active.values >= cut
    ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return ActiveLatents(active.values[kept], active.indices[kept], ends[active.offsets])


def _nth_largest(parts: Sequence[Tensor], n: int, workers: Workers) -> Tensor:
    """Return the n-th largest of all ranks' values (), 0 where there are fewer."""
    values = torch.cat([part.reshape(-1) for part in parts])
    if workers.world_size > 1:
        size = torch.tensor(len(values), device=values.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
        padded = values.new_zeros(int(size))
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in range(workers.world_size)]
        dist.all_gather(gathered, padded)
        values = torch.cat(gathered)
    if n > len(values) or not n:
        return values.new_zeros(())
    return values.kthvalue(len(values) - n + 1).values
