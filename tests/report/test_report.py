"""A run's report against the files that it is made from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import capture_top_activating_sentences as top_sentences
from saint.evidence.file import open_evidence
from saint.report import __main__ as program
from saint.report.stages import run_stages
from saint.stage.errors import UserError
from tests.support.tiny_store import make_store

EVALUATION = {"fvu": 0.1234, "l0": 4.0, "loss_recovered": 0.9, "kl_divergence": 0.2}
EVALUATION |= {"dead_share": 0.25, "n_tokens": 1234, "ce_clean": 3.0, "ce_sae": 3.5}
EVALUATION |= {"ce_mean_ablated": 8.0}
EVALUATION |= {"density_histogram": {"log10_edges": [-3.0, -2.0, -1.0], "n_latents": [3, 5]}}


def finish(path: Path, stage: str, finished: str, **more) -> None:
    record = {"stage": stage, "finished": finished, "fingerprint": stage, "files": {}, **more}
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "run"
    root.mkdir()
    store = make_store(root, n_latents=32, n_sentences=60)
    words = ["--data_dir", store.data_dir, "--model_path", store.sae_path, "--device", "cpu"]
    words += ["--captured_data_output_dir", root / "top", "--top_n", "10"]
    top_sentences.main([str(word) for word in words])
    entries = [
        {"step": i, "tokens": 1000 * i, "train/loss": 1 / i, "val/fvu": 1 / i, "val/l0": 9 - i}
        for i in (1, 2, 3)
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (root / "trained_sae.metrics.jsonl").write_text(lines)
    counts = {"n_steps": 3, "n_tokens": 3000}
    day = "2030-01-01T00:0"
    finish(root / "trained_sae.pt", "sae_training", f"{day}1:00+00:00", counts=counts)
    (root / "sae_evaluation.json").write_text(json.dumps(EVALUATION))
    finish(root / "sae_evaluation.json", "sae_evaluation", f"{day}3:30+00:00", seconds=150.2)
    (root / "output").mkdir()
    labels = "1: {common_semantic: 'a <b> label', score: {detect: {balanced_accuracy: 0.8}}}\n"
    (root / "output" / "parsed_responses.yaml").write_text(labels)
    return root


def test_every_figure_has_the_file_it_came_from(run_dir: Path, capsys) -> None:
    program.main([str(run_dir), "--html"])
    said = capsys.readouterr().out
    page = (run_dir / "report.html").read_text()
    for text in ("0.1234", "90.00%", "25.0%", "1,234"):
        assert text in said and text in page
    sources = re.findall(r'<p class="source">from (.*?)</p>', page)
    assert len(sources) == page.count("<section") >= 6
    assert all(Path(source).is_file() for source in sources)
    evidence = open_evidence(run_dir / "top" / "evidence.parquet")
    alive = sum(d > 0 for d in evidence.summary().column("density").to_pylist())
    assert f"that fire {alive}" in said
    scatter = page[page.index("density × largest") :].partition("</svg>")[0]
    assert scatter.count("<circle") == alive
    assert "FVU over L0" in page and "mean detection score" in page
    assert not re.search(r"(src|href)=", page), "the page asks nobody for anything"


def test_stages_are_in_the_order_of_time(run_dir: Path) -> None:
    *before, training, evaluation = run_stages(run_dir)
    assert (training.name, evaluation.name) == ("sae_training", "sae_evaluation")
    assert training.made == "3 steps, 3,000 tokens"
    assert (training.cost, evaluation.cost) == ("", "150 s")
    assert all(stage.seconds is not None for stage in before), "a stage writes down its time"
    assert {stage.name for stage in before} >= {"capture_top_activating_sentences"}


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no stage's manifest"):
        program.main([str(tmp_path)])
