"""A tool beside the stages: SAEs of other tools in, ours out; labels and evidence for others.

    python saint_exchange.py import SRC --output_path sae.safetensors
    python saint_exchange.py export sae.safetensors --format saelens --output_dir out/
    python saint_exchange.py labels --labels_path parsed_responses.yaml --output_path labels.csv
    python saint_exchange.py pull hf://owner/name --output_path sae.safetensors
    python saint_exchange.py push sae.safetensors owner/name

SRC is a directory or file of SAELens, sparsify, dictionary_learning, Llama Scope, Goodfire or Gemma
Scope, or hf://owner/name/folder. What a format cannot carry is refused by name.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae import SAEConfig, read_sae
from saint.evidence.file import open_evidence
from saint.evidence.labels import load_labels
from saint.exchange import hub, neuronpedia
from saint.exchange.exports import WRITERS
from saint.exchange.foreign import LazyTensor, fold, write_ours
from saint.exchange.imports import Overrides, read_foreign
from saint.exchange.labels_table import label_rows, write_labels
from saint.stage.errors import UserError, log
from saint.stage.files import naming_full_disk, read_json, remove_torn
from saint.stage.flags import positive_float, positive_int, whole_number
from saint.stage.program import run_stage

FORMATS = (*WRITERS, "neuronpedia")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description="Bring SAEs in from other tools, and out to them.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_import(commands.add_parser("import", help="turn another tool's SAE into one of ours"))
    add_export(commands.add_parser("export", help="write an SAE as another tool reads it"))
    labels = commands.add_parser("labels", help="write labels as a table")
    labels.add_argument("--labels_path", type=Path, help="parsed_responses.yaml")
    labels.add_argument("--evidence_path", type=Path, help="adds density, maximum, all latents")
    labels.add_argument("--output_path", type=Path, required=True, help=".csv or .jsonl")
    pull = commands.add_parser("pull", help="fetch an SAE of ours from the hub")
    pull.add_argument("source", help="hf://owner/name[/folder][@revision]")
    pull.add_argument("--output_path", type=Path, required=True, help="sae.safetensors")
    push = commands.add_parser("push", help="upload an SAE of ours to the hub, with a model card")
    push.add_argument("sae_path", type=Path, help="the SAE")
    push.add_argument("repository", help="owner/name, made where it is not there")
    push.add_argument(
        "--evaluation_path", type=Path, help="sae_evaluation.json [the one beside the SAE]"
    )
    push.add_argument("--curve_path", type=Path, help="a picture of the training curve")
    push.add_argument("--model_name", help="the language model's id on the hub")
    push.add_argument(
        "--dry_run", type=Path, metavar="DIR", help="only write what would be uploaded, here"
    )
    return parser


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `import`."""
    parser.add_argument("source", help="a directory, a file, or hf://owner/name[/folder]")
    parser.add_argument(
        "--output_path", type=Path, required=True, help="sae.safetensors (or .pt) to write"
    )
    said = parser.add_argument_group("what the file does not say, or says wrongly")
    said.add_argument("--layer", type=whole_number, help="0-based layer that it reads")
    said.add_argument("--hook_point", help="where in that layer, e.g. resid_pre")
    said.add_argument("--no_bos", action="store_true", help="it was trained without BOS tokens")
    said.add_argument(
        "--max_token_length", type=positive_int, help="tokens of a sentence, BOS not counted"
    )
    said.add_argument("--model_name", help="the language model's name")
    said.add_argument(
        "--norm_factor",
        type=positive_float,
        help="SAELens's expected_average_only_in: activation × this",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `export`."""
    parser.add_argument("sae_path", type=Path, help="the SAE")
    parser.add_argument("--format", required=True, choices=FORMATS, help="who shall read it")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory to write")
    parser.add_argument("--model_name", help="the language model's name there")
    features = parser.add_argument_group("neuronpedia")
    features.add_argument("--evidence_path", type=Path, help="evidence.parquet of this SAE")
    features.add_argument("--labels_path", type=Path, help="parsed_responses.yaml")
    features.add_argument("--source_set", default="saint", help="source is LAYER-SET [%(default)s]")
    features.add_argument(
        "--explainer", default="claude", help="who wrote the labels [%(default)s]"
    )
    features.add_argument(
        "--upload", action="store_true", help="send it (NEURONPEDIA_API_KEY, USE_LOCALHOST)"
    )


def import_sae(args: argparse.Namespace) -> None:
    """Read another tool's SAE and write ours."""
    remote = args.source.startswith(hub.PREFIX)
    path = hub.fetch(args.source) if remote else Path(args.source)
    overrides = Overrides(
        layer=args.layer,
        hook_point=args.hook_point,
        no_bos=args.no_bos,
        norm_factor=args.norm_factor,
        model_name=args.model_name,
        max_token_length=args.max_token_length,
    )
    config, tensors = fold(read_foreign(path, overrides))
    remove_torn(args.output_path.parent, f"{args.output_path.stem}.")
    with naming_full_disk(args.output_path.parent):
        write_ours(args.output_path, config, tensors)
    place = "layer unknown: name --sae_layer_idx later"
    if config.layer is not None:
        place = f"layer {config.layer} {config.hook_point}"
    log.info(
        "%s: %s, %s latents of %d dimensions, %s",
        args.output_path,
        config.source,
        f"{config.n_latents:,}",
        config.d_model,
        place,
    )


def read_ours(path: Path, model_name: str | None = None) -> tuple[SAEConfig, dict[str, Any]]:
    """Return an SAE's config and mapped tensors. Raises UserError for a bare state dict."""
    config, state = read_sae(path)
    if config is None:
        raise UserError(f"{path} is a bare state dict, which says too little of itself")
    if model_name:
        config = SAEConfig(**{**vars(config), "model_name": model_name})
    return config, state


def export_sae(args: argparse.Namespace) -> None:
    """Write an SAE, or what is known of its latents, for another tool."""
    config, state = read_ours(args.sae_path, args.model_name)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    remove_torn(args.output_dir)
    with naming_full_disk(args.output_dir):
        if args.format != "neuronpedia":
            WRITERS[args.format](config, state, args.output_dir)
            log.info("%s holds the SAE as %s reads it", args.output_dir, args.format)
            return
        export_neuronpedia(args, config)


def export_neuronpedia(args: argparse.Namespace, config: SAEConfig) -> None:
    """Write Neuronpedia's batches, and send them if that is asked for."""
    if args.evidence_path is None or config.layer is None or not config.model_name:
        raise UserError("neuronpedia needs --evidence_path, --model_name and an SAE with a layer")
    evidence = open_evidence(args.evidence_path)
    if evidence.n_latents != config.n_latents:
        raise UserError(
            f"{args.evidence_path} has {evidence.n_latents} latents, the SAE {config.n_latents}"
        )
    labels = load_labels(args.labels_path) if args.labels_path else {}
    dead = neuronpedia.dead_latents(evidence)
    payloads = neuronpedia.batches(
        evidence,
        labels,
        model_id=config.model_name.rsplit("/", 1)[-1].lower(),
        source=neuronpedia.source_id(config.layer, args.source_set),
        explainer=args.explainer,
    )
    n = neuronpedia.write_batches(args.output_dir, payloads, dead)
    log.info("%s: %d batches, %d dead latents left out", args.output_dir, n, len(dead))
    if args.upload:
        log.info("%d batches are sent", neuronpedia.upload(args.output_dir))


def export_labels(args: argparse.Namespace) -> None:
    """Write labels as a table."""
    if args.labels_path is None and args.evidence_path is None:
        raise UserError("name --labels_path, --evidence_path or both")
    labels = load_labels(args.labels_path) if args.labels_path else {}
    evidence = open_evidence(args.evidence_path) if args.evidence_path else None
    rows = label_rows(labels, evidence)
    write_labels(args.output_path, rows)
    log.info("%s: %s latents", args.output_path, f"{len(rows):,}")


def pull(args: argparse.Namespace) -> None:
    """Fetch an SAE of ours."""
    directory = hub.fetch(args.source, nested=False)
    found = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.pt"))
    if len(found) != 1:
        raise UserError(
            f"{args.source} holds {len(found)} SAEs of ours (others: saint_exchange.py import)"
        )
    config, state = read_sae(found[0])
    if config is None:
        raise UserError(f"{args.source} holds no SAE of ours (others: saint_exchange.py import)")
    with naming_full_disk(args.output_path.parent):
        write_ours(args.output_path, config, {name: LazyTensor.of(t) for name, t in state.items()})
    log.info("%s is fetched", args.output_path)


def push(args: argparse.Namespace) -> None:
    """Upload an SAE with its card, and as SAELens and sparsify read it where they can."""
    config, state = read_ours(args.sae_path, args.model_name)
    report = args.evaluation_path or args.sae_path.with_name("sae_evaluation.json")
    facts: dict[str, Any] = {"formats": []}
    if report.exists():
        facts["evaluation"] = read_json(report)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.dry_run or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / args.sae_path.with_suffix(".safetensors").name
        write_ours(path, config, {name: LazyTensor.of(t) for name, t in state.items()})
        for name in ("saelens", "sparsify"):
            try:
                WRITERS[name](config, state, directory / name)
            except UserError as error:
                log.info("not as %s: %s", name, error)
            else:
                facts["formats"].append(name)
        if args.curve_path:
            shutil.copy(args.curve_path, directory / args.curve_path.name)
            facts["curve"] = args.curve_path.name
        if args.dry_run:
            card = hub.model_card(config, path.name, args.repository, facts)
            (directory / "README.md").write_text(card)
            log.info("%s holds what would be uploaded", directory)
            return
        log.info("%s", hub.push(args.repository, config, path, directory, facts))


COMMANDS = {
    "import": import_sae,
    "export": export_sae,
    "labels": export_labels,
    "pull": pull,
    "push": push,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    args = build_parser().parse_args(argv)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_stage(main, after_interrupt="the same command starts over")
