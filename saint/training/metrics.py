"""What is measured of a run: losses, validation, densities, the steering unit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import TopKSparseAutoencoder
from saint.kernels.fastest import Encode
from saint.stage.workers import Axis
from saint.store.shuffled_rows import BatchedRows, Split
from saint.training.losses import Losses
from saint.training.objectives import nth_largest
from saint.training.together import ALONE, Together
from saint.training.trainer import Trainer, prepare_each

_BLOCK_ROWS = 8192
_CALIBRATION_ROWS = 1 << 18
DENSITY_PERCENTS = (10, 50, 90)

Measured = tuple[dict[str, float], Tensor]
"""val/ metrics over held-out rows, and each latent's density (n_latents,)."""


def validate(
    trainers: Sequence[Trainer],
    rows: BatchedRows,
    n_rows: int | None = None,
    together: Together = ALONE,
) -> list[Measured]:
    """Return what each trainer's SAE makes of held-out rows.

    n_rows: of the first so many (they are shuffled, so these are a sample), by default of all.
    """
    for trainer in trainers:
        trainer.settle_threshold()
    meters = [
        HeldOutMeter(trainer.sae, trainer.kernels.encode, trainer.workers.latents)
        for trainer in trainers
    ]
    n_rows = n_rows or rows.n_rows("val")
    for start in range(0, n_rows, _BLOCK_ROWS):
        raw = rows.read("val", start, min(start + _BLOCK_ROWS, n_rows))
        together.each(HeldOutMeter.add, meters, prepare_each(trainers, raw))
    return [meter.read() for meter in meters]


class HeldOutMeter:
    """Sums what an SAE makes of normalised rows.

    encode: `sae.encode` or a faster version of it. ranks: who shares the latents, of which `sae`
    then has a part; each of them measures the same rows.
    """

    def __init__(self, sae: TopKSparseAutoencoder, encode: Encode, ranks: Axis | None = None):
        self._sae, self._encode, self._n_rows = sae, encode, 0
        self._ranks = ranks or Axis()
        zeros = sae.b_pre.detach().new_zeros
        self._loss, self._error, self._n_active = zeros(3, dtype=torch.float64).unbind()
        self._total, self._squares = zeros(2, sae.config.d_model, dtype=torch.float64).unbind()
        self._fired = zeros(sae.config.n_latents)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count a block of rows (n, d_model) in."""
        self._n_rows, active = self._n_rows + len(x), self._encode(x)
        decoded = self._sae.decode(active)
        if self._ranks.size > 1:
            decoded = self._ranks.sum(decoded - self._sae.b_pre) + self._sae.b_pre
        error = (decoded - x).square().sum(dim=1).double()
        self._loss += (error / x.square().sum(dim=1).clamp_min(1e-12)).sum()
        self._error += error.sum()
        self._n_active += (active.values > 0).sum()
        self._total += x.double().sum(dim=0)
        self._squares += x.double().square().sum(dim=0)
        which = active.indices[active.values > 0]
        self._fired += torch.bincount(which, minlength=len(self._fired))

    def read(self) -> Measured:
        """Return what was measured so far."""
        n_rows, fired = self._n_rows, self._ranks.gather(self._fired).flatten()
        n_active = self._ranks.sum(self._n_active.clone())
        variance = (self._squares - self._total.square() / n_rows).sum().clamp_min(1e-12)
        density = (fired / n_rows).cpu()
        metrics = {
            "val/loss": float(self._loss / n_rows),
            "val/aux_loss": 0.0,  # AuxK trains dead latents; held-out tokens have none of their own
            "val/total_loss": float(self._loss / n_rows),
            "val/fvu": float(self._error / variance),
            "val/l0": float(n_active / n_rows),
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
def maxima_over_rows(
    trainers: Sequence[Trainer], rows: BatchedRows, together: Together = ALONE
) -> list[Tensor]:
    """Return for each trainer (n_latents,) float32: latents' maxima over every captured token.

    Of ranks that share the latents, each gets its own ones'.
    """
    if not trainers:
        return []
    workers, data = trainers[0].workers, trainers[0].workers.data
    maxima = [
        torch.zeros(trainer.sae.config.n_latents, device=workers.device) for trainer in trainers
    ]
    splits: tuple[Split, ...] = ("train", "val")
    blocks: list[tuple[Split, int]] = [
        (s, i) for s in splits for i in range(0, rows.n_rows(s), _BLOCK_ROWS)
    ]
    for split, start in blocks[data.rank :: data.size]:
        raw = rows.read(split, start, min(start + _BLOCK_ROWS, rows.n_rows(split)))
        together.each(_raise_maxima, maxima, trainers, prepare_each(trainers, raw))
    return [data.largest(maximum) for maximum in maxima]


@torch.no_grad()
def _raise_maxima(maximum: Tensor, trainer: Trainer, x: Tensor) -> None:
    active = trainer.kernels.encode(x)
    maximum.scatter_reduce_(0, active.indices.long(), active.values, "amax")


@torch.no_grad()
def calibrate(trainer: Trainer, rows: BatchedRows) -> None:
    """Raise or lower all thresholds by one factor, so that k latents per token are active.

    On average over the first 262,144 training rows, which are a sample. Does nothing where there
    are no thresholds.
    """
    levels, workers, n_ranks = trainer.levels(), trainer.workers, trainer.workers.data.size
    n_rows = min(rows.n_rows("train"), _CALIBRATION_ROWS) // n_ranks
    if levels is None or not workers.latents.largest(levels.amax()) or not n_rows:
        return
    n_active = trainer.sae.config.k * n_rows * n_ranks
    factor, floor = levels.new_zeros(()), 0.8
    while not factor and floor > 1e-3:  # what lies above the floor is enough, nearly always
        ratios = list(_ratios(trainer, rows, n_rows, levels, floor))
        factor, floor = nth_largest(ratios, n_active, workers), floor / 4
    # Active is what is above the threshold.
    trainer.raise_levels(torch.nextafter(factor, factor.new_zeros(())))


def _ratios(
    trainer: Trainer, rows: BatchedRows, n_rows: int, levels: Tensor, floor: float
) -> Iterator[Tensor]:
    """Yield pre-activations over levels (n_latents,), those above a floor, of this rank's rows."""
    sae, first = trainer.sae, trainer.workers.data.rank * n_rows
    for start in range(first, first + n_rows, _BLOCK_ROWS):
        raw = rows.read("train", start, min(start + _BLOCK_ROWS, first + n_rows))
        above = trainer.kernels.above(trainer.prepare(raw) - sae.b_pre, sae.b_enc - floor * levels)
        yield above.values / levels[above.indices.long()] + floor


