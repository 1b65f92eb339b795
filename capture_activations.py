"""Stage 1: run Llama over a sentence dataset and store the activations of one or more layers.

    torchrun --nproc_per_node=1 capture_activations.py --model_dir M --dataset_dir D \
        --output_dir activation_outputs/ --num_samples 50000

Sentences are sampled in a seeded order and cut into shards; shard k belongs to rank k mod world
size, so the bytes do not depend on the number of ranks. Within a shard, sentences of similar length
are packed into batches without padding, the forward stops at the last captured layer, and a thread
writes the rows to their places in the sentences' order.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from saint.activation_store import SENTENCES, STAGE, VOCABULARY, layer_dir_name, part_name
from saint.capture import (
    Capture,
    CapturedBatch,
    ShardJob,
    Tokenised,
    capture_shards,
    is_complete,
    read_record,
    shard_jobs,
    shard_paths,
    shard_sizes,
)
from saint.manifests import (
    Output,
    State,
    file_checksum,
    manifest_path,
    model_fingerprint,
    read_manifest,
    recorded_arguments,
)
from saint.row_format import STORE_DTYPES, row_bytes
from saint.runtime import (
    UserError,
    Workers,
    add_device_flags,
    add_overwrite_flag,
    atomic_path,
    available_bytes,
    log,
    log_arguments,
    naming_full_disk,
    pick_dtype,
    positive_int,
    progress,
    require_space,
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
    what.add_argument(
        "--store_dtype",
        choices=STORE_DTYPES,
        default="bfloat16",
        help="number format on disk; int8, with one scale per token, takes half [%(default)s]",
    )
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


def automatic_batch_tokens(model_args: LlamaArgs, device: torch.device, weight_bytes: int) -> int:
    """Return the largest power of two of tokens whose forward pass takes half of the free memory.

    At most 32,768 on a GPU (more is no faster) and 4,096 on a CPU (larger leaves its caches).
    """
    per_token = 4 * (12 * model_args.dim + 3 * model_args.ffn_dim)
    most = 32768 if device.type == "cuda" else 4096
    fitting = (available_bytes(device) - weight_bytes) // 2 // per_token
    return min(most, 1 << max(8, fitting.bit_length() - 1)) if fitting > 0 else 256


def write_vocabulary(output_dir: Path, tokenizer: Tokenizer) -> None:
    """Write the display text of every token id, for stages that do not load the tokenizer."""
    ids = range(tokenizer.n_vocab)
    table = pa.table(
        {"token_id": pa.array(ids, pa.int32()), "text": [tokenizer.token_text(i) for i in ids]}
    )
    with atomic_path(output_dir / VOCABULARY) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def plan_output(
    args: argparse.Namespace,
    model_args: LlamaArgs,
    hooks: list[HookPoint],
    dataset: SentenceDataset,
    device: torch.device,
) -> Output:
    """Resolve what shapes the bytes, automatic values included: an earlier run's, if there is one.

    Raises UserError when the store cannot be extended any more.
    """
    earlier: dict[str, Any] = {}
    if not args.overwrite:
        earlier = recorded_arguments(manifest_path(args.output_dir, STAGE, single_file=False))
    weights = [p for p in args.model_dir.glob("*") if p.suffix in (".pth", ".safetensors")]
    automatic = {
        "batch_tokens": lambda: automatic_batch_tokens(
            model_args, device, sum(p.stat().st_size for p in weights)
        ),
        "sentences_per_shard": lambda: max(
            1, _SHARD_BYTES // (row_bytes(model_args.dim, args.store_dtype) * _TYPICAL_TOKENS)
        ),
    }
    resolved = {
        name: getattr(args, name) or earlier.get(name) or choose()
        for name, choose in automatic.items()
    }
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
            "dtype": str(pick_dtype(args.dtype, device)).removeprefix("torch."),
            "store_dtype": args.store_dtype,
            **resolved,
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


def begin(output: Output, *, overwrite: bool) -> State:
    """Begin the run. Raises UserError when the store's rows have moved, so that it cannot grow."""
    if output.manifest_path.exists() and not overwrite:
        earlier = read_manifest(output.path, STAGE)
        grows = output.arguments["num_samples"] > earlier.arguments["num_samples"]
        if grows and "in_place" in earlier.facts:
            raise UserError(
                f"{output.path} was preprocessed in place and cannot be extended: choose another "
                "--output_dir, or --overwrite to start over"
            )
    return output.begin(overwrite=overwrite)


def finish(
    output: Output, model_args: LlamaArgs, hooks: list[HookPoint], n_shards: int, sampler: Sampler
) -> None:
    """Write the manifest from what every shard's writer recorded."""
    arguments = output.arguments
    records = [read_record(output.path, i) for i in range(n_shards)]
    counts = {
        "n_shards": n_shards,
        "n_sentences": sum(r["n_sentences"] for r in records),
        "n_tokens": sum(r["n_tokens"] for r in records),
        "n_cut_sentences": sum(r["n_cut"] for r in records),
        "shard_sentences": [r["n_sentences"] for r in records],
        "shard_tokens": [r["n_tokens"] for r in records],
        "skipped": asdict(sampler.skipped),
    }
    facts = {
        "layers": {layer_dir_name(*h): {"layer": h.layer, "hook_point": h.name} for h in hooks},
        "d_model": model_args.dim,
        "prepend_bos": not arguments["no_bos"],
        "max_token_length": arguments["max_token_length"],
        "dtype": arguments["dtype"],
        "store_dtype": arguments["store_dtype"],
        "model_fingerprint": output.sources["model"],
        "dataset_fingerprint": output.sources["dataset"],
        "text_column": sampler.dataset.text_column,
        "n_sentences": counts["n_sentences"],
        "n_tokens": counts["n_tokens"],
    }
    own = [VOCABULARY, *(f"{SENTENCES}/{part_name(i)}" for i in range(n_shards))]
    with ThreadPoolExecutor() as pool:
        checksums = pool.map(lambda name: file_checksum(output.path / name), own)
        known = dict(zip(own, checksums, strict=True))
    for record in records:
        known |= record["files"]
    output.finish(facts=facts, counts=counts, files=known, known=known)


