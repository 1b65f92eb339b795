"""Stage 2: shuffle captured activations into training rows, and compute their mean.

    python sae_preprocessing.py --input_dir activation_outputs/ --num_processes 4

The bytes depend neither on the number of workers nor on the memory they are given. Sentences of the
held-out split go to files of their own.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saint.shuffle.on_disk import Result, clean_up, run_shuffle
from saint.shuffle.plan import Shuffle, make_plan
from saint.shuffle.statistics import (
    MASSIVE_NORM_FACTOR,
    combine_sums,
    describe_norms,
    massive_tokens,
)
from saint.stage.errors import UserError, log
from saint.stage.files import naming_full_disk, require_space, save_torch
from saint.stage.flags import (
    add_overwrite_flag,
    positive_float,
    positive_int,
    proper_fraction,
    seed_number,
)
from saint.stage.locks import hold
from saint.stage.manifests import (
    Output,
    State,
    file_checksum,
    load_manifest,
    lock_path,
    manifest_path,
    read_manifest,
    recorded_numbers,
)
from saint.stage.program import log_arguments, run_stage
from saint.stage.terminal import FINAL
from saint.store.activation_store import ActivationStore, add_layer_flags, open_stores
from saint.store.dataset import HELD_OUT_FRACTION, HELD_OUT_SEED
from saint.store.row_format import row_bytes
from saint.store.shuffled_rows import STAGE

_FILE_BYTES = 500_000_000
NEXT = "; next: sae_training.py --data_dir %s --b_pre_path %s"


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
    shuffle.add_argument("--shuffle_seed", type=seed_number, default=0, help="seed [%(default)s]")
    shuffle.add_argument(
        "--rows_per_file", type=positive_int, help="rows of an output file [about 500 MB]"
    )
    shuffle.add_argument(
        "--held_out_fraction",
        type=proper_fraction,
        default=HELD_OUT_FRACTION,
        help="share of sentences kept for validation [%(default)s]",
    )
    shuffle.add_argument(
        "--num_processes",
        type=positive_int,
        default=min(4, os.cpu_count() or 1),
        help="workers at once (threads); the bytes do not depend on it [%(default)s]",
    )
    shuffle.add_argument(
        "--memory_gb",
        type=positive_float,
        default=4.0,
        help="memory for rows, GB beside the program's own 0.3; where all rows fit, nothing goes "
        "to disk in between [%(default)s]",
    )
    shuffle.add_argument(
        "--in_place",
        action="store_true",
        help="free each captured shard as its rows move on, so that no extra disk is needed; top "
        "sentences still works, through an index of where each row went",
    )
    add_overwrite_flag(parser)
    return parser


def preprocess(
    store: ActivationStore, output: Output, mean_output: Output, args: argparse.Namespace
) -> None:
    """Shuffle one layer directory and write its mean."""
    started = time.monotonic()
    if store.moved_to is not None and (args.overwrite or not args.in_place):
        raise UserError(
            f"{store.root / store.layer_dir} was preprocessed in place: {store.moved_to} holds the "
            "only copy of its rows; run capture_activations.py --overwrite to start over"
        )
    if store.moved_to is not None and store.moved_to.resolve() != output.path.resolve():
        raise UserError(
            f"{store.root / store.layer_dir} is preprocessed in place into {store.moved_to}: "
            f"--output_dir {output.path} cannot have its rows"
        )
    if store.has_moved:
        refuse_what_is_lost(output, mean_output)
    states = [out.begin(overwrite=args.overwrite) for out in (output, mean_output)]
    if states == [State.DONE, State.DONE]:
        clean_up(store, output.path)
        counts = read_manifest(output.path, STAGE).counts
        told = (output.path, f"{counts['n_rows']:,}", output.path, mean_output.path)
        log.info("done already: %s holds %s rows" + NEXT, *told)
        return
    n_files = max(1, round(store.n_tokens / output.arguments["rows_per_file"]))
    shuffle = Shuffle(
        store,
        output.path,
        args.shuffle_seed,
        args.held_out_fraction,
        {"train": n_files, "val": max(1, round(n_files * args.held_out_fraction))},
        memory_bytes=int(args.memory_gb * 1e9),
        n_workers=args.num_processes,
        in_place=args.in_place,
    )
    plan = make_plan(shuffle)
    n_train = sum(file.n_rows for file in plan.files if file.split == "train")
    if n_train < args.batch_size:
        for out in (output, mean_output):
            out.discard()
        raise UserError(
            f"--batch_size {args.batch_size} is larger than the {n_train} training rows"
        )
    with naming_full_disk(output.path):
        require_space(output.path, plan.disk_bytes, "make room")
        finish(run_shuffle(plan), output, mean_output, started)


def refuse_what_is_lost(*outputs: Output) -> None:
    """Raise UserError where a file of a store that was preprocessed in place is missing.

    It cannot be made again, and beginning to would spoil what is left. A run that was interrupted
    before its manifest goes on.
    """
    for output in outputs:
        missing = [] if output.partial_path.exists() else [output.manifest_path]
        if output.manifest_path.exists():
            names = load_manifest(output.manifest_path).files
            missing = [output.manifest_path.with_name(name) for name in names]
        missing = [path for path in missing if not path.exists()]
        if missing:
            raise UserError(
                f"{missing[0]} is missing and cannot be made again: the captured rows were "
                "preprocessed in place; put it back, or start over with "
                "capture_activations.py --overwrite"
            )


def finish(result: Result, output: Output, mean_output: Output, started: float) -> None:
    """Write the mean and both manifests, the rows' last."""
    plan, store, args = result.plan, result.plan.shuffle.store, output.arguments
    n_rows = {split: sum(rows) for split, rows in result.rows.items()}

    def norms() -> Iterator[np.ndarray]:
        return (result.statistics(i).norms for i in plan.shuffle.shards)

    mean, variance = combine_sums(map(result.statistics, plan.shuffle.shards), n_rows["train"])
    norm_facts = describe_norms(norms)
    norm_facts["massive_tokens"] = massive_tokens(
        norms(),
        (plan.shuffle.index_of(i)["token_ids"].numpy() for i in plan.shuffle.shards),
        norm_facts["norm_median"],
        store.token_texts(),
    )
    save_torch(mean_output.path, mean)
    facts = store.facts | norm_facts | {"variance": variance, "rows": result.rows}
    facts |= {"batch_size": args["batch_size"], "store": store.fingerprint}
    facts |= {"held_out_fraction": args["held_out_fraction"], "held_out_seed": HELD_OUT_SEED}
    counts = {"n_rows": plan.n_rows, "n_train": n_rows["train"], "n_val": n_rows["val"]}
    mean_output.finish(facts=facts, counts=counts, files=[mean_output.path.name])
    checksums = result.checksums
    if plan.shuffle.in_place:
        paths = [store.shard_path(i) for i in plan.shuffle.shards]
        moved = {f"{store.layer_dir}/{path.name}": file_checksum(path) for path in paths}
        store.record_move(output.path, moved)
    output.finish(facts=facts, counts=counts, files=checksums, known=checksums)
    clean_up(store, output.path)
    megabytes = result.share * sum(f["bytes"] for f in checksums.values()) / 1e6
    report(output, mean_output.path, facts, counts, megabytes / (time.monotonic() - started))