class LossMeter:
    """Sums losses on the device between two logs, and remembers the first step that blew up."""

    def __init__(self, sums: Tensor):
        """sums: (6,) float64, the trainer's `since_logged`: five figures and the steps."""
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=sums.device)
        self.sums, self._one = sums, torch.ones(1, dtype=torch.float64, device=sums.device)
        self._n_timed, self._since = 0, time.monotonic()
        self._means, self._seconds = [math.nan] * 5, math.nan

    def add(self, losses: Losses, norm: Tensor, step: int) -> None:
        """Count a step's losses and gradient norm in, without waiting for the device."""
        scalars = (losses.loss, losses.aux_loss, losses.l0, norm, losses.squared_error)
        scalars = torch.stack([scalar.double() for scalar in scalars])
        bad = ~torch.isfinite(scalars).all() & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, step)
        self.sums += torch.cat([scalars, self._one])
        self._n_timed += 1

    def read(self, sums: Sequence[float]) -> tuple[list[float], float]:
        """Return means since the last read, and seconds per step. sums: ours, on the host.

        The means are of loss, aux_loss, l0, the gradient's norm and a batch's squared error: those
        of the last read where no step was taken since, NaN where there is none.
        """
        if sums[5] > 0:
            self._means = [figure / sums[5] for figure in sums[:5]]
            self.sums.zero_()
        if self._n_timed:
            self._seconds = (time.monotonic() - self._since) / self._n_timed
            self._n_timed = 0
        self.restart_clock()
        return self._means, self._seconds

    def restart_clock(self) -> None:
        """Leave out of the next seconds per step what was done up to now."""
        self._since, self._n_timed = time.monotonic(), 0


@dataclass(frozen=True)
class Look:
    """A trainer's figures on the host. sums: of the meter. longest: tokens that a latent waits."""

    sums: list[float]
    first_bad_step: int
    longest: int
    n_longest: int
    n_dead: int
    diagnostics: dict[str, float]


def look(trainer: Trainer, meter: LossMeter) -> Look:
    """Wait for the device, and copy all that a log says in one piece."""
    since, kernels = trainer.tokens_since_fired, trainer.kernels.diagnostics()
    ranks = trainer.workers.latents
    longest = ranks.largest(since.max())
    latents = ranks.sum(torch.stack([(since == longest).sum(), trainer.is_dead().sum()]))
    counts = (meter.first_bad_step, longest, *latents.unbind())
    more = [torch.as_tensor(figure, device=since.device) for figure in kernels.values()]
    figures = torch.stack([figure.double() for figure in (*counts, *more)])
    on_host = torch.cat([meter.sums, figures]).tolist()
    sums, rest = on_host[: len(meter.sums)], on_host[len(meter.sums) :]
    first_bad_step, wait, n_longest, n_dead = map(int, rest[: len(counts)])
    found = dict(zip(kernels, rest[len(counts) :], strict=True))
    return Look(sums, first_bad_step, wait, n_longest, n_dead, found)


def describe_step(
    trainer: Trainer, meter: LossMeter, seen: Look, variance: float
) -> dict[str, Any]:
    """Return the metrics since the last log, under the names that DESIGN fixes.

    seen: by `look`. variance: of the training rows, standardised and summed over d_model, for
    train/fvu.
    """
    (loss, aux_loss, l0, norm, squared_error), seconds = meter.read(seen.sums)
    recipe = trainer.recipe
    return {
        "step": trainer.step,
        "tokens": trainer.step * recipe.batch_size,
        "train/loss": loss,
        "train/aux_loss": aux_loss,
        "train/total_loss": loss + recipe.aux_coefficient * aux_loss,
        "train/fvu": squared_error / recipe.batch_size / max(variance, 1e-12),
        "train/l0": l0,
        "train/grad_norm": norm,
        "debug/dead_latents_ratio": seen.n_dead / recipe.n_latents,
        "debug/max_dead_latent": seen.longest // recipe.batch_size,
        "debug/max_dead_latent_count": seen.n_longest,
        "learning_rate": recipe.learning_rate_at(trainer.step - 1, trainer.n_steps),
        "tokens_per_s": recipe.batch_size / seconds,
        **seen.diagnostics,
    }
