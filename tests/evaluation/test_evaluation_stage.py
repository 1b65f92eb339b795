"""The stage with everything that it can measure, and the page that compares its reports."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae import save_sae
from saint.evaluation.compare import evaluations_page, main, noise_floor, read_reports
from saint.evaluation.page import evaluation_page
from saint.stage.errors import UserError
from tests.support.program import call
from tests.support.tiny_steering import WORDS, make_sae, write_model


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    write_model(root / "model")
    rng = random.Random(0)
    rows = [
        (" ".join(rng.choices(WORDS[:6] if i % 2 else WORDS[6:], k=9)), "ab"[i % 2])
        for i in range(600)
    ]
    (root / "data").mkdir()
    table = pa.table({"text": [r[0] for r in rows], "topic": [r[1] for r in rows]})
    pq.write_table(table, root / "data" / "part.parquet", row_group_size=100)
    for seed in (0, 1):
        save_sae(root / f"sae{seed}.pt", make_sae(seed=seed))
    return root


def evaluate(root: Path, sae: str, **changes: object):
    flags = {
        "model_dir": root / "model",
        "sae_model_path": root / sae,
        "dataset_dir": root / "data",
        "output_path": root / f"{sae}.json",
        "dtype": "float32",
        "num_samples": 20,
        "probe_column": "topic",
        "probe_sentences": 40,
    } | changes
    return call("sae_evaluation", *(part for n, v in flags.items() for part in (f"--{n}", v)))


@pytest.fixture(scope="module")
def reports(root) -> list[Path]:
    for sae in ("sae0.pt", "sae1.pt"):
        finished = evaluate(root, sae)
        assert finished.returncode == 0, finished.stderr
    return [root / "sae0.pt.json", root / "sae1.pt.json"]


def test_the_report_has_topics_groups_neighbours_and_sentences_and_so_has_its_page(root, reports):
    report = json.loads(reports[0].read_text())
    assert report["probing"]["classes"].keys() == {"a", "b"}
    assert report["probing"]["mean"]["dense"] > 0.9  # the topics share no word
    assert sum(row["n_tokens"] for row in report["by_position"]) == report["n_tokens"]
    assert sum(row["n_tokens"] for row in report["by_norm"]) == report["n_tokens"]
    assert 0 < report["decoder"]["mean_nearest_cosine"] < 1
    assert len(report["excerpts"]) == 6
    page = reports[0].with_suffix(".html").read_text()
    assert page.count("<svg") == 6 and "src=" not in page
    assert page.count('class="sentence"') == 6 and "topics told apart" in page
    word = report["excerpts"][0]["tokens"][1]["text"]
    assert f">{word}</span>" in page


def test_the_page_has_a_row_for_each_letter(reports):
    report = json.loads(reports[0].read_text())
    row = {"n_words": 9, "probe_f1": 0.5, "f1_of_one_latent": 0.25, "latents": [3, 5]}
    row |= {"missed": 0.5, "absorbed": 0.25}
    report["absorption"] = {"absorbed": 0.25, "latents_per_letter": 2.0, "letters": {"a": row}}
    page = evaluation_page(report, title="x")
    assert "<td>3, 5</td><td>50 %</td><td>25 %</td>" in page


def test_a_vocabulary_with_too_few_words_is_one_clear_line(root, tmp_path):
    changes = {"first_letter_words": 50, "output_path": tmp_path / "report.json"}
    finished = evaluate(root, "sae0.pt", **changes)
    assert finished.returncode == 1 and "fewer than two letters" in finished.last_line
    assert not (tmp_path / "report.json").exists()


def test_reports_are_compared_on_one_page_with_the_noise_between_seeds(reports, tmp_path):
    first, second = (json.loads(path.read_text()) for path in reports)
    assert noise_floor({"a": first, "b": second}) == {}  # how they were trained is not known
    trained = [r | {"training": {"k": 8, "seed": i}} for i, r in enumerate((first, second))]
    other = first | {"training": {"k": 9, "seed": 5}, "fvu": 0.0, "sae": "<other>"}
    named = {"a": trained[0], "b": trained[1], "<other>": other}
    floor = noise_floor(named)
    assert floor["FVU"] == pytest.approx(abs(first["fvu"] - second["fvu"]))
    page = str(evaluations_page(named))
    assert f"{floor['FVU']:.4f}" in page and "&lt;other&gt;" in page and "<other>" not in page
    assert page.count("<svg") == 3  # none has absorption
    main([*map(str, reports), "--output_path", str(tmp_path / "page.html")])
    written = (tmp_path / "page.html").read_text()
    assert f"{first['fvu']:.4f}" in written and f"{second['fvu']:.4f}" in written
    assert "how large a difference is noise is not known" in written


def test_reports_of_other_text_are_not_compared(reports, tmp_path):
    changed = json.loads(reports[1].read_text()) | {"dataset": "other"}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="has dataset other"):
        read_reports([reports[0], path])
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a report"):
        read_reports([path])
