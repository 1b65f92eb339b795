"""Stage 4: how faithful and how sparse the autoencoder is, on sentences it never saw.

    python sae_evaluation.py --model_dir M --sae_model_path trained_sae.pt --dataset_dir D

Reads the held-out rule from the SAE's file, captures those sentences up to the hook once, and runs
the layers above it four times: untouched, with the SAE's reconstruction in place of the activation,
and with the mean activation or zeros in its place. The BOS position and padding are never replaced.
--first_letter_words and --probe_column ask what its latents mean. Several SAEs are compared by
`python -m saint.evaluation.compare`, from their reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama_3 import CheckpointError, HookPoint, load_args, load_llama, load_tokenizer
from sae import TopKSparseAutoencoder, load_sae
from saint.capture.packing import Pack
from saint.evaluation.absorption import first_letters
from saint.evaluation.decoder import geometry
from saint.evaluation.faithfulness import (
    Subject,
    capture_to_hook,
    count_tokens,
    cross_entropies,
    dead_share,
    density_histogram,
    held_out_sentences,
    next_token_losses,
)
from saint.evaluation.page import evaluation_page
from saint.evaluation.tokens import by_norm, by_position, excerpts
from saint.evaluation.topics import topic_probing
from saint.stage.devices import pick_dtype
from saint.stage.errors import UserError, log
from saint.stage.files import write_json, write_text
from saint.stage.flags import (
    add_bare_sae_flags,
    add_device_flags,
    add_model_parallel_flag,
    add_overwrite_flag,
    bare_sae_flags,
    positive_int,
    said_of_dtype,
    seed_number,
    whole_number,
)
from saint.stage.manifests import (
    Output,
    State,
    file_checksum,
    manifest_path,
    model_fingerprint,
    read_manifest,
)
from saint.stage.program import log_arguments, run_stage
from saint.stage.terminal import FINAL, page_link
from saint.stage.workers import start_workers
from saint.store.dataset import SentenceDataset, open_dataset

STAGE = "sae_evaluation"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Measure an SAE's faithfulness and sparsity on held-out sentences."
    )
    files = parser.add_argument_group("files")
    files.add_argument("--model_dir", type=Path, required=True, help="Llama weights")
    files.add_argument("--sae_model_path", type=Path, required=True, help="the trained SAE")
    files.add_argument("--dataset_dir", required=True, help="the sentences' parquet files")
    files.add_argument("--text_column", default="text", help="column of sentences [%(default)s]")
    files.add_argument(
        "--output_path", type=Path, help="report [sae_evaluation.json beside the SAE; and a .html]"
    )
    what = parser.add_argument_group("sample")
    what.add_argument(
        "--num_samples", type=positive_int, default=500, help="held-out sentences [%(default)s]"
    )
    what.add_argument("--shuffle_seed", type=seed_number, default=42, help="seed [%(default)s]")
    what.add_argument(
        "--batch_tokens", type=positive_int, default=2048, help="of one pass [%(default)s]"
    )
    more = parser.add_argument_group("what else to measure")
    more.add_argument(
        "--first_letter_words",
        type=whole_number,
        default=0,
        help="single-token words on which absorption is measured on two cores with "
        "a model of 135M [%(default)s: not]",
    )
    more.add_argument("--probe_column", help="column of topics, to probe for [none: not]")
    more.add_argument(
        "--probe_sentences", type=positive_int, default=100, help="of each topic [%(default)s]"
    )
    more.add_argument(
        "--decoder_latents",
        type=positive_int,
        default=4096,
        help="latents whose directions are compared with all others [%(default)s]",
    )
    more.add_argument(
        "--excerpts",
        type=whole_number,
        default=6,
        help="sentences shown token by token [%(default)s]",
    )
    add_bare_sae_flags(parser)
    add_device_flags(parser, dtype=True)
    add_model_parallel_flag(parser)
    add_overwrite_flag(parser)
    return parser


def hook_of(sae: TopKSparseAutoencoder, args: argparse.Namespace) -> HookPoint:
    """Return where the SAE reads. Raises UserError when that is unknown or not in the model."""
    n_layers, layer = load_args(args.model_dir).n_layers, sae.config.layer
    if layer is None:
        raise UserError(f"{args.sae_model_path} does not know its layer: name --sae_layer_idx")
    if not 0 <= layer < n_layers:
        raise UserError(f"the SAE reads layer {layer}, the model has layers 0 to {n_layers - 1}")
    model_dim = load_args(args.model_dir).dim
    if model_dim != sae.config.d_model:
        raise UserError(
            f"the SAE has d_model {sae.config.d_model}, the model in --model_dir has {model_dim}"
        )
    return HookPoint(layer, sae.config.hook_point)


def _more(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for beyond what every report has."""
    found = {"first_letter_words": args.first_letter_words, "probe_column": args.probe_column}
    if args.probe_column:
        found["probe_sentences"] = args.probe_sentences
    for name, default in (("decoder_latents", 4096), ("excerpts", 6)):
        if getattr(args, name) != default:
            found[name] = getattr(args, name)
    return found


