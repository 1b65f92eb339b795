"""Sentences per second: exact rankings of all latents against the first version's loop.

    python -m benchmarks.top_sentences [--device cuda]

Both rank the same sentences by mean, max and last, from the same sparse activations (the encoder is
the same work in both and is timed apart), with the same threads. The first version scatters 128
sentences at a time into a dense (tokens, latents) matrix and credits each sentence to its arg-max
latent in a Python loop that keeps heaps; ours ranks every latent. Medians over repeats.
`ratio_same_work` lets that loop credit every latent that fires, as ours does; `processor_ratio`
compares processor time, which other work on the machine disturbs less. `write_yaml_s` is what one
ranking of 65,536 latents takes to write.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae import SAEConfig, TopKSparseAutoencoder
from saint.evidence.rankings import Chunk, Tally, write_top_sentences
from saint.kernels.fastest import fastest_encode
from saint.stage.devices import pick_device
from saint.stage.program import run_stage


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n_latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d_model", type=int, default=576)
    parser.add_argument("--n_sentences", type=int, default=32768, help="ours ranks all of them")
    parser.add_argument("--n_first_version", type=int, default=1024, help="the loop ranks these")
    parser.add_argument("--top_n", type=int, default=100)
    parser.add_argument("--yaml_latents", type=int, default=65_536, help="of the written YAML")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser


def make_sentences(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse activations (n_tokens, k) whose latents have a Zipf-like frequency, and offsets.

    A sixth of a token's latents are its sentence's: about as many pairs as on real text.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 49, args.n_sentences)
    offsets = np.concatenate([[0], lengths.cumsum()])
    n_tokens, k, step = int(offsets[-1]), args.k, args.n_latents // args.k
    # One latent out of each of k strata keeps a token's latents distinct.
    place = np.minimum(rng.pareto(0.6, (n_tokens, k)) * step / 50, step - 1).astype(np.int64)
    shared = np.minimum(rng.pareto(0.6, (args.n_sentences, k)) * step / 50, step - 1)
    place[:, ::6] = np.repeat(shared.astype(np.int64), lengths, axis=0)[:, ::6]
    indices = rng.permutation(args.n_latents)[place + step * np.arange(k)]
    values = rng.exponential(1.0, (n_tokens, k)).astype(np.float32) + np.float32(0.1)
    return torch.from_numpy(values), torch.from_numpy(indices), torch.from_numpy(offsets)


def batches(offsets: Tensor, n_sentences: int) -> list[tuple[int, int]]:
    ends = list(range(0, len(offsets) - 1, n_sentences)) + [len(offsets) - 1]
    return list(zip(ends, ends[1:], strict=False))


def first_version(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    n_latents: int,
    top_n: int,
    *,
    every_latent: bool = False,
) -> None:
    """Dense scatter and a Python loop; only the latent that wins a sentence gets it.

    every_latent: credit each latent that fires, so that the lists are complete.
    """
    rankings: list[dict[int, list[tuple[float, int]]]] = [{}, {}, {}]
    bounds = offsets.tolist()
    for first, end in batches(offsets, 128):
        rows = slice(bounds[first], bounds[end])
        dense = torch.zeros(rows.stop - rows.start, n_latents, device=values.device)
        dense.scatter_(1, indices[rows], values[rows])
        for sentence in range(first, end):
            mine = dense[bounds[sentence] - rows.start : bounds[sentence + 1] - rows.start]
            scores = (mine.mean(dim=0), mine.amax(dim=0), mine[-1])
            for ranking, score in zip(rankings, scores, strict=True):
                latents = score.nonzero().squeeze(1) if every_latent else score.argmax().reshape(1)
                pairs = zip(latents.tolist(), score[latents].tolist(), strict=True)
                for latent, value in pairs:
                    kept = ranking.setdefault(latent, [])
                    heapq.heappush(kept, (value, sentence))
                    if len(kept) > top_n:
                        heapq.heappop(kept)


def ours(values: Tensor, indices: Tensor, offsets: Tensor, n_latents: int, top_n: int) -> Tally:
    """Every latent's exact top N by mean, max and last."""
    tally = Tally(n_latents, top_n, 0, 0)
    ids = np.arange(len(offsets) - 1)
    entries = values.shape[1] * np.arange(len(values) + 1)
    flat = values.reshape(-1).cpu().numpy(), indices.reshape(-1).to(torch.int32).cpu().numpy()
    tally.add(Chunk(*flat, entries, offsets.numpy(), ids, np.ones(len(ids), bool)))
    tally.finish()
    return tally


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median wall and processor seconds."""
    walls, processors = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - started[0])
        processors.append(time.process_time() - started[1])
    return statistics.median(walls), statistics.median(processors)


def encoder_speed(args: argparse.Namespace, device: torch.device) -> float:
    """Tokens per second of the encoder that comes before either."""
    sae = TopKSparseAutoencoder(SAEConfig(args.d_model, args.n_latents, args.k), device=device)
    sae.initialise(torch.zeros(args.d_model), seed=0)
    rows = torch.randn(4096, args.d_model, device=device)
    encode = fastest_encode(sae)
    return len(rows) / seconds(lambda: encode(rows), device, args.repeats)[0]


def yaml_seconds(n_latents: int, n_rows: int) -> float:
    """Seconds to write one ranking in which every latent has n_rows sentences."""
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.exponential(1.0, (n_latents, n_rows)).astype(np.float32), axis=1)
    ids = rng.integers(0, 1_000_000, values.shape)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        write_top_sentences(Path(directory) / "top_sentences_mean.yaml", values, ids)
        return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    values, indices, offsets = make_sentences(args)
    values, indices = values.to(device), indices.to(device)
    n_tokens = int(offsets[args.n_first_version])
    few = (values[:n_tokens], indices[:n_tokens], offsets[: args.n_first_version + 1])
    sizes = args.n_latents, args.top_n
    before = seconds(lambda: first_version(*few, *sizes), device, args.repeats)
    complete = seconds(lambda: first_version(*few, *sizes, every_latent=True), device, args.repeats)
    after = seconds(lambda: ours(values, indices, offsets, *sizes), device, args.repeats)
    speeds = args.n_first_version / before[0], args.n_sentences / after[0]
    per_sentence = before[1] / args.n_first_version, after[1] / args.n_sentences
    names = ("n_latents", "k", "d_model", "n_sentences", "top_n", "threads")
    result = {"device": str(device), **{name: getattr(args, name) for name in names}}
    result |= {
        "first_version_sentences_per_s": round(speeds[0], 1),
        "sentences_per_s": round(speeds[1], 1),
        "tokens_per_s": round(len(values) / after[0]),
        "encoder_tokens_per_s": round(encoder_speed(args, device)),
        "ratio_same_work": round(speeds[1] * complete[0] / args.n_first_version, 2),
        "processor_ratio": round(per_sentence[0] / per_sentence[1], 2),
        "ratio": round(speeds[1] / speeds[0], 2),
        "write_yaml_s": round(yaml_seconds(args.yaml_latents, args.top_n), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_stage(main)
