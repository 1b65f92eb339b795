"""Stage 3: train a TopK sparse autoencoder on the shuffled activations.

    torchrun --nproc_per_node=1 sae_training.py --data_dir ./activation_outputs_batched \
        --b_pre_path ./activation_outputs_mean.pt --model_save_path ./trained_sae.pt

Recipe: Gao et al., arXiv:2406.04093. Data-parallel ranks each take an equal share of every batch
and average their gradients, so N ranks do what one does. Everything goes by steps; a checkpoint
holds all there is, and an interrupted run continues with the same bits.
"""

from __future__ import annotations

import argparse
import math
import pickle
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sae import SAEConfig, TopKSparseAutoencoder, load_sae, normalise_decoder, save_sae
from saint.batched_rows import BatchedRows, open_batched_rows
from saint.manifests import Output, State, file_checksum
from saint.runtime import (
    UserError,
    Workers,
    add_device_flags,
    add_overwrite_flag,
    log,
    log_arguments,
    positive_int,
    progress,
    run_stage,
    start_workers,
)
from saint.trainer import (
    LossMeter,
    Recipe,
    Trainer,
    describe_step,
    largest_activations,
    validate,
)
from saint.training_run import RunFiles, WandbLog, write_curves

STAGE = "sae_training"
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
        "--decay_fraction", type=float, default=0.5, help="share of steps, to zero [%(default)s]"
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
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--logs_per_epoch", type=positive_int, default=100, help="[%(default)s]")
    logs.add_argument(
        "--checkpoint_minutes", type=float, default=10.0, help="between checkpoints [%(default)s]"
    )
    logs.add_argument(
        "--keep_last_n", type=int, default=1, help="checkpoints kept; 0 keeps none [%(default)s]"
    )
    logs.add_argument("--wandb_project", help="log to this W&B project too [off]")
    logs.add_argument("--wandb_offline", action="store_true", help="W&B without a network")
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=["auto", "sparse", "dense"],
        help="auto is sparse on a CPU and dense on a GPU; same results",
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
        grad_clip=args.grad_clip,
        k_aux=args.k_aux or 1 << (d_model.bit_length() - 1),
        aux_coefficient=args.aux_coefficient,
        dead_tokens=args.dead_tokens or min(_DEAD_TOKENS, n_rows),
        seed=args.seed,
    )


