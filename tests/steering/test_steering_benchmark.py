"""The steering benchmark's report: interpolation, bootstrap, turning down, the last line."""

import json

import numpy as np
import pytest

from benchmarks import steering, steering_report
from benchmarks.steering_methods import Cell
from benchmarks.steering_report import Curve, at_loss, bootstrap, shows, topic_score
from saint.stage.files import write_json

FAMILIES = {
    "film": {"family": ["film", "movie"], "topic": {"actor": 2.0}},
    "war": {"family": ["war"], "topic": {"army": 1.0}},
}


def curve(loss, share):
    loss, share = np.array(loss, float), np.array(share, float)
    zero = np.zeros_like(loss)
    return Curve("means", np.arange(float(len(loss))), share, loss, zero, zero, zero, 1)


def test_a_share_is_read_off_where_the_mean_loss_passes_the_limit():
    one = curve([[0, 0], [0.2, 0.4], [1.0, 1.4]], [[0, 0], [0.4, 0.6], [1.0, 0.8]])
    both = np.array([0, 1])
    # Mean losses 0, 0.3, 1.2; mean shares 0, 0.5, 0.9.
    assert at_loss(one, 0.3 + 0.45, "share", both) == pytest.approx(0.7)
    assert at_loss(one, 0.15, "share", both) == pytest.approx(0.25)
    assert at_loss(one, 5.0, "share", both) == pytest.approx(0.9), "a lower bound"
    assert at_loss(one, 0.6, "share", np.array([0])) == pytest.approx(0.7)
    assert np.isnan(at_loss(curve([[2.0]], [[1.0]]), 0.5, "share", np.array([0])))


def test_the_interval_is_a_bootstrap_over_concepts():
    draw = np.random.default_rng(1)
    shares = draw.random(40)
    one = curve(np.stack([np.zeros(40), np.ones(40)]), np.stack([np.zeros(40), shares]))
    estimate, low, high = bootstrap(one, 1.0)
    assert estimate == pytest.approx(shares.mean())
    spread = 1.96 * shares.std() / 40**0.5
    assert low == pytest.approx(estimate - spread, abs=0.02)
    assert high == pytest.approx(estimate + spread, abs=0.02)
    same = curve([[0, 0], [1, 1]], [[0, 0], [0.5, 0.5]])
    assert bootstrap(same, 0.5) == pytest.approx((0.25, 0.25, 0.25))


def test_families_and_topics_are_counted_by_word():
    assert shows("A Movie!", ["film", "movie"]) and not shows("filmed", ["film"])
    assert topic_score("the actor an actor", {"actor": 2.0}) == pytest.approx(4 / 3)


def rows(texts, surprise):
    return [
        {"concept": name, "prompt": i, "text": text, "surprise": surprise, "distinct": 1.0}
        for name in texts
        for i, text in enumerate(texts[name])
    ]


@pytest.fixture
def cells(tmp_path):
    none, all_ = ["x", "x"], {"film": ["a film", "a movie"], "war": ["war", "war"]}
    half = {"film": ["a film", "x"], "war": ["x", "x"]}
    made = {
        Cell("plain", 0.0, 0): rows({"": none}, 1.0),
        Cell("means", 8.0, 0): rows(all_, 2.0),
        Cell("before_same", 8.0, 0): rows(half, 2.0),
        Cell("prompt_nothing_but", 0.0, 0): rows(all_, 1.1),
        Cell("down_plain", 0.0, 0): rows(all_, 1.1),
        Cell("down_subtract", 4.0, 0): rows(half, 1.4),
        Cell("down_project", 0.0, 0): rows({"film": none, "war": none}, 1.9),
    }
    for cell, own in made.items():
        record = {"method": cell.method, "dose": cell.dose, "seed": cell.seed, "rows": own}
        write_json(cell.path(tmp_path), record)
    return tmp_path


def test_the_last_line_holds_the_figures_that_are_compared(cells, capsys, monkeypatch):
    monkeypatch.setattr(steering_report, "plot", lambda *_: None)
    steering_report.report(cells, FAMILIES, 0)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {
        "share_half_nat": 0.5, "share_1nat": 1.0, "share_1nat_plain": 0.0,
        "share_1nat_prompt": 1.0, "share_1nat_before": 0.25, "loss": 0.1,
        # Half a nat is the limit: the projection takes away more, for 0.9.
        "down_lost": 0.75, "down": "down_subtract@4",
    }  # fmt: skip
    record = json.loads((cells / "steering.json").read_text())
    assert record["down"]["down_project@0"]["lost"] == 1.0


def test_turning_down_alone_is_a_plan_of_its_own(tmp_path):
    parse = steering.build_parser().parse_args
    flags = ["--llama_model_dir", "m", "--sae_model_path", "s", "--store_dir", "d"]
    flags += ["--output_dir", str(tmp_path), "--n_seeds", "1"]
    down = {cell.method for cell in steering.cells_of(parse([*flags, "--down"]))}
    assert down == {"plain", *(name for name, *_ in steering.PLAN if name.startswith("down_"))}
    every = [cell.name for cell in steering.cells_of(parse(flags))]
    assert "before_same@8@0" in every and len(set(every)) == len(every)
