"""Loading a `Studio` from the command line, for the demo page, its terminal twin and benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from llama_3 import HOOK_NAMES, HookPoint, LlamaArgs, load_args, load_llama
from sae import TopKSparseAutoencoder, load_sae
from saint.evidence.file import open_evidence
from saint.evidence.labels import load_labels
from saint.stage.program import (
    UserError,
    Workers,
    add_device_flags,
    log,
    pick_device,
    pick_dtype,
    positive_int,
)
from saint.steering.guide import Guide, make_guide
from saint.steering.settings import Dictionary, Limits, Studio

_DEFAULT_LABELS = Path("output") / "parsed_responses.yaml"
_DEFAULT_EVIDENCE = Path("top_activating_sentences") / "evidence.parquet"
# What a person types to see the demo work: sentences that a news text might open with.
EXAMPLE_PROMPTS = (
    "The delegates gathered at the",
    "Foreign officials released a statement",
    "Humanitarian staff coordinated their efforts",
    "Senior diplomats met to discuss",
)


def add_studio_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model, its SAEs and what is known of their latents."""
    group = parser.add_argument_group("model and SAE")
    group.add_argument(
        "--llama_model_dir", type=Path, required=True, help="directory of the Llama model"
    )
    group.add_argument(
        "--sae_model_path", type=Path, nargs="+", required=True, help="one or more trained SAEs"
    )
    group.add_argument(
        "--sae_layer_idx",
        type=int,
        nargs="+",
        help="0-based layer of each SAE, for older checkpoints that do not know it",
    )
    group.add_argument(
        "--k", type=positive_int, nargs="+", help="active latents per token of older checkpoints"
    )
    group.add_argument(
        "--hook_point",
        choices=HOOK_NAMES,
        nargs="+",
        help="hook point of older checkpoints (the first version's SAEs: attn_norm)",
    )
    group.add_argument(
        "--no_bos", action="store_true", help="older checkpoints that were trained without BOS"
    )
    group.add_argument(
        "--labels_path",
        type=Path,
        nargs="+",
        help=f"parsed_responses.yaml of each SAE [{_DEFAULT_LABELS} beside the SAE, where it is]",
    )
    group.add_argument(
        "--evidence_path",
        type=Path,
        nargs="+",
        help=f"evidence file of each SAE [{_DEFAULT_EVIDENCE} beside the SAE, where it is]",
    )
    add_device_flags(parser, dtype=True)


def load_studio(
    args: argparse.Namespace, limits: Limits | None = None, workers: Workers | None = None
) -> tuple[Studio, list[Guide]]:
    """Load what `add_studio_flags` names; the cheap files first, the model last.

    workers: the ranks that the model is split over; then all of them must use the studio alike.
    Raises UserError or llama_3.CheckpointError when something is missing, damaged or does not fit.
    """
    workers = workers or Workers(0, 1, pick_device(args.device))
    device, n_shards = workers.device, workers.model_parallel_size
    model_args = load_args(args.llama_model_dir)
    dictionaries, guides = [], []
    n = len(args.sae_model_path)
    labels_paths = _per_sae(args.labels_path, n, "--labels_path", spread=False)
    evidence_paths = _per_sae(args.evidence_path, n, "--evidence_path", spread=False)
    flags = zip(
        _per_sae(args.sae_layer_idx, n, "--sae_layer_idx"),
        _per_sae(args.k, n, "--k"),
        _per_sae(args.hook_point, n, "--hook_point"),
        strict=True,
    )
    for i, (path, (layer, k, hook_point)) in enumerate(
        zip(args.sae_model_path, flags, strict=True)
    ):
        sae = load_sae(
            path, device=device, k=k, layer=layer, hook_point=hook_point, no_bos=args.no_bos
        )
        hook = _checked_hook(path, sae, model_args)
        guide_paths = _guide_paths(path, labels_paths[i], evidence_paths[i])
        dictionary, guide = _bind(path, sae, hook, *guide_paths)
        dictionaries.append(dictionary)
        guides.append(guide)
    if len({d.sae.config.prepend_bos for d in dictionaries}) > 1:
        raise UserError("some of the SAEs were trained with a BOS token and some without")
    model, tokenizer = load_llama(
        args.llama_model_dir,
        device=device,
        dtype=pick_dtype(args.dtype, device),
        model_parallel_size=n_shards,
    )
    return Studio(model, tokenizer, tuple(dictionaries), limits or Limits()), guides


def _per_sae(values: Sequence[Any] | None, n: int, flag: str, *, spread: bool = True) -> list[Any]:
    """One value per SAE: none, as many as SAEs, or (spread) one for all."""
    if values is None:
        return [None] * n
    if len(values) == 1 and spread:
        return list(values) * n
    if len(values) != n:
        raise UserError(f"{flag} has {len(values)} values for {n} SAEs")
    return list(values)


def _checked_hook(path: Path, sae: TopKSparseAutoencoder, args: LlamaArgs) -> HookPoint:
    config = sae.config
    if config.layer is None:
        raise UserError(f"{path} does not know its layer: name it with --sae_layer_idx")
    if not 0 <= config.layer < args.n_layers:
        raise UserError(
            f"{path} is for layer {config.layer}, the model has {args.n_layers} (from 0)"
        )
    if config.d_model != args.dim:
        raise UserError(f"{path} is for d_model {config.d_model}, the model has {args.dim}")
    if config.hook_point not in HOOK_NAMES:
        raise UserError(
            f"{path} is for the hook point {config.hook_point}, which is not known here"
        )
    return HookPoint(config.layer, config.hook_point)


def _guide_paths(
    sae_path: Path, labels: Path | None, evidence: Path | None
) -> tuple[Path | None, Path | None]:
    """The paths given, or the default places beside the SAE where files are there."""
    chosen = []
    for given, default in ((labels, _DEFAULT_LABELS), (evidence, _DEFAULT_EVIDENCE)):
        beside = sae_path.parent / default
        if given is None and beside.is_file():
            log.info("using %s", beside)
            given = beside
        chosen.append(given)
    return chosen[0], chosen[1]


def _bind(
    path: Path,
    sae: TopKSparseAutoencoder,
    hook: HookPoint,
    labels_path: Path | None,
    evidence_path: Path | None,
) -> tuple[Dictionary, Guide]:
    evidence = None if evidence_path is None else open_evidence(evidence_path)
    labels = {} if labels_path is None else load_labels(labels_path)
    if sae.max_activations is not None:
        units, source = sae.max_activations.float().cpu(), "largest activation over training tokens"
    elif evidence is not None and evidence.n_latents == sae.config.n_latents:
        column = evidence.summary().column("max_activation").to_numpy()
        units, source = torch.tensor(column), "largest activation in the evidence"
    else:
        units, source = torch.ones(sae.config.n_latents), "raw activation: no maximum is known"
    # A latent that never fired has no unit of its own: its strength stays raw.
    units = torch.where(units > 0, units, torch.ones_like(units))
    dictionary = Dictionary(path.stem, sae, hook, units, source)
    return dictionary, make_guide(labels, evidence, dictionary)


def fingerprints(studio: Studio) -> list[str]:
    """Return a short identity per SAE: settings made for one mean nothing for another."""
    found = []
    for dictionary in studio.dictionaries:
        sae = dictionary.sae
        shape = (*dictionary.hook, sae.config.n_latents, sae.config.k)
        digest = xxhash.xxh3_64(repr(shape).encode())
        for tensor in (sae.b_enc, sae.b_pre):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        found.append(digest.hexdigest())
    return found