def report(
    output: Output,
    mean_path: Path,
    facts: dict[str, Any],
    counts: dict[str, int],
    mb_per_s: float,
) -> None:
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
        "shuffled %s rows into %s: %s for training, %s held out, %s" + NEXT,
        f"{counts['n_rows']:,}",
        output.path,
        f"{counts['n_train']:,}",
        f"{counts['n_val']:,}",
        f"{mb_per_s:.0f} MB/s" if mb_per_s else "an earlier run moved all of them",
        output.path,
        mean_path,
        extra=FINAL,
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
    earlier = {}
    if not args.overwrite:
        earlier = recorded_numbers(base, STAGE)
    file_bytes = min(_FILE_BYTES, int(args.memory_gb * 1e9 / 4))
    stored = row_bytes(store.facts["d_model"], store.facts.get("store_dtype", "bfloat16"))
    automatic = earlier.get("rows_per_file") or max(1, file_bytes // stored)
    arguments = {
        "shuffle_seed": args.shuffle_seed,
        "held_out_fraction": args.held_out_fraction,
        "rows_per_file": args.rows_per_file or automatic,
        "batch_size": args.batch_size,
        "in_place": args.in_place,
    }
    sources = {"store": store.fingerprint, "layer_dir": store.layer_dir}
    settings = {"num_processes": args.num_processes, "input_dir": str(args.input_dir)}
    patterns = tuple(f"{name}_*.safetensors" for name in ("train", "val", "positions"))
    patterns += (".*.rows.tmp", ".*.stats.npz")
    record = {"stage": STAGE, "arguments": arguments, "sources": sources, "settings": settings}
    rows = Output(base, single_file=False, own_patterns=patterns, **record)
    return rows, Output(mean, single_file=True, **record)


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess every captured layer directory that the command line chooses."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    everything = open_stores(args.input_dir, half_moved=True)
    # The only copy of the rows is one run's at a time, wherever it puts them.
    lock = (
        hold(lock_path(manifest_path(args.input_dir, "capture_activations")))
        if args.in_place
        else None
    )
    chosen = open_stores(
        args.input_dir, layer=args.layer, hook_point=args.hook_point, half_moved=True
    )
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
    if lock is not None:
        lock.release()


if __name__ == "__main__":
    run_stage(main)
