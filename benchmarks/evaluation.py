"""How fast an SAE encodes, and is evaluated with its language model.

    python -m benchmarks.memory --layers 2 --parts write_files --files_dir files
    python -m benchmarks.evaluation --files_dir files

Times the evaluation stage's two passes over held-out sentences, up to the hook and from there, and
the encoder alone on one batch of rows. The last line is one JSON object, in tokens/s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import seconds
from llama_3 import CheckpointError, HookPoint, load_llama
from sae import load_sae
from saint.evaluation.faithfulness import (
    Subject,
    capture_to_hook,
    count_tokens,
    held_out_sentences,
    next_token_losses,
)
from saint.kernels.fastest import fastest_encode
from saint.stage.devices import peak_gigabytes, pick_device, pick_dtype
from saint.stage.flags import positive_int
from saint.stage.program import run_stage
from saint.store.dataset import open_dataset

_ENCODED = 8192


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files_dir", type=Path, required=True, help="of benchmarks.memory")
    parser.add_argument("--num_samples", type=positive_int, default=200, help="[%(default)s]")
    parser.add_argument("--batch_tokens", type=positive_int, default=8192, help="[%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N [auto]")
    return parser


def load_subject(args: argparse.Namespace) -> Subject:
    device = pick_device(args.device)
    dtype = pick_dtype("auto", device)
    model, tokenizer = load_llama(args.files_dir / "model", device=device, dtype=dtype)
    sae = load_sae(args.files_dir / "trained_sae.pt", device=device)
    assert sae.config.layer is not None
    hook = HookPoint(sae.config.layer, sae.config.hook_point)
    return Subject(model, tokenizer, sae, hook, args.batch_tokens, seed=0)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    subject = load_subject(args)
    dataset = open_dataset(str(args.files_dir / "s.parquet"))
    sae, device = subject.sae, subject.model.device
    how = {"seed": 0, "batch_tokens": args.batch_tokens}
    packs = held_out_sentences(dataset, subject.tokenizer, sae.config, args.num_samples, **how)
    n_tokens = count_tokens(packs)
    x = torch.randn(min(_ENCODED, 2 * n_tokens), sae.config.d_model, device=device)
    encode = fastest_encode(sae)
    captured = capture_to_hook(subject, packs[:1])  # warms up
    next_token_losses(subject, packs[:1], captured)
    encode(x)
    taken = {"encode": seconds(partial(encode, x), device)}

    def to_hook() -> None:
        nonlocal captured
        captured = capture_to_hook(subject, packs)

    taken["to_hook"] = seconds(to_hook, device)
    taken["losses"] = seconds(lambda: next_token_losses(subject, packs, captured), device)
    n_of = {"encode": len(x), "to_hook": n_tokens, "losses": n_tokens}
    found: dict[str, object] = {
        f"{name}_tokens_per_s": round(n_of[name] / spent, 1) for name, spent in taken.items()
    }
    found |= {"n_tokens": n_tokens, "batch_tokens": args.batch_tokens, "device": str(device)}
    print(json.dumps(found | {"peak_gb": round(peak_gigabytes(device), 2)}))


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
