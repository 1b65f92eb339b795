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
import resource
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
from saint.stage.errors import UserError, log
from saint.stage.files import naming_full_disk
from saint.stage.manifests import Output, State, file_checksum, manifest_path, read_manifest
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.workers import Workers, start_workers
from saint.store.shuffled_rows import BatchedRows, open_batched_rows
from saint.training.metrics import LossMeter, describe_step, largest_activations, validate
from saint.training.recipe import Recipe, build_parser, resolve_recipe
from saint.training.run_files import RunFiles, WandbLog
from saint.training.trainer import Trainer

STAGE = "sae_training"
_PAGE_SECONDS = 20
_LEAST_VAL_ROWS = 8192


@dataclass
class Run:
    """One training run from here to its end."""

    args: argparse.Namespace
    rows: BatchedRows
    recipe: Recipe
    files: RunFiles
    workers: Workers
    wandb: WandbLog | None = None
    stopping: int = 0  # the signal that asked for it
    page_written: float = 0.0
    first_step: int = 0  # of this session, where a run was resumed
    val_fvu: float | None = None

    @property
    def n_batches(self) -> int:
        """Whole batches of an epoch."""
        return self.rows.n_rows("train") // self.recipe.batch_size

    @property
    def n_steps(self) -> int:
        """Steps of the whole run: as many as the epochs' tokens make."""
        return self.recipe.num_epochs * self.rows.n_rows("train") // self.recipe.batch_size

    @property
    def n_val_rows(self) -> int:
        """Held-out rows of a validation before the last one: the same sample each time."""
        n_rows = self.rows.n_rows("val")
        return min(n_rows, max(_LEAST_VAL_ROWS, n_rows // self.args.validations_per_epoch))

    def validates_at(self, step: int) -> bool:
        """Whether a step is followed by validation; by steps, so that a resumed run does alike."""
        interval = max(1, self.n_batches // self.args.validations_per_epoch)
        return step == self.n_steps or not step % self.n_batches or not step % interval

    def open_wandb(self, run_id: str) -> None:
        """Join W&B if that was asked for."""
        if self.args.wandb_project:
            self.wandb = WandbLog(
                self.args.wandb_project,
                run_id=run_id,
                offline=self.args.wandb_offline,
                config=asdict(self.recipe),
            )

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
        trainer = Trainer(sae, self.recipe, self.n_steps, self.workers, self.args.kernels)
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
        self.first_step = trainer.step
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
            device=self.workers.device,
        )
        bar = progress(self.n_steps, unit="step", description="train", initial=trainer.step)
        with bar:
            for batch in batches:
                step = trainer.step
                if step in trainer.skipped_steps:
                    trainer.step += 1
                else:
                    rows_at_once = self.args.micro_batch_size or len(batch)
                    meter.add(*trainer.train_step(batch, rows_at_once), step)
                bar.update()
                ended = trainer.step == self.n_steps
                minutes = (time.monotonic() - last_saved) / 60
                due, stopping = self._agreed(minutes > self.args.checkpoint_minutes)
                validating = self.validates_at(trainer.step)
                if not (ended or stopping or due or validating or trainer.step % log_interval == 0):
                    continue
                if int(meter.first_bad_step) >= 0:
                    return int(meter.first_bad_step)
                self._log(trainer, meter, bar, validating)
                if ended or stopping or due:
                    if self.workers.is_main:
                        self.files.save(trainer.state(), trainer.step)
                    last_saved = time.monotonic()
                meter.restart_clock()
                if stopping and not ended:
                    log.warning("stopped at step %d; the same command resumes", trainer.step)
                    raise SystemExit(128 + stopping)
        return None

    def _agreed(self, due: bool) -> tuple[bool, int]:
        """Whether rank 0 finds a checkpoint due, and a stop signal that any rank has got."""
        if self.workers.world_size == 1:
            return due, self.stopping
        wishes = torch.tensor(
            [due and self.workers.is_main, self.stopping], device=self.workers.device
        )
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        due_now, stopping = wishes.tolist()
        return bool(due_now), stopping

    def _log(self, trainer: Trainer, meter: LossMeter, bar: Any, validating: bool) -> None:
        if not self.workers.is_main:
            return
        entry = describe_step(trainer, meter, self.rows.facts["variance"])
        for earlier in self.files.read_metrics()[-1:] if math.isnan(entry["train/loss"]) else ():
            entry |= {k: v for k, v in earlier.items() if k in entry and entry[k] != entry[k]}
        density = None
        if validating and self.rows.n_rows("val"):
            metrics, density = self._validate(trainer)
            entry |= metrics
        self.files.append_metrics(entry)
        now = time.monotonic()
        if validating or now - self.page_written > _PAGE_SECONDS:
            self.files.write_page(asdict(self.recipe), done=trainer.step == self.n_steps)
            self.page_written = now
        if self.wandb:
            self.wandb.log(entry, density)
        self.val_fvu = entry.get("val/fvu", self.val_fvu)
        bar.set_postfix(
            loss=f"{entry['train/loss']:.4f}",
            FVU=f"{entry['train/fvu']:.4f}",
            held_out_FVU="-" if self.val_fvu is None else f"{self.val_fvu:.4f}",
            L0=f"{entry['train/l0']:.1f}",
            dead=f"{entry['debug/dead_latents_ratio']:.1%}",
            tokens_per_s=f"{entry['tokens_per_s']:.0f}",
        )

    def _validate(self, trainer: Trainer) -> tuple[dict[str, float], Tensor]:
        """Measure on the sample, keep the SAE if it is the best there; at the end, on all rows."""
        encode = trainer.kernels.encode
        metrics, density = validate(trainer.sae, self.rows, encode, self.n_val_rows)
        if metrics["val/loss"] < trainer.best_val_loss:
            trainer.best_val_loss = metrics["val/loss"]
            save_sae(self.files.best, trainer.sae)
        if trainer.step == self.n_steps and self.n_val_rows < self.rows.n_rows("val"):
            metrics, density = validate(trainer.sae, self.rows, encode)
        return metrics, density

    def save_with_steering_unit(self, trainer: Trainer) -> None:
        """Write the SAE with each latent's largest activation, and the best one with its own.

        Most often the best is the last; else its weights take the trainer's place, for one more
        pass over the rows.
        """
        is_main, sae = self.workers.is_main, trainer.sae
        sae.max_activations = largest_activations(trainer, self.rows)
        if is_main:
            save_sae(self.files.model, sae)
        best = None
        if is_main and self.files.keep_last_n and self.files.best.exists():
            best = load_sae(self.files.best, device=self.workers.device)
        weights = sae.state_dict()
        is_last = best is None or all(
            torch.equal(weights[name], value) for name, value in best.state_dict().items()
        )
        if not self.workers.broadcast(is_last):
            trainer.take_weights(best)
            sae.max_activations = largest_activations(trainer, self.rows)
        if best is not None:
            save_sae(self.files.best, sae)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: finish this step, checkpoint, exit. A second one exits at once."""
        del frame
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = signum


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


def refuse_another_mean(path: Path, rows: BatchedRows) -> None:
    """Raise UserError where preprocessing made the mean from other rows: another layer's, say."""
    if not manifest_path(path, rows.manifest.stage, single_file=True).exists():
        return  # not preprocessing's: anyone's tensor will do
    made_from = read_manifest(path, rows.manifest.stage).sources
    if made_from != rows.manifest.sources:
        theirs, ours = (s["layer_dir"] for s in (made_from, rows.manifest.sources))
        other = "another store" if theirs == ours else f"{theirs}, the rows are of {ours}"
        raise UserError(f"--b_pre_path {path} is the mean of {other}")


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
    arguments = asdict(recipe)
    if recipe.moments == "float32":  # so that runs from before there was a choice go on
        del arguments["moments"]
    return Output(
        path=args.model_save_path,
        stage=STAGE,
        arguments=arguments,
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
    refuse_another_mean(args.b_pre_path, rows)
    files = RunFiles(args.model_save_path, args.keep_last_n)
    output = plan_output(args, rows, recipe, files, workers)
    if workers.on_main(lambda: output.begin(overwrite=args.overwrite)) is State.DONE:
        log.info("done already: %s", output.path)
        return
    workers.on_main(rows.verify)
    run = Run(args, rows, recipe, files, workers)
    workers.on_main(lambda: run.open_wandb(f"{files.model.stem}-{output.identity}"))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, run.request_stop)
    started = time.monotonic()
    with naming_full_disk(output.path.parent):
        trainer = run.train()
        run.save_with_steering_unit(trainer)
        if workers.is_main:
            finish(output, run, trainer, time.monotonic() - started)


def finish(output: Output, run: Run, trainer: Trainer, seconds: float) -> None:
    """Write the SAE's manifest, and log the figures a person wants."""
    last = run.files.read_metrics()[-1]
    facts = asdict(trainer.sae.config)
    counts = {"n_steps": trainer.step, "n_tokens": trainer.step * run.recipe.batch_size}
    n_tokens_now = (trainer.step - run.first_step) * run.recipe.batch_size
    output.finish(facts=facts | {"final": last}, counts=counts, files=[output.path.name])
    run.files.clear_checkpoints()
    if run.wandb:
        run.wandb.close()
    kernels = trainer.kernels.name
    log.info(
        "trained %s: %d steps, loss %.4f, held-out FVU %s, dead %.1f %%, %.0f tokens/s (kernels "
        "%s), %.0f s, %s",
        output.path,
        trainer.step,
        last["train/loss"],
        f"{last['val/fvu']:.4f}" if "val/fvu" in last else "not measured",
        100 * last["debug/dead_latents_ratio"],
        n_tokens_now / max(seconds, 1e-9),
        kernels,
        seconds,
        peak_memory(run.workers.device),
    )


def peak_memory(device: torch.device) -> str:
    """Say the most memory that this process has held: the GPU's, or its own on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory at most"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kilobytes / 1e6:.1f} GB of memory at most"


if __name__ == "__main__":
    run_stage(main)
