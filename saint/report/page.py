"""A run as one page, for a reader who was not there; every section names the file it comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.evaluation.page import evaluation_charts
from saint.evidence.file import Evidence, open_evidence
from saint.evidence.labels import Label, load_labels
from saint.evidence.words import clearest_latents
from saint.report.stages import StageSummary, run_stages
from saint.stage.errors import UserError
from saint.stage.files import read_json
from saint.stage.html import render
from saint.stage.plots import Axis, Series, histogram_chart, scatter_chart
from saint.training.curves_page import curves

TEMPLATES = Path(__file__).parent / "templates"
_N_EXAMPLES = 12
_N_WINDOWS = 3


@dataclass(frozen=True)
class Section:
    """One part of the report. source: the file it was made from. figures: name -> value."""

    title: str
    source: Path
    figures: Mapping[str, str] = field(default_factory=dict)
    charts: tuple[Markup, ...] = ()
    body: Markup = Markup()
    rows: Mapping[str, Any] = field(default_factory=dict)


def report_sections(run_dir: Path) -> list[Section]:
    """Return what a run directory has files for. Raises UserError where no stage has finished."""
    stages = run_stages(run_dir)
    if not stages:
        raise UserError(f"{run_dir} holds no stage's manifest: name the directory of a run")
    sections = [_stage_section(stage) for stage in stages if stage.name in _STAGE_TITLES]
    for stage in stages:
        sections += _details(stage)
    titles = Counter(section.title for section in sections)
    return [
        section if titles[section.title] == 1 else replace(section, title=_told_apart(section))
        for section in sections
    ]


def _told_apart(section: Section) -> str:
    """The title of one of several sections of the same kind."""
    return f"{section.title}: {'/'.join(section.source.parts[-2:])}"


def report_page(run_dir: Path, sections: list[Section]) -> Markup:
    """Return the whole page."""
    stages = run_stages(run_dir)
    return render(
        TEMPLATES,
        "report.html",
        title=f"Report of {run_dir.name}",
        sections=sections,
        stages=stages,
    )


_STAGE_TITLES = {
    "capture_activations": "Data and model",
    "sae_preprocessing": "Training rows",
    "sae_training": "Recipe",
}


def _stage_section(stage: StageSummary) -> Section:
    counts = stage.manifest.get("counts", {})
    figures = {k.removeprefix("n_"): f"{v:,}" for k, v in counts.items() if isinstance(v, int)}
    rows = dict(stage.manifest.get("arguments", {}))
    rows |= {k: v for k, v in stage.manifest.get("settings", {}).items() if k not in rows}
    rows |= {f"made from: {k}": v for k, v in stage.manifest.get("sources", {}).items()}
    return Section(_STAGE_TITLES[stage.name], stage.path, figures, rows=rows)


def _details(stage: StageSummary) -> list[Section]:
    """Sections made from the files of a stage, beside its manifest."""
    folder = stage.path.parent
    output = folder / stage.path.name.removesuffix(".manifest.json")
    if stage.name == "sae_training":
        return _training(output)
    if stage.name == "sae_evaluation":
        return _evaluation(output)
    if stage.name == "capture_top_activating_sentences":
        return _evidence(folder / "evidence.parquet", folder.parent / "output")
    return []


def _training(sae_path: Path) -> list[Section]:
    path = sae_path.with_suffix(".metrics.jsonl")
    if not path.is_file():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    pairs = [(e["val/l0"], e["val/fvu"]) for e in entries if {"val/l0", "val/fvu"} <= e.keys()]
    charts = ()
    if len({l0 for l0, _ in pairs}) > 1:
        charts = (scatter_chart("FVU over L0", [Series("", pairs)], x=Axis("L0"), y=Axis("FVU")),)
    return [Section("Training", path, charts=charts, body=curves(entries))]


def _evaluation(path: Path) -> list[Section]:
    report = read_json(path)
    figures = {
        "FVU": f"{report['fvu']:.4f}",
        "L0": f"{report['l0']:.1f}",
        "cross-entropy recovered": f"{report['loss_recovered']:.2%}",
        "KL divergence, nats": f"{report['kl_divergence']:.3f}",
        "dead latents": f"{report['dead_share']:.1%}",
        "held-out tokens": f"{report['n_tokens']:,}",
    }
    body = evaluation_charts(report) if "density_histogram" in report else Markup()
    return [Section("Faithfulness on held-out sentences", path, figures, body=body)]


def _evidence(path: Path, labels_dir: Path) -> list[Section]:
    if not path.is_file():
        return []
    evidence, labels_path = open_evidence(path), labels_dir / "parsed_responses.yaml"
    labels = load_labels(labels_path) if labels_path.is_file() else {}
    table = evidence.summary()
    density = [float(d) for d in table.column("density").to_pylist()]
    maxima = [float(m) for m in table.column("max_activation").to_pylist()]
    points = list(zip(density, maxima, strict=True))
    dots = scatter_chart(
        "density × largest activation",
        [Series("", points)],
        x=Axis("share of tokens", logarithmic=True, percent=True),
        y=Axis("largest activation", logarithmic=True),
    )
    figures = {
        "latents": f"{evidence.n_latents:,}",
        "that fire": f"{sum(d > 0 for d in density):,}",
        "sentences": f"{evidence.meta['n_sentences']:,}",
    }
    sections = [Section("Latents", path, figures, (dots,))]
    if labels:
        sections.append(_labels(labels_path, labels))
    return [*sections, _examples(path, evidence, labels)]


def _labels(path: Path, labels: Mapping[int, Label]) -> Section:
    scores = [label.score for label in labels.values() if label.score is not None]
    named = [label for label in labels.values() if label.text]
    figures = {"labels": f"{len(named):,}", "tested": f"{len(scores):,}"}
    if not scores:
        return Section("Labels", path, figures)
    counts = [sum(i <= s * 20 < i + 1 or (i == 19 and s == 1) for s in scores) for i in range(20)]
    figures |= {"mean detection score": f"{sum(scores) / len(scores):.3f}"}
    chart = histogram_chart(
        "detection scores",
        counts,
        [i / 20 for i in range(21)],
        x=Axis("balanced accuracy, 0.5 is chance"),
        y=Axis("labels"),
    )
    return Section("Labels", path, figures, (chart,))


def _examples(path: Path, evidence: Evidence, labels: Mapping[int, Label]) -> Section:
    latents = []
    for i in clearest_latents(evidence, _N_EXAMPLES):
        row = evidence.latent(i)
        top = [e for e in row["examples"] if e["kind"] == "top"][:_N_WINDOWS]
        unit = max(row["max_activation"], 1e-9)
        windows = [
            [
                (token, f"{min(1.0, value / unit):.2f}" if value > 0 else "")
                for token, value in zip(example["tokens"], example["activations"], strict=True)
            ]
            for example in top
        ]
        name = labels[i].text if i in labels else ""
        latents.append({"number": i, "name": name, "density": row["density"], "windows": windows})
    return Section("Examples", path, body=render(TEMPLATES, "examples.html", latents=latents))
