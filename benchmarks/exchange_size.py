"""Time and memory of bringing a large SAE in and out, each in a process of its own.

    python benchmarks/exchange_size.py --work_dir runs/exchange_size

Makes a JumpReLU and a TopK SAE of SAELens's layout (random, decoder norms other than one, so that
all is folded), imports them, and exports each to the formats that carry it. The last line is one
JSON object: seconds, peak resident memory, and that memory in sizes of the SAE's file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from saint.exchange.foreign import LazyTensor, write_tensors  # noqa: E402

FORMATS = {"jumprelu": ("saelens", "dictionary_learning"), "topk": ("sparsify",)}


def make(directory: Path, rule: str, n: int, d: int) -> Path:
    """Write SAELens's two files; returns the weights'."""

    def draw(rows: int, columns: int, scale: float) -> LazyTensor:
        block = scale * torch.randn(64, columns)  # rows repeat: only their number matters
        return LazyTensor((rows, columns), lambda a, b: block[torch.arange(a, b) % 64])

    small = {"b_enc": torch.randn(n), "b_dec": torch.randn(d)}
    small |= {"threshold": torch.rand(n)} if rule == "jumprelu" else {}
    tensors = {"W_enc": draw(d, n, d**-0.5), "W_dec": draw(n, d, 1.5 * d**-0.5)}
    path = directory / "sae_weights.safetensors"
    write_tensors(path, tensors | {name: LazyTensor.of(t) for name, t in small.items()}, {})
    config = {"architecture": rule, "d_in": d, "d_sae": n, "apply_b_dec_to_input": False}
    config |= {"k": 64, "rescale_acts_by_decoder_norm": True} if rule == "topk" else {}
    hook = {"metadata": {"hook_name": "blocks.21.hook_resid_post"}}
    (directory / "cfg.json").write_text(json.dumps(config | hook))
    return path


def run(*arguments: object) -> dict[str, float]:
    """Run saint_exchange.py; returns its seconds and peak memory in bytes."""
    started = time.monotonic()
    measured = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, str(REPO / "saint_exchange.py"), *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-c", measured, *command], stdout=subprocess.PIPE, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.monotonic() - started, "bytes": unit * int(done.stdout)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a large SAE's exchange.")
    parser.add_argument("--work_dir", type=Path, required=True, help="where files are made")
    parser.add_argument("--n_latents", type=int, default=65536, help="latents [%(default)s]")
    parser.add_argument("--d_model", type=int, default=3072, help="width [%(default)s]")
    args = parser.parse_args(argv)
    found, size = {}, 1
    for rule, formats in FORMATS.items():
        theirs = args.work_dir / f"saelens_{rule}"
        theirs.mkdir(parents=True, exist_ok=True)
        size = make(theirs, rule, args.n_latents, args.d_model).stat().st_size
        ours = args.work_dir / f"{rule}.safetensors"
        found[f"import {rule}"] = run("import", theirs, "--output_path", ours)
        for name in formats:
            out = args.work_dir / f"out_{name}"
            found[f"export {name}"] = run("export", ours, "--format", name, "--output_dir", out)
    for name, row in found.items():
        row["sizes"] = round(row["bytes"] / size, 2)
        print(f"{name}: {row['seconds']:.1f} s, {row['bytes'] / 1e9:.2f} GB, {row['sizes']} files")
    print(json.dumps({"file_bytes": size, **found}))


if __name__ == "__main__":
    main()
