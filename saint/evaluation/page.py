"""An evaluation's figures as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.stage.html import fragment, render
from saint.stage.plots import Axis, Series, bar_chart, histogram_chart, line_chart

TEMPLATES = Path(__file__).parent / "templates"
_FULL_COLOUR = 2.0  # nats


def evaluation_charts(report: Mapping[str, Any]) -> Markup:
    """Return the diagrams of `sae_evaluation.py`'s report: cross-entropies, latent densities."""
    losses = [
        ("clean", report["ce_clean"]),
        ("SAE", report["ce_sae"]),
        ("mean-ablated", report["ce_mean_ablated"]),
    ]
    if "ce_zero_ablated" in report:
        losses.append(("zero-ablated", report["ce_zero_ablated"]))
    density = report["density_histogram"]
    charts = [
        bar_chart("cross-entropy", losses, y=Axis("nats per token")),
        histogram_chart(
            "latent density",
            density["n_latents"],
            density["log10_edges"],
            x=Axis("log10 of the share of tokens on which a latent fires"),
            y=Axis("latents"),
        ),
    ]
    return fragment(TEMPLATES, "figures.html", "charts", charts, [])


def detail_charts(report: Mapping[str, Any]) -> Markup:
    """Return the diagrams of where it errs, of the decoder, and of what was probed."""
    charts = []
    for name, title, label in (
        ("by_position", "where in the sentence", "position of the token, from 0"),
        ("by_norm", "how large the activation", "norm, upper end of a fifth"),
    ):
        rows, end = report[name], "from" if name == "by_position" else "to"
        error = [(float(row[end]), row["normalized_mse"]) for row in rows]
        increase = [
            (float(row[end]), row["loss_increase"]) for row in rows if "loss_increase" in row
        ]
        series = [Series("normalised MSE", error), Series("loss added, nats", increase)]
        charts.append(line_chart(title, series, x=Axis(label), y=Axis(include=(0.0,))))
    histogram = report["decoder"].get("nearest_cosine_histogram")
    if histogram:
        charts.append(
            histogram_chart(
                "decoder directions",
                histogram["n_latents"],
                histogram["edges"],
                x=Axis("cosine with the nearest other direction"),
                y=Axis("latents"),
            )
        )
    if "probing" in report:
        bars = [(name, value) for name, value in report["probing"]["mean"].items()]
        charts.append(bar_chart("topics told apart", bars, y=Axis("accuracy", percent=True)))
    return fragment(TEMPLATES, "figures.html", "charts", charts, [])


def evaluation_page(report: Mapping[str, Any], *, title: str) -> Markup:
    """Return the page of `sae_evaluation.py`."""
    facts = {
        "variance explained": f"{1 - report['fvu']:.1%}",
        "cross-entropy recovered": f"{report['loss_recovered']:.1%}",
        "active latents (L0)": f"{report['l0']:.1f}",
        "dead latents": f"{report['dead_share']:.1%}",
        "tokens": f"{report['n_tokens']:,}",
    }
    if "absorption" in report:
        facts["first letters absorbed"] = f"{report['absorption']['absorbed']:.1%}"
    if "probing" in report:
        facts["one latent tells a topic"] = f"{report['probing']['mean']['k1']:.1%}"
    numbers = {k: v for k, v in report.items() if isinstance(v, (int, float, str))}
    values = {"title": title, "facts": facts, "numbers": numbers, "report": report}
    values |= {"charts": evaluation_charts(report), "details": detail_charts(report)}
    return render(TEMPLATES, "evaluation.html", full=_FULL_COLOUR, **values)
