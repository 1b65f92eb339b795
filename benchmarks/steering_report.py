"""The steering benchmark's table, plot and last line, from the cells that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saint.stage.files import write_json

LIMITS = (0.25, 0.5, 1.0)
_RESAMPLES = 1000
_WORD = re.compile(r"[a-z]+")
_PROMPTS = ("prompt_write", "prompt_nothing_but")
TITLES = {
    "latents_16": "16 latents",
    "latents_1": "1 latent",
    "latents_4": "4 latents",
    "latents_64": "64 latents",
    "means": "difference of means",
    "means_generated": "… on generated tokens only",
    "means_clamp": "… clamped instead of added",
    "prompt_write": "prompt “Write about film.”",
    "prompt_nothing_but": "prompt “… nothing but film.”",
    "logit_bias": "logit bias on the family",
    "random_direction": "random direction",
    "random_latent": "random latent",
    "first_version": "first version's way",
    "before": "before: the clearest latents",
    "before_same": "before: the word's latent",
    "trained": "trained vector",
}


@dataclass(frozen=True)
class Curve:
    """A method's cells: (n_doses, n_concepts) means over prompts and seeds, doses ascending.

    The first dose is 0, the plain model, for methods that have doses.
    """

    method: str
    doses: np.ndarray
    share: np.ndarray
    loss: np.ndarray
    topic: np.ndarray
    distinct: np.ndarray
    kl: np.ndarray
    n_texts: int


def read_cells(output_dir: Path) -> list[dict[str, Any]]:
    """Return all cells, by name."""
    paths = sorted((output_dir / "cells").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def shows(text: str, family: Sequence[str]) -> bool:
    """Whether a text has a word of a family."""
    return not set(_WORD.findall(text.lower())).isdisjoint(family)


def topic_score(text: str, topic: Mapping[str, float]) -> float:
    """Mean log ratio of a text's words of three letters or more; words without one count 0."""
    words = [word for word in _WORD.findall(text.lower()) if len(word) > 2]
    return sum(topic.get(word, 0.0) for word in words) / max(1, len(words))


def _forms(word: str) -> list[str]:
    return [word, word + "s", word + "es", word + "ed", word + "ing", word.rstrip("e") + "ing"]


