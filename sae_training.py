"""Stage 3: train a sparse autoencoder on the shuffled activations.

    torchrun --nproc_per_node=1 sae_training.py --data_dir ./activation_outputs_batched \
        --b_pre_path ./activation_outputs_mean.pt --model_save_path ./trained_sae.pt

Recipe: Gao et al., arXiv:2406.04093. Data-parallel ranks each take an equal share of every batch
and average their gradients, so N ranks do what one does. A checkpoint holds all there is: an
interrupted run continues with the same bits. The loop is `train`, the step `Trainer.train_step`.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from sae import save_sae
from saint.stage.devices import peak_memory
from saint.stage.errors import UserError, log
from saint.stage.files import naming_full_disk, try_directory
from saint.stage.flags import (
    add_device_flags,
    add_overwrite_flag,
    non_negative_float,
    positive_int,
    whole_number,
)
from saint.stage.manifests import Output, State, file_checksum, recorded_arguments
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.workers import Workers, start_workers
from saint.store.shuffled_rows import BatchedRows, open_batched_rows
from saint.training.metrics import LossMeter, calibrate, validate
from saint.training.recipe import Recipe, add_recipe_flags, resolve_recipe
from saint.training.report import Report
from saint.training.run_files import RunFiles
from saint.training.steps import KERNELS
from saint.training.trainer import Trainer
from saint.training.weights import first_sae, leave_saes, make_basis, read_mean, refuse_another_mean

STAGE = "sae_training"
_LEAST_VAL_ROWS = 8192


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Train a sparse autoencoder on the shuffled activations.",
        epilog="Run it again to resume from the last checkpoint. Ctrl-C checkpoints and exits.",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--data_dir", type=Path, required=True, help="what preprocessing wrote")
    files.add_argument("--b_pre_path", type=Path, required=True, help="the mean from preprocessing")
    files.add_argument(
        "--model_save_path", type=Path, default=Path("trained_sae.pt"), help="[%(default)s]"
    )
    files.add_argument("--model_load_path", type=Path, help="start from these weights [random]")
    add_recipe_flags(parser)
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--logs_per_epoch", type=positive_int, default=100, help="[%(default)s]")
    logs.add_argument(
        "--validations_per_epoch",
        type=positive_int,
        default=10,
        help="each on that share of the held-out rows, the end's on all [%(default)s]",
    )
    minutes = "between checkpoints [10]"
    logs.add_argument("--checkpoint_minutes", type=non_negative_float, default=10.0, help=minutes)
    logs.add_argument(
        "--keep_last_n",
        type=whole_number,
        default=1,
        help="checkpoints kept; 0: none, nor the best SAE [%(default)s]",
    )
    logs.add_argument("--wandb_project", help="log to this W&B project too [off]")
    logs.add_argument("--wandb_offline", action="store_true", help="W&B without a network")
    work = parser.add_argument_group("how it is computed")
    work.add_argument(
        "--micro_batch_size", type=positive_int, help="tokens at once, to save memory [batch_size]"
    )
    work.add_argument(
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


@dataclass(frozen=True)
class Plan:
    """What happens after which step; by steps, so that a resumed run does alike."""

    n_steps: int
    steps_per_epoch: int
    log_interval: int
    validation_interval: int
    n_val_rows: int

    @classmethod
    def of(cls, args: argparse.Namespace, rows: BatchedRows, recipe: Recipe) -> Plan:
        """As many steps as the epochs' tokens make, logs and validations as the flags say.

        Validations before the last take the same sample of held-out rows each time.
        """
        n_batches, n_val = rows.n_rows("train") // recipe.batch_size, rows.n_rows("val")
        return cls(
            n_steps=recipe.num_epochs * rows.n_rows("train") // recipe.batch_size,
            steps_per_epoch=n_batches,
            log_interval=max(1, n_batches // args.logs_per_epoch),
            validation_interval=max(1, n_batches // args.validations_per_epoch),
            n_val_rows=min(n_val, max(_LEAST_VAL_ROWS, n_val // args.validations_per_epoch)),
        )

    def validates_at(self, step: int) -> bool:
        """Whether a step is followed by validation."""
        intervals = (self.n_steps, self.steps_per_epoch, self.validation_interval)
        return any(step % interval == 0 for interval in intervals)


class Stop:
    """A signal that asked the run to checkpoint and exit after this step; a second one exits."""

    signal = 0

    def request(self, signum: int, frame: object) -> None:
        """Handle the signal."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signum


