"""The command line of `sae_training.py`, and the recipe that it and the data make."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from saint.stage.errors import UserError
from saint.stage.flags import add_device_flags, add_overwrite_flag, positive_int
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows
from saint.training.moments import KINDS
from saint.training.steps import KERNELS

LEARNING_RATE_CONSTANT = 0.064  # 1e-3 at 4,096 latents
_DEAD_TOKENS = 10_000_000


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Train a TopK sparse autoencoder on the shuffled activations.",
        epilog="Run it again to resume from the last checkpoint. Ctrl-C checkpoints and exits.",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--data_dir", type=Path, required=True, help="what preprocessing wrote")
    files.add_argument("--b_pre_path", type=Path, required=True, help="the mean from preprocessing")
    files.add_argument(
        "--model_save_path", type=Path, default=Path("trained_sae.pt"), help="[%(default)s]"
    )
    files.add_argument("--model_load_path", type=Path, help="start from these weights [random]")
    size = parser.add_argument_group("the autoencoder")
    size.add_argument("--n_latents", type=positive_int, default=65536, help="[%(default)s]")
    size.add_argument("--k", type=positive_int, default=64, help="active latents [%(default)s]")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--num_epochs", type=positive_int, default=10, help="[%(default)s]")
    recipe.add_argument(
        "--batch_size",
        type=positive_int,
        help="tokens a step, over all ranks [as preprocessing says]",
    )
    recipe.add_argument(
        "--micro_batch_size", type=positive_int, help="tokens at once, to save memory [batch_size]"
    )
    recipe.add_argument(
        "--learning_rate", type=float, help=f"peak [{LEARNING_RATE_CONSTANT} / √n_latents]"
    )
    recipe.add_argument(
        "--warmup_fraction", type=float, default=0.02, help="share of steps [%(default)s]"
    )
    recipe.add_argument(
        "--decay_fraction",
        type=float,
        default=0.5,
        help="share of steps, to lr_floor [%(default)s]",
    )
    recipe.add_argument(
        "--lr_floor", type=float, default=0.0, help="last rate as a share of the peak [%(default)s]"
    )
    recipe.add_argument(
        "--k_anneal_steps",
        type=int,
        default=0,
        help="steps over which k_start falls to k, linearly; 0 keeps k [%(default)s]",
    )
    recipe.add_argument(
        "--k_start", type=positive_int, help="active latents at first, when annealing [4 k]"
    )
    recipe.add_argument("--grad_clip", type=float, default=1.0, help="largest norm [%(default)s]")
    recipe.add_argument(
        "--k_aux", type=positive_int, help="dead latents that AuxK uses [largest 2^n ≤ d_model]"
    )
    recipe.add_argument("--aux_coefficient", type=float, default=1 / 32, help="[1/32]")
    recipe.add_argument(
        "--dead_tokens",
        type=positive_int,
        help="a latent is dead after so many tokens without firing [10M, at most one epoch]",
    )
    recipe.add_argument("--seed", type=int, default=0, help="of the first weights [%(default)s]")
    recipe.add_argument(
        "--moments",
        choices=KINDS,
        default="float32",
        help="how Adam's are kept; int8 takes 2 bytes per weight instead of 8 (not with --kernels "
        "triton) [%(default)s]",
    )
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--logs_per_epoch", type=positive_int, default=100, help="[%(default)s]")
    logs.add_argument(
        "--validations_per_epoch",
        type=positive_int,
        default=10,
        help="each on that share of the held-out rows, the end's on all [%(default)s]",
    )
    logs.add_argument(
        "--checkpoint_minutes", type=float, default=10.0, help="between checkpoints [%(default)s]"
    )
    logs.add_argument(
        "--keep_last_n",
        type=int,
        default=1,
        help="checkpoints kept; 0: none, nor the best SAE [%(default)s]",
    )
    logs.add_argument("--wandb_project", help="log to this W&B project too [off]")
    logs.add_argument("--wandb_offline", action="store_true", help="W&B without a network")
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=KERNELS,
        help="cpp: compiled for this CPU; triton: for a GPU (none has run it yet); sparse: torch's "
        "sparse products; dense: plain autograd; same results up to rounding. auto: cpp on a CPU "
        "(without a compiler sparse), dense on a GPU [%(default)s]",
    )
    add_device_flags(parser)
    add_overwrite_flag(parser)
    return parser


def resolve_recipe(args: argparse.Namespace, rows: BatchedRows, workers: Workers) -> Recipe:
    """Fill in the defaults that depend on the data; refuse what cannot work."""
    n_rows, d_model = rows.n_rows("train"), rows.facts["d_model"]
    batch_size = args.batch_size or rows.facts["batch_size"]
    problems = []
    if batch_size > n_rows:
        problems.append(f"--batch_size {batch_size} is larger than the {n_rows} training rows")
    if batch_size % workers.world_size:
        problems.append(
            f"--batch_size {batch_size} does not divide among {workers.world_size} ranks"
        )
    if args.k > args.n_latents:
        problems.append(f"--k {args.k} is larger than --n_latents {args.n_latents}")
    if not 0 <= args.lr_floor <= 1:
        problems.append(f"--lr_floor {args.lr_floor} is not a share between 0 and 1")
    for name in ("warmup_fraction", "decay_fraction"):
        if not 0 <= getattr(args, name) <= 1:
            problems.append(f"--{name} {getattr(args, name)} is not a share between 0 and 1")
    if args.grad_clip <= 0:
        problems.append(f"--grad_clip {args.grad_clip} must be positive")
    if args.k_anneal_steps < 0:
        problems.append(f"--k_anneal_steps {args.k_anneal_steps} is negative")
    k_start = min(args.n_latents, args.k_start or 4 * args.k) if args.k_anneal_steps else args.k
    if k_start < args.k:
        problems.append(f"--k_start {k_start} is smaller than --k {args.k}")
    if problems:
        raise UserError("; ".join(problems))
    return Recipe(
        n_latents=args.n_latents,
        k=args.k,
        num_epochs=args.num_epochs,
        batch_size=batch_size,
        learning_rate=args.learning_rate or LEARNING_RATE_CONSTANT / math.sqrt(args.n_latents),
        warmup_fraction=args.warmup_fraction,
        decay_fraction=args.decay_fraction,
        lr_floor=args.lr_floor,
        k_start=k_start,
        k_anneal_steps=args.k_anneal_steps,
        grad_clip=args.grad_clip,
        k_aux=args.k_aux or 1 << (d_model.bit_length() - 1),
        aux_coefficient=args.aux_coefficient,
        dead_tokens=args.dead_tokens or min(_DEAD_TOKENS, n_rows),
        seed=args.seed,
        moments=args.moments,
    )


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
