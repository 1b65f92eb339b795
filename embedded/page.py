"""The quickstart's page: curves, figures, the clearest latents, and concepts turned up.

python -m embedded.page --run_dir runs/quickstart --llama_model_dir runs/quickstart/model
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llama_3 import CheckpointError
from saint.evaluation.page import evaluation_charts
from saint.evidence.file import Evidence, open_evidence
from saint.evidence.labels import Label, load_labels
from saint.evidence.words import clearest_latents
from saint.report.stages import run_stages
from saint.stage.errors import UserError, log
from saint.stage.files import write_json, write_text
from saint.stage.flags import add_overwrite_flag
from saint.stage.html import render
from saint.stage.manifests import Output, State, file_checksum
from saint.stage.program import run_stage
from saint.stage.terminal import page_link
from saint.steering.showcase import SHOWCASE, Shown, family_shows, load_showcase
from saint.steering.studio import EXAMPLE_PROMPTS, Studio, add_studio_flags, load_studio
from saint.training.curves_page import curves
from saint.training.run_files import RunFiles

_N_LATENTS = 20
_N_WINDOWS = 5
_N_OPEN = 3
_NO_DIFFERENCE, _LARGE_DIFFERENCE = 0.1, 3.0  # nats, for the colours of a token


@dataclass(frozen=True)
class Known:
    """What is known of the run's latents; latents: those to show, clearest first."""

    evidence: Evidence
    labels: dict[int, Label]
    latents: list[int]


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


def example(one: Shown) -> dict[str, Any]:
    """Return what the page shows of a concept that was seen to show: its slider and its texts."""
    doses = [
        {
            "strength": row["dose"],
            "text": row["text"],
            "says": f"dose {row['dose']:g}, fluency {row['loss']:+.2f} nats per token"
            if row["dose"]
            else "not at all: the plain text",
        }
        for row in one.doses
    ]
    nearest = min(range(len(doses)), key=lambda i: abs(doses[i]["strength"] - one.dose))
    return {
        "name": one.concept.name,
        "seen": f"{sum(text.shows for text in one.texts)} of {len(one.texts)}",
        "dose": f"{one.dose:g}",
        "loss": f"{one.loss:+.2f}",
        "prompt": one.best.prompt,
        "plain": one.doses[0]["text"],
        "doses": doses,
        "chosen": nearest,
        "texts": [
            {"prompt": text.prompt, "pieces": marked(text.steered, one), "shows": text.shows}
            for text in one.texts
        ],
    }


def marked(text: str, one: Shown) -> list[tuple[str, bool]]:
    """Cut a text at its words; True for those that count as the concept."""
    pieces = re.split(r"([A-Za-z]+)", text)
    return [
        (piece, bool(i % 2) and family_shows(piece, one.concept.name, one.family))
        for i, piece in enumerate(pieces)
        if piece
    ]


