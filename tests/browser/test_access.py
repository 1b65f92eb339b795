"""Every page that a stage writes: nobody is kept out, at both widths, in both colours, on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saint.browser.prompt_view import PromptActivations, prompt_page
from saint.evaluation.compare import evaluations_page
from saint.evaluation.page import evaluation_page
from saint.interpretation.report import report_page as labels_page
from saint.page.fragments import dose_html, report_page
from saint.report.page import report_page as run_page
from saint.report.page import report_sections
from saint.steering.dose import DosePoint, DoseReport
from saint.steering.guide import make_guide
from saint.steering.settings import Setting
from saint.training.comparison import read_runs
from saint.training.curves_page import runs_page, training_page
from tests.support.barriers import (
    SCHEMES,
    WIDTHS,
    check_barriers,
    check_paper,
    check_stillness,
)
from tests.support.steering_site import running_browser

LONG = "a_name_without_a_single_space_in_it/" * 4
ENTRIES = [
    {"step": i, "tokens": 1000 * i, "train/loss": 1 / i, "train/fvu": 1 / i, "val/fvu": 1 / i}
    | {"val/l0": 9 - i, "learning_rate": 0.01, "tokens_per_s": 1e4, "train/l0": 8.0}
    for i in range(1, 9)
]
HISTOGRAM = {"log10_edges": [-3.0, -2.0, -1.0], "n_latents": [3, 5]}
EVALUATION: dict[str, Any] = {
    "fvu": 0.1, "l0": 4.0, "loss_recovered": 0.9, "kl_divergence": 0.2, "dead_share": 0.25,
    "n_tokens": 1234, "ce_clean": 3.0, "ce_sae": 3.5, "ce_mean_ablated": 8.0,
    "density_histogram": HISTOGRAM, "sae": LONG, "k": 4, "training": {"k": 4, "seed": 0},
    "by_position": [{"from": i, "to": i, "normalized_mse": 0.1} for i in range(3)],
    "by_norm": [{"from": i, "to": i + 1, "normalized_mse": 0.1} for i in range(3)],
    "decoder": {"nearest_cosine_histogram": {"edges": [0.0, 0.5, 1.0], "n_latents": [3, 5]}},
    "probing": {"mean": {"dense": 0.8, "k1": 0.7}},
    "absorption": {
        "absorbed": 0.1, "latents_per_letter": 1.5, "letters": {
            "a": {"n_words": 9, "probe_f1": 0.6, "f1_of_one_latent": 0.5, "latents": [3, 9],
                  "missed": 0.1, "absorbed": 0.1},
        },
    },
    "excerpts": [{"loss_increase": 1.0, "tokens": [
        {"text": "The", "clean": None, "sae": None}, {"text": " worst", "clean": 2.0, "sae": 9.0},
        {"text": " best", "clean": 9.0, "sae": 2.0},
    ]}],
}  # fmt: skip


def write_run(root: Path) -> None:
    """A run's directory with two stages of one kind, under a name without a place to break."""
    for name in ("first", "second"):
        folder = root / (name * 12)
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(entry) + "\n" for entry in ENTRIES)
        (folder / "sae.metrics.jsonl").write_text(lines)
        record = {"stage": "sae_training", "finished": "2030-01-01T00:00:00+00:00", "files": {}}
        record |= {"fingerprint": name, "counts": {"n_steps": 3}, "seconds": 12.0}
        record |= {"arguments": {"k": 4, "n_latents": 8, "data": LONG}, "sources": {}}
        (folder / "sae.pt.manifest.json").write_text(json.dumps(record))


def dose_page() -> str:
    points = [DosePoint(s, s / 4, 2 + s, 1.0 - s / 9, "a text " * 9) for s in (0.0, 1.0, 2.0)]
    report = DoseReport(Setting(3), points, 1.0)
    return report_page("Doses", dose_html(report, [make_guide({}, None, name="a", n_latents=8)]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    write_run(root / "run")
    runs = read_runs(sorted((root / "run").glob("*/sae.metrics.jsonl")))
    prompt = PromptActivations(
        tokens=["Sen", "ior", " words"],
        latents=np.array([[0, 1], [2, 1], [1, 0]]),
        values=np.array([[1.0, 2.0], [0.0, 3.0], [4.0, 0.5]], np.float32),
        maxima=None,
        names={1: "a label"},
    )
    labels = {"labels": 3, "scores": {"detect": {"mean": 0.8}}, "near_duplicates": ["one", "two"]}
    other = EVALUATION | {"training": {"k": 4, "seed": 1}, "fvu": 0.11}
    texts = {
        "training": training_page(ENTRIES, title=LONG, settings={"data": LONG}, done=True),
        "sweep": runs_page(runs, title="Sweep"),
        "evaluation": evaluation_page(EVALUATION, title="Evaluation"),
        "evaluations": evaluations_page({LONG: EVALUATION, "other": other}),
        "labels": labels_page(labels, "Labels"),
        "run": run_page(root / "run", report_sections(root / "run")),
        "doses": dose_page(),
        "prompt": prompt_page(prompt, title="Senior words", about="8 latents.", per_token=5),
    }
    for name, text in texts.items():
        (root / f"{name}.html").write_text(str(text))
    return {name: root / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as running:
        yield running


@pytest.mark.parametrize(
    "name",
    ["training", "sweep", "evaluation", "evaluations", "labels", "run", "doses", "prompt"],
)
def test_nobody_is_kept_out_and_paper_is_readable(
    pages: dict[str, Path], browser: Any, name: str
) -> None:
    tab = browser.new_page(reduced_motion="reduce")
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(pages[name].as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 844})
        for scheme in SCHEMES:
            tab.emulate_media(color_scheme=scheme)
            check_barriers(tab, only="" if scheme == "light" else "color-contrast")
    check_stillness(tab)
    check_paper(tab)
    tab.close()
    assert errors == []


def test_stages_of_one_kind_have_titles_of_their_own(pages: dict[str, Path]) -> None:
    text = pages["run"].read_text()
    assert ">Recipe: " + "first" * 12 in text and ">Recipe: " + "second" * 12 in text
    assert text.count("<td>12 s</td>") == 2
