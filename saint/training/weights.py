"""The autoencoder that a run starts from, and the ones that it leaves."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sae import (
    SAEConfig,
    TopKSparseAutoencoder,
    load_sae,
    normalise,
    normalise_decoder,
    save_sae,
)
from saint.stage.errors import UserError
from saint.stage.manifests import manifest_path, read_manifest, verify_file
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows
from saint.training.metrics import calibrate, maxima_over_rows
from saint.training.objectives import OBJECTIVES
from saint.training.recipe import Recipe
from saint.training.run_files import RunFiles
from saint.training.shard_files import write_whole
from saint.training.together import Together
from saint.training.trainer import Trainer

_SAMPLE_ROWS = 1 << 16  # of shuffled training rows, for what is not known of all
_INHERITED_FACTS = (
    "layer",
    "hook_point",
    "prepend_bos",
    "max_token_length",
    "held_out_fraction",
    "held_out_seed",
    "model_fingerprint",
    "dataset_fingerprint",
)


def first_sae(
    recipe: Recipe, rows: BatchedRows, b_pre_path: Path, load_path: Path | None, workers: Workers
) -> TopKSparseAutoencoder:
    """Return random directions and the mean, or another SAE's weights, for these rows.

    Of ranks that share the latents each gets its part of the same SAE. b_pre_path, load_path: the
    flags --b_pre_path and --model_load_path. Raises UserError.
    """
    config, ranks = make_config(recipe, rows), workers.latents
    part = (ranks.rank, ranks.size)
    here = replace(config, n_latents=recipe.n_latents // ranks.size)
    sae = TopKSparseAutoencoder(here, device=workers.device)
    mean = read_mean(b_pre_path, config.d_model)
    if recipe.normalisation != "per_token_standardise":  # the file's is of standardised tokens
        mean = sample_moments(rows, config)[0].float()
    sae.initialise(mean, seed=recipe.seed, part=part)
    if load_path:
        _copy_weights(sae, load_path, part)
    return sae


def _sample(rows: BatchedRows) -> Tensor:
    return rows.read("train", 0, min(_SAMPLE_ROWS, rows.n_rows("train"))).float()


def make_config(recipe: Recipe, rows: BatchedRows) -> SAEConfig:
    """Return what the SAE's file will say; norm_factor by a sample of the training rows."""
    return SAEConfig(
        d_model=rows.facts["d_model"],
        n_latents=recipe.n_latents,
        k=recipe.k,
        activation=OBJECTIVES[recipe.objective].activation,
        normalisation=recipe.normalisation,
        norm_factor=norm_factor(rows) if recipe.normalisation == "scalar" else 1.0,
        **{name: rows.facts[name] for name in _INHERITED_FACTS},
    )


def total_variance(recipe: Recipe, rows: BatchedRows) -> float:
    """Return the training rows' variance in the SAE's input space, summed over d_model."""
    if recipe.normalisation == "per_token_standardise":
        return rows.facts["variance"]
    return sample_moments(rows, make_config(recipe, rows))[1]


def norm_factor(rows: BatchedRows) -> float:
    """Return what gives the training rows a mean norm of √d_model, by a sample of them."""
    return rows.facts["d_model"] ** 0.5 / float(_sample(rows).norm(dim=1).mean())


def sample_moments(rows: BatchedRows, config: SAEConfig) -> tuple[Tensor, float]:
    """Return mean (d_model,) and total variance of a sample of training rows, normalised."""
    variance, mean = torch.var_mean(normalise(_sample(rows), config)[0].double(), dim=0)
    return mean, float(variance.sum())


def read_mean(path: Path, d_model: int) -> Tensor:
    """Read b_pre's first value. Raises UserError when it is no (d_model,) tensor."""
    if not path.exists():
        raise UserError(f"--b_pre_path {path} does not exist: sae_preprocessing.py writes it")
    try:
        mean = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise UserError(f"--b_pre_path {path} is not a tensor that torch can read") from None
    if not isinstance(mean, Tensor) or tuple(mean.shape) != (d_model,):
        shape = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
        raise UserError(f"--b_pre_path {path} has shape {shape}, the activations need ({d_model},)")
    return mean.float()


def refuse_another_mean(path: Path, rows: BatchedRows) -> None:
    """Raise UserError where the mean is of other rows (another layer's, say), or damaged."""
    if not manifest_path(path, rows.manifest.stage, single_file=True).exists():
        return  # not preprocessing's: anyone's tensor will do
    manifest = read_manifest(path, rows.manifest.stage)
    made_from = manifest.sources
    if made_from != rows.manifest.sources:
        theirs, ours = (s["layer_dir"] for s in (made_from, rows.manifest.sources))
        other = "another store" if theirs == ours else f"{theirs}, the rows are of {ours}"
        raise UserError(f"--b_pre_path {path} is the mean of {other}")
    if path.name in manifest.files:  # not where it was renamed
        verify_file(path, manifest.files[path.name])


