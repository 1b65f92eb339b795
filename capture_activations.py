"""Stage 1: run Llama over a sentence dataset and store the activations of one or more layers.

    torchrun --nproc_per_node=1 capture_activations.py --model_dir M --dataset_dir D \
        --output_dir activation_outputs/ --num_samples 50000

Sentences are sampled in a seeded order and cut into shards; shard k belongs to rank k mod world
size, so the bytes do not depend on the number of ranks. Within a shard, sentences of similar length
are packed into batches without padding, the forward stops at the last captured layer, and the rows
are put back into the sentences' order. A model too large for one GPU is split over every N ranks
(--model_parallel_size N), which then count as one.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llama_3 import (
    HOOK_NAMES,
    CheckpointError,
    HookPoint,
    LlamaArgs,
    Tokenizer,
    load_args,
    load_llama,
)
from saint.activation_store import (
    SENTENCES,
    STAGE,
    VOCABULARY,
    layer_dir_name,
    part_name,
    read_shard,
    shard_name,
)
from saint.capture import (
    Capture,
    ShardJob,
    follow_shards,
    is_complete,
    shard_jobs,
    shard_paths,
    shard_sizes,
    write_job,
)
from saint.manifests import Output, State, file_checksum, model_fingerprint, read_manifest
from saint.runtime import (
    UserError,
    Workers,
    add_device_flags,
    add_model_parallel_flag,
    add_overwrite_flag,
    atomic_path,
    log,
    log_arguments,
    pick_dtype,
    positive_int,
    progress,
    run_stage,
    start_workers,
)
from saint.sentences import Sampler, SentenceDataset, open_dataset

_SHARD_BYTES = 1_000_000_000
# English sentences are about this long; only sizes shards, and is recorded by its result.
_TYPICAL_TOKENS = 28


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
    what = parser.add_argument_group("what to capture")
    what.add_argument("--num_samples", type=int, default=50_000, help="sentences [%(default)s]")
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
        "--shuffle_seed", type=int, default=42, help="seed of the sample [%(default)s]"
    )
    what.add_argument(
        "--no_bos", action="store_true", help="no BOS token before a sentence (the older behaviour)"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch_tokens",
        type=positive_int,
        help="tokens of one forward pass [32768 on a GPU, 4096 on a CPU]",
    )
    speed.add_argument(
        "--sentences_per_shard", type=positive_int, help="sentences of a shard file [about 1 GB]"
    )
    add_device_flags(parser, dtype=True)
    add_model_parallel_flag(parser)
    add_overwrite_flag(parser)
    return parser


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


def require_space(output_dir: Path, n_bytes: int) -> None:
    """Raise UserError when the disk cannot hold what is still to be written."""
    free = shutil.disk_usage(output_dir).free
    if n_bytes > free:
        raise UserError(
            f"{output_dir} needs about {n_bytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: "
            "make room or lower --num_samples, then run the same command"
        )


def capture_shards(
    capture: Capture, jobs: Iterator[ShardJob], output_dir: Path, num_samples: int, bar: Any
) -> int:
    """Capture the given shards; tokenising and writing overlap the forward. Return the tokens."""
    n_stored = 0
    with ThreadPoolExecutor(1) as tokenising, ThreadPoolExecutor(1) as writing:
        written: Future[None] | None = None
        job = next(jobs, None)
        prepared = tokenising.submit(capture.tokenise, job) if job else None
        while job is not None and prepared is not None:
            following = next(jobs, None)
            token_lists = prepared.result()
            if following is not None:
                prepared = tokenising.submit(capture.tokenise, following)
            n_tokens = sum(map(len, token_lists))
            bytes_per_sentence = (
                2 * capture.model.args.dim * len(capture.hooks) * n_tokens / len(token_lists)
            )
            if n_stored == 0:
                require_space(output_dir, int(bytes_per_sentence * num_samples))
            rows = capture.run(token_lists, bar)
            if written is not None:
                written.result()
            written = writing.submit(write_job, output_dir, job, token_lists, rows)
            n_stored += n_tokens
            job = following
        if written is not None:
            written.result()
    return n_stored


def write_vocabulary(output_dir: Path, tokenizer: Tokenizer) -> None:
    """Write the display text of every token id, for stages that do not load the tokenizer."""
    ids = range(tokenizer.n_vocab)
    table = pa.table(
        {"token_id": pa.array(ids, pa.int32()), "text": [tokenizer.token_text(i) for i in ids]}
    )
    with atomic_path(output_dir / VOCABULARY) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def count_stored(output_dir: Path, hooks: Sequence[HookPoint], n_shards: int) -> dict[str, Any]:
    """Count sentences and tokens per shard from the shards themselves."""
    shards = [read_shard(shard_paths(output_dir, hooks[:1], i)[hooks[0]]) for i in range(n_shards)]
    return {
        "n_shards": n_shards,
        "n_sentences": sum(len(s.sentence_ids) for s in shards),
        "n_tokens": sum(len(s.token_ids) for s in shards),
        "shard_sentences": [len(s.sentence_ids) for s in shards],
        "shard_tokens": [len(s.token_ids) for s in shards],
    }


def plan_output(
    args: argparse.Namespace,
    model_args: LlamaArgs,
    hooks: list[HookPoint],
    dataset: SentenceDataset,
    device: torch.device,
) -> Output:
    """Resolve what shapes the bytes, automatic values included."""
    per_shard = _SHARD_BYTES // (2 * model_args.dim * _TYPICAL_TOKENS)
    return Output(
        path=args.output_dir,
        stage=STAGE,
        arguments={
            "num_samples": args.num_samples,
            "layers": ",".join(str(layer) for layer in dict.fromkeys(h.layer for h in hooks)),
            "hook_points": ",".join(dict.fromkeys(h.name for h in hooks)),
            "max_token_length": args.max_token_length,
            "shuffle_seed": args.shuffle_seed,
            "no_bos": args.no_bos,
            "batch_tokens": args.batch_tokens or (32768 if device.type == "cuda" else 4096),
            "sentences_per_shard": args.sentences_per_shard or max(1, per_shard),
            "dtype": str(pick_dtype(args.dtype, device)).removeprefix("torch."),
        },
        sources={"model": model_fingerprint(args.model_dir), "dataset": dataset.fingerprint},
        single_file=False,
        own_patterns=("layer_*", SENTENCES, VOCABULARY),
        extendable=("num_samples",),
        settings={
            "model_dir": str(args.model_dir),
            "dataset_dir": args.dataset_dir,
            "device": str(device),
        },
    )


def finish(
    output: Output, model_args: LlamaArgs, hooks: list[HookPoint], n_shards: int, sampler: Sampler
) -> None:
    """Write the manifest from what lies on disk."""
    arguments = output.arguments
    counts = count_stored(output.path, hooks, n_shards) | {"skipped": asdict(sampler.skipped)}
    names = [VOCABULARY] + [f"{SENTENCES}/{part_name(i)}" for i in range(n_shards)]
    names += [f"{layer_dir_name(*h)}/{shard_name(i)}" for h in hooks for i in range(n_shards)]
    facts = {
        "layers": {layer_dir_name(*h): {"layer": h.layer, "hook_point": h.name} for h in hooks},
        "d_model": model_args.dim,
        "prepend_bos": not arguments["no_bos"],
        "max_token_length": arguments["max_token_length"],
        "dtype": arguments["dtype"],
        "model_fingerprint": output.sources["model"],
        "dataset_fingerprint": output.sources["dataset"],
        "text_column": sampler.dataset.text_column,
        "n_sentences": counts["n_sentences"],
        "n_tokens": counts["n_tokens"],
    }
    with ThreadPoolExecutor() as pool:
        known = dict(
            zip(names, pool.map(lambda n: file_checksum(output.path / n), names), strict=True)
        )
    output.finish(facts=facts, counts=counts, files=names, known=known)


def main(argv: Sequence[str] | None = None) -> None:
    """Capture activations as the command line says."""
    args = build_parser().parse_args(argv)
    model_args = load_args(args.model_dir)
    model_args.shard(args.model_parallel_size)  # raises if it does not split
    workers = start_workers(args.device, model_parallel_size=args.model_parallel_size)
    log_arguments(args)
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: at least one sentence is needed")
    hooks = parse_hooks(args.layers, args.hook_points, model_args.n_layers)
    dataset = open_dataset(args.dataset_dir, text_column=args.text_column)
    if dataset.n_rows == 0:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no rows")
    output = plan_output(args, model_args, hooks, dataset, workers.device)
    state = workers.on_main(lambda: output.begin(overwrite=args.overwrite))
    if state is State.DONE:
        counts = read_manifest(output.path, STAGE).counts
        log.info("done already: %s holds %s tokens", output.path, f"{counts['n_tokens']:,}")
        return
    capture_and_finish(args, output, hooks, dataset, workers)


def capture_and_finish(
    args: argparse.Namespace,
    output: Output,
    hooks: list[HookPoint],
    dataset: SentenceDataset,
    workers: Workers,
) -> None:
    """Load the model, capture this rank's missing shards, and write the manifest on rank 0."""
    started = time.monotonic()
    kept = []
    if output.manifest_path.exists():
        kept = read_manifest(output.path, STAGE).counts["shard_sentences"]
    sizes = shard_sizes(args.num_samples, output.arguments["sentences_per_shard"], kept)
    sampler = Sampler(dataset, args.shuffle_seed)
    n_jobs = 0

    def own_jobs() -> Iterator[ShardJob]:
        nonlocal n_jobs
        for job in shard_jobs(sampler, sizes):
            n_jobs += 1
            if workers.owns(job.index) and not is_complete(output.path, hooks, job):
                yield job

    model, tokenizer = load_llama(
        args.model_dir,
        device=workers.device,
        dtype=pick_dtype(args.dtype, workers.device),
        n_layers=max(h.layer for h in hooks) + 1,
        model_parallel_size=args.model_parallel_size,
    )
    capture = Capture(
        model,
        tokenizer,
        hooks,
        not args.no_bos,
        args.max_token_length,
        output.arguments["batch_tokens"],
    )
    if workers.is_main:
        write_vocabulary(output.path, tokenizer)
    with progress(None, unit="tok", description="capture", unit_scale=True) as bar:
        if workers.is_writer:
            n_stored = capture_shards(capture, own_jobs(), output.path, args.num_samples, bar)
        else:
            n_stored = follow_shards(capture, own_jobs(), bar)
    workers.barrier()
    if n_jobs == 0:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no usable sentence")
    everyone = workers.gather(n_stored)
    if workers.is_main:
        finish(output, load_args(args.model_dir), hooks, n_jobs, sampler)
        summarise(output, sum(everyone), time.monotonic() - started)


def summarise(output: Output, n_stored: int, seconds: float) -> None:
    """Log the figures a person wants; n_stored: tokens that this run added."""
    manifest = read_manifest(output.path, STAGE)
    size = sum(file["bytes"] for file in manifest.files.values())
    if manifest.counts["n_sentences"] < output.arguments["num_samples"]:
        log.info("the dataset has only %d usable sentences", manifest.counts["n_sentences"])
    log.info(
        "captured %s tokens of %s sentences into %s: %.2f GB, %.0f tokens/s, no padding, "
        "%d rows skipped, %.0f s",
        f"{manifest.counts['n_tokens']:,}",
        f"{manifest.counts['n_sentences']:,}",
        output.path,
        size / 1e9,
        n_stored / max(seconds, 1e-9),
        sum(manifest.counts["skipped"].values()),
        seconds,
    )


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
