"""Several evaluations on one page.

    python -m saint.evaluation.compare a/sae_evaluation.json b/sae_evaluation.json …

Reports are compared that were made of the same sentences and model. Those whose SAEs were trained
alike but for the seed say how large a difference is noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.evaluation.page import TEMPLATES
from saint.stage.errors import UserError, log
from saint.stage.files import read_json, write_text
from saint.stage.html import fragment, render
from saint.stage.plots import Axis, Series, scatter_chart
from saint.stage.program import run_stage
from saint.stage.terminal import page_link

Evaluation = Mapping[str, Any]

# name → where it stands in a report, digits
MEASURES: dict[str, tuple[tuple[str, ...], str]] = {
    "FVU": (("fvu",), ".4f"),
    "L0": (("l0",), ".1f"),
    "dead": (("dead_share",), ".2%"),
    "CE recovered": (("loss_recovered",), ".4f"),
    "CE recovered, zero": (("loss_recovered_zero",), ".4f"),
    "KL": (("kl_divergence",), ".4f"),
    "nearest cosine": (("decoder", "mean_nearest_cosine"), ".3f"),
    "absorbed": (("absorption", "absorbed"), ".2%"),
    "letters split": (("absorption", "share_split"), ".2%"),
    "one latent": (("probing", "mean", "k1"), ".2%"),
    "five latents": (("probing", "mean", "k5"), ".2%"),
    "dense probe": (("probing", "mean", "dense"), ".2%"),
}
_SAME = ("model", "dataset", "layer", "hook_point", "n_tokens")


def figure(report: Evaluation, measure: str) -> float | None:
    """Return one of MEASURES from a report, None where it was not measured."""
    found: Any = report
    for key in MEASURES[measure][0]:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def noise_floor(reports: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return for each measure the largest difference between SAEs that differ in the seed alone."""
    groups: dict[str, list[Evaluation]] = {}
    for report in reports.values():
        recipe = dict(report.get("training") or {})
        if recipe.pop("seed", None) is not None:
            groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(report)
    floor: dict[str, float] = {}
    for members in groups.values():
        seeds = {member["training"]["seed"] for member in members}
        for measure in MEASURES if len(seeds) > 1 else ():
            values = [v for v in (figure(member, measure) for member in members) if v is not None]
            if len(values) > 1:
                difference = max(values) - min(values)
                floor[measure] = max(floor.get(measure, 0.0), difference)
    return floor


def read_reports(paths: Sequence[Path]) -> dict[str, Evaluation]:
    """Return name → report. Raises UserError where a file is none, or was made of other text."""
    reports: dict[str, Evaluation] = {}
    for path in paths:
        try:
            report = read_json(path)
            name = report["sae"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a report of sae_evaluation.py") from None
        first = next(iter(reports.values()), report)
        for key in _SAME:
            if report.get(key) != first.get(key):
                raise UserError(f"{path} has {key} {report.get(key)}, not {first.get(key)}")
        if name in reports:
            name = str(path)
        reports[name] = report
    return reports


def evaluations_page(reports: Mapping[str, Evaluation]) -> Markup:
    """Return the page: FVU and the other measures against L0, and a table with the noise floor."""
    floor = noise_floor(reports)
    charts = []
    for measure in ("FVU", "CE recovered", "absorbed", "one latent"):
        series = []
        for name, report in reports.items():
            x, y = figure(report, "L0"), figure(report, measure)
            if x is not None and y is not None:
                text = f"{name}: {measure} {y:{MEASURES[measure][1]}}, L0 {x:.1f}"
                series.append(Series(name, [(x, y)], [text]))
        if series:
            title = f"{measure} against L0"
            charts.append(scatter_chart(title, series, x=Axis("active latents per token (L0)")))
    shown = [m for m in MEASURES if any(figure(r, m) is not None for r in reports.values())]
    table = {
        name: [_text(figure(report, measure), measure) for measure in shown]
        for name, report in reports.items()
    }
    floors = [_text(floor.get(measure), measure) for measure in shown]
    values = {"names": shown, "table": table, "floor": floors if floor else None}
    drawn = fragment(TEMPLATES, "figures.html", "charts", charts, [])
    return render(TEMPLATES, "comparison.html", charts=drawn, **values)


def _text(value: float | None, measure: str) -> str:
    return "–" if value is None else f"{value:{MEASURES[measure][1]}}"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m saint.evaluation.compare", description="Compare evaluated SAEs on one page."
    )
    parser.add_argument("reports", type=Path, nargs="+", help="what sae_evaluation.py wrote")
    parser.add_argument(
        "--output_path", type=Path, default=Path("sae_comparison.html"), help="[%(default)s]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    args = build_parser().parse_args(argv)
    reports = read_reports(args.reports)
    write_text(args.output_path, evaluations_page(reports))
    log.info("%d SAEs compared: look at %s", len(reports), page_link(args.output_path))


if __name__ == "__main__":
    run_stage(main)
