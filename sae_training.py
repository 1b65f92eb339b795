"""Stage 3: train a sparse autoencoder on the shuffled activations, or several in one pass.

    torchrun --nproc_per_node=1 sae_training.py --data_dir ./activation_outputs_batched \
        --b_pre_path ./activation_outputs_mean.pt --model_save_path ./trained_sae.pt

Recipe: Gao et al., arXiv:2406.04093. Data-parallel ranks each take an equal share of every batch
and average their gradients, so N ranks do what one does. A checkpoint holds all there is: an
interrupted run continues with the same bits. With `--sweep` the same rows train several SAEs, each
as it would be alone. The loop is `train`, the step `Trainer.step_on`.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

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
from saint.stage.manifests import State
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.terminal import FINAL, page_link
from saint.stage.workers import Workers, start_workers
from saint.training.jobs import add_sweep_flags, by_rows, plan_jobs
from saint.training.metrics import Look, Measured, calibrate, look, validate
from saint.training.recipe import add_recipe_flags
from saint.training.run import Job, Pass, Plan, Run, Stop
from saint.training.steps import KERNELS
from saint.training.sweep_results import compare
from saint.training.together import Together
from saint.training.weights import leave_saes, save_best


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
        "--model_save_path",
        type=Path,
        default=Path("trained_sae.pt"),
        help="without --sweep [%(default)s]",
    )
    files.add_argument("--model_load_path", type=Path, help="start from these weights [random]")
    add_recipe_flags(parser)
    add_sweep_flags(parser)
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
        help="cpp: compiled for this CPU; torch: for any device; triton: for a GPU (none has run "
        "it yet); dense: plain autograd; same results up to rounding. auto: what a run was begun "
        "with, else cpp on a CPU (without a compiler torch), torch on a GPU [%(default)s]",
    )
    work.add_argument(
        "--latent_parallel_size",
        type=positive_int,
        default=1,
        metavar="N",
        help="split the latents over N ranks of torchrun, each with its own part of weights and "
        "moments; N times M ranks share the tokens M-fold besides (not with --kernels dense or "
        "triton, nor --moments int8) [%(default)s]",
    )
    add_device_flags(parser)
    add_overwrite_flag(parser)
    return parser


def train(this: Pass) -> list[Run]:
    """Take the steps that are left, log, validate and checkpoint between them.

    A run that is behind the others takes its batches first, while those wait. Returns the runs
    whose loss was not finite; none at the end. Exits with checkpoints where a signal asked for it.
    """
    workers, runs = this.workers, [run for run in this.runs if not run.has_ended]
    first = min((run.trainer.step for run in runs), default=0)
    last = max((run.plan.n_steps for run in runs), default=0)
    last_saved = time.monotonic()
    batches = this.rows.batches(
        "train",
        batch_size=this.runs[0].job.recipe.batch_size,
        first_batch=first,
        n_batches=last,
        part=(workers.data.rank, workers.data.size),
        device=workers.device,
    )
    with progress(last, unit="step", description="train", initial=first) as bar:
        for number, batch in enumerate(batches, first):
            here = [run for run in runs if run.trainer.step == number]
            this.take_step(here, batch)
            bar.update()
            minutes = (time.monotonic() - last_saved) / 60
            due, stopping = this.agree(minutes > this.args.checkpoint_minutes)
            saving = runs if due or stopping else [run for run in here if run.has_ended]
            # Lines depend on steps alone; what they do not hold yet goes into the checkpoint.
            logging = [run for run in here if run.plan.logs_at(run.trainer.step)]
            if not (saving or logging):
                continue
            seen = {run: look(run.trainer, run.meter) for run in logging}
            bad = [run for run in logging if seen[run].first_bad_step >= 0]
            bad += [run for run in saving if run not in seen and run.is_bad]
            said = leave_lines(this, {run: seen[run] for run in logging if run not in bad})
            if said:
                bar.set_postfix_str(min(said)[1])
            for run in saving if workers.data.rank == 0 else ():
                if run not in bad:
                    save_best(run.job.files.best, run.trainer)  # which a checkpoint counts on
                    state = run.trainer.state()
                    run.job.files.save(state, run.trainer.step, workers.latents)
            last_saved = time.monotonic() if saving else last_saved
            for run in runs:
                run.meter.restart_clock()
            if bad:
                return bad
            runs = [run for run in runs if not run.has_ended]
            if stopping and runs:
                step = min(run.trainer.step for run in runs)
                log.warning("stopped at step %d; the same command resumes", step)
                raise SystemExit(128 + stopping)
    return []


def leave_lines(this: Pass, runs: Mapping[Run, Look]) -> list[tuple[float, str]]:
    """Write a line of metrics for each run, of what was seen, and validate those due for it.

    Returns each one's FVU and what a bar is to say of it.
    """
    ended = [run.trainer for run in runs if run.has_ended]
    this.together.each(calibrate, ended, [this.rows] * len(ended))
    if this.workers.data.rank:
        return []
    measured = measure(this, [run for run in runs if run.plan.validates_at(run.trainer.step)])
    said = []
    for run, seen in runs.items() if this.workers.is_main else ():
        fvu, text = run.report.write(run.trainer, run.meter, seen, measured.get(run))
        said.append((fvu, run.job.label + text))
    return said


def measure(this: Pass, runs: Sequence[Run]) -> dict[Run, Measured]:
    """Validate on the sample, keep each SAE if it is its best there; at the end, on all rows."""
    n_all = this.rows.n_rows("val")
    if not n_all or not runs:
        return {}
    n_sample, trainers = runs[0].plan.n_val_rows, [run.trainer for run in runs]
    found = validate(trainers, this.rows, n_sample, this.together)
    for run, (metrics, _) in zip(runs, found, strict=True):
        if metrics["val/loss"] < run.trainer.best_val_loss:
            run.trainer.best_val_loss = metrics["val/loss"]
            run.trainer.keep_as_best()
    measured = dict(zip(runs, found, strict=True))
    ended = [run for run in runs if run.has_ended and n_sample < n_all]
    if ended:
        found = validate([run.trainer for run in ended], this.rows, None, this.together)
        measured |= zip(ended, found, strict=True)
    for run in runs:
        run.trainer.kernels.diagnostics()  # what follows in the log is of training alone
    return measured


def train_to_the_end(this: Pass) -> None:
    """Train; a loss that is not finite is stepped over once, from a checkpoint.

    A second one ends the run: of a sweep, the others go on.
    """
    for run in this.runs:
        this.start(run)
        run.first_step = run.trainer.step
    at = min(run.first_step for run in this.runs)
    if at:
        log.info("continuing at step %d of %d", at, max(run.plan.n_steps for run in this.runs))
    while bad := train(this):
        for run in bad:
            step_over(this, run)


def step_over(this: Pass, run: Run) -> None:
    """Take a run back to its checkpoint, and let it leave out the step that was not finite."""
    bad_step, label = int(run.meter.first_bad_step), run.job.label
    if run.trainer.skipped_steps:
        run.failure = (
            f"the loss is not finite at step {bad_step}, and was not at step "
            f"{min(run.trainer.skipped_steps)} before: lower --learning_rate"
        )
        if not run.job.name:
            raise UserError(run.failure)
        log.warning("warning: %s%s; the others go on", label, run.failure)
        return
    del run.trainer, run.meter  # the next trainer needs the memory
    this.start(run)
    run.trainer.skipped_steps.add(bad_step)
    log.warning(
        "warning: %sthe loss was not finite at step %d: going on from step %d without that batch",
        label,
        bad_step,
        run.trainer.step,
    )


def begin(job: Job, args: argparse.Namespace, workers: Workers) -> bool:
    """Record that a job has begun. Returns whether there is anything to do."""
    if workers.on_main(lambda: job.output.begin(overwrite=args.overwrite)) is State.DONE:
        if not job.name:
            log.info("done already: %s; look at %s", job.output.path, page_link(job.files.page))
        return False
    workers.on_main(lambda: try_directory(job.files.checkpoint_dir))
    return True


def make(jobs: Sequence[Job], args: argparse.Namespace, workers: Workers, stop: Stop) -> list[Run]:
    """Train the SAEs that take the same batches, and leave their files."""
    started = time.monotonic()
    workers.on_main(jobs[0].rows.verify)
    runs = [Run(job, Plan.of(args, job.rows, job.recipe)) for job in jobs]
    for run in runs if args.wandb_project else ():
        run_id = f"{run.job.files.model.stem}-{run.job.output.identity}"
        options = (args.wandb_project, run_id, args.wandb_offline)
        workers.on_main(lambda report=run.report, options=options: report.open_wandb(*options))
    this = Pass(args, workers, stop, runs, Together(workers, len(runs)))
    train_to_the_end(this)
    good = [run for run in runs if not run.failure]
    files = [run.job.files for run in good]
    leave_saes([run.trainer for run in good], this.rows, files, this.together)
    for run in good if workers.is_main else ():
        finish(run, args, time.monotonic() - started)
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = build_parser().parse_args(argv)
    workers = start_workers(args.device, latent_parallel_size=args.latent_parallel_size)
    log_arguments(args, build_parser())
    jobs = plan_jobs(args, workers)
    stop = Stop()
    with naming_full_disk(jobs[0].output.path.parent):
        waiting = [job for job in jobs if begin(job, args, workers)]
        for signum in (signal.SIGTERM, signal.SIGINT) if waiting else ():
            signal.signal(signum, stop.request)
        failures = {}
        for group in by_rows(waiting):
            runs = make(group, args, workers, stop)
            failures |= {run.job.name: run.failure for run in runs if run.failure}
        if args.sweep and workers.is_main:
            compare(args.sweep, jobs, failures)


def finish(run: Run, args: argparse.Namespace, seconds: float) -> None:
    """Write the SAE's manifest, and log the figures a person wants."""
    job, trainer, output = run.job, run.trainer, run.job.output
    last = job.files.read_metrics()[-1]
    counts = {"n_steps": trainer.step, "n_tokens": trainer.step * job.recipe.batch_size}
    facts = asdict(trainer.sae.config) | {"n_latents": job.recipe.n_latents, "final": last}
    output.finish(facts=facts, counts=counts, files=[output.path.name])
    job.files.clear_checkpoints()
    run.report.close()
    log.info(
        "trained %s: %d steps, loss %.4f, held-out FVU %s, dead %.1f %%, %.0f tokens/s (kernels "
        "%s), %.0f s, %s; look at %s",
        output.path,
        trainer.step,
        last["train/loss"],
        f"{last['val/fvu']:.4f}" if "val/fvu" in last else "not measured",
        100 * last["debug/dead_latents_ratio"],
        (trainer.step - run.first_step) * job.recipe.batch_size / max(seconds, 1e-9),
        trainer.kernels.name,
        seconds,
        peak_memory(trainer.workers.device),
        page_link(job.files.page),
        extra=FINAL,
    )


if __name__ == "__main__":
    run_stage(main, when_full="--moments int8, or with --kernels dense --micro_batch_size 1024")