@torch.no_grad()
def _copy_weights(sae: TopKSparseAutoencoder, path: Path, part: tuple[int, int]) -> None:
    """Start from another SAE's weights, its decoder directions normalised."""
    other = load_sae(path, device="cpu", k=sae.config.k, part=part)
    for name in ("d_model", "n_latents", "normalisation"):
        mine, theirs = getattr(sae.config, name), getattr(other.config, name)
        if mine != theirs:
            if name == "n_latents":
                mine, theirs = mine * part[1], theirs * part[1]
            raise UserError(f"--model_load_path {path} has {name} {theirs}, this run has {mine}")
    state = other.state_dict()
    if sae.threshold is None:
        state.pop("threshold", None)
    else:  # another rule's SAE has none: they begin with the first batch
        state.setdefault("threshold", sae.threshold)
    sae.load_state_dict(state)
    normalise_decoder(sae)


@torch.no_grad()
def make_basis(recipe: Recipe, rows: BatchedRows, workers: Workers) -> Tensor | None:
    """Return the eigenvectors (d_model, d_model) of the training rows' covariance, or None.

    Of the first 65,536 normalised rows, which are a sample. Rank 0's, on every rank.
    """
    if recipe.basis == "none":
        return None
    d_model = rows.facts["d_model"]
    basis = torch.zeros(d_model, d_model, device=workers.device)
    if workers.is_main:
        x = normalise(_sample(rows), make_config(recipe, rows))[0]
        x -= x.mean(dim=0)
        basis.copy_(torch.linalg.eigh((x.T @ x).double()).eigenvectors)
    if workers.world_size > 1:
        dist.broadcast(basis, src=0)
    return basis


def leave_saes(
    trainers: Sequence[Trainer], rows: BatchedRows, files: Sequence[RunFiles], together: Together
) -> None:
    """Write each SAE with its latents' largest activations; the best one with its own.

    Most often the best is the last; else its weights take the trainer's place, for one more
    pass over the rows.
    """
    _set_maxima(trainers, rows, together)
    for trainer, its in zip(trainers, files, strict=True):
        save_whole(its.model, trainer, trainer.plain_sae())
    others = []
    for trainer, its in zip(trainers, files, strict=True):
        best = _load_best(trainer, its)
        is_last = best is None or _equal(trainer.plain_sae(), best)
        if not all(trainer.workers.gather(is_last)):
            trainer.take_weights(best)
            calibrate(trainer, rows)
            others.append(trainer)
    _set_maxima(others, rows, together)
    for trainer, its in zip(trainers, files, strict=True):
        if its.keep_last_n and its.best.exists():
            save_whole(its.best, trainer, trainer.plain_sae())


def save_best(path: Path, trainer: Trainer) -> None:
    """Write the best SAE where no file has it yet, as `save_whole` does."""
    if trainer.best is not None:
        save_whole(path, trainer, trainer.plain_sae(trainer.best))
        trainer.best = None


def save_whole(path: Path, trainer: Trainer, sae: TopKSparseAutoencoder) -> None:
    """Write a plain SAE of the trainer; every rank calls it, or all with rank 0's tokens."""
    workers = trainer.workers
    if workers.data.rank == 0 and workers.latents.size == 1:
        save_sae(path, sae)
    elif workers.data.rank == 0:
        write_whole(path, sae, workers.latents)


def _load_best(trainer: Trainer, files: RunFiles) -> TopKSparseAutoencoder | None:
    """Return the best SAE, or this rank's part of it, where this rank has the first tokens."""
    workers, ranks = trainer.workers, trainer.workers.latents
    if workers.data.rank == 0 and files.keep_last_n and files.best.exists():
        return load_sae(files.best, device=workers.device, part=(ranks.rank, ranks.size))
    return None


def _equal(one: TopKSparseAutoencoder, other: TopKSparseAutoencoder) -> bool:
    names = [name for name, _ in one.named_parameters()]
    return all(torch.equal(one.get_parameter(n), other.get_parameter(n)) for n in names)


def _set_maxima(trainers: Sequence[Trainer], rows: BatchedRows, together: Together) -> None:
    """Measure the steering units."""
    maxima = maxima_over_rows(trainers, rows, together)
    for trainer, maximum in zip(trainers, maxima, strict=True):
        trainer.sae.max_activations = maximum
