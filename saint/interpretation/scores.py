"""Labels and their measured scores: what a run's answers say, joined by latent and by label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from saint.evidence.labels import SET_SIZE
from saint.interpretation.ledger import LedgerState
from saint.interpretation.prompts import LABELLED_TASKS, label_hash
from saint.interpretation.responses import AnswerSet

_DRAWS = 2000
_LEVEL = 0.95


class Outcome(NamedTuple):
    """One excerpt or set of a test: its class, whether the answer was right, and its kind.

    truth: 1 where the latent fires (or the marks are right), else 0; of a set 0. kind: "near_miss"
    and "random" tell silent excerpts of detect apart; "" where nothing is known.
    """

    truth: int
    right: bool
    kind: str = ""


Outcomes = Sequence[Outcome]


def outcomes(
    task: str, fields: Mapping[str, Any], truth: Sequence[Any], kinds: Sequence[str] = ()
) -> list[Outcome]:
    """Compare a parsed answer to a test with the truth of each excerpt, or set.

    fields: "fires" or "correct": numbers from 1; "intruders": letters in the sets' order.
    """
    if task.startswith("intruder"):
        pairs = zip(fields["intruders"], truth, strict=True)
        return [Outcome(0, answer == right) for answer, right in pairs]
    chosen = set(fields["fires" if task.startswith("detect") else "correct"])
    names = list(kinds) or [""] * len(truth)
    pairs = zip(truth, names, strict=True)
    return [Outcome(t, (i in chosen) == bool(t), k) for i, (t, k) in enumerate(pairs, start=1)]


def score(task: str, results: Outcomes, *, seed: int) -> dict[str, Any]:
    """Accuracy averaged over the classes, with a 95 % bootstrap interval, and what it is made of.

    Resampling within a class draws from (right + 1/2) / (n + 1) rather than right / n: the plain
    bootstrap would give a perfect answer to a few excerpts an interval of no width. detect and fuzz
    also get their true- and false-positive rates; detect the share of near misses and of random
    excerpts that were told apart.
    """
    classes = sorted({result.truth for result in results})
    rng = np.random.default_rng(seed)
    points, draws = {}, np.zeros(_DRAWS)
    for truth in classes:
        right = [result.right for result in results if result.truth == truth]
        n = len(right)
        points[truth] = sum(right) / n
        draws += rng.binomial(n, (sum(right) + 0.5) / (n + 1), _DRAWS) / n / len(classes)
    point = sum(points.values()) / len(points)
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    is_intruder = task.startswith("intruder")
    found: dict[str, Any] = {
        "accuracy" if is_intruder else "balanced_accuracy": round(point, 4),
        "ci_low": round(float(min(low, point)), 4),
        "ci_high": round(float(max(high, point)), 4),
        "n": len(results),
    }
    if is_intruder:
        return found | {"chance": 1 / SET_SIZE}
    if len(points) == 2:
        found["true_positive_rate"] = round(points[1], 4)
        found["false_positive_rate"] = round(1 - points[0], 4)
    for kind in ("near_miss", "random"):
        right = [result.right for result in results if result.kind == kind]
        if right:
            found[kind] = round(sum(right) / len(right), 4)
    return found


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


@dataclass
class MeasuredLabels:
    """What became of the tests' answers.

    controls: task -> latent -> results with another latent's label (intruder: other latents'
    excerpts). left_out: why a test's answer is no score -> how many.
    """

    controls: dict[str, dict[int, list[Outcome]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def pools(self) -> dict[str, dict[str, Any]]:
        """Mean score of the controls of each task: what the form of its excerpts gives away."""
        return {task: pooled(task, list(found.values())) for task, found in self.controls.items()}


def made_labels(answers: AnswerSet) -> dict[int, dict[str, Any]]:
    """Return the labels of the explain answers; where none was asked for, those that were tested.

    Latent -> an entry of `parsed_responses.yaml`, without scores. What a latent does (effect)
    stands beside its label, or with an empty one.
    """
    kept = answers.kept.values()
    labels: dict[int, dict[str, Any]] = {}
    if not any(r.request.task == "explain" for r in kept):
        labels = _tested_labels(answers)
    for response in kept:
        if response.request.task != "explain" or response.answer.kind != "label":
            continue
        row = {**response.answer.fields, "source": "claude", "model": response.record.get("model")}
        n_firing = response.key.get("n_firing")
        if n_firing and "fits" in row:
            row["fits"] = [i for i in row["fits"] if i <= n_firing]
            row["n_excerpts"] = n_firing
        labels[response.request.latent] = row
    return labels


def add_effects(labels: dict[int, dict[str, Any]], answers: AnswerSet) -> None:
    """Put what a latent does beside what it fires on."""
    for response in answers.kept.values():
        if response.request.task == "effect" and response.answer.kind == "label":
            row = {**response.answer.fields, "model": response.record.get("model")}
            labels.setdefault(response.request.latent, dict(_UNLABELLED))["effect"] = row


def _tested_labels(answers: AnswerSet) -> dict[int, dict[str, Any]]:
    labels: dict[int, dict[str, Any]] = {}
    for response in answers.kept.values():
        text = response.key.get("label")
        if response.request.task in LABELLED_TASKS and text:
            source = response.key.get("source")
            row = {"common_semantic": text, "certainty": None, "source": source}
            labels[response.request.latent] = row
    return labels


def add_scores(
    labels: dict[int, dict[str, Any]],
    answers: AnswerSet,
    *,
    state: LedgerState,
    evidence: str | None,
) -> MeasuredLabels:
    """Add each latent's scores to its label, where they were measured on this very label.

    An intruder test, which is about no label, must have been made from the same evidence
    (fingerprint; None where it is not known); its latent may have no label at all. Its chance is
    what the controls reached, where there are any.
    """
    measured = MeasuredLabels()
    intruders_from = state.runs.get("intruder", {}).get("source")
    same_evidence = None in (intruders_from, evidence) or intruders_from == evidence
    joined: dict[tuple[str, int, str | None], list[Outcome]] = {}
    for response in answers.kept.values():
        task, latent = response.request.task, response.request.latent
        truth = response.key.get("truth")
        if response.answer.kind != "answer" or truth is None:
            continue
        results = outcomes(task, response.answer.fields, truth, response.key.get("kinds", ()))
        joined.setdefault((task, latent, response.request.label), []).extend(results)
    for (task, latent, label), results in joined.items():
        if task.startswith("intruder") and not same_evidence:
            measured.left_out["measured on other evidence than these labels are of"] += 1
        elif task.endswith("_control"):
            measured.controls.setdefault(task.removesuffix("_control"), {})[latent] = results
        elif not _add(labels, task, latent, label, results):
            measured.left_out["of a label of another text"] += 1
    _add_controls(labels, measured)
    return measured


def _add(
    labels: dict[int, dict[str, Any]], task: str, latent: int, label: str | None, results: Outcomes
) -> bool:
    if task == "intruder":
        labels.setdefault(latent, dict(_UNLABELLED))
    text = labels.get(latent, {}).get("common_semantic")
    if text is None or label not in (None, label_hash(text)):
        return False
    labels[latent].setdefault("score", {})[task] = score(task, results, seed=latent)
    return True


def _add_controls(labels: dict[int, dict[str, Any]], measured: MeasuredLabels) -> None:
    for task, found in measured.controls.items():
        chance = measured.pools()[task]["mean"]
        for latent, row in labels.items():
            own = (row.get("score") or {}).get(task)
            if own is None:
                continue
            if latent in found:
                own["control"] = pooled(task, [found[latent]])["mean"]
            if "chance" in own:
                own["chance"] = chance