class Scored:
    """Every cell's rows turned into numbers, against plain texts after the same prompts."""

    def __init__(self, cells: Sequence[dict[str, Any]], families: Mapping[str, Any]):
        self.names = list(families)
        self.families = families
        self.cells = cells
        self.plain = [row for cell in cells if cell["method"] == "plain" for row in cell["rows"]]
        by_prompt: dict[int, list[float]] = {}
        for row in self.plain:
            by_prompt.setdefault(row["prompt"], []).append(row["surprise"])
        self.surprise = {prompt: float(np.mean(values)) for prompt, values in by_prompt.items()}

    def plain_point(self, words: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """The plain texts as a point at dose 0."""
        n = len(self.names)
        return {
            "share": np.array(
                [np.mean([shows(r["text"], words[c]) for r in self.plain]) for c in self.names]
            ),
            "topic": np.array(
                [
                    np.mean([topic_score(r["text"], self.families[c]["topic"]) for r in self.plain])
                    for c in self.names
                ]
            ),
            "loss": np.zeros(n),
            "distinct": np.full(n, np.mean([r["distinct"] for r in self.plain])),
            "kl": np.zeros(n),
        }

    def curve(self, method: str) -> Curve:
        """Collect a method's cells; where a seed lacks a dose, the other seeds' stand for it."""
        cells = [cell for cell in self.cells if cell["method"] == method]
        words = {name: self.families[name]["family"] for name in self.names}
        if method == "before":
            words = {name: _forms(word) for name, word in cells[0]["words"].items()}
        points: dict[float, dict[str, np.ndarray]] = {}
        dosed = method not in _PROMPTS and not method.startswith("down_")
        if dosed and method != "first_version":
            points[0.0] = self.plain_point(words)
        for dose in sorted({cell["dose"] for cell in cells}):
            rows = [row for cell in cells if cell["dose"] == dose for row in cell["rows"]]
            points[dose] = self._point(rows, words)
        stacked = {
            key: np.stack([points[dose][key] for dose in sorted(points)])
            for key in ("share", "loss", "topic", "distinct", "kl")
        }
        n_texts = sum(len(cell["rows"]) for cell in cells)
        return Curve(method, np.array(sorted(points)), **stacked, n_texts=n_texts)

    def _point(
        self, rows: Sequence[dict[str, Any]], words: Mapping[str, Sequence[str]]
    ) -> dict[str, np.ndarray]:
        columns: dict[str, list[float]] = {
            k: [] for k in ("share", "loss", "topic", "distinct", "kl")
        }
        for name in self.names:
            own = [row for row in rows if row["concept"] == name]
            topic = self.families[name]["topic"]
            columns["share"].append(float(np.mean([shows(r["text"], words[name]) for r in own])))
            columns["loss"].append(
                float(np.mean([r["surprise"] - self.surprise[r["prompt"]] for r in own]))
            )
            columns["topic"].append(float(np.mean([topic_score(r["text"], topic) for r in own])))
            columns["distinct"].append(float(np.mean([r["distinct"] for r in own])))
            kl = [r["kl"] for r in own if "kl" in r]
            columns["kl"].append(float(np.mean(kl)) if kl else float("nan"))
        return {key: np.array(values) for key, values in columns.items()}


def at_loss(curve: Curve, limit: float, which: str, members: np.ndarray) -> float:
    """Return a measure where the mean loss over `members` (concepts) first reaches the limit.

    Linear between doses. Where the strongest dose still costs less, its value (a lower bound);
    where the weakest costs more already, nan.
    """
    loss = curve.loss[:, members].mean(1)
    values = getattr(curve, which)[:, members].mean(1)
    over = np.flatnonzero(loss > limit)
    if not len(over):
        return float(values[-1])
    i = int(over[0])
    if i == 0:
        return float("nan")
    t = (limit - loss[i - 1]) / (loss[i] - loss[i - 1])
    return float((1 - t) * values[i - 1] + t * values[i])


def bootstrap(curve: Curve, limit: float, which: str = "share") -> tuple[float, float, float]:
    """Return the estimate and its 95 % interval over concepts."""
    n = curve.share.shape[1]
    draw = np.random.default_rng(0)
    values = [at_loss(curve, limit, which, draw.integers(0, n, n)) for _ in range(_RESAMPLES)]
    low, high = (
        np.nanpercentile(values, (2.5, 97.5)) if not np.all(np.isnan(values)) else (np.nan,) * 2
    )
    return at_loss(curve, limit, which, np.arange(n)), float(low), float(high)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over concepts and its 95 % interval."""
    draw = np.random.default_rng(0)
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def report(output_dir: Path, families: Mapping[str, Any], first_seed: int) -> None:
    """Print the tables and the last line, and write `steering.json` and `steering.png`."""
    scored = Scored(read_cells(output_dir), families)
    methods = list(dict.fromkeys(cell["method"] for cell in scored.cells))
    curves = {m: scored.curve(m) for m in methods if m != "plain"}
    words = {name: families[name]["family"] for name in scored.names}
    plain = interval(scored.plain_point(words)["share"])
    print(f"\n{len(scored.names)} concepts; plain share {_shown(plain)}")
    _print_doses(curves)
    record: dict[str, Any] = {"plain": plain, "at_loss": {}, "down": {}}
    print(f"\n{'method':<34}" + "".join(f"{f'share at {x:g} nat':>24}" for x in LIMITS))
    for method, curve in curves.items():
        if method.startswith("down_"):
            continue
        if method in _PROMPTS:
            found = [interval(curve.share[0])] * len(LIMITS)
        else:
            found = [bootstrap(curve, limit) for limit in LIMITS]
        record["at_loss"][method] = {str(x): v for x, v in zip(LIMITS, found, strict=True)}
        print(f"{TITLES.get(method, method):<34}" + "".join(f"{_shown(f):>24}" for f in found))
    record["down"] = _print_down(curves)
    plot(output_dir / "steering.png", curves, plain[0])
    write_json(output_dir / "steering.json", record)
    print(json.dumps(last_line(record, curves, plain[0])))


def last_line(
    record: Mapping[str, Any], curves: Mapping[str, Curve], plain: float
) -> dict[str, float | None]:
    """The figures of the default, the difference of means."""

    def at(method: str, limit: str) -> float | None:
        row = record["at_loss"].get(method)
        return None if row is None else round(row[limit][0], 3)

    default = "means"
    prompt = curves.get("prompt_nothing_but")
    return {
        "share_half_nat": at(default, "0.5"),
        "share_1nat": at(default, "1.0"),
        "share_1nat_plain": round(plain, 3),
        "share_1nat_prompt": at("prompt_nothing_but", "1.0"),
        # The same concepts and families, where that was measured.
        "share_1nat_before": at("before_same" if "before_same" in curves else "before", "1.0"),
        "loss": None if prompt is None else round(float(prompt.loss.mean()), 3),
        **_down_figures(record.get("down", {})),
    }


def _down_figures(down: Mapping[str, Any]) -> dict[str, Any]:
    """What turning down takes away at half a nat, where it was measured."""
    best = down.get("best")
    return {} if best is None else {"down_lost": round(best["lost"], 3), "down": best["method"]}


def _shown(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def _print_doses(curves: Mapping[str, Curve]) -> None:
    head = ("dose", "loss", "share", "topic", "KL", "distinct", "texts")
    print(f"\n{'method':<34}" + "".join(f"{name:>9}" for name in head))
    for method, curve in curves.items():
        for i, dose in enumerate(curve.doses):
            row = [curve.loss[i].mean(), curve.share[i].mean(), curve.topic[i].mean()]
            kl = np.nanmean(curve.kl[i]) if not np.all(np.isnan(curve.kl[i])) else float("nan")
            row += [kl, curve.distinct[i].mean()]
            print(
                f"{TITLES.get(method, method):<34}{dose:9g}"
                + "".join(f"{v:9.3f}" for v in row)
                + f"{curve.n_texts:9d}"
            )


def _print_down(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Turning down: how often the concept still shows where the prompt asks for it."""
    if "down_plain" not in curves:
        return {}
    asked = curves["down_plain"]
    best: tuple[float, str] | None = None
    print("\nturning down, after “This text is about film, film and nothing but film. …”")
    record: dict[str, Any] = {"plain": interval(asked.share[0])}
    print(f"{'unsteered':<34} share {_shown(interval(asked.share[0]))}")
    for method, curve in curves.items():
        if not method.startswith("down_") or method == "down_plain":
            continue
        for i, dose in enumerate(curve.doses):
            lost = 1 - curve.share[i].mean() / asked.share[0].mean()
            share, loss = interval(curve.share[i]), float(curve.loss[i].mean())
            record[f"{method}@{dose:g}"] = {"share": share, "loss": loss, "lost": float(lost)}
            print(
                f"{method:<27}{dose:>6g}  share {_shown(share)}  lost {lost:.0%}  loss {loss:.2f}"
            )
            if loss <= LIMITS[1] and (best is None or lost > best[0]):
                best = float(lost), f"{method}@{dose:g}"
    if best is not None:
        record["best"] = {"method": best[1], "lost": best[0]}
        print(f"at no more than half a nat, {best[1]} takes it from {best[0]:.0%} of the texts")
    return record


def plot(path: Path, curves: Mapping[str, Curve], plain: float) -> None:
    """Concept against fluency, a curve a method."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for method, curve in curves.items():
        if method.startswith("down_"):
            continue
        marker = "*" if method in _PROMPTS else "o"
        axes.plot(
            curve.loss.mean(1), curve.share.mean(1), marker=marker, label=TITLES.get(method, method)
        )
    axes.axhline(plain, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.1, 2), ylim=(0, 1))
    axes.set(xlabel="loss of the generated text, nats per token", ylabel="share of texts")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
