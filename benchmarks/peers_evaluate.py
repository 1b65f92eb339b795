"""SAINT's export, loaded and computed by SAELens, beside what `sae_evaluation.py` wrote.

    .venv-bench/bin/python benchmarks/peers_evaluate.py --model_dir M --dataset_dir D \
        --sae_model_path trained_sae.pt --evaluation_path sae_evaluation.json

`run_tests.sh --peers` makes .venv-bench (and `pip install tiktoken fsspec` there). The SAE is
exported to a temporary directory, loaded with `SAE.load_from_disk`, and SAELens's own encode and
decode give the metrics that SAEBench calls core, in memory and on the same held-out sentences:
L0, FVU, cross-entropy with its output in place of the activation, and the share that it recovers
of what the mean activation loses. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_3 import HookPoint, Llama, load_llama, load_tokenizer  # noqa: E402
from sae import read_sae  # noqa: E402
from saint.capture.packing import Pack  # noqa: E402
from saint.evaluation.faithfulness import (  # noqa: E402
    held_out_sentences,
    predicting,
)
from saint.exchange.exports import export_saelens  # noqa: E402
from saint.store.dataset import open_dataset  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SAELens's metrics of an SAE beside ours.")
    parser.add_argument("--model_dir", type=Path, required=True, help="Llama weights")
    parser.add_argument("--dataset_dir", required=True, help="the sentences' parquet files")
    parser.add_argument("--sae_model_path", type=Path, required=True, help="the trained SAE")
    parser.add_argument("--evaluation_path", type=Path, required=True, help="ours, as JSON")
    parser.add_argument("--num_samples", type=int, default=500, help="sentences [%(default)s]")
    args = parser.parse_args(argv)
    compare(args)


@torch.inference_mode()
def compare(args: argparse.Namespace) -> None:
    """Print both columns."""
    from sae_lens import SAE  # pyright: ignore

    config, state = read_sae(args.sae_model_path)
    assert config is not None and config.layer is not None, "a bare state dict says too little"
    with tempfile.TemporaryDirectory() as folder:
        export_saelens(config, state, Path(folder))
        theirs = SAE.load_from_disk(folder)
    model, _ = load_llama(args.model_dir, device=torch.device("cpu"), dtype=torch.float32)
    hook = HookPoint(config.layer, config.hook_point)
    dataset = open_dataset(args.dataset_dir, text_column="text")
    sentences = held_out_sentences(
        dataset,
        load_tokenizer(args.model_dir),
        config,
        args.num_samples,
        seed=42,
        batch_tokens=2048,
    )
    found = metrics(model, theirs, hook, sentences)
    ours = json.loads(args.evaluation_path.read_text())
    for name, value in found.items():
        print(f"{name:>15}  SAELens {value:.5f}  SAINT {ours.get(name, float('nan')):.5f}")
    print(json.dumps({"saelens": found, "saint": {name: ours.get(name) for name in found}}))


def metrics(model: Llama, theirs: Any, hook: HookPoint, packs: list[Pack]) -> dict[str, float]:
    """Return what SAELens's encode and decode give; FVU on standardised tokens, as ours."""
    rows = torch.cat(
        [model.capture(p.tokens, [hook], seq_lens=p.seq_lens)[hook][p.own].float() for p in packs]
    )
    acts = theirs.encode(rows)
    output = theirs.decode(acts)
    std, mean = torch.std_mean(rows, dim=1, keepdim=True)
    z, z_hat = (rows - mean) / std, (output - mean) / std
    unexplained = (z_hat - z).double().square().sum()
    found = {
        "fvu": float(unexplained / (z - z.mean(0)).double().square().sum()),
        "l0": float((acts > 0).sum(1).double().mean()),
    }
    average = rows.mean(0)
    sums, n = torch.zeros(3, dtype=torch.float64), 0

    def with_theirs(x: Tensor) -> Tensor:
        return theirs(x.float()).to(x.dtype)

    for packed in packs:
        wanted, own = predicting(packed), packed.own.unsqueeze(-1)
        targets = packed.tokens.roll(-1)[wanted]

        def run(replace: Callable[[Tensor], Tensor], packed: Pack = packed, own: Tensor = own):
            edits = {hook: lambda x, _: torch.where(own, replace(x), x)}  # BOS stays
            return model(packed.tokens, edits=edits, seq_lens=packed.seq_lens)

        for i, replace in enumerate((lambda x: x, with_theirs, lambda x: average.expand_as(x))):
            loss = F.cross_entropy(run(replace)[wanted], targets, reduction="sum")
            sums[i] += loss.double()
        n += len(targets)
    clean, with_sae, ablated = (sums / n).tolist()
    share = (ablated - with_sae) / (ablated - clean)
    return found | {"ce_clean": clean, "ce_sae": with_sae, "loss_recovered": share}


if __name__ == "__main__":
    main()
