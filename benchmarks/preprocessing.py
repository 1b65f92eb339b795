"""Preprocessing and reading against a re-creation of this toolkit's first version.

What its preprocessing did, written anew from its description: each process reads its share of the
files (one per sentence) in directory order, concatenates them, and writes one file per batch of
contiguous tokens; the mean is that of the raw activations.

Both get the same rows and processes, in turn, and are timed without starting Python: medians over
the repeats. Reading: the trainer's stream of batches against a plain sequential read of the same
files. The last line is JSON.

    python -m benchmarks.preprocessing --prep_tokens 1000000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import sae_preprocessing
from benchmarks.common import SHAPES, draw_sentences, medians, seconds
from saint.stage.manifests import Output
from saint.store.activation_store import (
    SENTENCES,
    STAGE,
    VOCABULARY,
    part_name,
    shard_file,
    shard_name,
)
from saint.store.shuffled_rows import open_batched_rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Preprocessing and reading against version one.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="embedded", help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing [%(default)s]")
    parser.add_argument("--prep_tokens", type=int, default=1_000_000, help="[%(default)s]")
    parser.add_argument("--num_processes", type=int, default=2, help="of both sides [%(default)s]")
    parser.add_argument("--work_dir", type=Path, help="on the disk to measure [a temporary one]")
    return parser


def make_store(data_dir: Path, d_model: int, n_tokens: int) -> list[list[int]]:
    """Write a store of random rows, as capture would; returns the sentences."""
    per_shard = 1_000_000_000 // (2 * d_model * 28)
    lengths = [len(ids) for ids in draw_sentences(2 * n_tokens // 28, 50)]
    n_sentences = int(np.searchsorted(np.cumsum(lengths), n_tokens)) + 1
    rng = np.random.default_rng(0)
    token_lists = [rng.integers(0, 50, n).tolist() for n in lengths[:n_sentences]]
    output = Output(data_dir, STAGE, {}, {}, single_file=False)
    output.begin(overwrite=True)
    for directory in ("layer_0", SENTENCES):
        (data_dir / directory).mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": [f"w{i}" for i in range(50)]}), data_dir / VOCABULARY)
    generator, names = torch.Generator().manual_seed(0), [VOCABULARY]
    for index, start in enumerate(range(0, n_sentences, per_shard)):
        part = token_lists[start : start + per_shard]
        ids = range(start, start + len(part))
        names += [f"layer_0/{shard_name(index)}", f"{SENTENCES}/{part_name(index)}"]
        pq.write_table(pa.table({"sentence_id": list(ids)}), data_dir / names[-1])
        with shard_file(data_dir / names[-2], part, ids, d_model=d_model) as shard:
            n_rows = sum(map(len, part))
            for row in range(0, n_rows, 8192):
                block = torch.randn(min(8192, n_rows - row), d_model, generator=generator)
                shard.write("activations", row, block.bfloat16())
    counts = {
        "n_shards": len(names) // 2,
        "n_sentences": n_sentences,
        "n_tokens": sum(map(len, token_lists)),
    }
    facts = {"layers": {"layer_0": {"layer": 0, "hook_point": "resid_pre"}}, "d_model": d_model}
    output.finish(facts=facts, counts=counts, files=names)
    return token_lists


def make_first_store(data_dir: Path, d_model: int, token_lists: list[list[int]]) -> None:
    """Write rows as the first version would: one file per sentence."""
    data_dir.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i, ids in enumerate(token_lists):
        rows = torch.randn(len(ids), d_model, generator=generator).bfloat16()
        torch.save(rows, data_dir / f"{i}.pt")


def preprocess_share(job: tuple[Path, Path, int, int, int]) -> tuple[Tensor, int]:
    """One of the first version's processes; returns its sum of rows and their number."""
    torch.set_num_threads(1)
    data_dir, out, rank, n_processes, batch_size = job
    if not data_dir.exists():  # the warm-up
        return torch.zeros(1), 0
    names = os.listdir(data_dir)[rank::n_processes]
    # Its own files, and faster than weights_only.
    rows = torch.cat([torch.load(data_dir / name, weights_only=False) for name in names])
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for i, start in enumerate(range(0, len(rows), batch_size)):
        batch = rows[start : start + batch_size]
        torch.save(batch.clone(), out / f"{rank}_{i}.pt")
        total += batch.float().sum(dim=0)
    return total, len(rows)


