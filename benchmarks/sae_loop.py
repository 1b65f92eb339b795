"""Whole training runs on random rows: whether their bits repeat, and what the loop costs.

    python -m benchmarks.sae_loop bits --device cuda --kernels triton --d_model 512 --n_latents 8192
    python -m benchmarks.sae_loop speed --device cuda

`bits` trains three times, the third killed (SIGKILL) at its first checkpoint and resumed, and
compares the SAEs' hashes. `speed` trains with validation as often as the stage does it by itself,
and without held-out rows; the last pass over all rows is in both. Every run is `sae_training.py`'s
own `main` in a process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import sae_training
from benchmarks.common import in_child
from benchmarks.sae_step import rows_like_activations
from saint.stage.manifests import Output, file_checksum
from saint.stage.program import run_stage
from saint.store.shuffled_rows import STAGE
from saint.training.steps import KERNELS

_EPOCHS = 2
_DISTINCT_ROWS = 1 << 15  # more are these again


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("bits", "speed"))
    parser.add_argument("--d_model", type=int, default=3072, help="[%(default)s]")
    parser.add_argument("--n_latents", type=int, default=65536, help="[%(default)s]")
    parser.add_argument("--k", type=int, default=64, help="active latents [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=8192, help="tokens a step [%(default)s]")
    parser.add_argument("--n_batches", type=int, default=20, help="of an epoch [%(default)s]")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="[%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N [auto]")
    parser.add_argument("--work_dir", type=Path, help="on a disk with 6 GB [a temporary one]")
    return parser


def write_rows(root: Path, args: argparse.Namespace, *, with_val: bool) -> None:
    """Write rows and their mean as preprocessing leaves them."""
    output = Output(root / "rows", STAGE, {}, {}, single_file=False)
    output.begin(overwrite=False)
    n_rows = {"train": args.n_batches * args.batch_size, "val": args.batch_size * with_val}
    some = rows_like_activations(_DISTINCT_ROWS, args.d_model, torch.device("cpu")).bfloat16()
    names = []
    for split, n in n_rows.items():
        if n:
            names.append(f"{split}_00000.safetensors")
            repeated = some.repeat(-(-n // len(some)), 1)[:n]
            save_file({"activations": repeated.contiguous()}, output.path / names[-1])
    facts: dict[str, Any] = dict.fromkeys(
        ("max_token_length", "model_fingerprint", "dataset_fingerprint")
    )
    facts |= {"d_model": args.d_model, "batch_size": args.batch_size, "layer": 0}
    facts |= {"rows": {split: [n] if n else [] for split, n in n_rows.items()}}
    facts |= {"hook_point": "resid_pre", "prepend_bos": True, "variance": 1.0}
    facts |= {"held_out_fraction": 0.05, "held_out_seed": 0}
    output.finish(facts=facts, counts={}, files=names)
    torch.save(some.float().mean(0), root / "mean.pt")


def training_flags(args: argparse.Namespace, root: Path, save: Path) -> list[str]:
    """Return the command line of one run on the rows in root."""
    names = ("n_latents", "k", "kernels", "device")
    given = [f"--{name}={getattr(args, name)}" for name in names]
    given += [f"--data_dir={root / 'rows'}", f"--b_pre_path={root / 'mean.pt'}"]
    return [*given, f"--model_save_path={save}", f"--num_epochs={_EPOCHS}"]


def apart(work: Callable[[], object]) -> None:
    """Do work in a process of its own. Raises SystemExit when it fails."""
    if code := in_child(work):
        raise SystemExit(code)


def train_and_kill(flags: Sequence[str], checkpoints: Path) -> int:
    """Train until there is a checkpoint, and kill the process; return the checkpoint's step."""
    child = multiprocessing.get_context("fork").Process(target=sae_training.main, args=(flags,))
    child.start()
    while child.is_alive() and not list(checkpoints.glob("*.step_*.pt")):
        time.sleep(0.001)
    assert child.pid is not None
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise SystemExit(f"the run was to be killed, and ended by itself ({child.exitcode})")
    return max(int(path.stem.rpartition("_")[2]) for path in checkpoints.glob("*.step_*.pt"))


def bits(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Compare two runs, and one that was killed and resumed."""
    apart(lambda: write_rows(work_dir, args, with_val=True))
    hashes, killed_at = [], 0
    for name in ("first", "second", "killed"):
        save = work_dir / name / "sae.pt"
        flags = training_flags(args, work_dir, save)
        if name == "killed":
            save.parent.mkdir()
            at_each_step = [*flags, "--checkpoint_minutes=0"]
            killed_at = train_and_kill(at_each_step, save.parent / "sae_checkpoints")
        apart(lambda flags=flags: sae_training.main(flags))
        hashes.append(file_checksum(save)["xxh3"])
    return {
        "two_runs_alike": hashes[0] == hashes[1],
        "killed_and_resumed_alike": hashes[0] == hashes[2],
        "killed_at_step": killed_at,
        "hashes": hashes,
    }


def speed(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Time whole runs, and the steps that their logs hold."""
    found: dict[str, Any] = {}
    for name, with_val in (("", True), ("_without_validation", False)):
        root = work_dir / f"rows{name}"
        root.mkdir()
        apart(lambda root=root, with_val=with_val: write_rows(root, args, with_val=with_val))
        save = root / "sae.pt"
        flags = [*training_flags(args, root, save), "--keep_last_n=0"]
        started = time.perf_counter()
        apart(lambda flags=flags: sae_training.main(flags))
        taken = time.perf_counter() - started
        metrics = save.with_name("sae.metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line)["tokens_per_s"] for line in metrics]
        found[f"seconds{name}"] = round(taken, 2)
        found[f"steps_per_s{name}"] = round(_EPOCHS * args.n_batches / taken, 2)
        found[f"median_tokens_per_s{name}"] = round(statistics.median(rates))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measure = {"bits": bits, "speed": speed}[args.what]
    with tempfile.TemporaryDirectory(prefix="saint_loop_", dir=args.work_dir) as directory:
        found = measure(args, Path(directory))
    names = ("d_model", "n_latents", "k", "batch_size", "n_batches", "kernels", "device")
    print(json.dumps({name: getattr(args, name) for name in names} | found))


if __name__ == "__main__":
    run_stage(main)
