"""Small evidence files, YAML files and datasets for the tests of the interpretation stages."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from saint.evidence.file import FORMAT, SCHEMA, VERSION

REPO = Path(__file__).resolve().parents[2]
WORDS = "red blue green stone river mountain window letter number garden".split()


def example(kind: str, split: str, sentence_id: int, word: str | None, **fields: Any) -> dict:
    """A window of eleven tokens; `word` fires in its middle, nothing where it is None."""
    filler = [f" {WORDS[(sentence_id * 7 + i) % len(WORDS)]}" for i in range(5)]
    tokens = [*filler, f" {word or 'plain'}", *reversed(filler)]
    value = 1.0 + sentence_id % 9 if word else 0.0
    return {
        "kind": kind,
        "decile": sentence_id % 10 if word else -1,
        "split": split,
        "value": value,
        "sentence_id": sentence_id,
        "start": 3,
        "position": 8,
        "token_ids": list(range(11)),
        "tokens": tokens,
        "activations": [0.0] * 5 + [value] + [0.0] * 5,
        **fields,
    }


def row(latent: int, *, n_firing_sentences: int = 50, n: int = 20) -> dict[str, Any]:
    base = 1000 * latent
    word = f"topic{latent}"
    examples = [example("top", "", base + i, word) for i in range(n)]
    # Half of the sentences of "top" are also in the test split, as in a real file.
    examples += [example("quantile", "test", base + i, word) for i in range(n // 2)]
    examples += [example("quantile", "test", base + 100 + i, word) for i in range(n // 2)]
    examples += [example("quantile", "explain", base + 200 + i, word) for i in range(n)]
    for offset, kind in ((300, "near_miss"), (500, "random")):
        for half, split in ((0, "explain"), (100, "test")):
            examples += [example(kind, split, base + offset + half + i, None) for i in range(10)]
    ranked = [{"value": 9.0 - i / 10, "sentence_id": base + i} for i in range(30)]
    return {
        "latent": latent,
        "density": 0.01,
        "n_firing_tokens": 100,
        "n_firing_sentences": n_firing_sentences,
        "max_activation": 9.0,
        "histogram": [1] * 20,
        "top_mean": ranked,
        "top_max": ranked,
        "top_last": ranked,
        "examples": examples,
        "promoted": [{"token": f" {word}", "value": 1.0}, {"token": " more", "value": 0.5}],
        "suppressed": [],
        "neighbours": [],
        "coactive": [],
    }


def write_evidence(path: Path, rows: list[dict[str, Any]]) -> Path:
    meta = {"format": FORMAT, "version": VERSION, "n_latents": len(rows)}
    schema = SCHEMA.with_metadata({b"saint": json.dumps(meta).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def write_dataset(directory: Path, n: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    texts = [f"sentence {i} about {WORDS[i % len(WORDS)]}" for i in range(n)]
    pq.write_table(pa.table({"text": texts}), directory / "part.parquet")
    return directory


def write_top_sentences(path: Path, n_latents: int, n: int = 12) -> Path:
    rows = {
        latent: [[round(0.1 * i, 3), latent * n + i] for i in range(n)]
        for latent in range(n_latents)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(rows))
    return path


def run(script: str, *args: object, env: dict[str, str] | None = None, **kwargs: Any):
    """Run a stage as a user does; the environment holds no key but the given one."""
    clean = {k: v for k, v in os.environ.items() if not k.upper().startswith("ANTHROPIC")}
    for name in [k for k in clean if k.lower().endswith("_proxy")]:
        del clean[name]
    command = [sys.executable, str(REPO / f"{script}.py"), *map(str, args)]
    return subprocess.run(
        command, env=clean | (env or {}), capture_output=True, text=True, timeout=120, **kwargs
    )


def judge(accuracy: float, seed: int = 0):
    """Answers like Claude, knowing the concept; each excerpt is judged right with `accuracy`."""
    rng = random.Random(seed)

    def answer(params: dict[str, Any]) -> str:
        text = params["messages"][0]["content"]
        system = params["system"]
        if "You name one latent" in system:
            word = re.findall(r"«(topic\d+)»", text)[0]
            return json.dumps({"common_semantic": f"the word {word}", "certainty": 0.9})
        if "intruder" in system:
            letters = []
            for part in text.split("Set ")[1:]:
                rows = dict(re.findall(r"^([A-E])\. (.*)$", part, re.MULTILINE))
                topics = re.findall(r"«(topic\d+)»", part)
                odd = next(letter for letter, line in rows.items() if "«topic" not in line)
                if len(set(topics)) > 1:  # no pattern is shared
                    odd = rng.choice("ABCDE")
                wrong = [letter for letter in rows if letter != odd]
                letters.append(odd if rng.random() < accuracy else rng.choice(wrong))
            return json.dumps({"intruders": letters})
        label = re.findall(r"Label: the word (topic\d+)", text)[0]
        excerpts = re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)
        sign = f"«{label}»" if "marked tokens" in system else label
        name = "correct" if "marked tokens" in system else "fires"
        chosen = [int(n) for n, t in excerpts if (sign in t) == (rng.random() < accuracy)]
        return json.dumps({name: chosen})

    return answer
