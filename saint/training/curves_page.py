"""The curves of a training run, or of several, as one self-contained HTML page, light and dark.

python -m saint.training.curves_page a.metrics.jsonl b.metrics.jsonl … --output_path runs.html
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.stage.errors import log
from saint.stage.files import write_text
from saint.stage.html import fragment, render
from saint.stage.plots import Axis, Series, hue, line_chart, scatter_chart
from saint.stage.program import run_stage
from saint.stage.terminal import page_link
from saint.training.comparison import (
    RULE,
    RunLog,
    differing,
    read_runs,
    rows_of,
    verdict,
)

TEMPLATES = Path(__file__).parent / "templates"
_TOKENS = Axis("training tokens", include=(0.0,))

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One diagram: which metrics, over training tokens, and how they are shown."""

    title: str
    names: tuple[str, ...]
    y: Axis = Axis(include=(0.0,))

    def of(self, entries: Entries, names: Sequence[str]) -> list[Series]:
        """Return a run's points, one series for each of `names`."""
        return [
            Series(name, [(float(e["tokens"]), float(e[name])) for e in entries if name in e])
            for name in names
        ]


PANELS = (
    Panel("normalised MSE", ("train/loss", "val/loss"), Axis(logarithmic=True)),
    Panel("fraction of variance unexplained (FVU)", ("train/fvu", "val/fvu")),
    Panel("dead latents", ("debug/dead_latents_ratio",), Axis(percent=True, include=(0.0,))),
    Panel(
        "log10 of latent density: 10, 50, 90 % of those that fire",
        ("val/log10_density_p10", "val/log10_density_p50", "val/log10_density_p90"),
    ),
    Panel("active latents per token (L0)", ("train/l0", "val/l0")),
    Panel("AuxK loss", ("train/aux_loss",)),
    Panel("norm of the gradient", ("train/grad_norm",), Axis(logarithmic=True)),
    Panel("learning rate", ("learning_rate",)),
    Panel("tokens per second", ("tokens_per_s",)),
)


def curves(entries: Entries) -> Markup:
    """Return the diagrams of logged metrics as HTML with inline SVG; `plots.STYLE` goes with it.

    What never changed is a line of text instead of a diagram.
    """
    charts, constants = [], []
    for panel in PANELS:
        series = panel.of(entries, panel.names)
        values = {y for one in series for _, y in one.points}
        if len(values) == 1 and sum(len(one.points) for one in series) > 1:
            constants.append(f"{panel.title} {panel.y.text(values.pop())}")
        else:
            charts.append(line_chart(panel.title, series, x=_TOKENS, y=panel.y))
    return fragment(TEMPLATES, "figures.html", "charts", charts, constants)


def training_page(
    entries: Entries, *, title: str, settings: Mapping[str, Any], done: bool
) -> Markup:
    """Return the whole page; while the run goes on, an open page renews itself."""
    last = entries[-1] if entries else {}
    facts = {
        "step": f"{last.get('step', 0):,}",
        "tokens": f"{last.get('tokens', 0):,}",
        "loss": _short(last.get("train/loss", math.nan)),
        "held-out FVU": _short(next((e["val/fvu"] for e in entries[::-1] if "val/fvu" in e), None)),
        "dead latents": f"{last.get('debug/dead_latents_ratio', 0):.1%}",
        "tokens/s": f"{last.get('tokens_per_s', 0):,.0f}",
    }
    values = {"title": title, "done": done, "facts": facts, "settings": settings}
    return render(TEMPLATES, "training.html", curves=curves(entries), **values)


def runs_page(runs: Sequence[RunLog], *, title: str) -> Markup:
    """Return the page of several runs: which is the best, FVU against L0, layers, curves."""
    charts, constants = _curves_of_all(runs)
    values = {
        "title": title,
        "verdict": verdict(runs),
        "rule": RULE,
        "runs": [
            {**row, "hue": hue(i), "cells": _cells(row)} for i, row in enumerate(rows_of(runs))
        ],
        "columns": [_COLUMNS.get(name, name) for name in _shown(rows_of(runs)[0])],
        "outcome": fragment(TEMPLATES, "figures.html", "charts", _outcome(runs), []),
        "curves": fragment(TEMPLATES, "figures.html", "charts", charts, constants),
        "settings": _common_settings(runs),
    }
    return render(TEMPLATES, "comparison.html", **values)


