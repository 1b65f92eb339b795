"""The contenders of `sae_quality.py`: SAINT's trainer, and each peer's own package.

A peer keeps its losses, its AuxK and its first weights (but for the norm of SAELens's decoder, with
which it is better), and runs in its own trainer where that takes a stream of rows. What it is given
is the same for all: standardised rows, steps, batch, size, after how many tokens a latent counts as
dead, and the setting that is tried. Peers' packages are in an environment of their own, so nothing
of them is imported before it is needed.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sae import SAEConfig, TopKSparseAutoencoder, standardise
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows
from saint.training.objectives import OBJECTIVES
from saint.training.recipe import add_recipe_flags, resolve_recipe
from saint.training.trainer import Trainer
from saint.training.weights import make_basis

_PEERS_WARMUP = 0.05  # share of steps
_AUX_COEFFICIENT = 1 / 32  # where a package's default is to have no AuxK


@dataclass(frozen=True)
class Setting:
    """What is searched: the peak rate, the share of steps over which it falls to 0, Adam's β₂."""

    learning_rate: float
    decay_fraction: float
    beta2: float

    def __str__(self) -> str:
        """Name a file by it."""
        return f"lr{self.learning_rate:g}_decay{self.decay_fraction:g}_beta{self.beta2:g}"


@dataclass(frozen=True)
class Task:
    """What every contender gets. mean: (d_model,) of the standardised rows."""

    rows: BatchedRows
    mean: Tensor
    n_latents: int
    k: int
    batch_size: int
    n_steps: int
    dead_tokens: int
    device: torch.device

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return len(self.mean)

    def raw_batches(self) -> Iterator[Tensor]:
        """Yield the training stream as it was captured, (batch_size, d_model) each."""
        yield from self.rows.batches(
            "train", batch_size=self.batch_size, first_batch=0, n_batches=self.n_steps
        )

    def batches(self) -> Iterator[Tensor]:
        """Yield the training stream standardised."""
        for raw in self.raw_batches():
            yield standardise(raw.to(self.device))[0]


@dataclass(frozen=True)
class Dictionary:
    """A trained contender in one form: x̂ = f(x · w_encᵀ + b_enc) · w_dec + b_dec.

    w_enc, w_dec: (n_latents, d_model), rows of w_dec of unit norm. b_enc, levels: (n_latents,).
    b_dec: (d_model,). f keeps a token's k largest (levels None), or what exceeds `levels` times a
    factor that is calibrated afterwards, the same way for all; then ReLU.
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    levels: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(
        cls, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, bias: Tensor, levels: Tensor | None
    ) -> Dictionary:
        """Take an encoder that reads x − bias, with decoder rows of any norm."""
        w_enc, b_enc, w_dec, bias = (t.detach().float() for t in (w_enc, b_enc, w_dec, bias))
        norm = w_dec.norm(dim=1).clamp_min(1e-12)
        w_enc = w_enc * norm[:, None]
        if levels is not None:
            levels = (levels.detach() * norm).clamp_min(1e-6)
        return cls(w_enc, b_enc * norm - w_enc @ bias, w_dec / norm[:, None], bias, levels)


Train = Callable[[Task, Setting | None, int], Dictionary]


def saint(task: Task, setting: Setting | None, seed: int, *more: str) -> Dictionary:
    """SAINT's trainer: `sae_training.py`'s defaults, but for the size, what is searched and `more`.

    Raises UserError where the trainer refuses a flag.
    """
    flags = ["--n_latents", task.n_latents, "--k", task.k, "--num_epochs", 1, "--seed", seed]
    flags += ["--batch_size", task.batch_size, "--dead_tokens", task.dead_tokens, *more]
    if setting is not None:
        flags += ["--learning_rate", setting.learning_rate]
        flags += ["--decay_fraction", setting.decay_fraction, "--beta2", setting.beta2]
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    args = parser.parse_args([str(flag) for flag in flags])
    workers = Workers(0, 1, task.device)
    recipe = resolve_recipe(args, task.rows, workers)
    activation = OBJECTIVES[recipe.objective].activation
    config = SAEConfig(task.d_model, task.n_latents, task.k, activation=activation)
    sae = TopKSparseAutoencoder(config, device=task.device)
    sae.initialise(task.mean, seed=seed)
    basis = make_basis(recipe, task.rows, workers)
    trainer = Trainer(sae, recipe, task.n_steps, workers, "auto", basis)
    for raw in task.raw_batches():
        trainer.train_step(raw, len(raw))
    trained = trainer.plain_sae()
    levels = None if activation == "topk" else torch.ones_like(trained.b_enc)
    if trained.threshold is not None:
        levels = trained.threshold
    return Dictionary.of(trained.W_enc, trained.b_enc, trained.W_dec, trained.b_pre, levels)


def _sae_lens(module: str, name: str, **options: Any) -> Train:
    """Return how to train one of `sae-lens`'s SAEs in its own `SAETrainer`."""

    def train(task: Task, setting: Setting | None, seed: int) -> Dictionary:
        assert setting is not None
        made = import_module(f"sae_lens.saes.{module}")
        trainer = import_module("sae_lens.training.sae_trainer").SAETrainer
        trainer_config = import_module("sae_lens.config").SAETrainerConfig
        given = {key: of(task) if callable(of) else of for key, of in options.items()}
        torch.manual_seed(seed)
        size = {"d_in": task.d_model, "d_sae": task.n_latents, "device": str(task.device)}
        size["decoder_init_norm"] = 1.0  # the package's 0.1 gave BatchTopK 0.185 instead of 0.161
        sae = getattr(made, name)(getattr(made, f"{name}Config")(**size, **given))
        sae.b_dec.data.copy_(task.mean)
        config = trainer_config(
            total_training_samples=task.n_steps * task.batch_size,
            train_batch_size_samples=task.batch_size,
            device=str(task.device),
            lr=setting.learning_rate,
            lr_end=setting.learning_rate,  # of the constant part, from which it falls to 0
            lr_warm_up_steps=round(_PEERS_WARMUP * task.n_steps),
            lr_decay_steps=round(setting.decay_fraction * task.n_steps),
            adam_beta2=setting.beta2,
            dead_feature_window=task.dead_tokens // task.batch_size,
        )
        trainer(cfg=config, sae=sae, data_provider=task.batches()).fit()
        levels = getattr(sae, "threshold", None)
        if "BatchTopK" in name:
            levels = torch.ones_like(sae.b_enc)
        return Dictionary.of(sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec, levels)

    return train


