"""The latents' page at full size: size, first paint, search and opening a latent in Chromium.

    python -m benchmarks.latent_browser [--n_latents 65536] [--chromium /usr/bin/chromium]

The evidence is made up: sentences of Zipf-distributed words (less compressible than real text),
windows around random places in them, random labels. Times are what the page itself measures, the
next frame included. Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.common import REPO
from sae import SAEConfig, TopKSparseAutoencoder, save_sae
from saint.evidence.file import KINDS, N_BINS, ROWS_PER_GROUP, EvidenceWriter, Examples, LatentBlock
from saint.stage.program import run_stage

STAGE = REPO / "latent_browser.py"
N_WORDS = 40_000
PER_KIND = {"top": 10, "quantile": 20, "near_miss": 4, "random": 0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n_latents", type=int, default=65_536)
    parser.add_argument("--n_sentences", type=int, default=50_000)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--work_dir", type=Path, help="kept, and reused by the next run")
    return parser


def make_words(rng: np.random.Generator) -> list[str]:
    syllables = [
        a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "ist")
    ]
    words = {"".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(2 * N_WORDS)}
    return [" " + word for word in sorted(words)[:N_WORDS]]


def make_block(
    rng: np.random.Generator, latents: np.ndarray, sentences: np.ndarray, n_words: int
) -> LatentBlock:
    """Random rows of evidence; a latent's windows end in one of its own three words."""
    n, per_latent = len(latents), sum(PER_KIND.values())
    kind = np.tile(np.repeat(np.arange(len(KINDS)), list(PER_KIND.values())), n)
    decile = np.tile(
        np.concatenate([np.full(10, 9), np.repeat(np.arange(9, -1, -1), 2), [-1] * 4]), n
    )
    m = n * per_latent
    length = rng.integers(8, 34, m)
    chosen = rng.integers(0, len(sentences), m)
    columns = np.arange(sentences.shape[1])
    tokens = sentences[chosen]
    fires = (columns == length[:, None] - 1) | (rng.random(tokens.shape) < 0.05)
    strength = rng.random(tokens.shape, np.float32) * 10
    active = np.where(fires & (kind < KINDS.index("near_miss"))[:, None], strength, 0)
    inside = columns < length[:, None]
    values = (active * inside).max(axis=1)
    pairs = (rng.integers(0, n_words, (n, 10)), rng.random((n, 10), np.float32))
    others = (
        rng.integers(0, 1 << 16, (n, 10)) % latents.max().clip(1),
        rng.random((n, 10), np.float32),
    )
    ranked = (values.reshape(n, per_latent)[:, :10], chosen.reshape(n, per_latent)[:, :10])
    return LatentBlock(
        latents=latents,
        density=rng.random(n) / 100,
        n_firing_tokens=rng.integers(100, 10_000, n),
        n_firing_sentences=rng.integers(50, 5_000, n),
        max_activation=np.full(n, 10, np.float32),
        histogram=rng.integers(0, 500, (n, N_BINS)),
        tops={name: ranked for name in ("mean", "max", "last")},
        examples=Examples(
            counts=np.full(n, per_latent),
            kind=kind,
            decile=decile,
            split=np.minimum(kind, 1),
            value=values,
            sentence_id=chosen,
            start=np.zeros(m, np.int64),
            position=(active * inside).argmax(axis=1),
            lengths=length,
            token_ids=tokens[inside],
            activations=active[inside].astype(np.float32),
        ),
        promoted=pairs,
        suppressed=pairs,
        neighbours=others,
        coactive=others,
    )