_COLUMNS = {"fvu": "held-out FVU", "l0": "L0", "dead": "dead", "loss": "loss"}
_NOT_SHOWN = ("run", "best", "frontier", "failure")


def _shown(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name not in _NOT_SHOWN]


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in _shown(row):
        value = row[name]
        if value is None:
            cells.append("–")
        elif name == "dead":
            cells.append(f"{value:.1%}")
        elif name == "step":
            cells.append(f"{value:,}")
        else:
            cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
    return cells


def _outcome(runs: Sequence[RunLog]) -> list[Markup]:
    """Return the diagrams of what came out: FVU against L0, and over layers where they differ."""
    series = []
    for run in runs:
        l0, fvu = run.figure("l0"), run.figure("fvu")
        if l0 is None or fvu is None:
            series.append(Series(run.name, []))
        else:
            text = f"{run.name}: FVU {fvu:.4f}, L0 {l0:.1f}"
            series.append(Series(run.name, [(l0, fvu)], [text]))
    x = Axis("active latents per token (L0)")
    charts = [scatter_chart("held-out FVU against L0", series, x=x, key=False)]
    if len({run.layer for run in runs} - {None}) > 1:
        charts.append(_layers(runs))
    return charts


def _layers(runs: Sequence[RunLog]) -> Markup:
    """Return held-out FVU over layers, a line for each recipe."""
    names, lines = differing(runs), {}
    for run in sorted(runs, key=lambda run: run.layer or 0):
        recipe = ", ".join(f"{name} {run.settings.get(name)}" for name in names)
        fvu = run.figure("fvu")
        if run.layer is not None and fvu is not None:
            lines.setdefault(recipe, []).append((float(run.layer), fvu))
    series = [Series(recipe, points) for recipe, points in lines.items()]
    return line_chart("held-out FVU over layers", series, x=Axis("layer"), y=Axis(include=(0.0,)))


def _curves_of_all(runs: Sequence[RunLog]) -> tuple[list[Markup], list[str]]:
    """Return diagrams with a line for each run, and in words what never changed in any."""
    charts, constants = [], []
    for panel in PANELS:
        if panel.names == ("tokens_per_s",):  # runs of one pass have its speed
            continue
        name = _best_metric(panel, runs)
        series = [Series(run.name, panel.of(run.entries, [name])[0].points) for run in runs]
        values = [sorted({y for _, y in one.points}) for one in series]
        if all(len(each) <= 1 for each in values) and any(values):
            texts = {
                one.name: panel.y.text(v[0]) for one, v in zip(series, values, strict=True) if v
            }
            same = len(set(texts.values())) == 1
            each = ", ".join(f"{text} ({run})" for run, text in texts.items())
            constants.append(f"{panel.title} {next(iter(texts.values())) if same else each}")
        else:
            title = f"{panel.title}: {name}" if len(panel.names) > 1 else panel.title
            charts.append(line_chart(title, series, x=_TOKENS, y=panel.y, key=False))
    return charts, constants


def _best_metric(panel: Panel, runs: Sequence[RunLog]) -> str:
    """Return the panel's metric that is drawn of several runs: the held-out one, or the median."""
    for name in (panel.names[len(panel.names) // 2], *panel.names):
        if all(sum(name in e for e in run.entries) > 1 for run in runs):
            return name
    return panel.names[0]


def _common_settings(runs: Sequence[RunLog]) -> dict[str, Any]:
    names = differing(runs)
    settings = next((run.settings for run in runs if run.settings), {})
    return {name: value for name, value in settings.items() if name not in names}


def _short(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m saint.training.curves_page",
        description="Draw the curves of training runs on one page.",
    )
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of sae_training.py")
    parser.add_argument(
        "--output_path", type=Path, default=Path("sae_runs.html"), help="[%(default)s]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    args = build_parser().parse_args(argv)
    runs = read_runs(args.metrics)
    title = f"Training of {len(runs)} SAEs" if len(runs) > 1 else f"Training {runs[0].name}"
    write_text(args.output_path, runs_page(runs, title=title))
    log.info("%d runs: %s; look at %s", len(runs), verdict(runs), page_link(args.output_path))


if __name__ == "__main__":
    run_stage(main)