def plan_output(
    args: argparse.Namespace,
    sae: TopKSparseAutoencoder,
    hook: HookPoint,
    dataset: SentenceDataset,
    dtype: torch.dtype,
) -> Output:
    """Describe the report for its manifest."""
    path = args.output_path or args.sae_model_path.with_name("sae_evaluation.json")
    return Output(
        path=path,
        stage=STAGE,
        arguments={
            "num_samples": args.num_samples,
            "shuffle_seed": args.shuffle_seed,
            "dtype": str(dtype).removeprefix("torch."),
            # What the command line says of a bare checkpoint.
            "k": sae.config.k,
            "layer": hook.layer,
            "hook_point": hook.name,
            "prepend_bos": sae.config.prepend_bos,
            **{name: value for name, value in _more(args).items() if value},
        }
        | said_of_dtype(args),
        sources={
            "sae": file_checksum(args.sae_model_path)["xxh3"],
            "model": model_fingerprint(args.model_dir),
            "dataset": dataset.fingerprint,
        },
        single_file=True,
        own_names=(path.name, path.with_suffix(".html").name),
        settings={"device": str(sae.b_pre.device), "batch_tokens": args.batch_tokens},
    )


def measure(
    args: argparse.Namespace,
    sae: TopKSparseAutoencoder,
    hook: HookPoint,
    dataset: SentenceDataset,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the report."""
    seed, batch_tokens = args.shuffle_seed, args.batch_tokens
    tokenizer = load_tokenizer(args.model_dir)
    packs = held_out_sentences(
        dataset, tokenizer, sae.config, args.num_samples, seed=seed, batch_tokens=batch_tokens
    )
    model, _ = load_llama(
        args.model_dir,
        device=sae.b_pre.device,
        dtype=dtype,
        model_parallel_size=args.model_parallel_size,
    )
    subject = Subject(model, tokenizer, sae, hook, batch_tokens=batch_tokens, seed=seed)
    report = faithfulness(subject, packs, args)
    if args.first_letter_words:
        report["absorption"] = first_letters(subject, args.first_letter_words)
    if args.probe_column:
        labels = open_dataset(args.dataset_dir, text_column=args.probe_column)
        report["probing"] = topic_probing(subject, dataset, labels, per_class=args.probe_sentences)
    return report


def faithfulness(
    subject: Subject, packs: Sequence[Pack], args: argparse.Namespace
) -> dict[str, Any]:
    """Return what every report has."""
    sae, hook = subject.sae, subject.hook
    captured = capture_to_hook(subject, packs)
    losses = next_token_losses(subject, packs, captured)
    share, basis = dead_share(sae, captured.density)
    tokens = captured.tokens | losses
    ids = tokens["token_id"].unique().tolist()
    texts = {i: subject.tokenizer.token_text(i) for i in ids}
    alive, n_compared = captured.density.nonzero()[:, 0], args.decoder_latents
    return {
        **captured.metrics,
        "dead_share": share,
        "dead_share_counted_over": basis,
        **cross_entropies(losses),
        "n_tokens": count_tokens(packs),
        "layer": hook.layer,
        "hook_point": hook.name,
        "density_histogram": density_histogram(captured.density),
        "by_position": by_position(tokens),
        "by_norm": by_norm(tokens),
        "decoder": geometry(sae.W_dec, alive, n_compared=n_compared, seed=subject.seed),
        "excerpts": excerpts(tokens, texts, args.excerpts),
    }


def provenance(args: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Return what a comparison must know: of which SAE, model and text, and how it was trained."""
    path = args.sae_model_path
    sources = {name: output.sources[name] for name in ("model", "dataset")}
    made: dict[str, Any] = {"sae": str(path), **sources}
    if manifest_path(path, "sae_training").exists():
        made["training"] = read_manifest(path, "sae_training").arguments
    return made


def write_report(output: Output, report: dict[str, Any], title: str) -> None:
    """Write the report and its page, and log the figures a person wants."""
    page = output.path.with_suffix(".html")
    write_text(page, evaluation_page(report, title=title))
    write_json(output.path, report)
    names = [output.path.name, page.name]
    output.finish(facts={}, counts={"n_tokens": report["n_tokens"]}, files=names)
    log.info(
        "%s: FVU %.4f, L0 %.1f, dead %.1f %%, cross-entropy recovered %.4f, over %s tokens; "
        "look at %s",
        output.path,
        report["fvu"],
        report["l0"],
        100 * report["dead_share"],
        report["loss_recovered"],
        f"{report['n_tokens']:,}",
        page_link(page),
        extra=FINAL,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = build_parser().parse_args(argv)
    load_args(args.model_dir).shard(args.model_parallel_size)  # raises if it does not split
    workers = start_workers(
        args.device, model_parallel_size=args.model_parallel_size, data_parallel=False
    )
    log_arguments(args, build_parser())
    sae = load_sae(args.sae_model_path, device=workers.device, **bare_sae_flags(args))
    hook = hook_of(sae, args)
    dataset = open_dataset(args.dataset_dir, text_column=args.text_column)
    dtype = pick_dtype(args.dtype, workers.device)
    output = plan_output(args, sae, hook, dataset, dtype)
    state = workers.on_main(lambda: output.begin(overwrite=args.overwrite))
    if state is State.DONE:
        log.info(
            "done already: %s; look at %s", output.path, page_link(output.path.with_suffix(".html"))
        )
        return
    try:
        report = provenance(args, output) | measure(args, sae, hook, dataset, dtype)
    except (CheckpointError, UserError):
        if state is State.NEW and workers.is_main:
            output.take_back()
        raise
    if workers.is_main:
        write_report(output, report, f"Evaluation of {args.sae_model_path.name}")


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