@dataclass(frozen=True)
class Run:
    """What a run has; what changes in it is the trainer's and the report's."""

    args: argparse.Namespace
    rows: BatchedRows
    recipe: Recipe
    plan: Plan
    files: RunFiles
    workers: Workers
    report: Report
    stop: Stop

    def start(self) -> Trainer:
        """Return a trainer at the first weights, or at the newest checkpoint if there is one."""
        paths = (self.args.b_pre_path, self.args.model_load_path)
        sae = first_sae(self.recipe, self.rows, *paths, self.workers)
        basis = make_basis(self.recipe, self.rows, self.workers)
        n_steps, kernels = self.plan.n_steps, self.args.kernels
        trainer = Trainer(sae, self.recipe, n_steps, self.workers, kernels, basis)
        self.files.restore_newest(trainer)
        if trainer.step:
            log.info("continuing at step %d of %d", trainer.step, self.plan.n_steps)
        if self.workers.is_main:
            self.files.truncate_metrics(trainer.step)
        return trainer

    def agree(self, due: bool) -> tuple[bool, int]:
        """Return whether rank 0 finds a checkpoint due, and a stop signal that any rank has got."""
        if self.workers.world_size == 1:
            return due, self.stop.signal
        wishes = torch.tensor(
            [due and self.workers.is_main, self.stop.signal], device=self.workers.device
        )
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        due_now, stopping = wishes.tolist()
        return bool(due_now), stopping


def train(run: Run, trainer: Trainer) -> int | None:
    """Take the steps that are left, log, validate and checkpoint between them.

    Returns None at the end, or the first step whose loss was not finite. Exits with a checkpoint
    where a signal asked for that.
    """
    plan, workers = run.plan, run.workers
    meter, last_saved = LossMeter(trainer.since_logged), time.monotonic()
    batches = run.rows.batches(
        "train",
        batch_size=run.recipe.batch_size,
        first_batch=trainer.step,
        n_batches=plan.n_steps,
        part=(workers.rank, workers.world_size),
        device=workers.device,
    )
    with progress(plan.n_steps, unit="step", description="train", initial=trainer.step) as bar:
        for batch in batches:
            step = trainer.step
            if step in trainer.skipped_steps:
                trainer.step += 1
            else:
                rows_at_once = run.args.micro_batch_size or len(batch)
                meter.add(*trainer.train_step(batch, rows_at_once), step)
            bar.update()
            ended = trainer.step == plan.n_steps
            minutes = (time.monotonic() - last_saved) / 60
            due, stopping = run.agree(minutes > run.args.checkpoint_minutes)
            saving, validating = ended or stopping or due, plan.validates_at(trainer.step)
            # Lines depend on steps alone; what they do not hold yet goes into the checkpoint.
            logging = validating or trainer.step % plan.log_interval == 0
            if not (saving or logging):
                continue
            if int(meter.first_bad_step) >= 0:
                return int(meter.first_bad_step)
            if ended:
                calibrate(trainer, run.rows)
            if logging and workers.is_main:
                measured = measure(run, trainer) if validating else None
                run.report.write(trainer, meter, measured, bar)
            if saving and workers.is_main:
                run.files.save(trainer.state(), trainer.step)
            last_saved = time.monotonic() if saving else last_saved
            meter.restart_clock()
            if stopping and not ended:
                log.warning("stopped at step %d; the same command resumes", trainer.step)
                raise SystemExit(128 + stopping)
    return None


def measure(run: Run, trainer: Trainer) -> tuple[dict[str, float], torch.Tensor] | None:
    """Validate on the sample, keep the SAE if it is the best there; at the end, on all rows."""
    n_all, n_sample = run.rows.n_rows("val"), run.plan.n_val_rows
    if not n_all:
        return None
    measured = validate(trainer, run.rows, n_sample)
    if measured[0]["val/loss"] < trainer.best_val_loss:
        trainer.best_val_loss = measured[0]["val/loss"]
        save_sae(run.files.best, trainer.plain_sae())
    if trainer.step == run.plan.n_steps and n_sample < n_all:
        measured = validate(trainer, run.rows)
    return measured


