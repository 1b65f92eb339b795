"""The training step and its state: recipe, optimiser, dead latents, ranks, validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sae import TopKSparseAutoencoder, standardise
from saint.stage.program import Workers
from saint.store.shuffled_rows import BatchedRows, Split
from saint.training.losses import AuxK, Losses
from saint.training.moments import Moments
from saint.training.steps import make_step

_BLOCK_ROWS = 8192
DENSITY_PERCENTS = (10, 50, 90)

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result, automatic values resolved.

    lr_floor: the last learning rate as a share of the peak. k_start, k_anneal_steps: active latents
    of the first step, and the steps until they are k. moments: how Adam's are kept, one of KINDS.
    """

    n_latents: int
    k: int
    num_epochs: int
    batch_size: int
    learning_rate: float
    warmup_fraction: float
    decay_fraction: float
    lr_floor: float
    k_start: int
    k_anneal_steps: int
    grad_clip: float
    k_aux: int
    aux_coefficient: float
    dead_tokens: int
    seed: int
    moments: str = "float32"

    def learning_rate_at(self, step: int, n_steps: int) -> float:
        """Linear warm-up, constant, then linear decay to the floor; by steps."""
        warmup = max(1, round(self.warmup_fraction * n_steps))
        decay = max(1, round(self.decay_fraction * n_steps))
        decayed = self.lr_floor + (1 - self.lr_floor) * min(1.0, (n_steps - step) / decay)
        return self.learning_rate * min(1.0, (step + 1) / warmup) * decayed

    def k_at(self, step: int) -> int:
        """Active latents per token: linearly from k_start to k over the first steps."""
        remaining = max(0.0, 1 - step / self.k_anneal_steps) if self.k_anneal_steps else 0.0
        return self.k + round((self.k_start - self.k) * remaining)


