"""What an SAE is trained for: which latents are active, and which reconstructions count.

An objective is one small class: `choose` says which latents of a batch are active, `prefixes` of
which nested dictionaries the reconstructions are summed up in the loss, and `activation` how the
trained SAE finds its active latents where there is no batch. Its fields are flags of the recipe. To
add one, write such a class, name it in OBJECTIVES, and give its gradients a reference in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels.torch_ops import TopK, complete, places_of
from saint.stage.workers import Workers
from saint.training.losses import Jump
from saint.training.moments import Moments

_MATRYOSHKA_SHARES = (16, 8, 4, 2, 1)  # prefixes are n_latents divided by these
_ROUNDING = 1e-5  # what a product of other rows at once may change of an activation, and more


class Finder(Protocol):
    """What an objective may ask of a training step; `steps.Step` is one."""

    sae: TopKSparseAutoencoder
    moments: Moments

    def top(self, a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `kernels.torch_ops.TopK`, of the encoder's inputs x − b_pre; this rank's latents."""
        ...

    def above(self, a: Tensor, bias: Tensor) -> ActiveLatents:
        """Return where a · W_encᵀ + bias exceeds 0, and by how much; bias: (n_latents,)."""
        ...


@dataclass(frozen=True)
class Choice:
    """What is active in a batch.

    active: of each micro-batch; an entry may be 0, where only a threshold's gradient needs it.
    least: () the least activation, which the running threshold follows, or None. jump: JumpReLU's.
    """

    active: Sequence[ActiveLatents]
    least: Tensor | None = None
    jump: Jump | None = None


class Objective(Protocol):
    """What the trainer asks of an objective."""

    activation: ClassVar[str]
    """Which of `sae.ACTIVATIONS` the trained SAE has."""

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """Return sizes of the nested dictionaries that are to reconstruct, ascending."""
        ...

    def choose(
        self, step: Finder, inputs: Sequence[Tensor], k: int, workers: Workers
    ) -> Choice | None:
        """Return what is active of this rank's micro-batches.

        None: each token's k largest, which the step finds by itself. inputs: (n, d_model) each, the
        encoder's inputs x − b_pre. k: mean number per token.
        """
        ...


@dataclass(frozen=True)
class TopKObjective:
    """Each token's k largest latents (Gao et al., arXiv:2406.04093)."""

    activation: ClassVar[str] = "topk"

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return (n_latents,)

    def choose(self, step: Finder, inputs: Sequence[Tensor], k: int, workers: Workers) -> None:
        """See `Objective`."""


