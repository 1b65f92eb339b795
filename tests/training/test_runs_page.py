"""The page of several runs: read as XML, and looked at in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from saint.stage.errors import UserError
from saint.training import curves_page
from saint.training.comparison import differing, read_run, read_runs
from saint.training.recipe import Recipe

RECIPE: dict[str, Any] = {
    "n_latents": 32, "k": 4, "num_epochs": 1, "batch_size": 32, "learning_rate": 0.01, "k_start": 4,
    "k_aux": 16, "dead_tokens": 100,
}  # fmt: skip


def write_run(folder: Path, name: str, *, fvu: float, layer: int = 3, **settings: Any) -> Path:
    """A finished run's metrics and manifest: FVU falls to `fvu`, the rest stays as it is."""
    recipe = RECIPE | settings
    entries = [
        {
            "step": 10 * i,
            "tokens": 320 * i,
            "train/loss": fvu + 1 / i,
            "train/fvu": fvu + 1 / i,
            "val/loss": fvu + 1 / i,
            "val/fvu": fvu + (1 / i if i < 50 else 0),
            "train/l0": recipe["k"],
            "val/l0": recipe["k"],
            "train/aux_loss": 0.0,
            "train/grad_norm": 1 / i,
            "debug/dead_latents_ratio": 0.0,
            "learning_rate": recipe["learning_rate"] / i,
            "tokens_per_s": 100.0 + i,
        }
        for i in range(1, 51)
    ]
    path = folder / f"{name}.metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    record = {"arguments": recipe, "sources": {"data": layer}, "facts": {"layer": layer}}
    (folder / f"{name}.pt.manifest.json").write_text(json.dumps(record))
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    rates = [0.001 * (i + 1) for i in range(7)]
    return [
        write_run(folder, f"rate{i}", fvu=0.1 + abs(0.004 - rate) * 10, learning_rate=rate)
        for i, rate in enumerate(rates)
    ]


def figures(page: str) -> dict[str, str]:
    found = re.findall(r'<figure class="plot">.*?aria-label="(.*?)".*?</figure>', page, re.S)
    bodies = re.findall(r'<figure class="plot">.*?</figure>', page, re.S)
    return dict(zip(found, bodies, strict=True))


def test_the_page_draws_a_line_for_each_run_and_says_the_constant_ones(paths, tmp_path):
    output = tmp_path / "page.html"
    curves_page.main([*map(str, paths), "--output", str(output)])
    page = output.read_text()
    drawn = figures(page)
    assert "held-out FVU over layers" not in drawn, "of one layer"
    fvu = drawn["fraction of variance unexplained (FVU): val/fvu"]
    assert fvu.count("<polyline") == 7 and fvu.count('class="line s0"') == 1
    assert fvu.count('class="line s0 d1"') == 1, "the seventh is dashed, not the first's double"
    assert "rate3: 0.1 at 16k training tokens" in fvu, "its last point says its value"
    assert fvu.count("<title>") >= 7 * 20
    scatter = drawn["held-out FVU against L0"]
    assert scatter.count("<circle") == 7 and "rate3: FVU 0.1000, L0 4.0" in scatter
    constant = re.search(r'<p class="note">Constant: (.*?)</p>', page, re.S)
    assert constant and "active latents per token (L0) 4;" in constant[1]
    assert "dead latents 0 %" in constant[1] and "dead latents" not in drawn
    assert "The best is rate3 (held-out FVU 0.1000, L0 4.0, dead 0.0%)." in page
    assert "<script" not in page and "src=" not in page and "href=" not in page


def test_ticks_are_round(paths):
    drawn = figures(curves_page.runs_page(read_runs(paths), title="x"))
    for name in ("fraction of variance unexplained (FVU): val/fvu", "learning rate"):
        texts = re.findall(r'text-anchor="(?:end|middle)">([\d.,k]+)</text>', drawn[name])
        assert len(texts) >= 6
        for text in texts:
            digits = re.sub(r"[.,k]", "", text).strip("0")
            assert len(digits) <= 2, text


def test_constants_that_differ_between_runs_are_one_line_too(tmp_path):
    runs = [write_run(tmp_path, f"k{k}", fvu=1 / k, k=k, k_start=k) for k in (2, 4)]
    page = curves_page.runs_page(read_runs(runs), title="x")
    assert "active latents per token (L0) 2 (k2), 4 (k4)" in page
    assert differing(read_runs(runs)) == ["k"], "k_start says nothing of its own"
    assert "The best are at k 2: k2 (" in page


def test_layers_are_drawn_where_they_differ(tmp_path):
    runs = [
        write_run(tmp_path, f"l{layer}k{k}", fvu=layer / k / 10, layer=layer, k=k, k_start=k)
        for layer in (9, 3)
        for k in (2, 4)
    ]
    chart = figures(curves_page.runs_page(read_runs(runs), title="x"))["held-out FVU over layers"]
    assert chart.count("<polyline") == 2 and "k 2" in chart and "k 4" in chart
    for line in re.findall(r'points="(.*?)"', chart):
        across = [float(pair.split(",")[0]) for pair in line.split()]
        assert across == sorted(across) and len(across) == 2
    assert "k 2: 0.15 at 3 layer" in chart and "k 4: 0.225 at 9 layer" in chart


def test_one_run_without_a_manifest_and_runs_of_one_name_have_a_page(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [write_run(tmp_path, "sae", fvu=0.3), write_run(tmp_path / "a", "sae", fvu=0.2)]
    (tmp_path / "sae.pt.manifest.json").unlink()
    names = [run.name for run in read_runs(paths)]
    assert len(set(names)) == 2 and all(name.endswith("sae") for name in names)
    assert read_run(paths[0]).settings == {}
    page = curves_page.runs_page(read_runs(paths[:1]), title="<b>")
    assert "<b></title>" not in page and "held-out FVU against L0" in page
    with pytest.raises(UserError, match="does not exist"):
        curves_page.main([str(tmp_path / "none.metrics.jsonl")])
    assert set(RECIPE) <= set(Recipe.__dataclass_fields__)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_no_barrier_and_nothing_beside_the_window(paths, tmp_path, browser, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    output = tmp_path / "page.html"
    curves_page.main([*map(str, paths), "--output_path", str(output)])
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto(output.as_uri())
    found = axe.Axe().run(tab).response["violations"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()


@pytest.fixture(scope="module")
def browser():
    from tests.support.steering_site import running_browser

    with running_browser() as running:
        yield running
