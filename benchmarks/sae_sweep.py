"""What a sweep of eight learning rates costs against one run of the same length.

    python -m benchmarks.sae_sweep --data_dir runs/quickstart/activation_outputs_batched \
        --b_pre_path runs/quickstart/activation_outputs_mean.pt

Both are whole commands, start-up and last pass over the rows included, on the first rows of a
finished store, one after the other in turn. The last line is one JSON object: medians of seconds
and of processor seconds, and the sweep's over the single run's.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.common import REPO
from saint.stage.manifests import Output
from saint.store.shuffled_rows import SPLITS, BatchedRows, open_batched_rows, rows_name

_RATES = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01)


def take_rows(rows: BatchedRows, path: Path, n_train: int, n_val: int) -> None:
    """Write a store of the first rows of another."""
    output = Output(path, rows.manifest.stage, {"n_train": n_train}, {}, single_file=False)
    output.begin(overwrite=False)
    for split, n in zip(SPLITS, (n_train, n_val), strict=True):
        tensors = {"activations": rows.read(split, 0, n).contiguous()}
        save_file(tensors, path / rows_name(split, 0))
    facts = rows.facts | {"rows": {"train": [n_train], "val": [n_val]}}
    output.finish(facts=facts, counts={}, files=[rows_name(split, 0) for split in SPLITS])


def timed(flags: Sequence[object]) -> tuple[float, float]:
    """Run `sae_training.py`; return its seconds and its processor seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, REPO / "sae_training.py", *map(str, flags)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, used


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--b_pre_path", type=Path, required=True)
    parser.add_argument("--n_latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--n_steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"one": [], "eight": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            rows = open_batched_rows(args.data_dir)
            n_val = min(rows.n_rows("val"), args.n_steps * args.batch_size // 19)
            take_rows(rows, work / "rows", args.n_steps * args.batch_size, n_val)
            shutil.copy(args.b_pre_path, work / "mean.pt")
            sweep = work / "rates.yaml"
            sweep.write_text(json.dumps({"learning_rate": list(_RATES)}))
            flags = ["--data_dir", work / "rows", "--b_pre_path", work / "mean.pt"]
            flags += ["--n_latents", args.n_latents, "--k", args.k, "--num_epochs", 1]
            flags += ["--batch_size", args.batch_size, "--device", "cpu"]
            found["one"].append(timed([*flags, "--model_save_path", work / "one.pt"]))
            swept = ["--sweep", sweep, "--sweep_dir", work / "swept"]
            found["eight"].append(timed([*flags, *swept]))
    medians = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)]
        for name, runs in found.items()
    }
    seconds, used = zip(medians["one"], medians["eight"], strict=True)
    result = {
        "one_s": round(seconds[0], 1),
        "eight_s": round(seconds[1], 1),
        "ratio": round(seconds[1] / seconds[0], 2),
        "one_cpu_s": round(used[0], 1),
        "eight_cpu_s": round(used[1], 1),
        "cpu_ratio": round(used[1] / used[0], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
