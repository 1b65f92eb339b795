"""The training step and its state: weights, moments, dead latents, ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import TopKSparseAutoencoder, normalise_decoder
from saint.stage.errors import UserError, log
from saint.stage.workers import Workers
from saint.training.losses import AuxK, Losses
from saint.training.moments import Moments
from saint.training.objectives import Choice, objective_of
from saint.training.recipe import Recipe
from saint.training.shard_files import read_part
from saint.training.steps import make_step

_FOLLOWS = 0.05  # share of a batch's threshold in the running one
# Steps between lists of the dead latents, for which the host must wait for the device: at most so
# many, and at most that share of the steps after which a latent is dead.
_MOST_BETWEEN, _SHARE_BETWEEN = 16, 16


class Trainer:
    """The state of a run: weights, Adam's moments, step, and tokens since each latent fired.

    Of ranks that share the latents each has an equal part of all that: `sae` is an SAE of the
    rank's own ones, numbered from 0, while `recipe.n_latents` counts all. dead: this rank's that
    AuxK trains, int64, which had not fired for dead_tokens when this was last looked at, some
    steps ago; n_dead: how many on all ranks that share the latents. basis: (d_model, d_model)
    orthogonal; `sae` then takes rows times it, see `plain_sae`.
    """

    def __init__(
        self,
        sae: TopKSparseAutoencoder,
        recipe: Recipe,
        n_steps: int,
        workers: Workers,
        kernels: str,
        basis: Tensor | None = None,
    ):
        self.sae, self.recipe, self.n_steps, self.workers = sae, recipe, n_steps, workers
        self.objective = objective_of(recipe)
        self.basis = basis
        if basis is not None:
            turn(sae, basis)
        self.moments = Moments(
            sae,
            recipe.moments,
            beta2=recipe.beta2,
            lazy=recipe.lazy,
            threshold_rate=recipe.threshold_rate,
        )
        dead_after = recipe.dead_tokens // recipe.batch_size
        self._steps_between = max(1, min(_MOST_BETWEEN, dead_after // _SHARE_BETWEEN))
        self._asked_kernels = kernels
        self.kernels = make_step(kernels, sae, self.moments, workers)
        self.tokens_since_fired = torch.zeros(
            sae.config.n_latents, dtype=torch.int64, device=workers.device
        )
        self.dead, self.n_dead = torch.empty(0, dtype=torch.int64, device=workers.device), 0
        self.threshold = torch.zeros((), device=workers.device)
        self.step = 0
        self.skipped_steps: set[int] = set()
        self.best_val_loss = math.inf
        self.best: TopKSparseAutoencoder | None = None  # where no file has it yet
        # Sums of five figures and the steps since the last line of the log, see `LossMeter`.
        self.since_logged = torch.zeros(6, dtype=torch.float64, device=workers.device)

    def is_dead(self) -> Tensor:
        """Return which of this rank's latents have not fired for dead_tokens, bool."""
        return self.tokens_since_fired >= self.recipe.dead_tokens

    def _list_dead(self, mask: Tensor) -> None:
        """Let AuxK train the latents of a mask; waits for the device."""
        self.dead = torch.nonzero(mask).squeeze(1)
        count = torch.full((), len(self.dead), device=self.workers.device)
        self.n_dead = int(self.workers.latents.sum(count))

    def prepare(self, rows: Tensor) -> Tensor:
        """Return raw rows (n, d_model) as `sae` takes them: normalised, in the basis."""
        x = self.sae.normalise(rows.to(self.workers.device))[0]
        return x if self.basis is None else x @ self.basis

    def plain_sae(self, of: TopKSparseAutoencoder | None = None) -> TopKSparseAutoencoder:
        """Return `sae`, or where there is a basis a copy in the activations' own coordinates.

        of: another one like it, such as `best`, of which a copy is made.
        """
        if self.basis is None and of is None:
            return self.sae
        whole = of or self.sae
        plain = TopKSparseAutoencoder(whole.config, device=self.workers.device)
        plain.load_state_dict(whole.state_dict())
        plain.max_activations = whole.max_activations
        if self.basis is not None:
            turn(plain, self.basis.T)
        return plain.requires_grad_(False)

    @torch.no_grad()
    def keep_as_best(self) -> None:
        """Copy `sae` to the host, where it waits to be written with the next checkpoint."""
        if self.best is None:
            self.best = TopKSparseAutoencoder(self.sae.config)
            for kept in self.best.parameters() if self.workers.device.type == "cuda" else ():
                kept.data = kept.data.pin_memory()  # else each copy waits for the device
        self.best.config = self.sae.config
        for kept, parameter in zip(self.best.parameters(), self.sae.parameters(), strict=True):
            kept.copy_(parameter, non_blocking=True)

    def train_step(self, rows: Tensor, micro_batch_size: int) -> tuple[Losses, Tensor]:
        """Take one optimiser step on this rank's share of the batch: raw rows (n, d_model).

        Returns the losses over all ranks, and the norm of the gradient before it is clipped.
        """
        return self.step_on([self.prepare(micro) for micro in rows.split(micro_batch_size)])

    def step_on(self, micros: Sequence[Tensor]) -> tuple[Losses, Tensor]:
        """As `train_step`, of micro-batches that are prepared."""
        if self.step % self._steps_between == 0:
            self._list_dead(self.is_dead())
        k = self.recipe.k_at(self.step)
        n_rows = sum(map(len, micros))
        prefixes = self.objective.prefixes(self.recipe.n_latents)
        parts: list[tuple[float, Losses]] = []
        first = self.workers.data.rank * n_rows
        choice = self._choose(micros, k)
        chosen = choice.active if choice is not None else [k] * len(micros)
        how = (prefixes, choice.jump if choice is not None else None)
        for x, active in zip(micros, chosen, strict=True):
            aux = self._aux(first)
            first += len(x)
            share = len(x) / n_rows
            weight = share / self.workers.data.size
            parts.append((share, self.kernels.accumulate(x, active, aux, weight, *how)))
        losses = self._over_ranks(combine(parts))
        learning_rate = self.recipe.learning_rate_at(self.step, self.n_steps)
        norm = self.kernels.apply(learning_rate, self.recipe.grad_clip)
        self.tokens_since_fired += self.recipe.batch_size
        self.tokens_since_fired.masked_fill_(losses.fired, 0)
        self.step += 1
        return losses, norm

    @torch.no_grad()
    def _choose(self, micros: Sequence[Tensor], k: int) -> Choice | None:
        """Return what the objective does, and let the threshold follow the batches'."""
        inputs = [x - self.sae.b_pre for x in micros]
        choice = self.objective.choose(self.kernels, inputs, k, self.workers)
        if choice is not None and choice.least is not None:
            followed = torch.lerp(self.threshold, choice.least, _FOLLOWS)
            self.threshold = torch.where(self.threshold > 0, followed, choice.least)
        return choice

    def settle_threshold(self) -> None:
        """Let a batchtopk SAE encode with the running threshold."""
        if self.objective.activation == "batchtopk":
            self.sae.config = replace(self.sae.config, threshold=float(self.threshold))

    @torch.no_grad()
    def levels(self) -> Tensor | None:
        """Return what latents must exceed to be active, (n_latents,); topk has no such thing."""
        if self.sae.threshold is not None:
            return self.sae.threshold.detach()
        if self.objective.activation == "batchtopk":
            return self.threshold.expand(self.sae.config.n_latents)
        return None

    @torch.no_grad()
    def raise_levels(self, factor: Tensor) -> None:
        """Multiply them all by a factor ()."""
        self.threshold = self.threshold * factor
        if self.sae.threshold is not None:
            self.sae.threshold.mul_(factor)
        self.settle_threshold()

    def _aux(self, first: int) -> AuxK | None:
        """Return AuxK for tokens from number `first` of the batch on; other ones at each step."""
        if not self.n_dead or not self.recipe.aux_coefficient:
            return None
        n_latents = self.recipe.n_latents
        return AuxK(
            self.dead,
            min(self.recipe.k_aux, self.n_dead),
            self.recipe.aux_coefficient,
            every=aux_every(self.n_dead, n_latents, self.recipe.batch_size),
            first=first + self.step,
        )

    def _over_ranks(self, losses: Losses) -> Losses:
        """Average losses over the ranks' tokens; a latent fired if it did on any."""
        data = self.workers.data
        if data.size == 1:
            return losses
        scalars = torch.stack(
            [losses.loss, losses.aux_loss, losses.squared_error, losses.l0.to(losses.loss.dtype)]
        )
        fired = data.largest(losses.fired.to(torch.int32))
        loss, aux_loss, squared_error, l0 = data.sum(scalars).unbind()
        n = data.size
        return Losses(loss / n, aux_loss / n, squared_error, fired > 0, l0 / n)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        more = {} if self.basis is None else {"basis": self.basis}
        if self.objective.activation == "batchtopk":
            more["threshold"] = self.threshold
        return more | {
            "sae": self.sae.state_dict(),
            "moments": self.moments.state_dict(),
            "kernels": self.kernels.name,
            "tokens_since_fired": self.tokens_since_fired,
            "dead": torch.zeros_like(self.is_dead()).index_fill_(0, self.dead, True),
            "step": self.step,
            "skipped_steps": sorted(self.skipped_steps),
            "best_val_loss": self.best_val_loss,
            "since_logged": self.since_logged,
        }

    def take_weights(self, sae: TopKSparseAutoencoder | None) -> None:
        """Go on with the first ranks' other plain SAE everywhere; the optimiser's state stays.

        The first ones are those of rank 0's tokens, with a part of the latents each.
        """
        if sae is not None:
            self.sae.load_state_dict(sae.state_dict())
            if self.basis is not None:
                turn(self.sae, self.basis)
        for parameter in self.sae.parameters():
            self.workers.data.broadcast(parameter.detach())
        # The old one may keep the old weights, rounded.
        self.kernels = make_step(self.kernels.name, self.sae, self.moments, self.workers)

    def _go_on_with(self, kernels: str) -> None:
        """Take up the kernels that a run began with, unless others are asked for."""
        mine = self.kernels.name
        if kernels == mine:
            return
        if self._asked_kernels != "auto":
            log.info("kernels: %s, as asked; the run began with %s", mine, kernels)
            return
        try:
            self.kernels = make_step(kernels, self.sae, self.moments, self.workers)
        except UserError as error:
            log.warning("warning: the run began with kernels %s: %s: now %s", kernels, error, mine)

    def read(self, paths: Sequence[Path]) -> Any:
        """Return what `restore` takes of a checkpoint's files, see `shard_files.read_part`.

        Raises UserError when one is damaged or of another run.
        """
        state, mine = read_part(paths, self.workers.latents), self.state()
        if isinstance(state, dict):
            _complete(state, mine)
        if not _is_alike(mine, state) or not 0 <= state["step"] <= self.n_steps:
            raise UserError(f"{paths[0]} is no checkpoint of this run")
        return state

    def restore(self, state: Any) -> None:
        """Continue from what `read` returned."""
        device = self.workers.device
        self._go_on_with(state["kernels"])
        self.sae.load_state_dict(state["sae"])
        self.moments.load_state_dict(state["moments"])
        if self.basis is not None:
            self.basis = state["basis"].to(device)  # not in place: several trainers may share one
        self.threshold = state.get("threshold", self.threshold).to(device)
        self.settle_threshold()
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self._list_dead(state["dead"].to(self.workers.device))
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]
        self.skipped_steps |= set(state["skipped_steps"])
        self.since_logged.copy_(state["since_logged"])


