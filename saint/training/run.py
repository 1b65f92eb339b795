"""SAEs in the making: what each is made of and how far it is, and those that share their rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from saint.stage.manifests import Output
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows
from saint.training.metrics import LossMeter
from saint.training.recipe import Recipe
from saint.training.report import Report
from saint.training.run_files import RunFiles
from saint.training.together import Together
from saint.training.trainer import Trainer, prepare_each, share_bases
from saint.training.weights import first_sae, make_basis

_LEAST_VAL_ROWS = 8192


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

    def logs_at(self, step: int) -> bool:
        """Whether a step is followed by a line of metrics, as validation always is."""
        return self.validates_at(step) or step % self.log_interval == 0


@dataclass(frozen=True)
class Job:
    """An SAE that is asked for. name: what tells it from a sweep's others, "" without a sweep."""

    name: str
    b_pre_path: Path
    rows: BatchedRows
    recipe: Recipe
    files: RunFiles
    output: Output

    @property
    def label(self) -> str:
        """What a line about it begins with."""
        return f"{self.name}: " if self.name else ""


class Run:
    """A job under way. first_step: where this session takes it up. failure: why it was given up."""

    def __init__(self, job: Job, plan: Plan):
        self.job, self.plan = job, plan
        self.report = Report(job.files, job.recipe, job.rows)
        self.has_begun, self.first_step, self.failure = False, 0, ""
        self.trainer: Trainer
        self.meter: LossMeter

    def begin(self, trainer: Trainer) -> None:
        """Go on with a trainer, from the newest checkpoint if there is one."""
        self.job.files.restore_newest(trainer)
        self.trainer, self.meter = trainer, LossMeter(trainer.since_logged)
        self.has_begun = True
        if trainer.workers.is_main:
            self.job.files.truncate_metrics(trainer.step)

    def take_step(self, micros: Sequence[Tensor]) -> None:
        """Train on prepared micro-batches."""
        step = self.trainer.step
        self.meter.add(*self.trainer.step_on(micros), step)

    @property
    def has_ended(self) -> bool:
        """Whether there is no step left, or no hope."""
        return bool(self.failure) or self.trainer.step >= self.plan.n_steps

    @property
    def is_bad(self) -> bool:
        """Whether a step since the last look was not finite."""
        return int(self.meter.first_bad_step) >= 0


class Stop:
    """A signal that asked the run to checkpoint and exit after this step; a second one exits."""

    signal = 0

    def request(self, signum: int, frame: object) -> None:
        """Handle the signal."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signum


@dataclass(frozen=True)
class Pass:
    """Runs that take the same batches of the same rows: one, or those of a sweep."""

    args: argparse.Namespace
    workers: Workers
    stop: Stop
    runs: list[Run]
    together: Together
    bases: dict[tuple[str, str], Tensor | None] = field(default_factory=dict)

    @property
    def rows(self) -> BatchedRows:
        """The rows of all."""
        return self.runs[0].job.rows

    def start(self, run: Run) -> None:
        """Give a run a trainer at the first weights, or at its newest checkpoint."""
        job, workers, recipe = run.job, self.workers, run.job.recipe
        sae = first_sae(recipe, job.rows, job.b_pre_path, self.args.model_load_path, workers)
        key = (recipe.basis, recipe.normalisation)
        if key not in self.bases:
            self.bases[key] = make_basis(recipe, job.rows, workers)
        steps = run.plan.n_steps
        trainer = Trainer(sae, recipe, steps, workers, self.args.kernels, self.bases[key])
        run.begin(trainer)
        share_bases([each.trainer for each in self.runs if each.has_begun])

    def take_step(self, runs: Sequence[Run], batch: Tensor) -> None:
        """Let runs train on a batch, each unless it is to leave that one out."""
        taking = [run for run in runs if run.trainer.step not in run.trainer.skipped_steps]
        for run in runs:
            if run not in taking:
                run.trainer.step += 1
        trainers = [run.trainer for run in taking]
        micros = batch.split(self.args.micro_batch_size or len(batch))
        prepared = [prepare_each(trainers, micro) for micro in micros]
        self.together.each(Run.take_step, taking, zip(*prepared, strict=True))

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
