"""What others wrote stays text on every static page: nothing runs, nothing is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markupsafe import Markup

import capture_top_activating_sentences as stage
import latent_browser
from embedded import page as quickstart
from saint.browser.prompt_view import PromptActivations, prompt_page
from saint.evaluation.compare import evaluations_page
from saint.interpretation.report import report_page as labels_page
from saint.stage.html import render
from saint.training.curves_page import training_page
from tests.support import program
from tests.support.pipeline import train_args
from tests.support.steering_site import running_browser
from tests.support.tiny_store import make_store

# U+202E would show what follows it backwards; U+2028 ends a line of an older script.
HOSTILE = (
    "</script></style></title><script>window.ran=1;alert(1)</script>"
    '<img src="http://127.0.0.1:9/x" onerror="window.ran=1">'
    '<a href="javascript:window.ran=1">go</a>'
    '" onmouseover="window.ran=1" \u2028 \u202egnp.exe\x1b[31m {{ 7 * 7 }}'
)
ENTRIES = [{"step": i, "tokens": i, "train/loss": 1 / i, "train/fvu": 1 / i} for i in (1, 2, 3)]
EVALUATION: dict[str, Any] = {"fvu": 0.1, "l0": 4.0, "dead_share": 0.2, "training": {"k": 4}}


def latents_page(root: Path) -> str:
    store = make_store(root, n_latents=8, n_sentences=20)
    words = ["--data_dir", store.data_dir, "--model_path", store.sae_path, "--device", "cpu"]
    words += ["--captured_data_output_dir", root / "top", "--window_tokens", "3", "--top_n", "3"]
    stage.main([str(word) for word in words])
    labels = {i: {"common_semantic": HOSTILE, "certainty": 0.8} for i in range(8)}
    (root / "labels.yaml").write_text(yaml.safe_dump(labels))
    words = ["--evidence_path", root / "top" / "evidence.parquet", "--html", root / "latents.html"]
    latent_browser.main([str(w) for w in (*words, "--labels_path", root / "labels.yaml")])
    return (root / "latents.html").read_text()


def quickstart_page() -> str:
    example: dict[str, Any] = dict.fromkeys(("name", "seen", "dose", "loss", "prompt"), HOSTILE)
    example |= {"chosen": 0, "plain": HOSTILE, "doses": [{"says": HOSTILE, "text": HOSTILE}] * 2}
    example |= {"texts": [{"prompt": HOSTILE, "pieces": [(HOSTILE, 1), (HOSTILE, 0)]}]}
    card: dict[str, Any] = dict.fromkeys(("name", "density", "promoted"), HOSTILE)
    card |= {"number": 3, "windows": [[(HOSTILE, 0.5), (HOSTILE, 0)]], "open": True}
    values = {"concepts": [example], "latents": [card], "loss": [], "facts": {HOSTILE: HOSTILE}}
    values |= {"model": HOSTILE, "demo": HOSTILE, "n_tokens": "5", "n_sentences": "1", "layer": 1}
    values |= {"stages": [], "curves": Markup(""), "evaluation": Markup("")}
    values |= {"loss_plain": 1, "loss_sae": 2}
    return render(Path(quickstart.__file__).parent, "quickstart.html", **values)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hostile")
    prompt = PromptActivations(
        tokens=[HOSTILE, "b"],
        latents=np.array([[0, 1], [1, 0]]),
        values=np.array([[1.0, 2.0], [4.0, 0.5]], np.float32),
        maxima=None,
        names={1: HOSTILE},
    )
    return {
        "latents": latents_page(root),
        "quickstart": quickstart_page(),
        "training": training_page(ENTRIES, title=HOSTILE, settings={"data": HOSTILE}, done=True),
        "evaluations": evaluations_page({HOSTILE: EVALUATION, "other": EVALUATION}),
        "labels": labels_page({"labels": 3, "near_duplicates": [HOSTILE]}, HOSTILE),
        "prompt": prompt_page(prompt, title=HOSTILE, about=HOSTILE, per_token=2),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as running:
        yield running


def visit(browser: Any, path: Path) -> tuple[Any, list[str]]:
    """Open a page; return the tab and a list of what it did that it should not."""
    tab, deeds = browser.new_page(), []
    tab.on("dialog", lambda dialog: (deeds.append("dialog"), dialog.dismiss()))
    tab.on("pageerror", lambda error: deeds.append(str(error)))
    tab.on("response", lambda got: None if got.url == path.as_uri() else deeds.append(got.url))
    tab.on("requestfailed", lambda r: None if r.failure == "csp" else deeds.append(r.url))
    tab.goto(path.as_uri())
    tab.wait_for_load_state()
    return tab, deeds


NAMES = ["latents", "quickstart", "training", "evaluations", "labels", "prompt"]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_text_is_text(
    pages: dict[str, str], browser: Any, tmp_path: Path, name: str
) -> None:
    (tmp_path / "page.html").write_text(pages[name])
    tab, deeds = visit(browser, tmp_path / "page.html")
    if name == "latents":
        tab.locator("#results button, #results a").first.click()
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    text = tab.evaluate("document.body.innerText + document.title")
    assert "<script>window.ran=1" in text and "{{ 7 * 7 }}" in text
    assert r"\u202egnp.exe\x1b[31m" in text and not set("\u202e\u2028\x1b") & set(text)
    assert tab.evaluate("[window.ran, document.querySelectorAll('img, [onmouseover]').length]") == [
        None,
        0,
    ]
    assert tab.locator("a[href^='javascript']").count() == 0 and deeds == []
    tab.close()


@pytest.mark.parametrize("name", NAMES)
def test_even_markup_that_got_in_does_nothing(
    pages: dict[str, str], browser: Any, tmp_path: Path, name: str
) -> None:
    bad = '<script>window.ran=1</script><p onclick="window.ran=1" id="bad">x</p>'
    bad += '<img src="http://127.0.0.1:9/x" onerror="window.ran=1"><base href="http://127.0.0.1:9">'
    bad += (
        '<iframe src="http://127.0.0.1:9/y"></iframe><script src="http://127.0.0.1:9/z"></script>'
    )
    (tmp_path / "page.html").write_text(str(pages[name]).replace("</main>", bad + "</main>", 1))
    tab, deeds = visit(browser, tmp_path / "page.html")
    tab.evaluate("document.getElementById('bad').click()")
    asked = "fetch('http://127.0.0.1:9/q').then(() => 'sent', () => 'kept in')"
    assert tab.evaluate(asked) == "kept in"
    assert tab.evaluate("window.ran") is None
    assert deeds == []
    tab.close()


def test_the_page_of_a_running_training_is_text_too(
    root: Path, browser: Any, tmp_path: Path
) -> None:
    # A file's name can hold all of it but a slash.
    name = "<img src=x onerror=window.ran=1><script>window.ran=1<\u2215script>\u202egnp\x1b[31m"
    arguments = train_args(root, tmp_path / f"{name}.pt", num_epochs=100_000, logs_per_epoch=1)
    process = program.start("sae_training", *arguments, output=tmp_path / "output")
    page = tmp_path / f"{name}.training.html"
    try:
        while not page.exists():
            assert process.is_alive(), (tmp_path / "output.err").read_text()
            time.sleep(0.05)
        tab, deeds = visit(browser, page)
        assert tab.locator("svg").count() > 0 and process.is_alive()
        text = tab.evaluate("document.body.innerText + document.title")
        assert "<img src=x onerror=window.ran=1>" in text and r"\u202egnp\x1b[31m" in text
        assert not set("\u202e\x1b") & set(text)
        assert tab.evaluate("window.ran") is None and tab.locator("img").count() == 0
        assert [deed for deed in deeds if deed != page.as_uri()] == []
        tab.close()
    finally:
        process.kill()
        process.join()
