r"""Capture against a re-creation of this toolkit's first version.

What the first version did, written anew from its description:

- capture: sentences in random order, batches of 32 padded to the longest, every layer and float32
  logits, no BOS; the attention norm's output is copied to the host at once, and a second process
  writes one `torch.save` file per sentence. It ran in bfloat16; here it gets our dtype, which is
  the processor's best.

Both get the same model, sentences, threads and processes, in turn, and are timed without starting
Python: medians over the repeats. Tokens/s count stored tokens. Memory: peak RSS of whole capture
runs (tiny random model) over 10,000 and 100,000 sentences. The last line is JSON.

    python -m benchmarks.capture --model_dir runs/quickstart/model \
        --dataset_dir runs/quickstart/sentences
    python -m benchmarks.capture --device cuda --shape 3b --num_sentences 20000 \
        --skip rss first_version

Without --model_dir: random weights in the chosen shape, random tokens; speed depends on neither.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import REPO, SHAPES, draw_sentences, medians, seconds
from llama_3 import HookPoint, Llama, load_args, load_llama
from saint.capture.shards import Capture, ShardJob, capture_shards
from saint.stage.devices import pick_dtype
from saint.store.dataset import Sampler, open_dataset

LAYERS = {"embedded": 9, "3b": 22, "tiny": 2}
FIRST_BATCH = 32
# Dense bf16 peaks in TFLOP/s from the vendor's data sheets, as of 2026-11.
BF16_PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.0, "3090": 71.0, "L4": 121.0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Capture against version one.")
    parser.add_argument("--model_dir", type=Path, help="Llama weights [random ones]")
    parser.add_argument("--dataset_dir", type=Path, help="its sentences; needed with --model_dir")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="embedded", help="[%(default)s]")
    parser.add_argument("--layer", type=int, help="captured layer [9, for 3b 22]")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="[cpu]")
    parser.add_argument("--dtype", default="auto", help="of both sides [the hardware's best]")
    parser.add_argument("--num_sentences", type=int, default=320, help="captured [%(default)s]")
    parser.add_argument("--batch_tokens", type=int, help="[4096 on a CPU, 32768 on a GPU]")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing [%(default)s]")
    parser.add_argument(
        "--rss_sentences", type=int, nargs=2, default=(10_000, 100_000), help="[10000 100000]"
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["capture", "rss", "first_version"]
    )
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
    }
    with first_version_writer("first_version" in args.skip) as pipes:
        if pipes:
            ways["first_version_tokens_per_s"] = lambda: timed(
                lambda out: capture_like_version_one(subject, out, *pipes)
            )
        if args.device.type == "cuda":  # kernels are chosen and memory is taken once
            for way in ways.values():
                way()
        result: dict[str, Any] = medians(ways, args.repeats)
    if pipes:
        result["ratio"] = result["saint_tokens_per_s"] / result["first_version_tokens_per_s"]
    result |= {"dtype": str(subject.model.dtype), "num_sentences": len(subject.texts)}
    result["attention"] = attention(subject)
    if args.device.type == "cuda":
        result |= gpu_share(subject, result["saint_tokens_per_s"])
    return result


@contextmanager
def first_version_writer(skipped: bool) -> Iterator[tuple[Any, Any] | None]:
    """Start the first version's second process; yields its queues, None where it is skipped."""
    if skipped:
        yield None
        return
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Queue()
    writer = context.Process(target=save_sentences, args=(queue, done), daemon=True)
    writer.start()
    done.get()
    yield queue, done
    queue.put(None)
    writer.join()


@torch.inference_mode()
def attention(subject: Subject) -> list[str]:
    """Return by which kernels one pass computes attention."""
    model = subject.model
    lists = subject.tokenizer.encode_batch(subject.texts[:64], bos=False)
    tokens = torch.tensor([token for ids in lists for token in ids], device=model.device)
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        hook = HookPoint(subject.layer, "resid_pre")
        model.capture(tokens, [hook], seq_lens=[len(ids) for ids in lists])
    words = ("flash", "fmha", "cudnn", "attention_")
    names = {event.key for event in profiled.key_averages()}
    return sorted(name for name in names if any(word in name.lower() for word in words))


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
    stage = REPO / "capture_activations.py"
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


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if (args.model_dir is None) != (args.dataset_dir is None):
        raise SystemExit("--model_dir and --dataset_dir go together")
    work_dir = Path(tempfile.mkdtemp(prefix="saint_capture_", dir=args.work_dir))
    n_threads = torch.get_num_threads()
    result: dict[str, Any] = {"device": str(args.device), "threads": n_threads}
    parts = {"rss": bench_memory, "capture": bench_capture}
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
