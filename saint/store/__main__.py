"""Describe an activation store and verify it: `python -m saint.store DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saint.stage.errors import UserError
from saint.stage.flags import whole_number
from saint.stage.manifests import read_manifest, verify_file
from saint.stage.program import run_stage
from saint.stage.terminal import show
from saint.store.activation_store import (
    SENTENCES,
    STAGE,
    ActivationStore,
    _unfinished_move,
    half_moved_layers,
    open_stores,
)


def describe(data_dir: Path) -> list[str]:
    """Return lines that say what a finished store holds."""
    manifest = read_manifest(data_dir, STAGE)
    counts: Mapping[str, Any] = manifest.counts
    lines = [f"{data_dir}: {counts['n_sentences']:,} sentences, {counts['n_tokens']:,} tokens"]
    for name, facts in manifest.facts["layers"].items():
        size = sum(v["bytes"] for k, v in manifest.files.items() if k.startswith(f"{name}/"))
        moved = manifest.facts.get("in_place", {}).get(name)
        lines.append(
            f"  {name}: layer {facts['layer']} {facts['hook_point']}, {counts['n_shards']} shards, "
            f"{manifest.facts.get('store_dtype', 'bfloat16')}, {size / 1e9:.2f} GB"
            + (f", its rows moved to {data_dir / moved['rows']}" if moved else "")
        )
    return lines


def find_problems(data_dir: Path) -> list[str]:
    """Return a line for every file that is missing, shortened, changed or not the store's own.

    A layer whose rows are half moved is one line: until the move ends, nothing says what its
    shards should be.
    """
    manifest = read_manifest(data_dir, STAGE)
    moving = half_moved_layers(manifest)
    problems = [_unfinished_move(data_dir / name) for name in moving]
    for name, expected in manifest.files.items():
        if Path(name).parts[0] in moving:
            continue
        try:
            verify_file(data_dir / name, expected)
        except UserError as error:
            problems.append(str(error))
    own = [*manifest.facts["layers"], SENTENCES]
    held = [path for pattern in ("layer_*/*", f"{SENTENCES}/*") for path in data_dir.glob(pattern)]
    foreign = [p for p in held if p.relative_to(data_dir).as_posix() not in manifest.files]
    for path in sorted(foreign):
        if path.parent.name in own and path.match(".*.tmp"):
            if path.parent.name not in moving:
                problems.append(f"{path} is what an interrupted run was writing: remove it")
            continue
        what = "no shard of this store" if path.parent.name in own else "in no layer of this store"
        problems.append(f"{path} is foreign: {what}, its manifest does not list it")
    return problems


def show_sentences(store: ActivationStore, n_sentences: int) -> list[str]:
    """Return lines with the first sentences, each token followed by its activation norm."""
    shard, texts = store.read_shard(0), store.token_texts()
    lines = []
    for i in range(min(n_sentences, len(shard.sentence_ids))):
        rows = slice(int(shard.offsets[i]), int(shard.offsets[i + 1]))
        norms = torch.linalg.vector_norm(shard.read(rows).float(), dim=1)
        tokens = shard.token_ids[rows].tolist()
        shown = " ".join(
            f"{texts[t].strip() or '_'}[{n:.0f}]"
            for t, n in zip(tokens, norms.tolist(), strict=True)
        )
        lines.append(f"  sentence {int(shard.sentence_ids[i])}: {shown}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Describe and verify a store; exit with 1 when something is wrong with a file."""
    parser = argparse.ArgumentParser(description="Describe and verify an activation store.")
    parser.add_argument("data_dir", type=Path, help="the directory that capture wrote")
    parser.add_argument("--n_sentences", type=whole_number, default=3, help="sentences to show [3]")
    args = parser.parse_args(argv)
    print("\n".join(describe(args.data_dir)))
    problems = find_problems(args.data_dir)
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        sys.exit(1)
    print("  every file has its checksum, and none is foreign")
    for store in open_stores(args.data_dir):
        print(f"{store.layer_dir}, token[norm]:")
        show("\n".join(show_sentences(store, args.n_sentences)))


if __name__ == "__main__":
    run_stage(main)
