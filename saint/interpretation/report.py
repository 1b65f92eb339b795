"""Statistics of a set of labels: how far they reach, how they read, what they cost."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from saint.interpretation.prices import LIVE_FACTOR, PRICES_DATE, batch_price, dollars
from saint.interpretation.prompts import SCORING_TASKS
from saint.interpretation.scores import MeasuredLabels
from saint.stage.html import render
from saint.stage.terminal import show

_TEMPLATES = Path(__file__).parent / "templates"
_PERCENTILES = (10, 25, 50, 75, 90)
_ALIKE = 0.6  # Jaccard index of the words of near-duplicates
_N_SHOWN = 10
_TOO_NARROW, _TOO_BROAD = 0.5, 0.3  # a true-positive rate below, a false-positive rate above
_Labels = Mapping[int, Mapping[str, Any]]

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
    labels: _Labels,
    kinds: Mapping[str, int],
    usage: Mapping[tuple[str, bool], Sequence[int]],
    measured: MeasuredLabels,
    explained: Sequence[str],
) -> dict[str, Any]:
    """Add up what the labels are like; what was not asked or tested is left out.

    kinds: responses by what became of them. explained: what became of each explained latent.
    usage: (model, live) -> tokens in and out. measured: the tests' controls.
    """
    # A latent that was measured and not labelled has an empty one.
    texts = {i: text for i, row in labels.items() if (text := str(row["common_semantic"]))}
    n, values = len(texts), list(texts.values())
    report: dict[str, Any] = {"responses": dict(sorted(kinds.items())), "labels": n}
    if explained:
        report["labelled_share"] = _share(explained.count("label"), len(explained))
    if n:
        twins = near_duplicates(texts)
        report |= {
            "mean_words": round(sum(len(text.split()) for text in values) / n, 1),
            "hedged_share": _share(sum(bool(_HEDGES.search(t)) for t in values), n),
            "artefact_share": _share(sum(bool(_ARTEFACTS.search(t)) for t in values), n),
            "near_duplicate_share": _share(len({i for pair in twins for i in pair}), n),
        }
        if twins:
            report["near_duplicates"] = [
                f"{a} {texts[a]!r} = {b} {texts[b]!r}" for a, b in twins[:_N_SHOWN]
            ]
    sure = [v for row in labels.values() if isinstance(v := row.get("certainty"), int | float)]
    if sure:
        report["certainty"] = _spread(sure)
    pools = measured.pools()
    tested = [t for t in SCORING_TASKS if any(t in (r.get("score") or {}) for r in labels.values())]
    if tested:
        report["scores"] = {task: _scores(labels, task, pools.get(task)) for task in tested}
        report |= _extremes(labels, tested[0])
    if pools:
        report["shuffled_label_controls"] = pools
    report["cost"] = _costs(usage, n)
    return report


def content_words(label: str) -> frozenset[str]:
    """The words of a label that carry its content."""
    return frozenset(re.findall(r"\w+", label.lower())) - _FILLERS


def near_duplicates(texts: Mapping[int, str]) -> list[tuple[int, int]]:
    """Pairs of latents whose labels share most of their words: Jaccard index of 0.6 or more.

    Two such sets share one of the first few of their words, rarest first (prefix filtering), so
    that few pairs are compared.
    """
    words = {i: found for i, text in texts.items() if (found := content_words(text))}
    counts = Counter(word for found in words.values() for word in found)
    seen: defaultdict[str, list[int]] = defaultdict(list)
    pairs = []
    for latent, found in words.items():
        prefix = sorted(found, key=lambda w: (counts[w], w))
        prefix = prefix[: len(found) - ceil(_ALIKE * len(found)) + 1]
        for other in sorted({i for word in prefix for i in seen[word]}):
            if len(found & words[other]) >= _ALIKE * len(found | words[other]):
                pairs.append((other, latent))
        for word in prefix:
            seen[word].append(latent)
    return sorted(pairs)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _spread(values: Sequence[float]) -> dict[str, float]:
    points = np.percentile(values, _PERCENTILES)
    spread = {f"p{p}": round(float(v), 4) for p, v in zip(_PERCENTILES, points, strict=True)}
    return {"mean": round(float(np.mean(values)), 4)} | spread


def _value(found: Mapping[str, Any]) -> float:
    return found.get("balanced_accuracy", found.get("accuracy", 0.0))


def _scores(labels: _Labels, task: str, control: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a test says of all latents. Chance is what its controls reached, where there are any."""
    found = [row["score"][task] for row in labels.values() if task in (row.get("score") or {})]
    chance = control["mean"] if control else found[0].get("chance", 0.5)
    told: dict[str, Any] = {"latents": len(found)} | _spread([_value(row) for row in found])
    told["chance"] = chance
    told["above_chance_share"] = _share(sum(r["ci_low"] > chance for r in found), len(found))
    for name in ("true_positive_rate", "false_positive_rate", "near_miss", "random"):
        if values := [row[name] for row in found if name in row]:
            told[name] = round(float(np.mean(values)), 4)
    if any("true_positive_rate" in row for row in found):
        n_narrow = sum(row.get("true_positive_rate", 1) < _TOO_NARROW for row in found)
        n_broad = sum(row.get("false_positive_rate", 0) > _TOO_BROAD for row in found)
        told |= {"too_narrow": n_narrow, "too_broad": n_broad}
    return told


