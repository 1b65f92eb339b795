"""Stage 9: look at latents, as one HTML file that opens from disk, or along a prompt.

python latent_browser.py --evidence_path top_activating_sentences/evidence.parquet \
        --labels_path output/parsed_responses.yaml --html latents.html

python latent_browser.py --prompt "Senior diplomats met to discuss" --model_dir M \
        --sae_model_path trained_sae.pt [--labels_path …] [--html prompt.html]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from llama_3 import CheckpointError, load_llama
from sae import TopKSparseAutoencoder, load_sae
from saint.browser.pack import Page, PageBuilder, WindowLimits, direction_map, read_effects
from saint.browser.prompt_view import prompt_activations, prompt_page, terminal_table
from saint.evidence.file import Evidence, open_evidence
from saint.evidence.labels import Label, load_labels
from saint.stage.devices import pick_device, pick_dtype
from saint.stage.errors import UserError, log
from saint.stage.files import remove_torn, write_text
from saint.stage.flags import (
    add_bare_sae_flags,
    add_device_flags,
    bare_sae_flags,
    positive_float,
    positive_int,
    whole_number,
)
from saint.stage.html import inline, render
from saint.stage.program import log_arguments, run_stage
from saint.stage.terminal import FINAL, page_link, show

SCRIPTS = ("search.js", "keep.js", "canvas.js", "browser.js")
TEMPLATES = Path(__file__).resolve().parent / "saint" / "browser" / "templates"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Write one HTML file to browse all latents, or show what fires on a prompt."
    )
    files = parser.add_argument_group("files")
    files.add_argument("--evidence_path", type=Path, help="evidence.parquet of the top sentences")
    files.add_argument(
        "--labels_path", type=Path, help="parsed_responses.yaml, where there are labels"
    )
    files.add_argument(
        "--effects_path",
        type=Path,
        help="what latents do [effects.parquet beside the evidence, where it is]",
    )
    files.add_argument(
        "--sae_model_path", type=Path, help="the SAE: needed for a prompt, and for the page's map"
    )
    files.add_argument("--html", type=Path, help="the HTML file to write, replaced if it is there")
    page = parser.add_argument_group("the page")
    page.add_argument("--title", help="what the page calls itself [the layer and hook point]")
    page.add_argument(
        "--top_windows",
        type=positive_int,
        default=10,
        help="strongest sentences shown [%(default)s]",
    )
    page.add_argument(
        "--decile_windows",
        type=whole_number,
        default=2,
        help="sentences per activation decile [%(default)s]",
    )
    page.add_argument(
        "--demo_url",
        default="http://127.0.0.1:8080",
        help="where the demo runs, for the links that steer by a latent [%(default)s]",
    )
    page.add_argument(
        "--max_megabytes",
        type=positive_float,
        default=60,
        help="size limit in MB; sentences per decile are left out to keep it [%(default)s]",
    )
    prompt = parser.add_argument_group("a prompt instead")
    prompt.add_argument("--prompt", help="text whose tokens' active latents are shown")
    prompt.add_argument("--model_dir", type=Path, help="Llama weights")
    prompt.add_argument(
        "--latents_per_token",
        type=positive_int,
        default=5,
        help="strongest ones shown [%(default)s]",
    )
    add_bare_sae_flags(parser)
    add_device_flags(parser, dtype=True)
    return parser


def page_text(page: Page, title: str, demo_url: str, sae_fingerprint: str) -> str:
    """Return the whole HTML file: styles, script and data inside."""
    packed = {"latents": page.latents, "sentences": page.sentences}
    return render(
        TEMPLATES,
        "browser.html",
        title=title,
        css=inline(TEMPLATES / "browser.css"),
        js=Markup("\n").join(inline(TEMPLATES / name) for name in SCRIPTS),
        summary=page.summary,
        vocabulary=page.vocabulary,
        packed=packed,
        demo_url=demo_url,
        sae_fingerprint=sae_fingerprint,
    )


def fit_page(evidence: Evidence, labels: Mapping[int, Label], args: argparse.Namespace) -> str:
    """Return the page with as many sentences per decile as fit into `--max_megabytes`."""
    facts = evidence.meta
    title = (
        args.title
        or f"{evidence.n_latents:,} latents of layer {facts['layer']}, {facts['hook_point']}"
    )
    places = decoder_map(args, evidence.n_latents)
    beside = args.evidence_path.with_name("effects.parquet")
    effects_path = args.effects_path or (beside if beside.is_file() else None)
    effects = None if effects_path is None else read_effects(effects_path, evidence.n_latents)
    text = ""
    for per_decile in range(args.decile_windows, -1, -1):
        limits = WindowLimits(top=args.top_windows, quantile=per_decile)
        page = PageBuilder(evidence, labels, limits, places, effects).build()
        text = page_text(page, title, args.demo_url, facts.get("sae_fingerprint", ""))
        megabytes = len(text.encode()) / 1e6
        if megabytes <= args.max_megabytes:
            return text
        log.info("%.1f MB with %d sentences per decile: too large", megabytes, per_decile)
    raise UserError(
        f"the page needs {len(text.encode()) / 1e6:.0f} MB even without sentences per decile: "
        f"raise --max_megabytes {args.max_megabytes:.0f} or lower --top_windows {args.top_windows}"
    )


def decoder_map(args: argparse.Namespace, n_latents: int) -> np.ndarray | None:
    """Return each direction's place on the map, or None where no SAE is named."""
    if args.sae_model_path is None:
        return None
    sae = load_sae(args.sae_model_path, device=pick_device(args.device), **bare_sae_flags(args))
    if sae.config.n_latents != n_latents:
        raise UserError(
            f"{args.evidence_path} has {n_latents} latents, {args.sae_model_path} has "
            f"{sae.config.n_latents}"
        )
    return direction_map(sae.W_dec.detach())