def bench_preprocessing(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    d_model, out = SHAPES[args.shape].dim, work_dir / "preprocessed"
    print(f"writing {args.prep_tokens:,} tokens twice, in shards and one file per sentence …")
    token_lists = make_store(work_dir / "store", d_model, args.prep_tokens)
    make_first_store(work_dir / "first_store", d_model, token_lists)
    megabytes = 2 * d_model * sum(map(len, token_lists)) / 1e6
    context, n = multiprocessing.get_context("spawn"), args.num_processes
    cpu = torch.device("cpu")

    def fresh() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        return out

    def saint(memory_gb: float) -> float:
        flags = {
            "input_dir": work_dir / "store",
            "output_dir": fresh() / "rows",
            "mean_filepath": out / "mean.pt",
            "num_processes": n,
            "memory_gb": memory_gb,
        }
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        return megabytes / seconds(lambda: sae_preprocessing.main(argv), cpu)

    with context.Pool(n) as pool:

        def first_version() -> float:
            jobs = [(work_dir / "first_store", fresh(), rank, n, 8192) for rank in range(n)]

            def run() -> None:
                shares = pool.map(preprocess_share, jobs, chunksize=1)
                mean = torch.stack([total for total, _ in shares]).sum(0)
                torch.save(mean / sum(count for _, count in shares), out / "mean.pt")

            return megabytes / seconds(run, cpu)

        nowhere = work_dir / "nowhere"
        pool.map(preprocess_share, [(nowhere, nowhere, 0, 1, 1)] * n, chunksize=1)
        result: dict[str, Any] = medians(
            {
                "preprocess_mb_per_s": lambda: saint(4.0),
                "first_version_preprocess_mb_per_s": first_version,
                "preprocess_over_disk_mb_per_s": lambda: saint(0.75 * megabytes / 1000),
            },
            args.repeats,
        )
    ours, theirs = (result[k] for k in ("preprocess_mb_per_s", "first_version_preprocess_mb_per_s"))
    result |= {"preprocess_ratio": ours / theirs, "preprocess_mb": megabytes, "processes": n}
    saint(4.0)
    return result | bench_reading(out / "rows", args.repeats)


def bench_reading(rows_dir: Path, repeats: int) -> dict[str, Any]:
    """The trainer's stream against plain reads of the same files, both out of the page cache."""
    rows = open_batched_rows(rows_dir)
    paths = sorted(rows_dir.glob("train_*.safetensors"))
    n_bytes = sum(path.stat().st_size for path in paths) / 1e6
    n_batches, buffer = rows.n_rows("train") // 8192, bytearray(8 << 20)

    def plain() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def stream() -> None:
        fresh = open_batched_rows(rows_dir)
        for batch in fresh.batches("train", batch_size=8192, first_batch=0, n_batches=n_batches):
            assert len(batch) == 8192

    cpu, used = torch.device("cpu"), 2 * rows.facts["d_model"] * 8192 * n_batches / 1e6
    result = medians(
        {
            "plain_read_mb_per_s": lambda: n_bytes / seconds(plain, cpu),
            "reader_mb_per_s": lambda: used / seconds(stream, cpu),
        },
        max(3, repeats),
    )
    return result | {"reader_ratio": result["reader_mb_per_s"] / result["plain_read_mb_per_s"]}


def main() -> None:
    args = build_parser().parse_args()
    work_dir = Path(tempfile.mkdtemp(prefix="saint_preprocessing_", dir=args.work_dir))
    try:
        result = bench_preprocessing(args, work_dir)
    finally:
        shutil.rmtree(work_dir)
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
