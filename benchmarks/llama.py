"""Prefill speed to a middle layer, against transformers and this toolkit's first version.

Three ways to get one layer's residual stream, timed in turn, medians over the rounds:

- ours: sentences sorted by length and packed, run up to the captured layer only;
- transformers: `output_hidden_states` on padded batches, sorted by length, all layers. Compared per
  token and layer, and its padding slots count as tokens, so only the arithmetic is compared;
- first version: batches of 32 in random order padded to the longest, all layers, float32 logits.
  Compared in stored (real) tokens/s. It ran in bfloat16; here it gets the dtype of the others.

Speed does not depend on the weights: without --model_dir they are random, in SmolLM2-135M's shape.
The last line is JSON: `vs_transformers` and `vs_first_version` are ratios, above 1 we are faster.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaModel

from benchmarks.common import SHAPES, draw_sentences, seconds
from llama_3 import HookPoint, Llama, load_args, load_llama

SMOLLM2_135M = SHAPES["embedded"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prefill speed to a middle layer.")
    parser.add_argument("--model_dir", type=Path, help="default: random weights, SmolLM2-135M")
    parser.add_argument("--layer", type=int, default=9, help="captured layer, 0-based [9]")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="[cpu]")
    parser.add_argument("--dtype", default="float32", help="of all three, a torch dtype [float32]")
    parser.add_argument("--n_sentences", type=int, default=512, help="to draw batches from [512]")
    parser.add_argument("--pack_tokens", type=int, default=4096, help="tokens per pack [4096]")
    parser.add_argument("--batch_size", type=int, default=32, help="padded sentences a batch [32]")
    parser.add_argument("--n_batches", type=int, default=4, help="per way and round [4]")
    parser.add_argument("--n_rounds", type=int, default=5, help="whose median counts [5]")
    parser.add_argument("--n_threads", type=int, help="CPU threads, for all three [torch's own]")
    return parser


def load(args: argparse.Namespace) -> tuple[Llama, LlamaModel]:
    """Our model and transformers' of the same shape, which keeps weights of its own."""
    dtype = getattr(torch, args.dtype)
    if args.model_dir:
        ours, _ = load_llama(args.model_dir, device=args.device, dtype=dtype)
    else:
        ours = Llama(SMOLLM2_135M, device=args.device, dtype=dtype)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.04)
    shape = ours.args
    config = LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_seq_len,
        initializer_range=0.04,
    )
    theirs = LlamaModel._from_config(config, attn_implementation="sdpa")  # their fastest on CPU
    return ours, theirs.to(args.device, dtype).eval()


def spread(batches: list, n: int) -> list:
    """Take n batches from evenly spaced places, so that sorted ones show every length."""
    return [batches[(2 * i + 1) * len(batches) // (2 * n)] for i in range(min(n, len(batches)))]


def packs(sentences: list[Tensor], n_tokens: int) -> list[list[Tensor]]:
    """Consecutive sentences in packs of at most n_tokens, unless one alone is longer."""
    result: list[list[Tensor]] = [[]]
    for sentence in sentences:
        if result[-1] and sum(map(len, result[-1])) + len(sentence) > n_tokens:
            result.append([])
        result[-1].append(sentence)
    return result


def ways(args: argparse.Namespace) -> dict[str, tuple[Callable[[], object], int]]:
    """For each way, its work and the tokens that count."""
    ours, theirs = load(args)
    drawn = draw_sentences(args.n_sentences, ours.args.vocab_size)
    sentences = [torch.tensor(tokens) for tokens in drawn]
    ordered = sorted(sentences, key=len)
    hook = HookPoint(args.layer, "resid_pre")
    all_packs = packs(ordered, args.pack_tokens)
    size = args.batch_size
    starts = range(0, len(sentences) - size + 1, size)
    sorted_batches = spread([ordered[i : i + size] for i in starts], args.n_batches)
    random_batches = spread([sentences[i : i + size] for i in starts], args.n_batches)
    our_packs = spread(all_packs, args.n_batches)

    def run_ours():
        for pack in our_packs:
            tokens = torch.cat(pack).to(args.device)
            ours.capture(tokens, [hook], seq_lens=list(map(len, pack)))

    def run_transformers():
        for batch in sorted_batches:
            tokens = pad_sequence(batch, batch_first=True).to(args.device)
            mask = pad_sequence([torch.ones_like(s) for s in batch], batch_first=True)
            theirs(tokens, attention_mask=mask.to(args.device), output_hidden_states=True)

    def run_first_version():
        for batch in random_batches:
            kept = []
            tokens = pad_sequence(batch, batch_first=True).to(args.device)
            where = HookPoint(args.layer, "attn_norm")
            ours(tokens, edits={where: lambda x, positions, kept=kept: kept.append(x) or x})

    slots = sum(len(batch) * max(map(len, batch)) for batch in sorted_batches)
    return {
        "ours": (run_ours, sum(len(s) for pack in our_packs for s in pack)),
        "transformers": (run_transformers, slots),
        "first_version": (run_first_version, sum(len(s) for b in random_batches for s in b)),
    }


@torch.no_grad()
def main() -> None:
    args = build_parser().parse_args()
    if args.n_threads:
        torch.set_num_threads(args.n_threads)
    timed = ways(args)
    rates: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(args.n_rounds + 1):
        for name, (work, n_tokens) in timed.items():
            rate = n_tokens / seconds(work, args.device)
            if round_:  # the first round warms up
                rates[name].append(rate)
                print(f"round {round_}: {name} {rate:.0f} tokens/s", flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    # Our layer L needs the blocks below it; transformers runs every block of the shape.
    n_layers = SMOLLM2_135M.n_layers
    if args.model_dir:
        n_layers = load_args(args.model_dir).n_layers
    vs_transformers = median["ours"] * args.layer / (median["transformers"] * n_layers)
    result = {
        "tokens_per_second": {name: round(value, 1) for name, value in median.items()},
        "layer": args.layer,
        "n_layers": n_layers,
        "dtype": args.dtype,
        "device": str(args.device),
        "n_threads": torch.get_num_threads(),
        "vs_transformers": round(vs_transformers, 3),
        "vs_first_version": round(median["ours"] / median["first_version"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
