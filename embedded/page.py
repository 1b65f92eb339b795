"""The quickstart's page: curves, figures, the clearest latents, and one steered completion.

python -m embedded.page --run_dir runs/quickstart --llama_model_dir runs/quickstart/model
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from llama_3 import CheckpointError
from saint.evaluation.page import evaluation_charts
from saint.evidence.file import Evidence, open_evidence
from saint.evidence.labels import Label, load_labels
from saint.evidence.words import clearest_latents
from saint.stage.errors import UserError, log
from saint.stage.files import write_json, write_text
from saint.stage.flags import add_overwrite_flag
from saint.stage.manifests import Output, State, file_checksum
from saint.stage.plots import STYLE
from saint.stage.program import run_stage
from saint.steering.completions import Pair, complete_pairs
from saint.steering.settings import Request, Setting
from saint.steering.studio import (
    EXAMPLE_PROMPTS,
    Studio,
    add_studio_flags,
    build_edits,
    load_studio,
)
from saint.training.curves_page import curves
from saint.training.run_files import RunFiles

_N_LATENTS = 20
_N_WINDOWS = 5
_TRIED_LATENTS = 6
_STRENGTH = 2.0
# The shown text should say the concept, not only the concept: more than this adds nothing.
_ENOUGH_CONCEPT = 0.3
_MAX_SURPRISE = 1.0  # nats per token beyond the plain text, to the plain model
_MIN_DISTINCT_SHARE = 0.8
_NEW_TOKENS = 24


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description="Write the quickstart's page.")
    parser.add_argument("--run_dir", type=Path, required=True, help="what the stages wrote")
    add_studio_flags(parser)
    for action in parser._actions:
        if action.dest == "sae_model_path":
            action.required = False
    add_overwrite_flag(parser)
    return parser


@torch.inference_mode()
def steerable(studio: Studio, evidence: Evidence, latents: Sequence[int]) -> list[int]:
    """Sort latents by how much steering raises their own top tokens right after the prompt."""
    ids = studio.tokenizer.encode(EXAMPLE_PROMPTS[-1], bos=studio.prepend_bos)
    tokens = torch.tensor([ids], device=studio.model.device)
    plain = studio.model(tokens)[0, -1].softmax(dim=-1)
    gains = {}
    for latent in latents:
        top = [e for e in evidence.latent(latent)["examples"] if e["kind"] == "top"]
        own = sorted({e["token_ids"][e["position"] - e["start"]] for e in top})
        settings = [Setting(latent, "add", _STRENGTH)]
        edits = build_edits(studio, settings, where="both", prompt_lengths=[len(ids)])
        steered = studio.model(tokens, edits=edits)[0, -1].softmax(dim=-1)
        gains[latent] = float((steered[own] - plain[own]).sum())
    return sorted(latents, key=lambda latent: -gains[latent])


def showcase(studio: Studio, latents: Sequence[int]) -> tuple[Pair, Setting]:
    """Try latents on the demo's prompts; return the pair that steers best.

    Best is the text whose own activation of the latent, read by the plain model, is high while
    the text stays fluent and does not run in circles.
    """
    tried: list[tuple[float, Pair, Setting]] = []
    for number, latent in enumerate(latents, 1):
        log.info("steering by latent %d, %d of the %d tried", latent, number, len(latents))
        setting = Setting(latent, "add", _STRENGTH)
        request = Request(EXAMPLE_PROMPTS, (setting,), max_new_tokens=_NEW_TOKENS)
        for pair in complete_pairs(studio, request):
            score = min(concept_gain(pair), _ENOUGH_CONCEPT)
            score -= max(0.0, surprise_gain(pair) - _MAX_SURPRISE)
            score -= max(0.0, _MIN_DISTINCT_SHARE - distinct_words(pair.steered.text))
            tried.append((score, pair, setting))
    _, pair, setting = max(tried, key=lambda row: row[0])
    return pair, setting


def concept_gain(pair: Pair) -> float:
    """How much more the steered text itself activates the latent, in its units, per token."""
    return _mean_activation(pair.steered) - _mean_activation(pair.plain)


def distinct_words(text: str) -> float:
    """Return the share of words that are not repeats: text that runs in circles has few."""
    words = text.lower().split()
    return len(set(words)) / max(1, len(words))


def surprise_gain(pair: Pair) -> float:
    """How many nats per token more surprising the steered text is to the plain model."""
    return (pair.steered.mean_surprise or 0.0) - (pair.plain.mean_surprise or 0.0)


def _mean_activation(reading: Any) -> float:
    rows = [row[0] for row in reading.activations[reading.n_prompt :]]
    return sum(rows) / max(1, len(rows))


def window_html(example: dict[str, Any], maximum: float) -> str:
    """Return one window with its firing tokens highlighted by strength."""
    parts = []
    for token, activation in zip(example["tokens"], example["activations"], strict=True):
        text = html.escape(token)
        if activation > 0:
            share = min(1.0, activation / max(maximum, 1e-9))
            title = f"{activation:.2f}"
            text = f'<mark style="--s:{share:.2f}" title="{title}">{text}</mark>'
        parts.append(text)
    return f"<li>{''.join(parts)}</li>"


def latent_html(row: dict[str, Any], label: Label | None) -> str:
    """Return one latent's card."""
    top = [example for example in row["examples"] if example["kind"] == "top"][:_N_WINDOWS]
    windows = "".join(window_html(example, row["max_activation"]) for example in top)
    name = html.escape(label.text if label else "")
    promoted = ", ".join(html.escape(t["token"].strip()) for t in row["promoted"][:6])
    promoted = f'<p class="small">promotes: {promoted}</p>' if promoted else ""
    return (
        f'<details><summary><b>{name}</b> <span class="small">latent {row["latent"]}, fires on '
        f"{row['density']:.2%} of tokens</span></summary>{promoted}<ul>{windows}</ul></details>"
    )