def main(argv: Sequence[str] | None = None) -> None:
    """Capture activations as the command line says."""
    args = build_parser().parse_args(argv)
    workers = start_workers(args.device)
    log_arguments(args)
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: at least one sentence is needed")
    model_args = load_args(args.model_dir)
    hooks = parse_hooks(args.layers, args.hook_points, model_args.n_layers)
    dataset = open_dataset(args.dataset_dir, text_column=args.text_column)
    if dataset.n_rows == 0:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no rows")
    output = plan_output(args, model_args, hooks, dataset, workers.device)
    output.arguments |= workers.broadcast(output.arguments)  # memory differs between machines
    state = workers.on_main(lambda: begin(output, overwrite=args.overwrite))
    if state is State.DONE:
        counts = read_manifest(output.path, STAGE).counts
        log.info("done already: %s holds %s tokens", output.path, f"{counts['n_tokens']:,}")
        return
    capture_and_finish(args, output, hooks, dataset, workers)


@dataclass
class Progress:
    """Follows one rank's run: space before the first shard, the bar, and what the summary says.

    n_missing: sentences still to capture, of all ranks; n_own: this rank's share of them.
    """

    output: Output
    n_hooks: int
    bytes_per_token: int
    n_missing: int
    n_own: int
    bar: Any
    n_tokenised: int = 0
    n_sentences: int = 0
    n_stored: int = 0
    n_computed: int = 0

    def tokenised(self, job: ShardJob, tokenised: Tokenised) -> None:
        """Estimate the whole from the sentences so far. Raises UserError if space is short."""
        first = self.n_sentences == 0
        self.n_tokenised += tokenised.n_tokens
        self.n_sentences += len(job.sentence_ids)
        per_sentence = self.n_tokenised / self.n_sentences
        if first:
            n_bytes = per_sentence * self.n_missing * self.bytes_per_token * self.n_hooks
            remedy = "make room or lower --num_samples"
            require_space(self.output.path, int(n_bytes), remedy)
        self.bar.total = int(per_sentence * max(self.n_own, self.n_sentences))
        self.bar.refresh()

    def batch(self, batch: CapturedBatch, n_stored: int) -> None:
        """Count a batch."""
        self.n_stored += n_stored
        self.n_computed += batch.n_computed
        self.bar.update(n_stored)


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

    def is_own(index: int) -> bool:
        return index % workers.world_size == workers.rank

    def own_jobs() -> Iterator[ShardJob]:
        nonlocal n_jobs
        for job in shard_jobs(sampler, sizes):
            n_jobs += 1
            if is_own(job.index) and not is_complete(output.path, hooks, job):
                yield job

    model, tokenizer = load_llama(
        args.model_dir,
        device=workers.device,
        dtype=pick_dtype(args.dtype, workers.device),
        n_layers=max(h.layer for h in hooks) + 1,
    )
    capture = Capture(
        model,
        tokenizer,
        hooks,
        not args.no_bos,
        args.max_token_length,
        output.arguments["batch_tokens"],
        args.store_dtype,
    )
    if workers.is_main:
        write_vocabulary(output.path, tokenizer)
    started = time.monotonic()
    missing = {
        i: size
        for i, size in enumerate(sizes)
        if not all(path.exists() for path in shard_paths(output.path, hooks, i).values())
    }
    with (
        naming_full_disk(output.path),
        progress(None, unit="tok", description="capture", unit_scale=True) as bar,
    ):
        done = Progress(
            output,
            len(hooks),
            row_bytes(model.args.dim, args.store_dtype),
            sum(missing.values()),
            sum(size for i, size in missing.items() if is_own(i)),
            bar,
        )
        capture_shards(
            capture, own_jobs(), output.path, on_tokenised=done.tokenised, on_batch=done.batch
        )
    workers.barrier()
    if n_jobs == 0:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no usable sentence")
    everyone = workers.gather((done.n_stored, done.n_computed))
    if workers.is_main:
        finish(output, model.args, hooks, n_jobs, sampler)
        n_stored, n_computed = (sum(column) for column in zip(*everyone, strict=True))
        summarise(output, n_stored, n_computed, time.monotonic() - started)


def summarise(output: Output, n_stored: int, n_computed: int, seconds: float) -> None:
    """Log the figures a person wants; n_stored, n_computed: tokens that this run added and ran."""
    manifest = read_manifest(output.path, STAGE)
    counts = manifest.counts
    size = sum(file["bytes"] for file in manifest.files.values())
    if counts["n_sentences"] < output.arguments["num_samples"]:
        log.info("the dataset has only %d usable sentences", counts["n_sentences"])
    log.info(
        "captured %s tokens of %s sentences into %s: %.2f GB, %.0f tokens/s, padding 0 %%, BOS "
        "%.1f %% of what was computed, %d rows skipped, %d sentences cut, %.0f s",
        f"{counts['n_tokens']:,}",
        f"{counts['n_sentences']:,}",
        output.path,
        size / 1e9,
        n_stored / max(seconds, 1e-9),
        100 * (1 - n_stored / max(n_computed, 1)),
        sum(counts["skipped"].values()),
        counts["n_cut_sentences"],
        seconds,
    )


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