class Trainer:
    """The state of a run: weights, Adam's moments, step, and tokens since each latent fired."""

    def __init__(
        self,
        sae: TopKSparseAutoencoder,
        recipe: Recipe,
        n_steps: int,
        workers: Workers,
        kernels: str,
    ):
        self.sae, self.recipe, self.n_steps, self.workers = sae, recipe, n_steps, workers
        self.moments = Moments(sae, recipe.moments)
        self.kernels = make_step(kernels, sae, self.moments, workers)
        self.tokens_since_fired = torch.zeros(
            recipe.n_latents, dtype=torch.int64, device=workers.device
        )
        self.step = 0
        self.skipped_steps: set[int] = set()
        self.best_val_loss = math.inf

    def dead(self) -> Tensor:
        """Return the (n_dead,) indices of latents that have not fired for dead_tokens."""
        return torch.nonzero(self.tokens_since_fired >= self.recipe.dead_tokens).squeeze(1)

    def train_step(self, rows: Tensor, micro_batch_size: int) -> tuple[Losses, Tensor]:
        """Take one optimiser step on this rank's share of the batch: raw rows (n, d_model).

        Returns the losses over all ranks, and the norm of the gradient before it is clipped.
        """
        dead, k = self.dead(), self.recipe.k_at(self.step)
        parts: list[tuple[float, Losses]] = []
        first = self.workers.rank * len(rows)
        for micro in rows.split(micro_batch_size):
            aux = self._aux(dead, first)
            first += len(micro)
            x = standardise(micro.to(self.workers.device), self.sae.config.norm_eps)[0]
            share = len(micro) / len(rows)
            weight = share / self.workers.world_size
            parts.append((share, self.kernels.accumulate(x, k, aux, weight)))
        losses = self._over_ranks(combine(parts))
        learning_rate = self.recipe.learning_rate_at(self.step, self.n_steps)
        norm = self.kernels.apply(learning_rate, self.recipe.grad_clip)
        self.tokens_since_fired += self.recipe.batch_size
        self.tokens_since_fired[losses.fired] = 0
        self.step += 1
        return losses, norm

    def _aux(self, dead: Tensor, first: int) -> AuxK | None:
        """Return AuxK for tokens from number `first` of the batch on; other ones at each step."""
        if not len(dead) or not self.recipe.aux_coefficient:
            return None
        n_latents = self.recipe.n_latents
        return AuxK(
            dead,
            min(self.recipe.k_aux, len(dead)),
            self.recipe.aux_coefficient,
            every=aux_every(len(dead), n_latents, self.recipe.batch_size),
            first=first + self.step,
        )

    def _over_ranks(self, losses: Losses) -> Losses:
        """Average losses over the ranks; a latent fired if it did on any."""
        if self.workers.world_size == 1:
            return losses
        scalars = torch.stack(
            [losses.loss, losses.aux_loss, losses.squared_error, losses.l0.to(losses.loss.dtype)]
        )
        fired = losses.fired.to(torch.int32)
        dist.all_reduce(scalars)
        dist.all_reduce(fired, op=dist.ReduceOp.MAX)
        loss, aux_loss, squared_error, l0 = scalars.unbind()
        n = self.workers.world_size
        return Losses(loss / n, aux_loss / n, squared_error, fired > 0, l0 / n)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "sae": self.sae.state_dict(),
            "moments": self.moments.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "step": self.step,
            "skipped_steps": sorted(self.skipped_steps),
            "best_val_loss": self.best_val_loss,
        }

    def take_weights(self, sae: TopKSparseAutoencoder | None) -> None:
        """Go on with rank 0's other SAE on every rank; the optimiser's state stays as it is."""
        if sae is not None:
            self.sae.load_state_dict(sae.state_dict())
        if self.workers.world_size > 1:
            for parameter in self.sae.parameters():
                dist.broadcast(parameter.detach(), src=0)
        # The old one may keep the old weights, rounded.
        self.kernels = make_step(self.kernels.name, self.sae, self.moments, self.workers)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint file."""
        state = torch.load(path, map_location=self.workers.device, weights_only=True)
        self.sae.load_state_dict(state["sae"])
        self.moments.load_state_dict(state["moments"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]
        self.skipped_steps |= set(state["skipped_steps"])


def aux_every(n_dead: int, n_latents: int, batch_size: int) -> int:
    """Return one in how many tokens AuxK takes: 2,048 dead of 65,536 latents make it 8.

    Its five dense products then cost at most 1/48 of one product with all latents and tokens; but
    it takes 16 tokens at least, so that no step is without it.
    """
    return max(1, min(-(-5 * 48 * n_dead // n_latents), batch_size // 16))


def combine(parts: Sequence[tuple[float, Losses]]) -> Losses:
    """Weigh micro-batches' losses by their shares of the batch."""
    first = parts[0][1]
    fired = first.fired.clone()
    for _, losses in parts[1:]:
        fired |= losses.fired
    return Losses(
        loss=torch.stack([s * p.loss for s, p in parts]).sum(),
        aux_loss=torch.stack([s * p.aux_loss for s, p in parts]).sum(),
        squared_error=torch.stack([p.squared_error for _, p in parts]).sum(),
        fired=fired,
        l0=torch.stack([s * p.l0 for s, p in parts]).sum(),
    )