@dataclass(frozen=True)
class BatchTopK:
    """The k · n_tokens largest of a batch of n_tokens (Bussmann et al., arXiv:2412.06410).

    The batch is that of all ranks and micro-batches; of exactly equal ones all are taken. Without a
    batch there is one threshold, calibrated on training rows at the end.
    """

    activation: ClassVar[str] = "batchtopk"

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return (n_latents,)

    def choose(self, step: Finder, inputs: Sequence[Tensor], k: int, workers: Workers) -> Choice:
        """See `Objective`."""
        active, least = largest_of_batch(step.top, inputs, k, step.sae.config.n_latents, workers)
        return Choice(active, least)


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK, of which nested dictionaries reconstruct too (Bussmann et al., arXiv:2503.17547).

    The loss is the mean over the first 1/16, 1/8, 1/4, 1/2 of the latents, and all.
    """

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return tuple(sorted({max(1, n_latents // share) for share in _MATRYOSHKA_SHARES}))


@dataclass(frozen=True)
class JumpReLU:
    """What exceeds a threshold that each latent learns (Rajamanoharan et al., arXiv:2407.14435).

    A threshold θ is moved by pre-activations within ± bandwidth / 2 of it, as if the step there
    were a ramp: see `Jump`. To the loss comes l0_coefficient · (L0 / k − 1)², with L0 the batch's
    mean number of active latents (of all ranks and micro-batches). The thresholds begin as one, at
    which the first batch has k per token; one factor on all is calibrated at the end.
    """

    bandwidth: float = 0.5
    l0_coefficient: float = 2.0
    activation: ClassVar[str] = "jumprelu"

    def prefixes(self, n_latents: int) -> tuple[int, ...]:
        """See `Objective`."""
        return (n_latents,)

    @torch.no_grad()
    def choose(self, step: Finder, inputs: Sequence[Tensor], k: int, workers: Workers) -> Choice:
        """See `Objective`."""
        threshold, n_latents = step.sae.threshold, step.sae.config.n_latents
        assert threshold is not None
        if not step.moments.n_steps and not workers.latents.largest(threshold.amax()):
            threshold.fill_(largest_of_batch(step.top, inputs, k, n_latents, workers)[1])
        half = self.bandwidth / 2
        bias, active = step.sae.b_enc - threshold + half, []
        n_active = threshold.new_zeros(())
        for a in inputs:
            near = step.above(a, bias)
            over = near.values - half
            values = (over + threshold[near.indices.long()]) * (over > 0)
            n_active += (over > 0).sum()
            active.append(replace(near, values=values))
        workers.everyone.sum(n_active)
        n_tokens = max(1, sum(map(len, inputs)) * workers.data.size)
        excess = n_active / n_tokens / k - 1
        return Choice(active, jump=Jump(self.bandwidth, 2 * self.l0_coefficient * excess / k))


OBJECTIVES: dict[str, Objective] = {
    "topk": TopKObjective(),
    "batchtopk": BatchTopK(),
    "matryoshka": Matryoshka(),
    "jumprelu": JumpReLU(),
}


def objective_of(recipe: Any) -> Objective:
    """Return the objective that a `Recipe` names, with its flags."""
    objective: Any = OBJECTIVES[recipe.objective]
    return replace(objective, **{f.name: getattr(recipe, f.name) for f in fields(objective)})


@torch.no_grad()
def largest_of_batch(
    top: TopK, inputs: Sequence[Tensor], k: int, n_latents: int, workers: Workers
) -> tuple[list[ActiveLatents], Tensor]:
    """Return the k · n_tokens largest latents of all tokens, and the least of their activations.

    n_latents: of this rank, which finds its own ones among all ranks' largest.

    The k · n_tokens-th largest of every token's 2 k largest is at most the wanted cut, so what lies
    below need not be looked at; where a token's 2 k all lie above it, more of it are.
    """
    n_active = k * sum(map(len, inputs)) * workers.data.size
    found = [top(a, min(2 * k, n_latents)) for a in inputs]
    floor = nth_largest([values for values, _ in found], n_active, workers) * (1 - _ROUNDING)
    parts = [
        complete(top, a, floor, pair, n_latents) for a, pair in zip(inputs, found, strict=True)
    ]
    cut = nth_largest([part.values for part in parts], n_active, workers)
    counts = torch.stack([(part.values >= cut).sum() for part in parts]).tolist()
    return [_at_least(part, cut, n) for part, n in zip(parts, counts, strict=True)], cut


def _at_least(active: ActiveLatents, cut: Tensor, n: int) -> ActiveLatents:
    """Return the n entries that are at least a cut ()."""
    kept = active.values >= cut
    places, ends = places_of(kept, n), F.pad(kept.cumsum(0), (1, 0))
    return ActiveLatents(active.values[places], active.indices[places], ends[active.offsets])


def nth_largest(parts: Sequence[Tensor], n: int, workers: Workers) -> Tensor:
    """Return the n-th largest of all ranks' values (), 0 where there are fewer."""
    values = torch.cat([part.reshape(-1) for part in parts])
    values = workers.everyone.gather_uneven(values)
    if n > len(values) or not n:
        return values.new_zeros(())
    return values.kthvalue(len(values) - n + 1).values
