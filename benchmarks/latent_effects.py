"""Does the causal score of `latent_effects.py` predict what a latent does to text?

    python -m benchmarks.latent_effects --llama_model_dir runs/quickstart/model \
        --sae_model_path runs/quickstart/trained_sae.pt

Latents with a word of their own are drawn evenly over the ranks of the score, turned up at their
measured dose of 1 nat, on beginnings that neither the score nor its texts have seen. What is
predicted is the share of texts with the word, less that of plain texts. Beside the score stands the
density, which knows nothing of effects. Spearman's rank correlations, with 95 % by bootstrap over
latents. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.steering import PROMPTS
from llama_3 import CheckpointError
from saint.evidence.file import open_evidence
from saint.stage.errors import UserError
from saint.stage.flags import positive_int, whole_number
from saint.stage.program import progress, run_stage
from saint.steering.effects import EFFECTS, TEXT_PROMPTS, Effects, load_effects, word_shows
from saint.steering.studio import Studio, add_studio_flags, load_studio
from saint.steering.texts import read_back, vector_edit, write

_RESAMPLES = 2000


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    parser.add_argument("--n_drawn", type=positive_int, default=160, help="latents [160]")
    parser.add_argument("--n_tokens", type=positive_int, default=24, help="tokens per text [24]")
    parser.add_argument("--batch", type=positive_int, default=256, help="texts at once [256]")
    parser.add_argument("--seed", type=whole_number, default=1, help="[1]")
    return parser


def drawn(effects: Effects, n: int) -> list[dict[str, Any]]:
    """Return n rows with a word and a dose of 1 nat, evenly spaced by the rank of their score."""
    rows = [row for row in effects.rows.values() if row["word"] and row["dose_1nat"]]
    rows.sort(key=lambda row: (row["score"], row["latent"]))
    places = np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int)
    return [rows[i] for i in places]


@torch.no_grad()
def shares(
    args: argparse.Namespace, studio: Studio, rows: Sequence[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Return each row's share of texts with its word, less plain texts', and their lost fluency."""
    dictionary, tokenizer = studio.dictionaries[0], studio.tokenizer
    prompts = [text for text in PROMPTS if text not in TEXT_PROMPTS]
    encoded = [studio.encode(text, chat=False) for text in prompts]
    seeds = [1000 * args.seed + i for i in range(len(prompts))]
    how = {"n_tokens": args.n_tokens}
    new = write(studio.model, tokenizer, encoded, seeds=seeds, **how)
    plain = read_back(studio.model, tokenizer, encoded, new)
    found: tuple[list[float], list[float]] = ([], [])
    at_once = max(1, args.batch // len(prompts))
    with progress(len(rows), unit="latent", description="write") as bar:
        for start in range(0, len(rows), at_once):
            block = rows[start : start + at_once]
            directions = dictionary.sae.W_dec.detach()[[row["latent"] for row in block]].float()
            doses = torch.tensor([row["dose_1nat"] for row in block])[:, None]
            vectors = (doses * directions).repeat_interleave(len(prompts), 0)
            edits = {dictionary.hook: vector_edit(vectors, first=int(studio.prepend_bos))}
            many = encoded * len(block)
            new = write(studio.model, tokenizer, many, seeds=seeds * len(block), edits=edits, **how)
            texts = read_back(studio.model, tokenizer, many, new)
            for i, row in enumerate(block):
                own = texts[i * len(prompts) : (i + 1) * len(prompts)]
                hits = [word_shows(text.text, row["word"]) for text in own]
                chance = [word_shows(text.text, row["word"]) for text in plain]
                found[0].append(float(np.mean(hits) - np.mean(chance)))
                found[1].append(float(np.mean([t.surprise for t in own])))
                bar.update()
    base = float(np.mean([text.surprise for text in plain]))
    return found[0], [loss - base for loss in found[1]]


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, equal values sharing theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation; 0 where one of the two does not vary."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def with_interval(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return the rank correlation and its 95 % interval over latents."""
    x, y, draw = np.array(a), np.array(b), np.random.default_rng(0)
    picks = [draw.integers(0, len(x), len(x)) for _ in range(_RESAMPLES)]
    low, high = np.percentile([spearman(x[pick], y[pick]) for pick in picks], (2.5, 97.5))
    return [round(value, 3) for value in (spearman(x, y), float(low), float(high))]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the texts and compare."""
    args = build_parser().parse_args(argv)
    studio, guides = load_studio(args)
    evidence = guides[0].evidence
    if evidence is None:
        raise UserError("needs the evidence file, and effects.parquet beside it")
    path = Path(evidence.path).with_name(EFFECTS)
    effects = load_effects(path, n_latents=studio.dictionaries[0].sae.config.n_latents)
    rows = drawn(effects, args.n_drawn)
    share, loss = shares(args, studio, rows)
    density = open_evidence(evidence.path).summary().column("density").to_numpy()
    thirds = np.array_split(np.array(share), 3)
    print(
        json.dumps(
            {
                "latents": len(rows),
                "score": with_interval([row["score"] for row in rows], share),
                "density": with_interval([density[row["latent"]] for row in rows], share),
                "share_by_third_of_score": [round(float(third.mean()), 3) for third in thirds],
                "loss": round(float(np.mean(loss)), 3),
            }
        )
    )


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