@dataclass
class Run:
    """One training run from here to its end."""

    args: argparse.Namespace
    rows: BatchedRows
    recipe: Recipe
    files: RunFiles
    workers: Workers
    wandb: WandbLog | None
    stopping: bool = False

    @property
    def n_batches(self) -> int:
        """Whole batches of an epoch."""
        return self.rows.n_rows("train") // self.recipe.batch_size

    @property
    def n_steps(self) -> int:
        """Steps of the whole run: as many as the epochs' tokens make."""
        return self.recipe.num_epochs * self.rows.n_rows("train") // self.recipe.batch_size

    def start(self) -> Trainer:
        """Build the trainer: first weights, then the newest checkpoint if there is one."""
        facts = self.rows.facts
        config = SAEConfig(
            d_model=facts["d_model"],
            n_latents=self.recipe.n_latents,
            k=self.recipe.k,
            **{name: facts[name] for name in _INHERITED_FACTS},
        )
        sae = TopKSparseAutoencoder(config, device=self.workers.device)
        sae.initialise(read_mean(self.args.b_pre_path, config.d_model), seed=self.recipe.seed)
        if self.args.model_load_path:
            copy_weights(sae, self.args.model_load_path)
        kernel = self.args.kernels
        if kernel == "auto":
            kernel = "dense" if self.workers.device.type == "cuda" else "sparse"
        trainer = Trainer(sae, self.recipe, self.n_steps, self.workers, kernel)
        checkpoints = self.files.checkpoints()
        if checkpoints:
            trainer.restore(checkpoints[-1])
            log.info("continuing at step %d of %d", trainer.step, self.n_steps)
        if self.workers.is_main:
            self.files.truncate_metrics(trainer.step)
        return trainer

    def train(self) -> Trainer:
        """Train to the end. A loss that is not finite is stepped over once, from a checkpoint."""
        trainer = self.start()
        while (bad_step := self._train_until_bad(trainer)) is not None:
            if trainer.skipped_steps:
                raise UserError(
                    f"the loss is not finite at step {bad_step}, and was not at step "
                    f"{min(trainer.skipped_steps)} before: lower --learning_rate"
                )
            trainer = self.start()
            trainer.skipped_steps.add(bad_step)
            log.warning(
                "warning: the loss was not finite at step %d: going on from step %d without "
                "that batch",
                bad_step,
                trainer.step,
            )
        return trainer

    def _train_until_bad(self, trainer: Trainer) -> int | None:
        """Take steps; return None at the end, or the first step whose loss was not finite."""
        meter = LossMeter(self.workers.device)
        log_interval = max(1, self.n_batches // self.args.logs_per_epoch)
        last_saved = time.monotonic()
        batches = self.rows.batches(
            "train",
            batch_size=self.recipe.batch_size,
            first_batch=trainer.step,
            n_batches=self.n_steps,
            part=(self.workers.rank, self.workers.world_size),
        )
        bar = progress(self.n_steps, unit="step", description="train", initial=trainer.step)
        with bar:
            for batch in batches:
                step = trainer.step
                if step in trainer.skipped_steps:
                    trainer.step += 1
                    continue
                losses = trainer.train_step(batch, self.args.micro_batch_size or len(batch))
                meter.add(losses, step)
                bar.update()
                ended = trainer.step == self.n_steps
                stopping = self._anybody_stopping()
                due = time.monotonic() - last_saved > 60 * self.args.checkpoint_minutes
                validating = ended or trainer.step % self.n_batches == 0
                if not (ended or stopping or due or validating or trainer.step % log_interval == 0):
                    continue
                if int(meter.first_bad_step) >= 0:
                    return int(meter.first_bad_step)
                self._log(trainer, meter, bar, validating)
                if self.workers.is_main and (ended or stopping or due):
                    self.files.save(trainer.state(), trainer.step)
                    last_saved = time.monotonic()
                if stopping and not ended:
                    log.warning("stopped at step %d; the same command resumes", trainer.step)
                    raise SystemExit(143)
        return None

    def _anybody_stopping(self) -> bool:
        if self.workers.world_size == 1:
            return self.stopping
        flag = torch.tensor(float(self.stopping), device=self.workers.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _log(self, trainer: Trainer, meter: LossMeter, bar: Any, validating: bool) -> None:
        if not self.workers.is_main:
            return
        entry = describe_step(trainer, meter)
        density = None
        if validating and self.rows.n_rows("val"):
            metrics, density = validate(trainer.sae, self.rows)
            entry |= metrics
            if metrics["val/loss"] < trainer.best_val_loss:
                trainer.best_val_loss = metrics["val/loss"]
                save_sae(self.files.best, trainer.sae)
        self.files.append_metrics(entry)
        if validating:
            write_curves(self.files.read_metrics(), self.files.curves)
        if self.wandb:
            self.wandb.log(entry, density)
        shown = {"loss": f"{entry['train/loss']:.4f}"}
        shown |= {"dead": f"{entry['debug/dead_latents_ratio']:.1%}"}
        if "val/fvu" in entry:
            shown |= {"FVU": f"{entry['val/fvu']:.4f}"}
        bar.set_postfix(shown)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: finish this step, checkpoint, exit. A second one exits at once."""
        del signum, frame
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True


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


@torch.no_grad()
def copy_weights(sae: TopKSparseAutoencoder, path: Path) -> None:
    """Start from another SAE's weights, its decoder directions normalised."""
    other = load_sae(path, device="cpu", k=sae.config.k)
    for name in ("d_model", "n_latents"):
        mine, theirs = getattr(sae.config, name), getattr(other.config, name)
        if mine != theirs:
            raise UserError(f"--model_load_path {path} has {name} {theirs}, this run has {mine}")
    sae.load_state_dict(other.state_dict())
    normalise_decoder(sae)


def plan_output(
    args: argparse.Namespace, rows: BatchedRows, recipe: Recipe, files: RunFiles, workers: Workers
) -> Output:
    """Describe the run for its manifest."""
    if not args.b_pre_path.exists():
        raise UserError(f"--b_pre_path {args.b_pre_path} does not exist: preprocessing writes it")
    sources = {"data": rows.manifest.fingerprint, "b_pre": file_checksum(args.b_pre_path)["xxh3"]}
    if args.model_load_path:
        if not args.model_load_path.exists():
            raise UserError(f"--model_load_path {args.model_load_path} does not exist")
        sources["model_load_path"] = file_checksum(args.model_load_path)["xxh3"]
    return Output(
        path=args.model_save_path,
        stage=STAGE,
        arguments=asdict(recipe),
        sources=sources,
        own_patterns=files.patterns(),
        settings={
            "device": str(workers.device),
            "world_size": workers.world_size,
            "kernels": args.kernels,
            "data_dir": str(args.data_dir),
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = build_parser().parse_args(argv)
    workers = start_workers(args.device)
    log_arguments(args)
    rows = open_batched_rows(args.data_dir)
    recipe = resolve_recipe(args, rows, workers)
    read_mean(args.b_pre_path, rows.facts["d_model"])
    files = RunFiles(args.model_save_path, args.keep_last_n)
    output = plan_output(args, rows, recipe, files, workers)
    if workers.on_main(lambda: output.begin(overwrite=args.overwrite)) is State.DONE:
        log.info("done already: %s", output.path)
        return
    workers.on_main(rows.verify)
    wandb = None
    if args.wandb_project and workers.is_main:
        wandb = WandbLog(
            args.wandb_project,
            run_id=f"{files.model.stem}-{rows.manifest.fingerprint[:8]}",
            offline=args.wandb_offline,
            config=asdict(recipe),
        )
    run = Run(args, rows, recipe, files, workers, wandb)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, run.request_stop)
    started = time.monotonic()
    trainer = run.train()
    trainer.sae.max_activations = largest_activations(trainer.sae, rows, workers)
    if workers.is_main:
        finish(output, run, trainer, time.monotonic() - started)


def finish(output: Output, run: Run, trainer: Trainer, seconds: float) -> None:
    """Write the SAE and its manifest, and log the figures a person wants."""
    save_sae(output.path, trainer.sae)
    last = run.files.read_metrics()[-1]
    facts = asdict(trainer.sae.config)
    counts = {"n_steps": trainer.step, "n_tokens": trainer.step * run.recipe.batch_size}
    output.finish(facts=facts | {"final": last}, counts=counts, files=[output.path.name])
    run.files.clear_checkpoints()
    if run.wandb:
        run.wandb.close()
    memory = ""
    if run.workers.device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory at most"
    log.info(
        "trained %s: %d steps, loss %.4f, held-out FVU %s, dead %.1f %%, %.0f tokens/s, %.0f s%s",
        output.path,
        trainer.step,
        last["train/loss"],
        f"{last['val/fvu']:.4f}" if "val/fvu" in last else "not measured",
        100 * last["debug/dead_latents_ratio"],
        counts["n_tokens"] / max(seconds, 1e-9),
        seconds,
        memory,
    )


if __name__ == "__main__":
    run_stage(main)
