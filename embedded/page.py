"""The quickstart's page: curves, figures, the clearest latents, and one steered completion.

python -m embedded.page --run_dir runs/quickstart --llama_model_dir runs/quickstart/model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
_N_OPEN = 3
_TRIED_LATENTS = 6
_STRENGTH = 2.0
# The shown text should say the concept, not only the concept: more than this adds nothing.
_ENOUGH_CONCEPT = 0.3
_MAX_SURPRISE = 1.0  # nats per token beyond the plain text, to the plain model
_MIN_DISTINCT_SHARE = 0.8
_NEW_TOKENS = 24
_DOSES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
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


def dose_texts(studio: Studio, pair: Pair, setting: Setting) -> list[dict[str, Any]]:
    """Return what the prompt becomes at each strength of the slider, and what that costs."""
    found = [{"strength": 0.0, "text": pair.plain.text, "says": "0×: the plain text"}]
    for strength in _DOSES:
        request = Request(
            (pair.prompt,), (replace(setting, strength=strength),), max_new_tokens=_NEW_TOKENS
        )
        (one,) = complete_pairs(studio, request)
        cost = f"{surprise_gain(one):+.2f} nats per token"
        says = f"{strength:g}×, fluency {cost}"
        found.append({"strength": strength, "text": one.steered.text, "says": says})
    return found


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
            "seconds": "" if stage.seconds is None else f"{stage.seconds:,.0f} s",
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
    tried = steerable(studio, known.evidence, known.latents)[:_TRIED_LATENTS]
    pair, setting = showcase(studio, tried or [0])
    record = {"latents": known.latents, "setting": str(setting), "prompt": pair.prompt}
    record |= {"plain": pair.plain.text, "steered": pair.steered.text}
    record |= {"labels": {str(i): known.labels[i].text for i in known.latents if i in known.labels}}
    doses = dose_texts(studio, pair, setting)
    label = known.labels.get(setting.latent)
    name = f"latent {setting.latent}" + (f" ({label.text})" if label else "")
    shown = {
        "prompt": pair.prompt,
        "plain": pair.plain.text,
        "doses": doses,
        "chosen": [dose["strength"] for dose in doses].index(_STRENGTH),
        "steered": {"latent": setting.latent, "name": name},
    }
    shown |= token_losses(studio, pair.prompt + pair.plain.text)
    return record, page_text(args, known, shown)


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
    log.info("look at %s", page.resolve().as_uri())


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