def _extremes(labels: _Labels, task: str) -> dict[str, list[str]]:
    """The labels with the best and the worst score in a test; what is wrong with them."""
    rows = [(i, r, r["score"][task]) for i, r in labels.items() if task in (r.get("score") or {})]
    rows.sort(key=lambda item: (-_value(item[2]), item[0]))

    def told(item: tuple[int, Mapping[str, Any], Mapping[str, Any]]) -> str:
        latent, row, found = item
        wrong = []
        if found.get("true_positive_rate", 1) < _TOO_NARROW:
            wrong.append("too narrow")
        if found.get("false_positive_rate", 0) > _TOO_BROAD:
            wrong.append("too broad")
        name = row["common_semantic"] or "(no label)"
        return f"{_value(found):.2f} {latent} {name}" + (f" ({', '.join(wrong)})" if wrong else "")

    n = min(_N_SHOWN, len(rows) // 2)
    if not n:
        return {}
    best, worst = rows[:n], rows[: -n - 1 : -1]
    return {
        f"best_by_{task}": [told(r) for r in best],
        f"worst_by_{task}": [told(r) for r in worst],
    }


def _costs(usage: Mapping[tuple[str, bool], Sequence[int]], n_labels: int) -> dict[str, Any]:
    """Tokens and dollars; these are unknown as soon as one model has no price."""
    total, unknown = 0.0, set()
    for (model, live), (tokens_in, tokens_out) in usage.items():
        cost = dollars(batch_price(model), tokens_in, tokens_out)
        if cost is not None:
            total += cost * (LIVE_FACTOR if live else 1)
        elif tokens_in or tokens_out:
            unknown.add(model)
    tokens = [sum(used[k] for used in usage.values()) for k in (0, 1)]
    found: dict[str, Any] = {"input_tokens": tokens[0], "output_tokens": tokens[1]}
    found["dollars"] = "unknown" if unknown else round(total, 4)
    if n_labels:
        each = [round(count / n_labels) for count in tokens]
        found["tokens_per_label"] = f"{each[0]} in, {each[1]} out"
        if not unknown:
            found["dollars_per_label"] = round(total / n_labels, 6)
    found["prices_of"] = PRICES_DATE
    if unknown:
        found["models_without_price"] = sorted(unknown)
    return found


def show_report(report: Mapping[str, Any], indent: str = "") -> None:
    """Print a report as aligned lines."""
    for name, value in report.items():
        if isinstance(value, Mapping):
            show(f"{indent}{name.replace('_', ' ')}:")
            show_report(value, indent + "  ")
        elif isinstance(value, list):
            show(f"{indent}{name.replace('_', ' ')}:")
            show("\n".join(f"{indent}  {line}" for line in value))
        else:
            show(f"{indent}{name.replace('_', ' '):<{28 - len(indent)}} {value}")


def report_page(report: Mapping[str, Any], title: str) -> str:
    """The report as one HTML page that opens from disk."""
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("All labels", {k: v for k, v in report.items() if not isinstance(v, Mapping | list)})
    ]
    for name, value in report.items():
        if name == "scores":
            groups += [(f"Test {task}", found) for task, found in value.items()]
        elif isinstance(value, Mapping):
            groups.append((name.replace("_", " ").capitalize(), value))
    lists = {k.replace("_", " ").capitalize(): v for k, v in report.items() if isinstance(v, list)}
    return render(_TEMPLATES, "report.html", title=title, groups=groups, lists=lists)