def prepare_each(trainers: Sequence[Trainer], rows: Tensor) -> list[Tensor]:
    """Return raw rows (n, d_model) as each trainer takes them, made once where that is alike."""
    made: dict[tuple[str, float, int], Tensor] = {}
    found = []
    for trainer in trainers:
        config = trainer.sae.config
        key = (config.normalisation, config.norm_factor, id(trainer.basis))
        if key not in made:
            made[key] = trainer.prepare(rows)
        found.append(made[key])
    return found


def share_bases(trainers: Sequence[Trainer]) -> None:
    """Let trainers whose bases are equal have one and the same, for `prepare_each`."""
    for i, trainer in enumerate(trainers):
        for other in trainers[:i]:
            if trainer.basis is not None and other.basis is not None:
                if torch.equal(trainer.basis, other.basis):
                    trainer.basis = other.basis


def _complete(state: dict[str, Any], mine: Mapping[str, Any]) -> None:
    """Give a checkpoint of before what it had no word for."""
    state.setdefault("since_logged", torch.zeros_like(mine["since_logged"]))
    state.setdefault("dead", torch.zeros_like(mine["dead"]))
    state.setdefault("kernels", mine["kernels"])


def _is_alike(mine: Any, theirs: Any) -> bool:
    """Whether two checkpoints' parts have the same structure, types, shapes and dtypes."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine.shape == theirs.shape and mine.dtype == theirs.dtype
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(_is_alike(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return all(type(value) is int for value in theirs)
    return type(mine) is type(theirs)


@torch.no_grad()
def turn(sae: TopKSparseAutoencoder, basis: Tensor) -> None:
    """Make an SAE take x · basis instead of x, and give the same but for that; unit norms stay."""
    for weight in (sae.W_enc, sae.W_dec):
        weight.copy_(weight @ basis)
    sae.b_pre.copy_(sae.b_pre @ basis)
    normalise_decoder(sae)


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
