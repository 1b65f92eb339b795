"""The quickstart's page: its slider, its losses, and who may be kept out of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import Markup

from embedded import page
from saint.evidence.labels import Label
from saint.stage.html import render
from saint.steering.concepts import find_concept
from saint.steering.showcase import Shown, Text
from tests.support.tiny_steering import make_sae, make_studio, one_thread, write_setup

TEXT = "Senior diplomats met"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with one_thread():
        model_dir, _ = write_setup(tmp_path_factory.mktemp("quickstart"))
        yield make_studio(model_dir, make_sae())[0]


def row(latent: int) -> dict[str, Any]:
    example = {"kind": "top", "tokens": ["the", " <b>"], "activations": [0.0, 2.0]}
    promoted = [{"token": " court", "value": 1.0}]
    return {"latent": latent, "density": 0.001, "max_activation": 4.0} | {
        "examples": [example],
        "promoted": promoted,
    }


@torch.inference_mode()
def test_losses_are_those_of_the_model_with_and_without_the_sae(
    studio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = page.token_losses(studio, TEXT)
    ids = torch.tensor([studio.tokenizer.encode(TEXT, bos=studio.prepend_bos)])
    plain = -studio.model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found["loss_plain"] == f"{float(plain.mean()):.2f}"
    assert "".join(token["text"] for token in found["loss"]) == TEXT
    shown = [float(token["title"].split()[0]) for token in found["loss"] if token["title"]]
    assert shown == pytest.approx(plain.tolist(), abs=0.006)
    assert found["loss_sae"] != found["loss_plain"]
    monkeypatch.setattr(studio.dictionaries[0].sae, "reconstruct", lambda x: x)
    same = page.token_losses(studio, TEXT)
    assert same["loss_sae"] == same["loss_plain"]
    assert {token["kind"] for token in same["loss"]} == {""}


def shown(studio: Any) -> Shown:
    concept = find_concept(studio, "court", use="means")
    texts = [
        Text(TEXT, " plain", f" a {word} <i>", word != "none", 1) for word in ("ruling", "none")
    ]
    doses = [{"dose": d, "text": f"text {d:g} <i>", "loss": d / 10} for d in (0.0, 7.0, 11.0)]
    return Shown(concept, 7.5, 0.5, 0.0, 0.4, ["ruling"], texts, doses)


def test_an_example_says_what_was_counted(studio: Any) -> None:
    one = page.example(shown(studio))
    assert one["seen"] == "1 of 2" and one["loss"] == "+0.40" and one["chosen"] == 1
    assert one["plain"] == "text 0 <i>" and one["doses"][2]["says"].startswith("dose 11, ")
    counted = [[p for p, counts in text["pieces"] if counts] for text in one["texts"]]
    assert counted == [["ruling"], []]
    assert "".join(p for p, _ in one["texts"][0]["pieces"]) == " a ruling <i>"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_slider_moves_the_text_and_nobody_is_kept_out(
    studio: Any, tmp_path: Path, scheme: Any, width: int
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    examples = [page.example(shown(studio)) | {"name": name} for name in ("court", "<u>ruling")]
    values: dict[str, Any] = {"concepts": examples, **page.token_losses(studio, TEXT)}
    cards = [page.latent_card(row(i), Label("a <u> label"), is_open=i == 0) for i in (0, 1)]
    stages = [{"name": "stage", "made": "1 thing", "size": "1 MB", "cost": "2 s"}]
    text = render(
        Path(page.__file__).parent,
        "quickstart.html",
        facts={"dead latents": "0 %"},
        model="a model",
        layer=1,
        curves=Markup(""),
        evaluation=Markup(""),
        latents=cards,
        stages=stages,
        demo="python demo.py",
        n_tokens="5",
        n_sentences="1",
        **values,
    )
    assert "<u>" not in text and "<i>" not in text
    (tmp_path / "page.html").write_text(text)
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab = context.new_page()
        tab.goto((tmp_path / "page.html").as_uri())
        tab.locator("#dose-1").focus()
        tab.keyboard.press("End")
        first, second = tab.locator(".steered").all_inner_texts()
        assert (first, second) == ("text 7 <i>", "text 11 <i>")
        assert tab.locator(".example output").nth(1).inner_text().startswith("dose 11")
        assert tab.locator(".example details[open]").count() == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(tab).response["violations"]
        assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []
        browser.close()
