"""Stage 1: run Llama over a sentence dataset and store the activations of one or more layers.

    torchrun --nproc_per_node=1 capture_activations.py --model_dir M --dataset_dir D \
        --output_dir activation_outputs/ --num_samples 50000

Sentences are sampled in a seeded order and cut into shards; shard k belongs to rank k mod world
size, so the bytes do not depend on the number of ranks. Within a shard, sentences of similar length
are packed into batches without padding, the forward stops at the last captured layer, and a thread
writes the rows to their places in the sentences' order. A model too large for one GPU is split over
every N ranks (--model_parallel_size N), which then count as one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_3 import HOOK_NAMES, CheckpointError, HookPoint, load_args, load_llama
from saint.capture.record import Progress, begin, finish, plan_output, write_vocabulary
from saint.capture.shards import (
    Capture,
    ShardJob,
    capture_shards,
    follow_shards,
    is_complete,
    shard_jobs,
    shard_paths,
    shard_sizes,
)
from saint.stage.devices import pick_dtype
from saint.stage.errors import UserError, log
from saint.stage.files import naming_full_disk
from saint.stage.flags import (
    add_device_flags,
    add_model_parallel_flag,
    add_overwrite_flag,
    positive_int,
    seed_number,
)
from saint.stage.manifests import Output, State, read_manifest
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.terminal import FINAL
from saint.stage.workers import Workers, start_workers
from saint.store.activation_store import STAGE
from saint.store.dataset import Sampler, SentenceDataset, open_dataset
from saint.store.row_format import STORE_DTYPES, row_bytes

NEXT = "; next: sae_preprocessing.py --input_dir %s"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Run Llama over a sentence dataset and store one layer's activations.",
        epilog="Run it again to resume; a larger --num_samples extends what is there.",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model_dir",
        type=Path,
        required=True,
        help="Llama weights: Meta's or Hugging Face's format",
    )
    files.add_argument(
        "--dataset_dir", required=True, help="parquet file or directory; a path or a URI (s3://…)"
    )
    files.add_argument(
        "--output_dir", type=Path, default=Path("activation_outputs"), help="[%(default)s]"
    )
    files.add_argument("--text_column", default="text", help="column of sentences [%(default)s]")
    _add_what(parser)
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch_tokens",
        type=positive_int,
        help="tokens of one forward pass [at most 32768 on a GPU and 4096 on a CPU, less where "
        "memory is short; kept when a run is resumed]",
    )
    speed.add_argument(
        "--sentences_per_shard", type=positive_int, help="sentences of a shard file [about 1 GB]"
    )
    add_device_flags(parser, dtype=True)
    add_model_parallel_flag(parser)
    add_overwrite_flag(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to capture")
    what.add_argument(
        "--num_samples", type=positive_int, default=50_000, help="sentences [%(default)s]"
    )
    what.add_argument(
        "--layers", default="22", help="0-based layers, like 22 or 8,16,22 [%(default)s]"
    )
    what.add_argument(
        "--hook_points", default="resid_pre", help=f"of {', '.join(HOOK_NAMES)} [%(default)s]"
    )
    what.add_argument(
        "--max_token_length",
        type=positive_int,
        default=192,
        help="longer sentences are cut to this many tokens, BOS not counted [%(default)s]",
    )
    what.add_argument(
        "--shuffle_seed", type=seed_number, default=42, help="seed of the sample [%(default)s]"
    )
    what.add_argument(
        "--no_bos", action="store_true", help="no BOS token before a sentence (the older behaviour)"
    )
    what.add_argument(
        "--store_dtype",
        choices=STORE_DTYPES,
        default="bfloat16",
        help="number format on disk; int8, with one scale per token, takes half [%(default)s]",
    )


def parse_hooks(layers: str, hook_points: str, n_layers: int) -> list[HookPoint]:
    """Return every named hook point of every named layer, checked against the model."""
    try:
        wanted = sorted({int(text) for text in layers.split(",")})
    except ValueError:
        raise UserError(f"--layers {layers}: expected numbers like 22 or 8,16,22") from None
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise UserError(f"--layers {layer}: the model has layers 0 to {n_layers - 1}")
    names = [name.strip() for name in hook_points.split(",")]
    for name in names:
        if name not in HOOK_NAMES:
            raise UserError(f"--hook_points {name}: expected one of {', '.join(HOOK_NAMES)}")
    return [HookPoint(layer, name) for layer in wanted for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    """Capture activations as the command line says."""
    args = build_parser().parse_args(argv)
    model_args = load_args(args.model_dir)
    model_args.shard(args.model_parallel_size)  # raises if it does not split
    workers = start_workers(args.device, model_parallel_size=args.model_parallel_size)
    log_arguments(args, build_parser())
    hooks = parse_hooks(args.layers, args.hook_points, model_args.n_layers)
    dataset = open_dataset(args.dataset_dir, text_column=args.text_column)
    if dataset.n_rows == 0:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no rows")
    output = plan_output(args, model_args, hooks, dataset, workers.device)
    output.arguments |= workers.broadcast(output.arguments)  # memory differs between machines
    state = workers.on_main(lambda: begin(output, overwrite=args.overwrite))
    if state is State.DONE:
        counts = read_manifest(output.path, STAGE).counts
        log.info(
            "done already: %s holds %s tokens" + NEXT,
            output.path,
            f"{counts['n_tokens']:,}",
            output.path,
        )
        return
    try:
        with naming_full_disk(output.path):
            capture_and_finish(args, output, hooks, dataset, workers)
    except CheckpointError:  # raised before anything is captured
        if state is State.NEW and workers.is_main:
            output.take_back()
        raise


def load_capture(
    args: argparse.Namespace, hooks: list[HookPoint], batch_tokens: int, workers: Workers
) -> Capture:
    """Load the model up to the last hooked layer, and its tokenizer."""
    model, tokenizer = load_llama(
        args.model_dir,
        device=workers.device,
        dtype=pick_dtype(args.dtype, workers.device),
        n_layers=max(h.layer for h in hooks) + 1,
        model_parallel_size=args.model_parallel_size,
    )
    bos, limit = not args.no_bos, args.max_token_length
    return Capture(model, tokenizer, hooks, bos, limit, batch_tokens, args.store_dtype)


def capture_and_finish(
    args: argparse.Namespace,
    output: Output,
    hooks: list[HookPoint],
    dataset: SentenceDataset,
    workers: Workers,
) -> None:
    """Load the model, capture this rank's missing shards, and write the manifest on rank 0."""
    kept = []
    if output.manifest_path.exists():
        kept = read_manifest(output.path, STAGE).counts["shard_sentences"]
    n_samples = min(args.num_samples, dataset.n_rows)
    sizes = shard_sizes(n_samples, output.arguments["sentences_per_shard"], kept)
    sampler = Sampler(dataset, args.shuffle_seed)
    n_jobs = 0

    def own_jobs() -> Iterator[ShardJob]:
        nonlocal n_jobs
        for job in shard_jobs(sampler, sizes):
            n_jobs += 1
            if workers.owns(job.index) and not is_complete(output.path, hooks, job):
                yield job

    capture = load_capture(args, hooks, output.arguments["batch_tokens"], workers)
    model_args = capture.model.args
    if workers.is_main:
        write_vocabulary(output.path, capture.tokenizer)
    started = time.monotonic()
    missing = {
        i: size
        for i, size in enumerate(sizes)
        if not all(path.exists() for path in shard_paths(output.path, hooks, i).values())
    }
    description = workers.label("capture")
    with progress(None, unit="tok", description=description, unit_scale=True) as bar:
        done = Progress(
            output,
            len(hooks),
            row_bytes(model_args.dim, args.store_dtype),
            sum(missing.values()),
            sum(size for i, size in missing.items() if workers.owns(i)),
            bar,
        )
        if workers.is_writer:
            capture_shards(
                capture, own_jobs(), output.path, on_tokenised=done.tokenised, on_batch=done.batch
            )
        else:
            follow_shards(capture, own_jobs())
    workers.barrier()
    if n_jobs == 0:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no usable sentence")
    everyone = workers.gather((done.n_stored, done.n_computed))
    if workers.is_main:
        finish(output, model_args, hooks, n_jobs, sampler)
        n_stored, n_computed = (sum(column) for column in zip(*everyone, strict=True))
        summarise(output, n_stored, n_computed, time.monotonic() - started)


def summarise(output: Output, n_stored: int, n_computed: int, seconds: float) -> None:
    """Log the figures a person wants; n_stored, n_computed: tokens that this run added and ran."""
    manifest = read_manifest(output.path, STAGE)
    counts = manifest.counts
    size = sum(file["bytes"] for file in manifest.files.values())
    if counts["n_sentences"] < output.arguments["num_samples"]:
        log.info("the dataset has only %d usable sentences", counts["n_sentences"])
    speed = "an earlier run captured all of them"
    if n_computed:
        speed = (
            f"{n_stored / max(seconds, 1e-9):.0f} tokens/s, padding 0 %, BOS "
            f"{100 * (1 - n_stored / n_computed):.1f} % of what was computed"
        )
    log.info(
        "captured %s tokens of %s sentences into %s: %.2f GB, %s, %d rows skipped, %d sentences "
        "cut, %.0f s" + NEXT,
        f"{counts['n_tokens']:,}",
        f"{counts['n_sentences']:,}",
        output.path,
        size / 1e9,
        speed,
        sum(counts["skipped"].values()),
        counts["n_cut_sentences"],
        seconds,
        output.path,
        extra=FINAL,
    )


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