@torch.inference_mode()
def token_losses(studio: Studio, text: str) -> dict[str, Any]:
    """Return each token's loss (nats) by the model and with the SAE's reconstruction in place."""
    dictionary = studio.dictionaries[0]
    first = int(studio.prepend_bos)
    ids = studio.tokenizer.encode(text, bos=studio.prepend_bos)
    tokens = torch.tensor([ids], device=studio.model.device)

    def replaced(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        own = (positions >= first).unsqueeze(-1)
        return torch.where(own, dictionary.sae.reconstruct(x), x)

    losses = []
    for edits in ({}, {dictionary.hook: replaced}):
        logits = studio.model(tokens, edits=edits)[0, :-1].float()
        losses.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    plain, with_sae = (row.tolist() for row in losses)
    shown = [{"text": studio.tokenizer.token_text(i), "kind": "", "title": ""} for i in ids[first:]]
    for token, a, b in zip(shown[-len(plain) :], plain, with_sae, strict=True):
        if abs(b - a) > _NO_DIFFERENCE:
            token["kind"] = "worse" if b > a else "better"
        token["share"] = f"{min(1.0, abs(b - a) / _LARGE_DIFFERENCE):.2f}"
        token["title"] = f"{a:.2f} nats, with the SAE {b:.2f}"
    mean = [f"{sum(row) / len(row):.2f}" for row in (plain, with_sae)]
    return {"loss": shown, "loss_plain": mean[0], "loss_sae": mean[1]}


def latent_card(row: dict[str, Any], label: Label | None, *, is_open: bool) -> dict[str, Any]:
    """Return what the page shows of one latent."""
    top = [example for example in row["examples"] if example["kind"] == "top"][:_N_WINDOWS]
    largest = max(row["max_activation"], 1e-9)
    windows = [
        [
            (token, f"{min(1.0, value / largest):.2f}" if value > 0 else "")
            for token, value in zip(example["tokens"], example["activations"], strict=True)
        ]
        for example in top
    ]
    return {
        "number": row["latent"],
        "name": label.text if label else f"latent {row['latent']}",
        "density": f"{row['density']:.2%}",
        "promoted": ", ".join(entry["token"].strip() for entry in row["promoted"][:6]),
        "windows": windows,
        "open": is_open,
    }


def page_text(args: argparse.Namespace, known: Known, shown: dict[str, Any]) -> str:
    """Fill the page's template."""
    run_dir, evidence, labels = args.run_dir, known.evidence, known.labels
    report = json.loads((run_dir / "sae_evaluation.json").read_text(encoding="utf-8"))
    facts = {
        "variance explained": f"{1 - report['fvu']:.1%}",
        "cross-entropy recovered": f"{report['loss_recovered']:.1%}",
        "active latents per token": f"{report['l0']:.0f} of {evidence.n_latents:,}",
        "dead latents": f"{report['dead_share']:.1%}",
    }
    stages = [
        {
            "name": stage.name,
            "made": stage.made,
            "size": stage.size,
            "cost": stage.cost,
        }
        for stage in run_stages(run_dir)
    ]
    cards = [
        latent_card(evidence.latent(i), labels.get(i), is_open=place < _N_OPEN)
        for place, i in enumerate(known.latents)
    ]
    demo = (
        ".venv/bin/python llama_3_inference_text_completion_gradio.py \\\n    --llama_model_dir "
        f"{args.llama_model_dir} --sae_model_path {args.sae_model_path[0]} --port 8080"
    )
    return render(
        Path(__file__).parent,
        "quickstart.html",
        facts=facts,
        model="SmolLM2-135M-Instruct",
        layer=report["layer"],
        curves=curves(RunFiles(run_dir / "trained_sae.pt").read_metrics()),
        evaluation=evaluation_charts(report),
        latents=cards,
        stages=stages,
        demo=demo,
        n_tokens=f"{evidence.meta['n_tokens']:,}",
        n_sentences=f"{evidence.meta['n_sentences']:,}",
        **shown,
    )


def make_page(args: argparse.Namespace, known: Known) -> tuple[dict[str, Any], str]:
    """Return the record of what was found and the page that shows it."""
    studio, _ = load_studio(args)
    concepts = load_showcase(args.run_dir / SHOWCASE, studio)
    record: dict[str, Any] = {"latents": known.latents, "concepts": []}
    record["labels"] = {str(i): known.labels[i].text for i in known.latents if i in known.labels}
    for one in concepts:
        texts = {"prompt": one.best.prompt, "plain": one.best.plain, "steered": one.best.steered}
        record["concepts"].append({"setting": f"{one.concept.name}=+{one.dose:g}"} | texts)
    shown: dict[str, Any] = {"concepts": [example(one) for one in concepts]}
    text = record["concepts"][0] if concepts else {"prompt": EXAMPLE_PROMPTS[0], "plain": ""}
    shown |= token_losses(studio, text["prompt"] + text["plain"])
    return record, page_text(args, known, shown)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and print the result."""
    args = build_parser().parse_args(argv)
    args.sae_model_path = args.sae_model_path or [args.run_dir / "trained_sae.pt"]
    page = args.run_dir / "quickstart.html"
    evidence_path = args.run_dir / "top_activating_sentences" / "evidence.parquet"
    labels_path = args.run_dir / "output" / "parsed_responses.yaml"
    inputs = {"evidence": evidence_path, "labels": labels_path, "sae": args.sae_model_path[0]}
    if (args.run_dir / SHOWCASE).exists():
        inputs["showcase"] = args.run_dir / SHOWCASE
    output = Output(
        page,
        "quickstart_page",
        arguments={},
        sources={name: file_checksum(path)["xxh3"] for name, path in inputs.items()},
        single_file=True,
        own_names=(page.name, "quickstart.json"),
    )
    if _begin(output, args.overwrite) is not State.DONE:
        evidence, labels = open_evidence(evidence_path), load_labels(labels_path)
        latents = clearest_latents(evidence, _N_LATENTS)
        record, text = make_page(args, Known(evidence, labels, latents))
        write_json(page.with_suffix(".json"), record)
        write_text(page, text)
        output.finish(facts={}, counts={}, files=[page.name, "quickstart.json"])
    show(json.loads(page.with_suffix(".json").read_text(encoding="utf-8")))
    log.info("look at %s", page_link(page))


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
    for one in record["concepts"][:1]:
        log.info("prompt:  %s", one["prompt"])
        log.info("plain:   %s", " ".join(one["plain"].split()))
        log.info("steered (%s):  %s", one["setting"], " ".join(one["steered"].split()))


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