@torch.no_grad()
def validate(
    sae: TopKSparseAutoencoder,
    rows: BatchedRows,
    encode: Encode | None = None,
    n_rows: int | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Return val/ metrics over held-out rows, and each latent's density (n_latents,).

    encode: a faster version of `sae.encode` where there is one. n_rows: of the first so many (they
    are shuffled, so these are a sample), by default of all.
    """
    encode = encode or sae.encode
    n_rows, device = n_rows or rows.n_rows("val"), sae.b_pre.device
    loss = error_sum = active = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros(sae.config.d_model, dtype=torch.float64, device=device)
    squares, fired = torch.zeros_like(total), torch.zeros(sae.config.n_latents, device=device)
    for start in range(0, n_rows, _BLOCK_ROWS):
        raw = rows.read("val", start, min(start + _BLOCK_ROWS, n_rows)).to(device)
        x = standardise(raw, sae.config.norm_eps)[0]
        values, indices = encode(x)
        error = (sae.decode(values, indices) - x).square().sum(dim=1).double()
        loss = loss + (error / x.square().sum(dim=1).clamp_min(1e-12)).sum()
        error_sum = error_sum + error.sum()
        active = active + (values > 0).sum()
        total += x.double().sum(dim=0)
        squares += x.double().square().sum(dim=0)
        fired += torch.bincount(indices[values > 0], minlength=len(fired))
    variance = (squares - total.square() / n_rows).sum().clamp_min(1e-12)
    density = (fired / n_rows).cpu()
    metrics = {
        "val/loss": float(loss / n_rows),
        "val/aux_loss": 0.0,  # AuxK trains dead latents; held-out tokens have none of their own
        "val/total_loss": float(loss / n_rows),
        "val/fvu": float(error_sum / variance),
        "val/l0": float(active / n_rows),
        "val/silent_latents_ratio": float((fired == 0).float().mean()),
        **density_quantiles(density),
    }
    return metrics, density


def density_quantiles(density: Tensor) -> dict[str, float]:
    """Return the 10, 50 and 90 % quantiles of log10 density (n_latents,), of latents that fire.

    {} where none fires.
    """
    firing = density[density > 0].double().log10().numpy()  # torch's quantile takes 16M at most
    if not len(firing):
        return {}
    names = [f"val/log10_density_p{percent}" for percent in DENSITY_PERCENTS]
    return dict(zip(names, np.percentile(firing, DENSITY_PERCENTS).tolist(), strict=True))


@torch.no_grad()
def largest_activations(trainer: Trainer, rows: BatchedRows) -> Tensor:
    """Return (n_latents,) float32: each latent's maximum over every captured token."""
    sae, workers = trainer.sae, trainer.workers
    maximum = torch.zeros(sae.config.n_latents, device=workers.device)
    splits: tuple[Split, ...] = ("train", "val")
    blocks: list[tuple[Split, int]] = [
        (s, i) for s in splits for i in range(0, rows.n_rows(s), _BLOCK_ROWS)
    ]
    for split, start in blocks[workers.rank :: workers.world_size]:
        raw = rows.read(split, start, min(start + _BLOCK_ROWS, rows.n_rows(split))).to(
            workers.device
        )
        values, indices = trainer.kernels.encode(standardise(raw, sae.config.norm_eps)[0])
        maximum.scatter_reduce_(0, indices.reshape(-1), values.reshape(-1), "amax")
    if workers.world_size > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return maximum


class LossMeter:
    """Sums losses on the device between two logs, and remembers the first step that blew up."""

    def __init__(self, device: torch.device):
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._n, self._since = 0, time.monotonic()
        self._means, self._seconds = [math.nan] * 5, math.nan

    def add(self, losses: Losses, norm: Tensor, step: int) -> None:
        """Count a step's losses and gradient norm in, without waiting for the device."""
        scalars = (losses.loss, losses.aux_loss, losses.l0, norm, losses.squared_error)
        scalars = torch.stack([scalar.double() for scalar in scalars])
        bad = ~torch.isfinite(scalars).all() & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, step)
        self._sums += scalars
        self._n += 1

    def read(self) -> tuple[list[float], float]:
        """Return means since the last read, and seconds per step.

        The means are of loss, aux_loss, l0, the gradient's norm and a batch's squared error: those
        of the last read where no step was taken since, NaN where there is none.
        """
        if self._n:
            self._means = (self._sums / self._n).tolist()
            self._seconds = (time.monotonic() - self._since) / self._n
            self._sums.zero_()
            self._n = 0
        self.restart_clock()
        return self._means, self._seconds

    def restart_clock(self) -> None:
        """Leave out of the next seconds per step what was done since the last read."""
        self._since = time.monotonic()


def describe_step(trainer: Trainer, meter: LossMeter, variance: float) -> dict[str, Any]:
    """Return the metrics since the last log, under the names that DESIGN fixes.

    variance: of the training rows, standardised and summed over d_model, for train/fvu.
    """
    (loss, aux_loss, l0, norm, squared_error), seconds = meter.read()
    recipe, since = trainer.recipe, trainer.tokens_since_fired
    longest = int(since.max())
    return {
        "step": trainer.step,
        "tokens": trainer.step * recipe.batch_size,
        "train/loss": loss,
        "train/aux_loss": aux_loss,
        "train/total_loss": loss + recipe.aux_coefficient * aux_loss,
        "train/fvu": squared_error / recipe.batch_size / max(variance, 1e-12),
        "train/l0": l0,
        "train/grad_norm": norm,
        "debug/dead_latents_ratio": len(trainer.dead()) / recipe.n_latents,
        "debug/max_dead_latent": longest // recipe.batch_size,
        "debug/max_dead_latent_count": int((since == longest).sum()),
        "learning_rate": recipe.learning_rate_at(trainer.step - 1, trainer.n_steps),
        "tokens_per_s": recipe.batch_size / seconds,
        **trainer.kernels.diagnostics(),
    }
