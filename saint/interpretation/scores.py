"""Labels and their measured scores: what a run's answers say, joined by latent and by label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saint.evidence.labels import SET_SIZE
from saint.interpretation.ledger import LedgerState
from saint.interpretation.prompts import LABELLED_TASKS, label_hash
from saint.interpretation.responses import AnswerSet, Response

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


# --- joined with the labels ---------------------------------------------------------------------

# A latent that was measured but not named: what readers have always taken for "no label".
_UNLABELLED = {"common_semantic": "", "certainty": None}
Keys = Mapping[str, Mapping[str, Any]]  # custom_id -> what was shown, or the truth


@dataclass
class Measured:
    """What became of the tests' answers.

    controls: task -> latent -> results with another latent's label (intruder: other latents'
    excerpts). left_out: why a test's answer is no score -> how many.
    """

    controls: dict[str, dict[int, Outcomes]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def made_labels(answers: AnswerSet, keys: Keys) -> dict[int, dict[str, Any]]:
    """Return the labels of the explain answers; where none was asked for, those that were tested.

    Latent -> an entry of `parsed_responses.yaml`, without scores.
    """
    kept = answers.kept.values()
    if not any(r.request.task == "explain" for r in kept):
        return _tested_labels(answers, keys)
    labels: dict[int, dict[str, Any]] = {}
    for response in kept:
        if response.request.task != "explain" or response.answer.kind != "label":
            continue
        row = {**response.answer.fields, "source": "claude", "model": response.record.get("model")}
        n_firing = keys.get(response.custom_id, {}).get("n_firing")
        if n_firing and "fits" in row:
            row["fits"] = [i for i in row["fits"] if i <= n_firing]
            row["n_excerpts"] = n_firing
        labels[response.request.latent] = row
    return labels


def _tested_labels(answers: AnswerSet, keys: Keys) -> dict[int, dict[str, Any]]:
    labels: dict[int, dict[str, Any]] = {}
    for response in answers.kept.values():
        key = keys.get(response.custom_id, {})
        text = key.get("label")
        if response.request.task in LABELLED_TASKS and text:
            row = {"common_semantic": text, "certainty": None, "source": key.get("source")}
            labels[response.request.latent] = row
    return labels


def add_scores(
    labels: dict[int, dict[str, Any]],
    answers: AnswerSet,
    keys: Keys,
    *,
    state: LedgerState,
    evidence: str | None,
) -> Measured:
    """Add each latent's scores to its label, where they were measured on this very label.

    An intruder test, which is about no label, must have been made from the same evidence
    (fingerprint; None where it is not known); its latent may have no label at all.
    """
    measured = Measured()
    intruders_from = state.runs.get("intruder", {}).get("source")
    same_evidence = None in (intruders_from, evidence) or intruders_from == evidence
    for response in answers.kept.values():
        task = response.request.task
        if response.answer.kind != "answer":
            continue
        if task.startswith("intruder") and not same_evidence:
            measured.left_out["measured on other evidence than these labels are of"] += 1
            continue
        truth = keys.get(response.custom_id, {}).get("truth")
        if truth is not None:
            _add(labels, response, outcomes(task, response.answer.fields, truth), measured)
    for task, found in measured.controls.items():
        for latent, results in found.items():
            if task in (labels.get(latent, {}).get("score") or {}):
                labels[latent]["score"][task]["control"] = pooled(task, [results])["mean"]
    return measured


def _add(
    labels: dict[int, dict[str, Any]], response: Response, results: Outcomes, measured: Measured
) -> None:
    task, latent = response.request.task, response.request.latent
    if task.endswith("_control"):
        measured.controls.setdefault(task.removesuffix("_control"), {})[latent] = results
        return
    if task == "intruder":
        labels.setdefault(latent, dict(_UNLABELLED))
    text = labels.get(latent, {}).get("common_semantic")
    if text is None or response.request.label not in (None, label_hash(text)):
        measured.left_out["of a label of another text"] += 1
        return
    labels[latent].setdefault("score", {})[task] = score(task, results, seed=latent)