def write_browser(args: argparse.Namespace) -> None:
    """Write the page of all latents."""
    if args.evidence_path is None or args.html is None:
        raise UserError("--evidence_path and --html are needed (or --prompt, to look at a prompt)")
    evidence = open_evidence(args.evidence_path)
    labels = load_labels(args.labels_path) if args.labels_path else {}
    strangers = [i for i in labels if i >= evidence.n_latents]
    if strangers:
        raise UserError(
            f"{args.labels_path} labels latent {strangers[0]}, "
            f"{args.evidence_path} has {evidence.n_latents} latents"
        )
    text = fit_page(evidence, labels, args)
    write_text(args.html, text)
    log.info(
        "wrote %s latents, %s labels, %.1f MB: look at %s",
        f"{evidence.n_latents:,}",
        f"{sum(bool(label.text) for label in labels.values()):,}",
        len(text.encode()) / 1e6,
        page_link(args.html),
        extra=FINAL,
    )


def look_at_prompt(args: argparse.Namespace) -> None:
    """Print what fires on a prompt, and write it as HTML where asked."""
    missing = [f"--{n}" for n in ("model_dir", "sae_model_path") if getattr(args, n) is None]
    if missing:
        raise UserError(f"--prompt needs {' and '.join(missing)}")
    device = pick_device(args.device)
    sae = load_sae(args.sae_model_path, device=device, **bare_sae_flags(args))
    labels = load_labels(args.labels_path) if args.labels_path else {}
    dtype = pick_dtype(args.dtype, device)
    n_layers = None if sae.config.layer is None else sae.config.layer + 1
    model, tokenizer = load_llama(args.model_dir, device=device, dtype=dtype, n_layers=n_layers)
    found = prompt_activations(
        model,
        tokenizer,
        sae,
        args.prompt,
        maxima=known_maxima(sae, args.evidence_path),
        names={latent: label.text for latent, label in labels.items() if label.text},
    )
    width = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 1000
    show(terminal_table(found, per_token=args.latents_per_token, width=width))
    if args.html is not None:
        about = (
            f"{sae.config.n_latents:,} latents of layer {sae.config.layer}, "
            f"{sae.config.hook_point}; {sae.config.k or 'any number'} may fire on a token."
        )
        text = prompt_page(found, title=args.prompt, about=about, per_token=args.latents_per_token)
        write_text(args.html, text)
        log.info("wrote %s: look at %s", args.html, page_link(args.html))


def known_maxima(sae: TopKSparseAutoencoder, evidence_path: Path | None) -> Tensor | None:
    """Return the steering unit: the SAE's own maxima, else the evidence's, else None."""
    if sae.max_activations is not None or evidence_path is None:
        return sae.max_activations
    maxima = open_evidence(evidence_path).summary().column("max_activation").to_numpy()
    if len(maxima) != sae.config.n_latents:
        raise UserError(
            f"{evidence_path} has {len(maxima)} latents, the SAE {sae.config.n_latents}"
        )
    return torch.from_numpy(maxima.copy())


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or show the prompt, that the command line asks for."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    if args.html is not None:
        remove_torn(args.html.parent, args.html.name)
    if args.prompt is None:
        write_browser(args)
    else:
        look_at_prompt(args)


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
