"""What a training run leaves beside its SAE: checkpoints, metrics.jsonl, W&B, a page of curves."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path, save_torch, write_text
from saint.stage.workers import Axis
from saint.training.curves_page import training_page
from saint.training.shard_files import complete_checkpoints, part_name
from saint.training.trainer import Trainer


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its checkpoints, metrics and curves; all named after the SAE's file."""

    model: Path
    keep_last_n: int = 1

    @property
    def checkpoint_dir(self) -> Path:
        """Directory of this run's checkpoints."""
        return self.model.parent / "sae_checkpoints"

    @property
    def best(self) -> Path:
        """The SAE with the lowest val/loss so far."""
        return self.checkpoint_dir / f"{self.model.stem}.best.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.model.with_name(f"{self.model.stem}.metrics.jsonl")

    @property
    def page(self) -> Path:
        """A page of curves, renewed while the run goes on."""
        return self.model.with_name(f"{self.model.stem}.training.html")

    def names(self) -> tuple[str, ...]:
        """Return what a run writes beside its checkpoints, relative to the SAE's directory."""
        saes = (Path(self.model.name), Path(self.checkpoint_dir.name, self.best.name))
        beside = [path.with_suffix(".json") for path in saes if path.suffix == ".safetensors"]
        return (*map(str, (*saes, *beside)), self.metrics.name, self.page.name)

    def patterns(self) -> tuple[str, ...]:
        """Return the glob pattern of its checkpoints, relative to the SAE's directory."""
        return (f"{self.checkpoint_dir.name}/{glob.escape(self.model.stem)}.step_*.pt",)

    def checkpoints(self) -> list[list[Path]]:
        """Return the complete checkpoints, oldest first, each as its files."""
        return complete_checkpoints(self._checkpoint_files())

    def _checkpoint_files(self) -> list[Path]:
        return sorted(self.model.parent.glob(*self.patterns()))

    def _keep(self, n: int) -> None:
        """Remove all but the n newest checkpoints, whole or in parts."""
        kept = {path for paths in self.checkpoints()[::-1][:n] for path in paths}
        for path in self._checkpoint_files():
            if path not in kept:
                path.unlink()

    def restore_newest(self, trainer: Trainer) -> None:
        """Continue from the newest checkpoint that every rank can read, if there are any.

        Raises UserError when none can.
        """
        workers, problem = trainer.workers, None
        for paths in workers.broadcast(self.checkpoints()[::-1]):
            state, mine = None, None
            try:
                state = trainer.read(paths)
            except UserError as error:
                mine = str(error)
            problems = [said for said in workers.gather(mine) if said]
            if problems:
                problem = problem or problems[0]
                continue
            trainer.restore(state)
            if problem:
                log.warning("warning: %s: going on from %s", problem, paths[0].name)
            return
        if problem:
            raise UserError(f"{problem}, nor is there an older one: --overwrite starts over")

    def save(self, state: Mapping[str, Any], step: int, ranks: Axis) -> None:
        """Write a checkpoint, and only then remove the older ones beyond keep_last_n.

        While the run goes on there are two: the one before stands in for one that is damaged. Each
        of the ranks that share the latents writes its part.
        """
        save_torch(self.checkpoint_dir / part_name(self.model.stem, step, ranks), dict(state))
        ranks.barrier()
        if ranks.rank == 0:
            self._keep(max(2, self.keep_last_n))

    def clear_checkpoints(self) -> None:
        """After success: leave the keep_last_n newest; with 0 none, nor the best SAE."""
        self._keep(self.keep_last_n)
        if self.keep_last_n == 0:
            self.best.unlink(missing_ok=True)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all logged metrics; damaged lines, or one that a kill cut short, are left out."""
        text = self.metrics.read_text(errors="replace") if self.metrics.exists() else ""
        return [entry for line in text.splitlines() if (entry := _entry(line))]

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged after a checkpoint, so that a resumed run logs each step once."""
        if self.metrics.exists():
            kept = [entry for entry in self.read_metrics() if entry["step"] <= step]
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def write_page(self, settings: Mapping[str, Any], *, done: bool) -> None:
        """Draw all that was logged."""
        title = f"Training {self.model.name}"
        entries = self.read_metrics()
        write_text(self.page, training_page(entries, title=title, settings=settings, done=done))


def _entry(line: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            return entry
    return None


class WandbLog:
    """Mirrors metrics to Weights & Biases; a resumed run continues its curves.

    Raises UserError where W&B refuses from the start. What fails later is a warning, once:
    metrics.jsonl has it all.
    """

    def __init__(self, project: str, *, run_id: str, offline: bool, config: Mapping[str, Any]):
        import wandb

        self._warned = False
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                reinit="create_new",  # a sweep's runs go on side by side
                mode="offline" if offline else "online",
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"--wandb_project {project}: {error} (or give --wandb_offline, and send the run "
                "later with `wandb sync`)"
            ) from None

    def log(self, entry: Mapping[str, Any], density: torch.Tensor | None) -> None:
        """Log one entry; density (n_latents,) becomes a histogram of log10."""
        import wandb

        shown = dict(entry)
        if density is not None:
            values = density[density > 0].log10().tolist()
            shown["val/log10_latent_density"] = wandb.Histogram(values)
        with self._never_fatal():
            self._run.log(shown, step=entry["step"])

    def close(self) -> None:
        """Finish the run."""
        with self._never_fatal():
            self._run.finish()

    @contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service's library raises: training matters more
            if not self._warned:
                log.warning("warning: W&B does not get all metrics: %s", error)
            self._warned = True
