"""Labels of latents: the reader of `parsed_responses.yaml`, and labels made of top tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saint.evidence.words import distinct_words, is_content_word, is_form, word_at
from saint.stage.errors import UserError
from saint.stage.yaml_files import load_yaml

TOP_TOKENS = "top tokens"
SET_SIZE = 5  # excerpts of an intruder test, one of them another latent's

_LEAST_NAMED = 0.25
_KNOWN = ("common_semantic", "certainty", "score")


@dataclass(frozen=True)
class Label:
    """One latent's label.

    text: "" where a latent was measured (by the intruder test) and has no label. certainty: 0..1,
    the model's own word, None where there is none. score: the measured balanced accuracy of
    detection on held-out excerpts (0.5 is chance), None where it was not measured.
    extra: whatever else the file says ("rationale", "source", "scores" of each task, …).
    """

    text: str
    certainty: float | None = None
    score: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def effect(self) -> str:
        """What the latent does when it is turned up, in words; "" where nobody asked."""
        effect = self.extra.get("effect")
        return str(effect.get("common_semantic", "")) if isinstance(effect, dict) else ""

    @property
    def intruder(self) -> float | None:
        """How often the odd one out of five was found (0.2 is chance): a score of the latent."""
        return _measured(self.extra.get("scores"), "intruder")


def load_labels(path: Path) -> dict[int, Label]:
    """Read `parsed_responses.yaml` in the order of the file (certainty descending).

    Raises UserError when the file is missing, is no mapping of latents, or an entry has no
    common_semantic (which is empty for a latent that has a score and no label).
    """
    rows = load_yaml(path)
    if rows is None:
        return {}
    if not isinstance(rows, dict):
        raise UserError(f"{path} is not a mapping of latents to labels")
    labels: dict[int, Label] = {}
    for key, row in rows.items():
        text = row.get("common_semantic") if isinstance(row, dict) else None
        if not isinstance(text, str) or not str(key).isdecimal():
            raise UserError(f"{path}: the entry {key!r} is not a latent with a common_semantic")
        scores = row.get("score") or {}
        extra = {name: value for name, value in row.items() if name not in _KNOWN}
        if scores:
            extra["scores"] = scores
        labels[int(key)] = Label(
            text,
            _number(row.get("certainty")),
            _measured(scores, "detect"),
            extra,
        )
    return labels


def _measured(scores: Any, task: str) -> float | None:
    found = scores.get(task) if isinstance(scores, dict) else None
    if not isinstance(found, dict):
        return None
    return _number(found.get("balanced_accuracy", found.get("accuracy")))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def label_from_top_tokens(latent_evidence: Mapping[str, Any], *, n_words: int = 4) -> str:
    """Name a latent by the words under its strongest tokens, most characteristic first.

    latent_evidence: a row of the evidence file. A token that is a piece of a word is joined with
    its neighbours; words are counted without regard to case, weighted by activation and by how
    exclusively the latent marks the token: a token of its windows on which it mostly stays silent
    is not what it is about. Function words are named where they lead by far. Where the words
    named hold less than a quarter of the weight, "(mixed)" says that windows disagree.
    Empty when the latent has no firing example.
    """
    marked = _share_marked(latent_evidence["examples"])
    weights: dict[str, float] = {}
    spellings: dict[str, Counter[str]] = {}
    for example in latent_evidence["examples"]:
        if example["kind"] not in ("top", "quantile") or not example["tokens"]:
            continue
        place = example["position"] - example["start"]
        word = word_at(example["tokens"], place)
        if word:
            key, weight = word.lower(), max(float(example["value"]), 0.0)
            weights[key] = weights.get(key, 0.0) + weight * marked(example["tokens"][place])
            spellings.setdefault(key, Counter())[word] += 1
    ranked = sorted(weights, key=lambda w: -weights[w] * _telling(w))
    total = sum(weights.values())
    if ranked and is_content_word(ranked[0]):
        ranked = [word for word in ranked if is_content_word(word)]
    words = distinct_words(ranked)[:n_words]
    # One-offs are noise beside words that carry a real share of the evidence.
    words = [w for i, w in enumerate(words) if i == 0 or weights[w] >= 0.03 * total]
    text = ", ".join(spellings[w].most_common(1)[0][0] for w in words)
    named = sum(weights[w] for w in ranked if any(is_form(w, other) for other in words))
    return f"{text} (mixed)" if named < _LEAST_NAMED * total else text


def _telling(word: str) -> float:
    """How much a lower-case word says, beside a content word."""
    if is_content_word(word):
        return 1.0
    return 0.5 if any(c.isalnum() for c in word) else 0.25


def _share_marked(examples: Sequence[Mapping[str, Any]]) -> Callable[[str], float]:
    """Return how often a token's occurrences in all windows, silent ones too, are marked."""
    seen: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    for example in examples:
        seen.update(example["tokens"])
        pairs = zip(example["tokens"], example["activations"], strict=True)
        fired.update(token for token, activation in pairs if activation > 0)
    return lambda token: fired[token] / seen[token]


def top_token_labels(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Entries of a `parsed_responses.yaml` made of top tokens, for latents that fire."""
    texts = ((row["latent"], label_from_top_tokens(row)) for row in rows)
    about = {"certainty": None, "source": TOP_TOKENS}
    return {latent: {"common_semantic": text, **about} for latent, text in texts if text}
