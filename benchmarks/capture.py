r"""Capture, preprocessing and reading, against a re-creation of this toolkit's first version.

What the first version did, written anew from its description:

- capture: sentences in random order, batches of 32 padded to the longest, every layer and float32
  logits, no BOS; the attention norm's output is copied to the host at once, and a second process
  writes one `torch.save` file per sentence. It ran in bfloat16; here it gets our dtype, which is
  the processor's best.
- preprocessing: each process reads its share of the files in directory order, concatenates them,
  and writes one file per batch of contiguous tokens; the mean is that of the raw activations.

Both get the same model, sentences, threads and processes, in turn, and are timed without starting
Python: medians over the repeats. Tokens/s count stored tokens. Reading: the trainer's stream of
batches against a plain sequential read of the same files. Memory: peak RSS of whole capture runs
(tiny random model) over 10,000 and 100,000 sentences. The last line is JSON.

    PYTHONPATH=. python benchmarks/capture.py --model_dir runs/quickstart/model \
        --dataset_dir runs/quickstart/sentences
    PYTHONPATH=. python benchmarks/capture.py --device cuda --shape 3b --num_sentences 20000

Without --model_dir: random weights in the chosen shape, random tokens; speed depends on neither.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import sae_preprocessing
from llama_3 import HookPoint, Llama, LlamaArgs, load_args, load_llama
from saint.capture.shards import Capture, ShardJob, capture_shards
from saint.stage.devices import pick_dtype
from saint.stage.manifests import Output
from saint.store.activation_store import (
    SENTENCES,
    STAGE,
    VOCABULARY,
    part_name,
    shard_file,
    shard_name,
)
from saint.store.dataset import Sampler, open_dataset
from saint.store.shuffled_rows import open_batched_rows

SHAPES = {
    "embedded": LlamaArgs(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        vocab_size=49152,
        rope_theta=100000.0,
        tied=True,
    ),
    "3b": LlamaArgs(
        dim=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=8192,
        vocab_size=128256,
        tied=True,
    ),
}
LAYERS = {"embedded": 9, "3b": 22}
FIRST_BATCH = 32
# Dense bf16 peaks in TFLOP/s from the vendor's data sheets, as of 2026-11.
BF16_PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.0, "3090": 71.0, "L4": 121.0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Capture and preprocessing against version one.")
    parser.add_argument("--model_dir", type=Path, help="Llama weights [random ones]")
    parser.add_argument("--dataset_dir", type=Path, help="its sentences; needed with --model_dir")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="embedded", help="[%(default)s]")
    parser.add_argument("--layer", type=int, help="captured layer [9, for 3b 22]")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="[cpu]")
    parser.add_argument("--dtype", default="auto", help="of both sides [the hardware's best]")
    parser.add_argument("--num_sentences", type=int, default=320, help="captured [%(default)s]")
    parser.add_argument("--batch_tokens", type=int, help="[4096 on a CPU, 32768 on a GPU]")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing [%(default)s]")
    parser.add_argument("--prep_tokens", type=int, default=1_000_000, help="[%(default)s]")
    parser.add_argument("--num_processes", type=int, default=2, help="of both sides [%(default)s]")
    parser.add_argument(
        "--rss_sentences", type=int, nargs=2, default=(10_000, 100_000), help="[10000 100000]"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=["capture", "prep", "rss"])
    parser.add_argument("--work_dir", type=Path, help="on the disk to measure [a temporary one]")
    return parser


class DrawnText:
    """Stands in for a tokenizer where there is no text: sentence i is the i-th list of ids."""

    bos_id = 0

    def __init__(self, token_lists: list[list[int]]) -> None:
        self.token_lists = token_lists

    def encode_batch(self, texts: Sequence[str], *, bos: bool) -> list[list[int]]:
        """Return the drawn ids."""
        return [self.token_lists[int(text)] for text in texts]


@dataclass
class Subject:
    """The model, and sentences in random order, as both sides get them."""

    model: Llama
    tokenizer: Any
    texts: list[str]
    layer: int
    batch_tokens: int


def load_subject(args: argparse.Namespace) -> Subject:
    dtype = pick_dtype(args.dtype, args.device)
    layer = LAYERS[args.shape] if args.layer is None else args.layer
    batch_tokens = args.batch_tokens or (32768 if args.device.type == "cuda" else 4096)
    if args.model_dir:
        model, tokenizer = load_llama(args.model_dir, device=args.device, dtype=dtype)
        sampler = Sampler(open_dataset(args.dataset_dir), 42)
        texts = [text for _, text in islice(iter(sampler), args.num_sentences)]
        return Subject(model, tokenizer, texts, layer, batch_tokens)
    model = Llama(SHAPES[args.shape], device=args.device, dtype=dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    token_lists = draw_sentences(args.num_sentences, model.args.vocab_size)
    texts = [str(i) for i in range(args.num_sentences)]
    return Subject(model, DrawnText(token_lists), texts, layer, batch_tokens)


def draw_sentences(n_sentences: int, n_vocab: int) -> list[list[int]]:
    """Random ids, as long as sentences of news are (mean 28, 95th percentile 58, cut at 192)."""
    rng = random.Random(0)
    lengths = [min(192, max(4, round(rng.lognormvariate(3.2, 0.5)))) for _ in range(n_sentences)]
    return [[rng.randrange(1, n_vocab) for _ in range(n)] for n in lengths]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Run every way in turn, several times; returns each one's median figure."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            figures[name].append(way())
            print(f"{name} {repeat + 1}/{repeats}: {figures[name][-1]:,.1f}", flush=True)
    return {name: statistics.median(values) for name, values in figures.items()}


def capture_with_saint(subject: Subject, out: Path) -> int:
    """Everything but the manifest; returns the stored tokens."""
    capture = Capture(
        subject.model,
        subject.tokenizer,
        [HookPoint(subject.layer, "resid_pre")],
        prepend_bos=True,
        max_token_length=192,
        batch_tokens=subject.batch_tokens,
    )
    job = ShardJob(0, list(range(len(subject.texts))), subject.texts)
    counted: list[int] = []
    capture_shards(
        capture,
        iter([job]),
        out,
        on_tokenised=lambda _, tokenised: counted.append(tokenised.n_tokens),
        on_batch=lambda *_: None,
    )
    return sum(counted)


def save_sentences(queue: Any, done: Any) -> None:
    """The first version's second process: one file per sentence."""
    torch.set_num_threads(1)
    done.put("ready")
    while (item := queue.get()) is not None:
        out, first, activations, lengths = item
        for i, n in enumerate(lengths):
            torch.save(activations[i, :n].clone(), f"{out}/{first + i}.pt")
        done.put(first)