def _widths(task: Task) -> list[int]:
    return [task.n_latents // part for part in (16, 8, 4, 2, 1)]


def _rate_at(step: int, task: Task, setting: Setting) -> float:
    warmup = max(1, round(_PEERS_WARMUP * task.n_steps))
    left = (task.n_steps - step) / max(1, round(setting.decay_fraction * task.n_steps))
    return setting.learning_rate * min(1.0, (step + 1) / warmup, left)


def sparsify(task: Task, setting: Setting | None, seed: int) -> Dictionary:
    """`eai-sparsify`: its sparse coder and its step, with AuxK; of its optimisers Adam."""
    assert setting is not None
    package = import_module("sparsify")
    torch.manual_seed(seed)
    config = package.SparseCoderConfig(num_latents=task.n_latents, k=task.k)
    sae = package.SparseCoder(task.d_model, config, device=task.device)
    sae.b_dec.data.copy_(task.mean)
    optimizer = torch.optim.Adam(sae.parameters(), betas=(0.9, setting.beta2))
    silent = torch.zeros(task.n_latents, device=task.device)
    for step, x in enumerate(task.batches()):
        optimizer.param_groups[0]["lr"] = _rate_at(step, task, setting)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=silent > task.dead_tokens)
        (out.fvu + _AUX_COEFFICIENT * out.auxk_loss).backward()
        silent += len(x)
        silent[out.latent_indices.unique()] = 0
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    sae.set_decoder_norm_to_unit_norm()
    return Dictionary.of(sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, None)


def _dictionary_learning(module: str, name: str) -> Train:
    """Return how to train with one of `dictionary-learning`'s trainers."""

    def train(task: Task, setting: Setting | None, seed: int) -> Dictionary:
        assert setting is not None
        # Its buffer, which nothing here uses, imports a package that pins another torch.
        absent = types.ModuleType("nnsight")
        absent.LanguageModel = None  # type: ignore[attr-defined]
        sys.modules.setdefault("nnsight", absent)
        made = import_module(f"dictionary_learning.trainers.{module}")
        trainer = getattr(made, name)(
            steps=task.n_steps,
            activation_dim=task.d_model,
            dict_size=task.n_latents,
            k=task.k,
            layer=0,
            lm_name="",
            lr=setting.learning_rate,
            warmup_steps=round(_PEERS_WARMUP * task.n_steps),
            decay_start=round((1 - setting.decay_fraction) * task.n_steps),
            threshold_start_step=task.n_steps,  # ours is calibrated afterwards
            seed=seed,
            device=str(task.device),
        )
        trainer.dead_feature_threshold = task.dead_tokens
        trainer.optimizer.param_groups[0]["betas"] = (0.9, setting.beta2)
        for step, x in enumerate(task.batches()):
            trainer.update(step, x)
        ae = trainer.ae
        levels = torch.ones_like(ae.encoder.bias) if "Batch" in name else None
        return Dictionary.of(
            ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec, levels
        )

    return train


PEERS: dict[str, Train] = {
    "sae_lens_topk": _sae_lens("topk_sae", "TopKTrainingSAE", k=lambda task: task.k),
    "sae_lens_batchtopk": _sae_lens("batchtopk_sae", "BatchTopKTrainingSAE", k=lambda task: task.k),
    "sae_lens_matryoshka": _sae_lens(
        "matryoshka_batchtopk_sae",
        "MatryoshkaBatchTopKTrainingSAE",
        k=lambda task: task.k,
        matryoshka_widths=_widths,
    ),
    "sae_lens_jumprelu": _sae_lens(
        "jumprelu_sae",
        "JumpReLUTrainingSAE",
        jumprelu_sparsity_loss_mode="quadratic",  # the package's way to a wanted L0
        target_l0=lambda task: task.k,
        l0_warm_up_steps=lambda task: task.n_steps // 5,
    ),
    "sparsify": sparsify,
    "dictionary_learning_batchtopk": _dictionary_learning("batch_top_k", "BatchTopKTrainer"),
    "dictionary_learning_topk": _dictionary_learning("top_k", "TopKTrainer"),
}
