"""What a rank of the tests does: twenty steps on its share of the same batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from sae import TopKSparseAutoencoder, standardise
from saint.stage.workers import Axis, Workers, make_mesh
from saint.training.objectives import OBJECTIVES
from saint.training.recipe import Recipe
from saint.training.trainer import Trainer
from tests.support.training_checks import make_sae

N_STEPS, BATCH = 20, 64
RECIPE = Recipe(
    n_latents=64, k=5, num_epochs=1, batch_size=BATCH, learning_rate=1e-3, warmup_fraction=0.1,
    decay_fraction=0.5, lr_floor=0.0, k_start=8, k_anneal_steps=4, grad_clip=0.5, k_aux=1,
    aux_coefficient=1 / 32, dead_tokens=128, seed=0, objective="topk", lazy=False, basis="none",
    beta2=0.999,
)  # fmt: skip


def walk(kernels: str, workers: Workers, **changes) -> dict:
    """Take 20 steps on this rank's share; return losses, the first step's gradient, and weights.

    changes: to the recipe.
    """
    recipe = replace(RECIPE, **changes)
    sae = make_sae(activation=OBJECTIVES[recipe.objective].activation)
    with torch.no_grad():
        sae.b_enc[::3] -= 1.2  # some latents are dead soon, which AuxK chooses among
    sae = own_part(sae, workers.latents)
    trainer = Trainer(sae, recipe, N_STEPS, workers, kernels)
    generator = torch.Generator().manual_seed(9)
    losses, l0s, first, n_dead = [], [], {}, 0
    for step in range(N_STEPS):
        batch = standardise(torch.randn(BATCH, 24, generator=generator))[0]
        n_dead = max(n_dead, trainer.n_dead)
        share = batch.chunk(workers.data.size)[workers.data.rank]
        found = trainer.train_step(share, 11)[0]
        losses.append(float(found.loss))
        l0s.append(float(found.l0))
        if step == 0:
            first = {name: moment.clone() for name, moment in trainer.moments.first.items()}
    weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
    weights["running_threshold"] = trainer.threshold
    return {"losses": losses, "l0": l0s, "first": first, "weights": weights, "n_dead": n_dead}


def own_part(sae: TopKSparseAutoencoder, ranks: Axis) -> TopKSparseAutoencoder:
    """Return an SAE of a rank's share of the latents."""
    n = sae.config.n_latents // ranks.size
    part = TopKSparseAutoencoder(replace(sae.config, n_latents=n))
    rows = slice(ranks.rank * n, (ranks.rank + 1) * n)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            whole = getattr(sae, name)
            parameter.copy_(whole if name == "b_pre" else whole[rows])
    return part


def rank_main(
    rank: int, world_size: int, directory: Path, changes: list[dict], n_latent_ranks: int = 1
) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    mesh = make_mesh("cpu", world_size, n_latent_ranks) if n_latent_ranks > 1 else None
    workers = Workers(rank, world_size, torch.device("cpu"), mesh=mesh)
    results = [walk(**how, workers=workers) for how in changes]
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()