def make_inputs(directory: Path, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    words = make_words(rng)
    ranks = np.minimum(rng.zipf(1.2, (args.n_sentences, 34)), len(words)) - 1
    meta = {"n_tokens": 1_300_000, "n_sentences": args.n_sentences, "window": 16, "k": 64}
    meta |= {"layer": 22, "hook_point": "resid_pre"}
    with EvidenceWriter(directory / "evidence.parquet", meta, words) as writer:
        for start in range(0, args.n_latents, ROWS_PER_GROUP):
            latents = np.arange(start, min(start + ROWS_PER_GROUP, args.n_latents))
            writer.write(make_block(rng, latents, ranks, len(words)))
    labels = {
        i: {
            "common_semantic": "".join(words[w] for w in rng.integers(0, len(words), 5)).strip(),
            "certainty": round(float(rng.random()), 2),
        }
        for i in range(args.n_latents)
    }
    text = yaml.dump(labels, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    torch.manual_seed(0)
    sae = TopKSparseAutoencoder(SAEConfig(d_model=64, n_latents=args.n_latents, k=8, layer=22))
    save_sae(directory / "sae.pt", sae)
    (directory / "labels.yaml").write_text(text)


def measure(page: Any, url: str, n_searches: int, n_latents: int) -> dict[str, float]:
    started = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector("html[data-ready]", timeout=120_000)
    ready = time.perf_counter() - started
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    measured = page.evaluate(
        """async (n) => {
          const names = [...document.querySelectorAll('.results .name')];
          const words = names.map((name) => name.textContent.split(' ')[0]);
          const box = document.getElementById('query'), out = [];
          const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          for (let i = 0; i < n; i++) {
            const word = words[i % words.length];
            const other = words[(i * 7 + 1) % words.length];
            // A word, two of them, its beginning, its first letter, the word with one too many.
            box.value = [word, `${word} ${other}`, word.slice(0, 3), word[0],
              `${word.slice(0, 2)}x${word.slice(2)}`][i % 5];
            const started = performance.now();
            box.dispatchEvent(new Event('input'));
            await frame(); await frame();
            out.push(performance.now() - started);
          }
          const scripts = performance.getEntriesByName('saint-search').slice(-n);
          return [out, scripts.map((entry) => entry.duration)];
        }""",
        n_searches,
    )
    page.fill("#query", "")
    page.evaluate("performance.clearMeasures('saint-map'); location.hash = '#/latent/1'")
    page.wait_for_selector("article")
    page.evaluate("location.hash = '#/'")
    page.wait_for_function("performance.getEntriesByName('saint-map').length")
    drawn = page.evaluate("performance.getEntriesByName('saint-map')[0].duration")
    opened = []
    for i in range(5):
        latent = (i * 12_345) % n_latents
        started = time.perf_counter()
        page.evaluate(f"location.hash = '#/latent/{latent}'")
        page.wait_for_selector(f"article[data-latent='{latent}']")
        opened.append(1000 * (time.perf_counter() - started))
    return {
        "first_paint_s": round(paint / 1000, 2),
        "ready_s": round(ready, 2),
        "search_ms": round(statistics.median(measured[0]), 1),
        "search_worst_ms": round(max(measured[0]), 1),
        "search_script_ms": round(statistics.median(measured[1]), 1),
        "search_script_worst_ms": round(max(measured[1]), 1),
        "map_ms": round(drawn, 1),
        "open_latent_ms": round(statistics.median(opened), 1),
    }


def main() -> None:
    from playwright.sync_api import sync_playwright

    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.work_dir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "labels.yaml").exists():
            make_inputs(directory, args)
        started = time.perf_counter()
        words = ["--evidence_path", "evidence.parquet", "--labels_path", "labels.yaml"]
        words += ["--sae_model_path", "sae.pt", "--device=cpu"]
        words = [w if w.startswith("--") else str(directory / w) for w in words]
        words += ["--html", str(directory / "latents.html")]
        subprocess.run([sys.executable, str(STAGE), *words], check=True)
        seconds = time.perf_counter() - started
        page_path = directory / "latents.html"
        result = {
            "n_latents": args.n_latents,
            "megabytes": round(page_path.stat().st_size / 1e6, 1),
        }
        result |= {"write_s": round(seconds, 1)}
        with sync_playwright() as playwright:
            options = ["--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=args.chromium, args=options)
            page = browser.new_page()
            result |= measure(page, page_path.resolve().as_uri(), args.searches, args.n_latents)
            browser.close()
    print(json.dumps(result))


if __name__ == "__main__":
    run_stage(main)