def train_to_the_end(run: Run) -> tuple[Trainer, int]:
    """Train; a loss that is not finite is stepped over once, from a checkpoint.

    Returns the trainer, and the steps that this session took.
    """
    trainer = run.start()
    first_step = trainer.step
    while (bad_step := train(run, trainer)) is not None:
        if trainer.skipped_steps:
            raise UserError(
                f"the loss is not finite at step {bad_step}, and was not at step "
                f"{min(trainer.skipped_steps)} before: lower --learning_rate"
            )
        trainer = run.start()
        trainer.skipped_steps.add(bad_step)
        log.warning(
            "warning: the loss was not finite at step %d: going on from step %d without that batch",
            bad_step,
            trainer.step,
        )
    return trainer, trainer.step - first_step


def plan_output(
    args: argparse.Namespace, rows: BatchedRows, recipe: Recipe, files: RunFiles, workers: Workers
) -> Output:
    """Describe the run for its manifest."""
    sources = {"data": rows.manifest.fingerprint, "b_pre": file_checksum(args.b_pre_path)["xxh3"]}
    if args.model_load_path:
        if not args.model_load_path.exists():
            raise UserError(f"--model_load_path {args.model_load_path} does not exist")
        sources["model_load_path"] = file_checksum(args.model_load_path)["xxh3"]
    return Output(
        path=args.model_save_path,
        stage=STAGE,
        arguments=recipe.arguments(),
        sources=sources,
        single_file=True,
        own_names=files.names(),
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
    log_arguments(args, build_parser())
    rows = open_batched_rows(args.data_dir)
    earlier = recorded_arguments(args.model_save_path, STAGE, single_file=True)
    recipe = resolve_recipe(args, rows, workers, {} if args.overwrite else earlier)
    read_mean(args.b_pre_path, rows.facts["d_model"])
    refuse_another_mean(args.b_pre_path, rows)
    files = RunFiles(args.model_save_path, args.keep_last_n)
    output = plan_output(args, rows, recipe, files, workers)
    if workers.on_main(lambda: output.begin(overwrite=args.overwrite)) is State.DONE:
        log.info("done already: %s; look at %s", output.path, files.page)
        return
    workers.on_main(lambda: try_directory(files.checkpoint_dir))
    workers.on_main(rows.verify)
    report, stop = Report(files, recipe, rows), Stop()
    if args.wandb_project:
        run_id = f"{files.model.stem}-{output.identity}"
        workers.on_main(lambda: report.open_wandb(args.wandb_project, run_id, args.wandb_offline))
    run = Run(args, rows, recipe, Plan.of(args, rows, recipe), files, workers, report, stop)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop.request)
    started = time.monotonic()
    with naming_full_disk(output.path.parent):
        trainer, n_steps = train_to_the_end(run)
        leave_saes(trainer, rows, files)
        if workers.is_main:
            finish(output, run, trainer, n_steps, time.monotonic() - started)


def finish(output: Output, run: Run, trainer: Trainer, n_steps: int, seconds: float) -> None:
    """Write the SAE's manifest, and log the figures a person wants; n_steps: this session's."""
    last = run.files.read_metrics()[-1]
    counts = {"n_steps": trainer.step, "n_tokens": trainer.step * run.recipe.batch_size}
    facts = asdict(trainer.sae.config) | {"final": last}
    output.finish(facts=facts, counts=counts, files=[output.path.name])
    run.files.clear_checkpoints()
    run.report.close()
    log.info(
        "trained %s: %d steps, loss %.4f, held-out FVU %s, dead %.1f %%, %.0f tokens/s (kernels "
        "%s), %.0f s, %s; look at %s",
        output.path,
        trainer.step,
        last["train/loss"],
        f"{last['val/fvu']:.4f}" if "val/fvu" in last else "not measured",
        100 * last["debug/dead_latents_ratio"],
        n_steps * run.recipe.batch_size / max(seconds, 1e-9),
        trainer.kernels.name,
        seconds,
        peak_memory(run.workers.device),
        run.files.page,
    )


if __name__ == "__main__":
    run_stage(main)
