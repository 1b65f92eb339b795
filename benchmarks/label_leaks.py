"""How far the form of a test's excerpts gives its answers away, to a probe that reads no words.

    python -m benchmarks.label_leaks --evidence_path …/evidence.parquet

A logistic probe sees of every excerpt only its geometry: length, how many tokens stand on either
side of the first mark, how many are marked, in how many runs, how long they are, and the share and
place of punctuation. It is trained on some latents and judged on others (five folds): on detect and
fuzz by its accuracy on classes of equal size, on intruder by how often the odd one of a set gets
the highest score. Where nothing leaks that is 1/2, 1/2 and 1/5. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saint.evidence.file import open_evidence
from saint.evidence.labels import SET_SIZE
from saint.interpretation.held_out import Excerpt, detect_cases, fuzz_cases, intruder_sets

CHANCE = {"detect": 0.5, "fuzz": 0.5, "intruder": 1 / SET_SIZE}
_FOLDS = 5
_ALLOWED = 0.03


def geometry(excerpt: Excerpt) -> list[float]:
    """What can be seen of an excerpt without reading a word."""
    tokens = excerpt.example["tokens"][excerpt.low : excerpt.high]
    marks = [i - excerpt.low for i in excerpt.marks]
    n = len(tokens)
    is_sign = [not any(c.isalnum() for c in t) for t in tokens]
    chars = [len(t) for t in tokens]
    runs = sum(i - 1 not in marks for i in marks)
    first, last = (marks[0], marks[-1]) if marks else (-1, -1)
    return [
        n,
        sum(chars) / n,
        sum(is_sign) / n,
        float(is_sign[0]),
        float(is_sign[-1]),
        float(tokens[0][:1].isspace()),
        float(tokens[0].strip()[:1].isupper()),
        len(marks),
        runs,
        first,
        n - 1 - last,
        first / n,
        last / n,
        last - first,
        sum(chars[i] for i in marks) / max(1, len(marks)),
        float(np.mean([is_sign[i] for i in marks])) if marks else 0.0,
        float(np.mean([tokens[i][:1].isspace() for i in marks])) if marks else 0.0,
        float(np.mean([tokens[i].strip()[:1].isupper() for i in marks])) if marks else 0.0,
        float(np.mean([tokens[i].strip()[:1].isdigit() for i in marks])) if marks else 0.0,
    ]


def excerpts(path: Path, n_latents: int) -> Iterator[tuple[str, int, list[Excerpt], list[int]]]:
    """Yield (task, latent, excerpts, answers): sets of an intruder test, all of detect and fuzz."""
    evidence = open_evidence(path)
    latents = random.Random(0).sample(range(evidence.n_latents), evidence.n_latents)
    done = 0
    for latent in latents:
        row = evidence.latent(latent)
        rng = random.Random(latent)
        cases = {"detect": detect_cases(row, 20, rng), "fuzz": fuzz_cases(row, 20, rng)}
        if not all(cases.values()):
            continue
        for task, found in cases.items():
            seen = [replace(c.excerpt, marks=()) if task == "detect" else c.excerpt for c in found]
            yield task, latent, seen, [c.truth for c in found]
        for members, place in intruder_sets(row, 20, rng):
            yield "intruder", latent, members, [int(i == place) for i in range(SET_SIZE)]
        done += 1
        if done >= n_latents:
            return


def probe(features: np.ndarray, truth: np.ndarray, *, steps: int = 60) -> np.ndarray:
    """Fit a logistic regression by Newton's method; return its weights, the bias last."""
    x = np.hstack([features, np.ones((len(features), 1))])
    share = np.where(truth == 1, 0.5 / truth.mean(), 0.5 / (1 - truth.mean()))
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (share * (p - truth)) + 1e-3 * len(x) * weights * 0.01
        hessian = (x * (share * p * (1 - p))[:, None]).T @ x + 1e-5 * len(x) * np.eye(x.shape[1])
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def accuracy(task: str, groups: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The probe's accuracy on latents that it was not fitted on, and its standard error."""
    order = {latent: i for i, latent in enumerate(dict.fromkeys(g[0] for g in groups))}
    right: dict[int, list[float]] = {}
    for fold in range(_FOLDS):
        train = [g for g in groups if order[g[0]] % _FOLDS != fold]
        x, y = np.vstack([g[1] for g in train]), np.concatenate([g[2] for g in train])
        mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
        weights = probe((x - mean) / scale, y)
        for latent, features, truth in groups:
            if order[latent] % _FOLDS != fold:
                continue
            values = (features - mean) / scale @ weights[:-1] + weights[-1]
            if task == "intruder":
                hits = [float(truth[np.argmax(values)])]
            else:
                hits = [np.mean((values > 0)[truth == t] == t) for t in (0, 1)]
            right.setdefault(latent, []).append(float(np.mean(hits)))
    per_latent = np.array([np.mean(values) for values in right.values()])
    return float(per_latent.mean()), float(per_latent.std() / np.sqrt(len(per_latent)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--evidence_path", type=Path, required=True, help="evidence.parquet")
    parser.add_argument("--n_latents", type=int, default=400, help="latents that are tested [400]")
    args = parser.parse_args()
    groups: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for task, latent, members, truth in excerpts(args.evidence_path, args.n_latents):
        features = np.array([geometry(e) for e in members])
        groups.setdefault(task, []).append((latent, features, np.array(truth)))
    found: dict[str, Any] = {}
    for task, tested in groups.items():
        found[task], error = (round(v, 4) for v in accuracy(task, tested))
        found |= {f"{task}_chance": CHANCE[task], f"{task}_standard_error": error}
        found[f"{task}_latents"] = len({latent for latent, _, _ in tested})
    found["passed"] = all(found[t] <= CHANCE[t] + _ALLOWED for t in groups)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
