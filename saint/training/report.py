"""What a run tells while it goes on: metrics.jsonl, the page of curves, W&B, the terminal's bar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from saint.store.shuffled_rows import BatchedRows
from saint.training.metrics import Look, LossMeter, describe_step
from saint.training.recipe import Recipe
from saint.training.run_files import RunFiles, WandbLog
from saint.training.trainer import Trainer
from saint.training.weights import total_variance

_PAGE_SECONDS = 20


class Report:
    """Rank 0's: everybody else measures in vain.

    variance: of the training rows, normalised and summed over d_model.
    """

    def __init__(self, files: RunFiles, recipe: Recipe, rows: BatchedRows):
        self.files, self.recipe = files, recipe
        self.variance = total_variance(recipe, rows)
        self.wandb: WandbLog | None = None
        self._page_written = 0.0
        self._val_fvu: float | None = None

    def open_wandb(self, project: str, run_id: str, offline: bool) -> None:
        """Join W&B. Raises UserError where it refuses."""
        config = asdict(self.recipe)
        self.wandb = WandbLog(project, run_id=run_id, offline=offline, config=config)

    def write(
        self,
        trainer: Trainer,
        meter: LossMeter,
        seen: Look,
        measured: tuple[Mapping[str, float], Tensor] | None,
    ) -> tuple[float, str]:
        """Write what was seen of the trainer and its meter.

        measured: a validation's metrics and latents' density.

        Returns the FVU, the held-out one once there is one, and what a bar is to say.
        """
        entry = describe_step(trainer, meter, seen, self.variance)
        if math.isnan(entry["train/loss"]):  # no step since the last line: its losses stand
            for earlier in self.files.read_metrics()[-1:]:
                entry |= {k: v for k, v in earlier.items() if k in entry and entry[k] != entry[k]}
        metrics, density = measured or ({}, None)
        entry |= metrics
        self.files.append_metrics(entry)
        now = time.monotonic()
        if measured is not None or now - self._page_written > _PAGE_SECONDS:
            done = trainer.step == trainer.n_steps
            self.files.write_page(asdict(self.recipe), done=done)
            self._page_written = now
        if self.wandb:
            self.wandb.log(entry, density)
        return self._said(entry)

    def _said(self, entry: Mapping[str, Any]) -> tuple[float, str]:
        self._val_fvu = entry.get("val/fvu", self._val_fvu)
        fvu = entry["train/fvu"] if self._val_fvu is None else self._val_fvu
        dead, speed = entry["debug/dead_latents_ratio"], entry["tokens_per_s"]
        return fvu, f"FVU {fvu:.3f}, dead {dead:.1%}, {speed:.0f} tok/s"

    def close(self) -> None:
        """Finish W&B's run."""
        if self.wandb:
            self.wandb.close()
