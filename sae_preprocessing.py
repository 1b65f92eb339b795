"""Stage 2: shuffle captured activations into training rows, and compute their mean.

    python sae_preprocessing.py --input_dir activation_outputs/ --num_processes 4

The bytes do not depend on the number of processes. Sentences of the held-out split go to files of
their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from saint.activation_store import ActivationStore, add_layer_flags, open_stores
from saint.batched_rows import STAGE
from saint.manifests import Output, State, read_manifest
from saint.runtime import (
    UserError,
    add_overwrite_flag,
    log,
    log_arguments,
    positive_int,
    run_stage,
    save_torch,
)
from saint.sentences import HELD_OUT_FRACTION, HELD_OUT_SEED
from saint.shuffle import MASSIVE_NORM_FACTOR, Shuffle, mean_and_norms, shuffle_rows

_FILE_BYTES = 500_000_000


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Shuffle captured activations into training rows and compute their mean."
    )
    files = parser.add_argument_group("files")
    files.add_argument("--input_dir", type=Path, required=True, help="what capture wrote")
    files.add_argument("--output_dir", type=Path, help="shuffled rows [<input_dir>_batched]")
    files.add_argument("--mean_filepath", type=Path, help="mean activation [<input_dir>_mean.pt]")
    add_layer_flags(parser)
    shuffle = parser.add_argument_group("shuffle")
    shuffle.add_argument(
        "--batch_size",
        type=positive_int,
        default=8192,
        help="training's default batch size in tokens; recorded, not baked in [%(default)s]",
    )
    shuffle.add_argument("--shuffle_seed", type=int, default=0, help="seed [%(default)s]")
    shuffle.add_argument(
        "--rows_per_file", type=positive_int, help="rows of an output file [about 500 MB]"
    )
    shuffle.add_argument(
        "--held_out_fraction",
        type=float,
        default=HELD_OUT_FRACTION,
        help="share of sentences kept for validation [%(default)s]",
    )
    shuffle.add_argument(
        "--num_processes",
        type=positive_int,
        default=min(4, os.cpu_count() or 1),
        help="worker processes; the bytes do not depend on it [%(default)s]",
    )
    add_overwrite_flag(parser)
    return parser


def preprocess(
    store: ActivationStore, output: Output, mean_output: Output, args: argparse.Namespace
) -> None:
    """Shuffle one layer directory and write its mean."""
    states = [out.begin(overwrite=args.overwrite) for out in (output, mean_output)]
    if states == [State.DONE, State.DONE]:
        counts = read_manifest(output.path, STAGE).counts
        log.info("done already: %s holds %s rows", output.path, f"{counts['n_rows']:,}")
        return
    n_files = max(1, round(store.n_tokens / output.arguments["rows_per_file"]))
    n_val = max(1, round(n_files * args.held_out_fraction))
    shuffle = Shuffle(
        store,
        output.path,
        args.shuffle_seed,
        args.held_out_fraction,
        {"train": n_files, "val": n_val},
    )
    one = args.num_processes == 1 or store.n_shards == 1 == n_files
    context = (
        nullcontext() if one else ProcessPoolExecutor(args.num_processes, get_context("spawn"))
    )
    with context as pool:
        result = shuffle_rows(shuffle, pool.map if pool else map)
    n_rows = {split: sum(rows) for split, rows in result["rows"].items()}
    assert sum(n_rows.values()) == store.n_tokens, "a row was lost or doubled"
    if n_rows["train"] < args.batch_size:
        output.discard()
        mean_output.discard()
        raise UserError(
            f"--batch_size {args.batch_size} is larger than the {n_rows['train']} training rows"
        )
    mean, norm_facts = mean_and_norms(shuffle, n_rows["train"])
    save_torch(mean_output.path, mean)
    facts = store.facts | norm_facts
    facts |= {"rows": result["rows"], "batch_size": args.batch_size, "store": store.fingerprint}
    facts |= {"held_out_fraction": args.held_out_fraction, "held_out_seed": HELD_OUT_SEED}
    counts = {"n_rows": sum(n_rows.values()), "n_train": n_rows["train"], "n_val": n_rows["val"]}
    mean_output.finish(facts=facts, counts=counts, files=[mean_output.path.name])
    checksums = result["checksums"]
    output.finish(facts=facts, counts=counts, files=checksums, known=checksums)
    for i in range(store.n_shards):
        shuffle.stats_path(i).unlink()
    report(output, facts, counts)


def report(output: Output, facts: dict[str, Any], counts: dict[str, int]) -> None:
    """Log the figures a person wants, and warn about massive activations."""
    if facts["massive_tokens"]:
        named = ", ".join(f"{text!r} ({n}×)" for text, n in facts["massive_tokens"].items())
        log.warning(
            "warning: tokens with norm over %d × the median (%.0f): %s. They can dominate the "
            "dictionary; was the BOS token left out of the forward pass?",
            MASSIVE_NORM_FACTOR,
            facts["norm_median"],
            named,
        )
    log.info(
        "shuffled %s rows into %s: %s for training, %s held out",
        f"{counts['n_rows']:,}",
        output.path,
        f"{counts['n_train']:,}",
        f"{counts['n_val']:,}",
    )


def outputs_of(
    store: ActivationStore, args: argparse.Namespace, *, nested: bool
) -> tuple[Output, Output]:
    """Return the rows' and the mean's outputs; names carry the layer where there are several."""
    base = args.output_dir or args.input_dir.with_name(args.input_dir.name + "_batched")
    mean = args.mean_filepath or args.input_dir.with_name(args.input_dir.name + "_mean.pt")
    if nested:
        base = base / store.layer_dir
        mean = mean.with_name(f"{mean.stem}.{store.layer_dir}{mean.suffix}")
    per_file = args.rows_per_file or _FILE_BYTES // (2 * store.facts["d_model"])
    arguments = {
        "shuffle_seed": args.shuffle_seed,
        "held_out_fraction": args.held_out_fraction,
        "rows_per_file": per_file,
        "batch_size": args.batch_size,
    }
    sources = {"store": store.fingerprint, "layer_dir": store.layer_dir}
    settings = {"num_processes": args.num_processes, "input_dir": str(args.input_dir)}
    patterns = ("train_*.safetensors", "val_*.safetensors", ".*.rows.tmp", ".*.stats.npz")
    rows = Output(base, STAGE, arguments, sources, patterns, settings=settings, single_file=False)
    return rows, Output(mean, STAGE, arguments, sources, settings=settings, single_file=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess every captured layer directory that the command line chooses."""
    args = build_parser().parse_args(argv)
    log_arguments(args)
    if not 0 < args.held_out_fraction < 1:
        raise UserError(f"--held_out_fraction {args.held_out_fraction}: expected between 0 and 1")
    everything = open_stores(args.input_dir)
    chosen = open_stores(args.input_dir, layer=args.layer, hook_point=args.hook_point)
    if not chosen:
        held = ", ".join(store.layer_dir for store in everything)
        raise UserError(f"{args.input_dir} holds {held}: none matches --layer and --hook_point")
    for store in chosen:
        if store.n_tokens < args.batch_size:
            raise UserError(
                f"--batch_size {args.batch_size} exceeds the {store.n_tokens} captured tokens"
            )
        rows, mean = outputs_of(store, args, nested=len(everything) > 1)
        preprocess(store, rows, mean, args)


if __name__ == "__main__":
    run_stage(main)
