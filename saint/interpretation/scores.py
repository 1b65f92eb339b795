"""Measured scores of labels: answers to the tests compared with what the latents did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saint.evidence.labels import SET_SIZE

# Of each excerpt or set of a test: its class, and whether the answer was right.
Outcomes = Sequence[tuple[int, bool]]
_DRAWS = 2000
_LEVEL = 0.95


def outcomes(task: str, fields: Mapping[str, Any], truth: Sequence[Any]) -> list[tuple[int, bool]]:
    """Return (class, whether the answer was right) for each excerpt, or set, of a test.

    fields: a parsed answer ("fires" or "correct": numbers from 1; "intruders": letters in order).
    The class of an excerpt is 1 where the latent fires (or its marks are right); of a set it is 0.
    """
    if task.startswith("intruder"):
        given = [str(letter).strip().upper()[:1] for letter in fields["intruders"]]
        given += [""] * (len(truth) - len(given))
        return [(0, answer == right) for answer, right in zip(given, truth, strict=False)]
    name = "fires" if task.startswith("detect") else "correct"
    chosen = {int(n) for n in fields[name] if str(n).strip().isdecimal()}
    return [(t, (i in chosen) == bool(t)) for i, t in enumerate(truth, start=1)]


def score(task: str, results: Outcomes, *, seed: int) -> dict[str, Any]:
    """Accuracy averaged over the classes, with a 95 % bootstrap interval.

    Resampling within a class draws from (right + 1/2) / (n + 1) rather than right / n: the plain
    bootstrap would give a perfect answer to a few excerpts an interval of no width.
    """
    classes = sorted({truth for truth, _ in results})
    rng = np.random.default_rng(seed)
    points, draws = [], np.zeros(_DRAWS)
    for truth in classes:
        right = [ok for t, ok in results if t == truth]
        n = len(right)
        points.append(sum(right) / n)
        draws += rng.binomial(n, (sum(right) + 0.5) / (n + 1), _DRAWS) / n / len(classes)
    point = sum(points) / len(points)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    name = "accuracy" if task.startswith("intruder") else "balanced_accuracy"
    found = {
        name: round(point, 4),
        "ci_low": round(float(min(low, point)), 4),
        "ci_high": round(float(max(high, point)), 4),
        "n": len(results),
    }
    return found | ({"chance": 1 / SET_SIZE} if name == "accuracy" else {})


def pooled(task: str, per_latent: Sequence[Outcomes]) -> dict[str, Any]:
    """Mean score over latents with a 95 % bootstrap interval over latents."""
    values = np.array([next(iter(score(task, results, seed=0).values())) for results in per_latent])
    if not values.size:
        return {"latents": 0}
    rng = np.random.default_rng(0)
    means = rng.choice(values, (_DRAWS, values.size)).mean(axis=1)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {
        "mean": round(float(values.mean()), 4),
        "ci_low": round(float(low), 4),
        "ci_high": round(float(high), 4),
        "latents": int(values.size),
    }
