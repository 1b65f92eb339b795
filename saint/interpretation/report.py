"""Statistics of a set of labels: how far they reach, how they read, what they cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from saint.interpretation.prices import LIVE_FACTOR, PRICES_DATE, batch_price, dollars
from saint.interpretation.prompts import SCORING_TASKS
from saint.interpretation.scores import Outcomes, pooled

_HEDGES = re.compile(
    r"\b(including|particularly|primarily|especially|specifically|predominantly|typically|often"
    r"|generally|various|such as|related to|relating to|focus(ed|ing) on|e\.g|etc)\b",
    re.IGNORECASE,
)
# Labels of the text's form rather than of its content.
_ARTEFACTS = re.compile(
    r"\b(format(ting|ted)?|punctuation|whitespace|newlines?|line breaks?|truncat\w+|fragment\w*"
    r"|tokens?|delimiters?|brackets?|quotation marks?|commas?|periods?|hyphens?|capitali[sz]\w+"
    r"|sentence[- ](end\w*|start\w*|begin\w*|final|initial|boundar\w+))\b",
    re.IGNORECASE,
)
_FILLERS = frozenset("a an and or the of in on to for with by from as at is are that this".split())


def build_report(
    labels: Mapping[int, Mapping[str, Any]],
    kinds: Mapping[str, int],
    usage: Mapping[tuple[str, bool], Sequence[int]],
    controls: Mapping[str, Mapping[int, Outcomes]],
    explained: Sequence[str],
) -> dict[str, Any]:
    """Add up what the labels are like.

    kinds: responses by what became of them. explained: what became of each explained latent.
    usage: (model, live) -> tokens in and out. controls: task -> results of each latent that was
    tested with another one's label (intruder: with other latents' excerpts).
    """
    # A latent that was measured and not labelled has an empty one.
    texts = [text for row in labels.values() if (text := str(row["common_semantic"]))]
    words = [len(text.split()) for text in texts]
    same = Counter(content_words(text) for text in texts)
    return {
        "responses": dict(sorted(kinds.items())),
        "labels": len(texts),
        "labelled_share": _share(explained.count("label"), len(explained)),
        "mean_words": round(sum(words) / len(words), 1) if words else None,
        "hedged_share": _share(sum(bool(_HEDGES.search(t)) for t in texts), len(texts)),
        "artefact_share": _share(sum(bool(_ARTEFACTS.search(t)) for t in texts), len(texts)),
        "near_duplicate_share": _share(sum(n for n in same.values() if n > 1), len(texts)),
        "mean_certainty": _mean([row.get("certainty") for row in labels.values()]),
        "scores": {task: _scores(labels, task) for task in SCORING_TASKS},
        "shuffled_label_controls": {
            task: pooled(task, list(found.values())) for task, found in controls.items()
        },
        "cost": _costs(usage),
    }


def content_words(label: str) -> frozenset[str]:
    """The words of a label that carry its content: equal sets make near-duplicates."""
    return frozenset(re.findall(r"\w+", label.lower())) - _FILLERS


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [v for v in values if isinstance(v, int | float)]
    return round(sum(numbers) / len(numbers), 4) if numbers else None


def _scores(labels: Mapping[int, Mapping[str, Any]], task: str) -> dict[str, Any]:
    found = [row["score"][task] for row in labels.values() if task in row.get("score", {})]
    name = "accuracy" if task == "intruder" else "balanced_accuracy"
    above = sum(row["ci_low"] > row.get("chance", 0.5) for row in found)
    return {
        "latents": len(found),
        "mean": _mean([row[name] for row in found]),
        "above_chance_share": _share(above, len(found)),
    }


def _costs(usage: Mapping[tuple[str, bool], Sequence[int]]) -> dict[str, Any]:
    total, unknown = 0.0, []
    for (model, live), (tokens_in, tokens_out) in usage.items():
        cost = dollars(batch_price(model), tokens_in, tokens_out)
        if cost is not None:
            total += cost * (LIVE_FACTOR if live else 1)
        elif tokens_in:
            unknown.append(model)
    return {
        "input_tokens": sum(tokens[0] for tokens in usage.values()),
        "output_tokens": sum(tokens[1] for tokens in usage.values()),
        "dollars": round(total, 4),
        "prices_of": PRICES_DATE,
        "models_without_price": sorted(set(unknown)),
    }


def show_report(report: Mapping[str, Any], indent: str = "") -> None:
    """Print a report as aligned lines."""
    for name, value in report.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name.replace('_', ' ')}:")
            show_report(value, indent + "  ")
        else:
            print(f"{indent}{name.replace('_', ' '):<{28 - len(indent)}} {value}")
