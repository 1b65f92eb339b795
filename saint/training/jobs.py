"""From a command line to the SAEs that it asks for, checked before any of them begins."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from saint.stage.errors import UserError
from saint.stage.manifests import Output, file_checksum, recorded_arguments
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows, open_batched_rows
from saint.training.recipe import Recipe, resolve_recipe
from saint.training.run import Job
from saint.training.run_files import RunFiles
from saint.training.sweep import Variant, read_sweep
from saint.training.weights import read_mean, refuse_another_mean

STAGE = "sae_training"


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--sweep` and `--sweep_dir`."""
    group = parser.add_argument_group("several SAEs in one pass over the rows")
    group.add_argument(
        "--sweep",
        type=Path,
        metavar="YAML",
        help="entries of flags above with values or lists of values, which are multiplied out: "
        "[{learning_rate: [0.002, 0.004], k: [16, 32]}]; data_dir names other rows",
    )
    group.add_argument(
        "--sweep_dir",
        type=Path,
        default=Path("sae_sweep"),
        help="where a sweep's SAEs go, each named by what differs [%(default)s]",
    )


def plan_jobs(args: argparse.Namespace, workers: Workers) -> list[Job]:
    """Return the one SAE that is asked for, or a sweep's. Raises UserError for what cannot be."""
    opened: dict[Path, BatchedRows] = {}
    if args.sweep is None:
        return [_job(args, Variant("", {}), opened, workers)]
    jobs = []
    for variant in read_sweep(args.sweep):
        try:
            jobs.append(_job(args, variant, opened, workers))
        except UserError as error:
            raise UserError(f"{args.sweep}, {variant.name}: {error}") from None
    identities = {job.output.identity: job.name for job in jobs}
    for job in jobs:
        if identities[job.output.identity] != job.name:
            raise UserError(
                f"{args.sweep} asks for one run as {job.name} and {identities[job.output.identity]}"
            )
    return jobs


def _job(
    args: argparse.Namespace, variant: Variant, opened: dict[Path, BatchedRows], workers: Workers
) -> Job:
    asked = variant.of(args)
    if asked.data_dir not in opened:
        opened[asked.data_dir] = open_batched_rows(asked.data_dir)
    rows = opened[asked.data_dir]
    path = args.sweep_dir / f"{variant.name}.pt" if variant.name else args.model_save_path
    earlier = recorded_arguments(path, STAGE, single_file=True)
    recipe = resolve_recipe(asked, rows, workers, {} if args.overwrite else earlier)
    read_mean(asked.b_pre_path, rows.facts["d_model"])
    refuse_another_mean(asked.b_pre_path, rows)
    files = RunFiles(path, args.keep_last_n)
    output = _output(asked, rows, recipe, files, workers)
    return Job(variant.name, asked.b_pre_path, rows, recipe, files, output)


def _output(
    args: argparse.Namespace, rows: BatchedRows, recipe: Recipe, files: RunFiles, workers: Workers
) -> Output:
    """Describe a run for its manifest."""
    sources = {"data": rows.manifest.fingerprint, "b_pre": file_checksum(args.b_pre_path)["xxh3"]}
    if args.model_load_path:
        if not args.model_load_path.exists():
            raise UserError(f"--model_load_path {args.model_load_path} does not exist")
        sources["model_load_path"] = file_checksum(args.model_load_path)["xxh3"]
    return Output(
        path=files.model,
        stage=STAGE,
        arguments=recipe.arguments(),
        sources=sources,
        single_file=True,
        own_names=files.names(),
        own_patterns=files.patterns(),
        settings={
            "device": str(workers.device),
            "world_size": workers.world_size,
            "latent_parallel_size": workers.latents.size,
            "kernels": args.kernels,
            "data_dir": str(args.data_dir),
        },
    )


def by_rows(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group jobs that take the same batches of the same rows, in the order of their first ones."""
    groups: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        key = (job.rows.manifest.fingerprint, job.recipe.batch_size)
        groups.setdefault(key, []).append(job)
    return list(groups.values())