@torch.inference_mode()
def capture_like_version_one(subject: Subject, out: Path, queue: Any, done: Any) -> int:
    model, n_stored, n_batches = subject.model, 0, 0
    hook = HookPoint(subject.layer, "attn_norm")
    last = HookPoint(model.args.n_layers - 1, "resid_post")
    out.mkdir(parents=True)
    for first in range(0, len(subject.texts), FIRST_BATCH):
        texts = subject.texts[first : first + FIRST_BATCH]
        tokens = [ids[:192] for ids in subject.tokenizer.encode_batch(texts, bos=False)]
        padded = pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True)
        found = model.capture(padded.to(model.device), [hook, last])
        model.unembed(found[last])
        lengths = [len(ids) for ids in tokens]
        queue.put((str(out), first, found[hook].to(torch.bfloat16).cpu(), lengths))
        n_stored, n_batches = n_stored + sum(lengths), n_batches + 1
    for _ in range(n_batches):
        done.get()
    return n_stored


def bench_capture(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    subject = load_subject(args)
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Queue()
    writer = context.Process(target=save_sentences, args=(queue, done), daemon=True)
    writer.start()
    done.get()

    def timed(capture: Callable[[Path], int]) -> float:
        out = work_dir / "captured"
        shutil.rmtree(out, ignore_errors=True)
        n_stored = 0

        def run() -> None:
            nonlocal n_stored
            n_stored = capture(out)

        elapsed = seconds(run, args.device)
        return n_stored / elapsed

    ways: dict[str, Callable[[], float]] = {
        "saint_tokens_per_s": lambda: timed(lambda out: capture_with_saint(subject, out)),
        "first_version_tokens_per_s": lambda: timed(
            lambda out: capture_like_version_one(subject, out, queue, done)
        ),
    }
    if args.device.type == "cuda":  # kernels are chosen and memory is taken once
        for way in ways.values():
            way()
    result: dict[str, Any] = medians(ways, args.repeats)
    queue.put(None)
    writer.join()
    result["ratio"] = result["saint_tokens_per_s"] / result["first_version_tokens_per_s"]
    result |= {"dtype": str(subject.model.dtype), "num_sentences": len(subject.texts)}
    if args.device.type == "cuda":
        result |= gpu_share(subject, result["saint_tokens_per_s"])
    return result


def gpu_share(subject: Subject, tokens_per_s: float) -> dict[str, Any]:
    """The share of the GPU's bf16 matrix peak that goes into stored tokens (BOS is not counted)."""
    flop = sum(
        2 * weight.numel()
        for block in subject.model.layers[: subject.layer]
        for weight in block.parameters()
        if weight.ndim == 2
    )
    name = torch.cuda.get_device_name()
    peak = next((tflops for key, tflops in BF16_PEAKS.items() if key in name), None)
    tflops = flop * tokens_per_s / 1e12
    return {
        "gpu": name,
        "tflops": tflops,
        "share_of_bf16_peak": peak and tflops / peak,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


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


def write_tiny_run(root: Path, n_sentences: int) -> None:
    """A tiny random model with a byte tokenizer, and sentences of random words."""
    model_dir, data_dir = root / "model", root / "sentences"
    model_dir.mkdir(parents=True)
    data_dir.mkdir()
    ranks = "\n".join(f"{base64.b64encode(bytes([i])).decode()} {i + 1}" for i in range(256))
    (model_dir / "tokenizer.model").write_text(ranks)
    spec = {
        "format": "saint.tokenizer",
        "version": 1,
        "pattern": r"\p{L}+|\s+",
        "special_tokens": {"<|endoftext|>": 0},
        "bos_token": "<|endoftext|>",
        "stop_tokens": ["<|endoftext|>"],
        "n_vocab": 257,
    }
    (model_dir / "tokenizer_spec.json").write_text(json.dumps(spec))
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64}
    params |= {"vocab_size": 257, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seq_len": 512}
    (model_dir / "params.json").write_text(json.dumps(params))
    model = Llama(load_args(model_dir), device=torch.device("cpu"), dtype=torch.float32)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    torch.save(model.state_dict(), model_dir / "consolidated.00.pth")
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(rng.choices(letters, k=rng.randint(10, 46))) for _ in range(n_sentences)]
    pq.write_table(pa.table({"text": texts}), data_dir / "a.parquet", row_group_size=5000)


def bench_memory(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Peak RSS of whole capture runs over few and many sentences."""
    root, peaks = work_dir / "tiny", []
    write_tiny_run(root, max(args.rss_sentences))
    stage = Path(__file__).resolve().parent.parent / "capture_activations.py"
    for n in args.rss_sentences:
        flags = ["--model_dir", root / "model", "--dataset_dir", root / "sentences"]
        flags += ["--output_dir", root / f"out_{n}", "--num_samples", n, "--layers", 1]
        flags += ["--sentences_per_shard", 2500, "--device", "cpu"]
        # RUSAGE_CHILDREN keeps a maximum: each run is measured by a program of its own.
        probe = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        probe += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        command = [sys.executable, "-c", probe, sys.executable, stage, *flags]
        done = subprocess.run(
            [str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE
        )
        peaks.append(int(done.stdout.split()[-1]) / 1000)
        print(f"peak RSS over {n:,} sentences: {peaks[-1]:,.0f} MB", flush=True)
    names = [f"peak_rss_mb_{n}_sentences" for n in args.rss_sentences]
    return dict(zip(names, peaks, strict=True))


def main() -> None:
    args = build_parser().parse_args()
    if (args.model_dir is None) != (args.dataset_dir is None):
        raise SystemExit("--model_dir and --dataset_dir go together")
    work_dir = Path(tempfile.mkdtemp(prefix="saint_capture_", dir=args.work_dir))
    n_threads = torch.get_num_threads()
    result: dict[str, Any] = {"device": str(args.device), "threads": n_threads}
    parts = {"rss": bench_memory, "capture": bench_capture, "prep": bench_preprocessing}
    try:
        for name, bench in parts.items():
            if name not in args.skip:
                result |= bench(args, work_dir)
    finally:
        shutil.rmtree(work_dir)
    result["own_peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
