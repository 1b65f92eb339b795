"""Training with the latents split over ranks: memory of each, against what one rank would hold.

    python -m benchmarks.shards                  # 2^18 latents at d 256 over 4 gloo ranks
    python -m benchmarks.shards --table          # what eight 24 GB cards would hold, counted

Every rank is `sae_training.py`'s own `main` with one thread, on random rows: first weights, steps,
validation, calibration, checkpoint, and the whole SAE's file. `anonymous` is the peak of RssAnon,
sampled every 5 ms; `resident` also has mapped files, which the system may drop. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import sae_training
from benchmarks.common import PrivatePeak
from benchmarks.sae_loop import training_flags, write_rows
from saint.kernels.torch_encoder import BLOCK_ELEMENTS, n_candidates
from saint.stage.errors import UserError
from saint.stage.program import run_stage
from saint.training.run_files import RunFiles


def rank_bytes(
    n_latents: int, d_model: int, k: int, batch_size: int, n_ranks: int
) -> dict[str, int]:
    """Count the bytes on a card of n_ranks that share the latents, `--kernels torch`, batchtopk.

    In a step without dead latents. What is as small as n_latents or n_ranks alone is left out.
    """
    here, n_here = n_latents // n_ranks * d_model, n_latents // n_ranks
    rows, looked_at = 4 * batch_size * d_model, batch_size * min(2 * k, n_here)
    n_rows = min(batch_size, max(1, BLOCK_ELEMENTS // n_here))
    members = n_rows * 32 * n_candidates(2 * k)  # of the groups that the encoder looks at
    return {
        "weights": 8 * here,
        "moments": 16 * here,
        "gradients": 8 * here,
        # W_enc in bfloat16; a block's products; product, norm, bound and place of each member.
        "encoder": 2 * here + 2 * n_rows * n_here + 20 * members,
        # Inputs, reconstruction, its gradient and copies of them while they are made; values and
        # indices of each token's largest here, and the values of all ranks, sorted.
        "tokens": 6 * rows + 12 * looked_at + 12 * looked_at * n_ranks,
    }


def table() -> str:
    """Return what eight cards hold, as a Markdown table."""
    counted = {n: rank_bytes(1 << 20, 3072, 64, 8192, n) for n in (1, 2, 4, 8)}
    lines = ["| bytes a rank, in GB | " + " | ".join(counted[8]) + " | together |"]
    lines.append("|" + "---|" * (len(counted[8]) + 2))
    for n, parts in counted.items():
        name = "one rank" if n == 1 else f"{n} ranks"
        figures = [*parts.values(), sum(parts.values())]
        lines.append(f"| {name} | " + " | ".join(f"{x / 1e9:.1f}" for x in figures) + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n_ranks", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--d_model", type=int, default=256, help="[%(default)s]")
    parser.add_argument("--n_latents", type=int, default=1 << 18, help="[%(default)s]")
    parser.add_argument("--k", type=int, default=32, help="active latents [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=1024, help="tokens a step [%(default)s]")
    parser.add_argument("--n_batches", type=int, default=8, help="of an epoch [%(default)s]")
    parser.add_argument("--table", action="store_true", help="only count, for the docs")
    parser.set_defaults(kernels="auto", device="cpu")
    return parser


def be_rank(rank: int, port: int, args: argparse.Namespace, root: Path) -> None:
    """Train as one of the ranks, and leave its peaks."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(args.n_ranks), "LOCAL_RANK": str(rank)}
    flags = training_flags(args, root, root / "sae.pt")
    with PrivatePeak() as peak:
        sae_training.main([*flags, f"--latent_parallel_size={args.n_ranks}"])
    status = Path("/proc/self/status").read_text().splitlines()
    resident = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    found = {"anonymous": peak.highest, "before": peak.before, "resident": resident}
    (root / f"{rank}.json").write_text(json.dumps(found))


def measure(args: argparse.Namespace, root: Path) -> dict:
    """Let the ranks train; return what they held, in GB, and how it went."""
    write_rows(root, args, with_val=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    ranks = [
        context.Process(target=be_rank, args=(rank, port, args, root))
        for rank in range(args.n_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise UserError(f"ranks ended with {[process.exitcode for process in ranks]}")
    peaks = [json.loads((root / f"{rank}.json").read_text()) for rank in range(args.n_ranks)]
    found = {name: [round(peak[name] / 1e9, 2) for peak in peaks] for name in peaks[0]}
    last = RunFiles(root / "sae.pt").read_metrics()[-1]
    how = {"fvu": round(last["val/fvu"], 4), "loss": round(last["train/loss"], 4)}
    return found | how | {"steps": last["step"], "seconds": round(time.monotonic() - start)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or count."""
    args = build_parser().parse_args(argv)
    if args.table:
        print(table(), end="")
        return
    with tempfile.TemporaryDirectory() as directory:
        found = measure(args, Path(directory))
    state = round(24 * args.n_latents * args.d_model / 1e9, 2)
    for rank, peak in enumerate(found["anonymous"]):
        before, resident = found["before"][rank], found["resident"][rank]
        print(f"rank {rank}: {peak} GB anonymous, {before} before it began; {resident} resident")
    share = round(state / args.n_ranks, 2)
    print(f"weights and moments: {state} GB of all, {share} a rank (counted)")
    sizes = {"ranks": args.n_ranks, "n_latents": args.n_latents, "d_model": args.d_model}
    print(json.dumps(sizes | found | {"state_gb": state, "state_gb_a_rank": share}))


if __name__ == "__main__":
    run_stage(main)
