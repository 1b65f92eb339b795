"""What a capture run settles before it begins, follows while it runs, and records at its end."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llama_3 import HookPoint, LlamaArgs, Tokenizer
from saint.capture.shards import CapturedBatch, ShardJob, Tokenised, read_record
from saint.stage.devices import available_bytes, pick_dtype
from saint.stage.errors import UserError
from saint.stage.files import atomic_path, require_space
from saint.stage.manifests import (
    Output,
    State,
    file_checksum,
    model_fingerprint,
    read_manifest,
    recorded_numbers,
)
from saint.store.activation_store import SENTENCES, STAGE, VOCABULARY, layer_dir_name, part_name
from saint.store.dataset import Sampler, SentenceDataset
from saint.store.row_format import row_bytes

_SHARD_BYTES = 1_000_000_000
# English sentences are about this long; only sizes shards, and is recorded by its result.
_TYPICAL_TOKENS = 28


def automatic_batch_tokens(model_args: LlamaArgs, device: torch.device, weight_bytes: int) -> int:
    """Return the largest power of two of tokens whose forward pass takes half of the free memory.

    At most 32,768 on a GPU (more is no faster) and 4,096 on a CPU (larger leaves its caches).
    """
    per_token = 4 * (12 * model_args.dim + 3 * model_args.ffn_dim)
    most = 32768 if device.type == "cuda" else 4096
    fitting = (available_bytes(device) - weight_bytes) // 2 // per_token
    return min(most, 1 << max(8, fitting.bit_length() - 1)) if fitting > 0 else 256


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
    earlier: dict[str, int] = {}
    if not args.overwrite:
        earlier = recorded_numbers(args.output_dir, STAGE)
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
        own_names=(SENTENCES, VOCABULARY),
        own_patterns=("layer_*",),
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


def write_vocabulary(output_dir: Path, tokenizer: Tokenizer) -> None:
    """Write the display text of every token id, for stages that do not load the tokenizer."""
    ids = range(tokenizer.n_vocab)
    table = pa.table(
        {"token_id": pa.array(ids, pa.int32()), "text": [tokenizer.token_text(i) for i in ids]}
    )
    with atomic_path(output_dir / VOCABULARY) as temporary:
        pq.write_table(table, temporary, compression="zstd")


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