def render(
    run_dir: Path,
    evidence: Evidence,
    labels: dict[int, Label],
    latents: list[int],
    pair: Pair,
    setting: Setting,
) -> str:
    """Fill the page's template."""
    report = json.loads((run_dir / "sae_evaluation.json").read_text(encoding="utf-8"))
    figures = {
        "variance explained": f"{1 - report['fvu']:.1%}",
        "cross-entropy recovered": f"{report['loss_recovered']:.1%}",
        "active latents per token": f"{report['l0']:.0f} of {evidence.n_latents:,}",
        "dead latents": f"{report['dead_share']:.1%}",
    }
    tiles = "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in figures.items())
    label = labels.get(setting.latent)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        tiles=tiles,
        layer=report["layer"],
        curves_style=STYLE,
        curves=curves(RunFiles(run_dir / "trained_sae.pt").read_metrics()),
        evaluation=evaluation_charts(report),
        latents="".join(latent_html(evidence.latent(i), labels.get(i)) for i in latents),
        prompt=html.escape(pair.prompt),
        plain=html.escape(pair.plain.text),
        steered=html.escape(pair.steered.text),
        steered_by=html.escape(f"latent {setting.latent} ({label.text if label else ''})"),
        strength=f"{setting.strength:g}",
        n_tokens=f"{evidence.meta['n_tokens']:,}",
        n_sentences=f"{evidence.meta['n_sentences']:,}",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and print the result."""
    args = build_parser().parse_args(argv)
    args.sae_model_path = args.sae_model_path or [args.run_dir / "trained_sae.pt"]
    page = args.run_dir / "quickstart.html"
    evidence_path = args.run_dir / "top_activating_sentences" / "evidence.parquet"
    labels_path = args.run_dir / "output" / "parsed_responses.yaml"
    inputs = {"evidence": evidence_path, "labels": labels_path, "sae": args.sae_model_path[0]}
    output = Output(
        page,
        "quickstart_page",
        arguments={},
        sources={name: file_checksum(path)["xxh3"] for name, path in inputs.items()},
        own_patterns=(page.name, "quickstart.json"),
    )
    if _begin(output, args.overwrite) is not State.DONE:
        evidence, labels = open_evidence(evidence_path), load_labels(labels_path)
        latents = clearest_latents(evidence, _N_LATENTS)
        studio, _ = load_studio(args)
        tried = steerable(studio, evidence, latents)[:_TRIED_LATENTS]
        pair, setting = showcase(studio, tried or [0])
        record = {"latents": latents, "setting": str(setting), "prompt": pair.prompt}
        record |= {"plain": pair.plain.text, "steered": pair.steered.text}
        record |= {"labels": {str(i): labels[i].text for i in latents if i in labels}}
        write_json(page.with_suffix(".json"), record)
        write_text(page, render(args.run_dir, evidence, labels, latents, pair, setting))
        output.finish(facts={}, counts={}, files=[page.name, "quickstart.json"])
    show(json.loads(page.with_suffix(".json").read_text(encoding="utf-8")))


def _begin(output: Output, overwrite: bool) -> State:
    """Begin the page; one that was made from other labels or another SAE is simply made anew."""
    try:
        return output.begin(overwrite=overwrite)
    except UserError as difference:
        log.info("%s", difference)
        return output.begin(overwrite=True)


def show(record: dict[str, Any]) -> None:
    """Print what was found."""
    log.info("the clearest latents:")
    for latent, text in record["labels"].items():
        log.info("  %6s  %s", latent, text)
    log.info("prompt:  %s", record["prompt"])
    log.info("plain:   %s", " ".join(record["plain"].split()))
    log.info("steered (%s):  %s", record["setting"], " ".join(record["steered"].split()))


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
