"""What a smaller number format on disk costs: SAEs trained on bfloat16, float16 and int8 stores.

    python -m benchmarks.store_dtype --data_dir runs/quickstart/activation_outputs

The captured bfloat16 store is rewritten in each format (as capture would have written the bfloat16
values), preprocessed and trained with the same seed. All SAEs are judged on the same held-out
rows, the captured ones. The last line is JSON: bytes per token, the mean relative error of the
rows, and FVU, by format.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import REPO
from sae import load_sae
from saint.stage.manifests import Output
from saint.store.activation_store import (
    SENTENCES,
    VOCABULARY,
    ActivationStore,
    open_store,
    shard_file,
)
from saint.store.row_format import STORE_DTYPES, decode_rows, encode_rows, row_bytes
from saint.store.shuffled_rows import open_batched_rows
from saint.training.metrics import HeldOutMeter

_ROWS = 8192


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What a smaller number format on disk costs.")
    parser.add_argument("--data_dir", type=Path, required=True, help="a bfloat16 store")
    parser.add_argument("--n_latents", type=int, default=4096, help="[%(default)s]")
    parser.add_argument("--k", type=int, default=32, help="[%(default)s]")
    parser.add_argument("--num_epochs", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--batch_size", type=int, default=1024, help="[%(default)s]")
    return parser


def convert(store: ActivationStore, out: Path, store_dtype: str) -> float:
    """Rewrite a store in another format; returns the mean over rows of |error| / |row|."""
    output = Output(out, store.manifest.stage, {}, {}, single_file=False)
    output.begin(overwrite=False)
    (out / store.layer_dir).mkdir()
    shutil.copytree(store.sentences_path, out / SENTENCES)
    shutil.copyfile(store.root / VOCABULARY, out / VOCABULARY)
    error, names = 0.0, [VOCABULARY]
    for index in range(store.n_shards):
        shard, path = store.read_shard(index), store.shard_path(index)
        offsets, tokens = shard.offsets.tolist(), shard.token_ids.tolist()
        lists = [tokens[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
        names.append(f"{store.layer_dir}/{path.name}")
        with shard_file(
            out / names[-1],
            lists,
            shard.sentence_ids.tolist(),
            d_model=store.facts["d_model"],
            store_dtype=store_dtype,
        ) as file:
            for start in range(0, len(tokens), _ROWS):
                rows = shard.read(slice(start, start + _ROWS)).float()
                stored = encode_rows(rows, store_dtype)
                for name, tensor in stored.items():
                    file.write(name, start, tensor)
                off = (decode_rows(stored).float() - rows).norm(dim=1) / rows.norm(dim=1)
                error += float(off.sum())
    facts: dict[str, Any] = store.manifest.facts | {"store_dtype": store_dtype}
    facts["layers"] = {store.layer_dir: facts["layers"][store.layer_dir]}
    output.finish(facts=facts, counts=store.manifest.counts, files=names)
    return error / store.n_tokens


def run(stage: str, **flags: object) -> None:
    command = [sys.executable, str(REPO / f"{stage}.py")]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    subprocess.run(command, check=True)


def main() -> None:
    args = build_parser().parse_args()
    store = open_store(args.data_dir)
    work = Path(tempfile.mkdtemp(prefix="saint_dtype_"))
    result: dict[str, Any] = {}
    try:
        for store_dtype in STORE_DTYPES:
            out = work / store_dtype
            error = convert(store, out, store_dtype)
            rows_dir, mean = work / f"{store_dtype}_batched", work / f"{store_dtype}_mean.pt"
            run("sae_preprocessing", input_dir=out, batch_size=args.batch_size)
            run(
                "sae_training",
                data_dir=rows_dir,
                b_pre_path=mean,
                model_save_path=work / f"{store_dtype}.pt",
                batch_size=args.batch_size,
                n_latents=args.n_latents,
                k=args.k,
                num_epochs=args.num_epochs,
            )
            sae = load_sae(work / f"{store_dtype}.pt", device="cpu")
            exact = open_batched_rows(work / "bfloat16_batched")
            with torch.no_grad():
                x = sae.normalise(exact.read("val", 0, exact.n_rows("val")))[0]
                meter = HeldOutMeter(sae, sae.encode)
                meter.add(x)
                metrics, _ = meter.read()
            result[store_dtype] = {
                "bytes_per_token": row_bytes(store.facts["d_model"], store_dtype),
                "relative_error": round(error, 6),
                "fvu": round(metrics["val/fvu"], 5),
            }
            print(store_dtype, result[store_dtype], flush=True)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
