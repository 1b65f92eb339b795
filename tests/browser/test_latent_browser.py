"""The latents' page in a real browser, its data against the evidence, and the prompt view."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import capture_top_activating_sentences as stage
import latent_browser
from saint.browser import pack, prompt_view
from saint.evidence.file import open_evidence
from saint.page.links import read_link
from saint.stage.errors import UserError
from tests.support import program
from tests.support.tiny_store import make_store

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
UNNAMED = 11  # has an intruder score and no label
LABEL = 'names of <b>zebras</b> & "others"'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with evidence.parquet, labels.yaml and latents.html."""
    root = tmp_path_factory.mktemp("browser")
    store = make_store(root, n_latents=150, n_sentences=80)
    words = ["--data_dir", store.data_dir, "--model_path", store.sae_path, "--device", "cpu"]
    words += ["--captured_data_output_dir", root / "top", "--window_tokens", "3", "--top_n", "10"]
    stage.main([str(word) for word in words])
    rows = open_evidence(root / "top" / "evidence.parquet").iter_latents()
    labelled = next(row["latent"] for row in rows if row["latent"] > 128 and is_telling(row))
    scores = {"detect": {"balanced_accuracy": 0.9, "ci_low": 0.8, "ci_high": 0.95, "n": 40}}
    intruder = {"accuracy": 0.6, "ci_low": 0.3, "ci_high": 0.8, "n": 5, "chance": 0.2}
    labels = {
        labelled: {"common_semantic": LABEL, "certainty": 0.8, "score": scores},
        13: {"common_semantic": "plain words", "certainty": 0.5},
        9: {"common_semantic": "swords", "certainty": 0.9},
        12: {"common_semantic": "wordsmiths", "certainty": 0.7},
        UNNAMED: {"common_semantic": "", "certainty": None, "score": {"intruder": intruder}},
    }
    (root / "labels.yaml").write_text(yaml.safe_dump(labels))
    latent_browser.main(arguments(root))
    return root


def is_telling(row: dict[str, Any]) -> bool:
    """Whether the top window starts inside its sentence, with its peak not on the first token."""
    tops = [e for e in row["examples"] if e["kind"] == "top"]
    return bool(tops) and 0 < tops[0]["start"] < tops[0]["position"]


def labelled(root: Path) -> int:
    labels = yaml.safe_load((root / "labels.yaml").read_text())
    return next(i for i, row in labels.items() if row["common_semantic"] == LABEL)


def arguments(root: Path, *more: str) -> list[str]:
    words = ["--evidence_path", root / "top" / "evidence.parquet"]
    words += ["--labels_path", root / "labels.yaml", "--html", root / "latents.html"]
    return [str(word) for word in (*words, *more)]


def unpack(packed: str) -> dict[str, Any]:
    """The reader in browser.js, once more."""
    raw = zlib.decompress(base64.b64decode(packed))
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length])
    columns, at = {"extra": header["extra"]}, 4 + length
    for name, kind, size in header["columns"]:
        columns[name] = np.frombuffer(raw, f"<{kind}", size, at)
        at += -(-columns[name].nbytes // 4) * 4
    return columns


def chunks(root: Path) -> dict[str, dict[str, Any]]:
    text = (root / "latents.html").read_text()
    found = re.findall(r'<script type="text/plain" id="data-([\w-]+)">([^<]*)</script>', text)
    return {name: unpack(packed) for name, packed in found}


def test_the_file_is_self_contained(made: Path) -> None:
    text = (made / "latents.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert "zebras" not in text, "labels are only in the compressed data, so they cannot be markup"
    assert "{{" not in text


@pytest.mark.parametrize("n_top", [10, 1])
def test_packed_windows_are_those_of_the_evidence(made: Path, tmp_path: Path, n_top: int) -> None:
    # With one window per latent, most sentences are known only in part.
    target = ["--html", str(tmp_path / "latents.html"), "--top_windows", str(n_top)]
    target += ["--decile_windows", str(n_top // 5)]
    latent_browser.main(arguments(made, *target))
    page, evidence = chunks(tmp_path), open_evidence(made / "top" / "evidence.parquet")
    words = page["vocabulary"]["extra"]
    for row in evidence.iter_latents():
        chunk = page[f"latents-{row['latent'] // 128}"]
        place = row["latent"] % 128
        first = chunk["window_count"][:place].sum()
        rows = range(first, first + chunk["window_count"][place])
        kept = [e for e in row["examples"] if e["kind"] == "top"][:n_top]
        assert list(chunk["histogram"][20 * place : 20 * place + 20]) == row["histogram"]
        tops = [w for w in rows if chunk["window_group"][w] == 0]
        assert len(tops) == len(kept)
        for w, example in zip(tops, kept, strict=True):
            sentence = int(chunk["window_sentence"][w])
            text = page[f"sentences-{sentence // 256}"]
            start = text["length"][: sentence % 256].sum() + chunk["window_start"][w]
            tokens = text["token"][start : start + chunk["window_length"][w]]
            assert [words[t] for t in tokens] == example["tokens"]
            fired = slice(chunk["fired_count"][:w].sum(), chunk["fired_count"][: w + 1].sum())
            dense = np.zeros(len(tokens))
            dense[chunk["fired_place"][fired]] = chunk["fired_value"][fired]
            expected = np.array(example["activations"]) / row["max_activation"]
            np.testing.assert_allclose(dense / 255, expected, atol=1 / 255)
        if n_top == 1:
            continue
        deciles = {int(g) for w in rows if 1 <= (g := chunk["window_group"][w]) <= 10}
        assert len(deciles) == len(
            {e["decile"] for e in row["examples"] if e["kind"] == "quantile"}
        )


def test_stitching_leaves_gaps_unknown() -> None:
    def block(sentence: list[int], start: list[int], tokens: list[list[int]]) -> pack.PageWindows:
        length = np.array([len(t) for t in tokens])
        flat = np.concatenate(tokens)
        zeros = np.zeros(len(length), int)
        return pack.PageWindows(
            length, zeros, np.array(sentence), np.array(start), length, zeros, flat, flat * 0.0
        )

    found = pack.stitch([block([9, 4], [2, 0], [[5, 6], [1]]), block([9], [6], [[7, 8]])])
    assert found.sentence_ids.tolist() == [4, 9]
    assert found.first.tolist() == [0, 2]
    assert found.token.tolist() == [1, 5, 6, 0, 0, 7, 8]


def test_limits_and_wrong_input(made: Path, tmp_path: Path) -> None:
    target = ["--html", str(tmp_path / "page.html")]
    with pytest.raises(UserError, match="needs 0 MB even without"):
        latent_browser.main(arguments(made, *target, "--max_megabytes", "0.001"))
    (tmp_path / "labels.yaml").write_text("{999: {common_semantic: none}}")
    for more, message in (
        (["--labels_path", str(tmp_path / "labels.yaml")], "labels latent 999"),
        (["--evidence_path", "nothing.parquet"], "nothing.parquet does not exist"),
        (["--evidence_path", str(made / "labels.yaml")], "not a readable parquet file"),
        (["--prompt", "text"], "--prompt needs --model_dir and --sae_model_path"),
    ):
        with pytest.raises(UserError, match=message):
            latent_browser.main(arguments(made, *target, *more))
    assert not (tmp_path / "page.html").exists()
    latent_browser.main(arguments(made, *target, "--decile_windows", "0"))
    assert (tmp_path / "page.html").stat().st_size < (made / "latents.html").stat().st_size


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, made: Path) -> Iterator[Any]:
    context = browser.new_context(bypass_csp=True, viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on(
        "request", lambda request: errors.append(request.url) if "file:" not in request.url else 0
    )
    tab.goto((made / "latents.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    context.close()
    assert not [error for error in errors if not error.startswith(("data:", "blob:"))]


def test_a_latent_that_was_tested_but_not_named(page: Any, made: Path) -> None:
    summary = chunks(made)["summary"]["extra"]
    assert summary["meta"]["n_labels"] == 4 and summary["labels"].split("\n")[UNNAMED] == ""
    page.evaluate(f"location.hash = '#/latent/{UNNAMED}'")
    article = page.locator(f"article[data-latent='{UNNAMED}']")
    assert "intruder score 0.60 (0.30–0.80)" in article.locator(".badges").inner_text()
    assert article.locator("h1").inner_text() not in ("", "null", "undefined")


def test_search_open_and_read_the_top_window(page: Any, made: Path) -> None:
    assert page.locator("#results li").count() == 40
    page.keyboard.press("/")
    page.keyboard.type("ZEBRA")
    page.wait_for_function("document.querySelectorAll('#results li').length === 1")
    assert page.locator("#status").inner_text() == "1 of 150 latents match"
    latent = labelled(made)
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.latent") == str(latent)
    page.keyboard.press("Enter")
    article = page.locator(f"article[data-latent='{latent}']")
    assert article.locator("h1").inner_text() == LABEL, "a label is text, never markup"
    assert page.evaluate("document.activeElement.id") == "heading"
    assert "detection score 0.90 (0.80–0.95)" in article.locator(".badges").inner_text()
    row = open_evidence(made / "top" / "evidence.parquet").latent(latent)
    top = next(e for e in row["examples"] if e["kind"] == "top")
    window = article.locator(".windows li").first
    assert window.locator(".text").inner_text().strip("…").split() == "".join(top["tokens"]).split()
    strongest = top["tokens"][top["position"] - top["start"]]
    assert window.locator("mark.peak").inner_text() == strongest.strip()
    assert float(window.locator(".value").inner_text().split()[0]) == pytest.approx(
        top["value"], rel=0.01
    )
    shown = article.inner_text()
    assert "Strongest tenth" in shown and "Nearest directions" in shown


def test_sorts_numbers_dead_latents_and_more_rows(page: Any, made: Path) -> None:
    summary = open_evidence(made / "top" / "evidence.parquet").summary().to_pydict()
    page.select_option("#sort", "maximum")
    first = int(page.locator("#results a").first.get_attribute("data-latent"))
    assert first == int(np.argmax(summary["max_activation"]))
    page.click("#direction")
    weakest = int(page.locator("#results a").first.get_attribute("data-latent"))
    alive = [v or np.inf for v in summary["max_activation"]]
    assert summary["max_activation"][weakest] == min(alive), "dead latents stay at the end"
    page.locator("#more").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('#results li').length > 40")
    page.fill("#query", "#3")
    page.keyboard.press("Enter")
    assert "dead" in page.locator("article[data-latent='3']").inner_text()
    page.fill("#query", "")
    page.click(".filters summary")
    page.select_option("#filter-source", "any")
    page.wait_for_function("document.querySelectorAll('#results li').length === 4")
    latents = "[...document.querySelectorAll('#results a')].map(a => +a.dataset.latent)"
    page.click("#direction")
    page.select_option("#sort", "relevance")
    page.fill("#query", "words")
    page.wait_for_function("document.querySelectorAll('#results li').length === 3")
    assert all(summary["max_activation"][i] > 0 for i in (9, 12, 13))
    assert page.evaluate(latents) == [13, 12, 9], "a whole word, the start of one, the inside"
    page.select_option("#sort", "certainty")
    assert page.evaluate(latents) == [9, 12, 13]


def test_a_latents_page_shows_its_evidence_and_keys_move_on(page: Any, made: Path) -> None:
    evidence, latent = open_evidence(made / "top" / "evidence.parquet"), labelled(made)
    row = evidence.latent(latent)
    page.select_option("#sort", "number")
    page.fill("#query", f"#{latent}")
    page.keyboard.press("Enter")
    article = page.locator(f"article[data-latent='{latent}']")
    article.wait_for()
    bars = article.locator(".chart rect")
    assert [int(t.replace(",", "")) for t in bars.locator("title").all_text_contents()] == row[
        "histogram"
    ]
    heights = [float(bars.nth(i).get_attribute("height") or 0) for i in range(bars.count())]
    assert (
        np.argsort(heights, kind="stable").tolist()
        == np.argsort(np.array(row["histogram"]), kind="stable").tolist()
    ), "more tokens, a taller bar"
    for place, name, value in ((0, "neighbours", "cosine"), (1, "coactive", "jaccard")):
        links = article.locator(".relations").nth(place).locator("a")
        found = [int(re.findall(r"latent/(\d+)", a.get_attribute("href"))[0]) for a in links.all()]
        shares = [float(text) for text in links.locator(".share").all_inner_texts()]
        wanted = row[name][: len(found)]
        assert found == [pair["latent"] for pair in wanted] and len(found) > 2
        assert shares == pytest.approx([pair[value] for pair in wanted], abs=0.01)
    groups = article.locator(".examples h3").all_inner_texts()
    assert (
        groups[:2] == ["Strongest sentences", "Strongest tenth"] and groups[-1] == "Weakest tenth"
    )
    quiet = [e for e in row["examples"] if e["kind"] == "near_miss"]
    article.locator("summary").first.click()
    silent = article.locator("details .windows li")
    assert 0 < silent.count() <= len(quiet)
    texts = {"".join(e["tokens"]).strip() for e in quiet}
    assert all(t.strip("…").strip() in texts for t in silent.locator(".text").all_inner_texts())
    page.fill("#query", "")
    page.locator("#heading").focus()
    page.keyboard.press("k")
    page.wait_for_selector(f"article[data-latent='{latent - 1}']")
    page.keyboard.press("j")
    page.wait_for_selector(f"article[data-latent='{latent}']")
    page.keyboard.press("Escape")
    page.wait_for_selector(".welcome")
    assert page.evaluate("document.activeElement.id") == "query"


def test_every_control_has_a_name_and_nothing_overflows_a_phone(browser: Any, made: Path) -> None:
    context = browser.new_context(
        bypass_csp=True, viewport={"width": 360, "height": 700}, color_scheme="dark"
    )
    tab = context.new_page()
    latent = labelled(made)
    tab.goto((made / "latents.html").as_uri() + f"#/latent/{latent}")
    tab.wait_for_selector(f"article[data-latent='{latent}']")
    assert not tab.locator(".finder").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(x) for x in re.findall(r"\d+", background)[:3]) < 60
    tab.click(".back")
    tab.wait_for_selector(".finder", state="visible")  # the route changes after the click
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    nameless = tab.evaluate(
        "[...document.querySelectorAll('a, button, input, select')].filter(e => !(e.textContent"
        " || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    context.close()


def test_a_typo_and_a_word_too_many_are_forgiven_and_the_address_keeps_the_search(
    page: Any, made: Path
) -> None:
    latent = labelled(made)
    page.fill("#query", "zebars")
    page.wait_for_function("document.querySelectorAll('#results li').length === 1")
    assert "no “zebars”: showing “zebras”" in page.locator("#status").inner_text()
    page.fill("#query", "zebras qqqq")
    page.wait_for_function("document.querySelectorAll('#results li').length === 1")
    assert "showing those with any" in page.locator("#status").inner_text()
    page.fill("#query", "zebras")
    page.wait_for_function("location.hash === '#/?q=zebras'")
    page.goto("about:blank")
    page.goto((made / "latents.html").as_uri() + f"#/latent/{latent}?q=zebras&source=2")
    page.wait_for_selector(f"article[data-latent='{latent}']")
    assert page.input_value("#query") == "zebras"
    assert page.locator("#results li").count() == 1


def test_filters_are_those_of_the_evidence(page: Any, made: Path) -> None:
    density = np.array(open_evidence(made / "top" / "evidence.parquet").summary()["density"])
    page.click(".filters summary")
    page.select_option("#filter-density", "0.01 2")
    wanted = int((density >= 0.01).sum())
    assert page.locator("#status").inner_text().startswith(f"{wanted} ")
    page.select_option("#filter-density", "")
    page.select_option("#filter-score", "0.75")
    assert page.locator("#results a").count() == 1
    page.select_option("#filter-score", "")
    page.check("#filter-words")
    names = page.locator("#results .name").all_inner_texts()
    assert names and all(re.search(r"\w", name) for name in names)


def test_words_of_sentences_are_found_where_they_are_asked_for(page: Any, made: Path) -> None:
    row = open_evidence(made / "top" / "evidence.parquet").latent(labelled(made))
    top = next(e for e in row["examples"] if e["kind"] == "top")
    page.fill("#query", "".join(top["tokens"]).split()[0].lower())
    page.click("#sentences")
    page.wait_for_function("document.querySelector('#sentences').hidden")
    shown = page.evaluate("view.results.includes(" + str(row["latent"]) + ")")
    assert shown


@pytest.mark.parametrize("link", ["#/latent/150", "#/latent/x", "#/compare/1/999", "#/nothing"])
def test_a_dead_link_says_so(page: Any, link: str) -> None:
    page.evaluate("link => { location.hash = link }", link)
    page.get_by_role("heading", name="This link leads nowhere").wait_for()
    assert "0 to 149" in page.locator("#detail").inner_text()


def test_two_latents_stand_side_by_side(page: Any, made: Path) -> None:
    latent = labelled(made)
    page.evaluate(f"location.hash = '#/latent/{latent}'")
    page.get_by_role("button", name="Compare").click()
    page.evaluate("location.hash = '#/latent/9'")
    page.get_by_role("link", name=f"Compare with #{latent}").click()
    page.wait_for_selector(".two article >> nth=1")
    boxes = [page.locator(".two article").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert page.locator(".two article").first.get_attribute("data-latent") == str(latent)


def test_a_list_is_kept_exported_and_imported(page: Any, made: Path, tmp_path: Path) -> None:
    latent = labelled(made)
    page.evaluate(f"location.hash = '#/latent/{latent}'")
    page.get_by_role("button", name="Keep").click()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#kept-count").inner_text() == "(1)"
    page.click(".filters summary")
    page.check("#filter-kept")
    assert page.locator("#results a").get_attribute("data-latent") == str(latent)
    with page.expect_download() as download:
        page.click("#export")
    record = json.loads(Path(download.value.path()).read_text())
    assert record["latents"] == [{"latent": latent, "label": LABEL}]
    (tmp_path / "list.json").write_text(json.dumps({"latents": [{"latent": 9}, {"latent": 999}]}))
    page.set_input_files("#import", tmp_path / "list.json")
    page.wait_for_function("document.querySelectorAll('#results li').length === 2")
    assert "1 of 2 latents" in page.locator("#status").inner_text()


def test_a_text_of_ones_own_goes_to_the_demo_with_the_latent(page: Any, made: Path) -> None:
    latent = labelled(made)
    page.evaluate(f"location.hash = '#/latent/{latent}'")
    page.get_by_text("Steer by it, or try your own text").click()
    page.get_by_label("A text of yours").fill("Œuvres “quoted” 東京")
    link = page.get_by_role("link", name="Try it in the demo").get_attribute("href")
    place, _, packed = str(link).partition("/?steer=")
    assert place == "http://127.0.0.1:8080"
    request = json.loads(read_link(packed))["request"]
    assert request["prompts"] == ["Œuvres “quoted” 東京"]
    assert request["steer"] == [f"0:{latent}=add:2.0"]
    assert "python latent_browser.py --prompt" in page.locator("article").inner_text()


def test_a_token_and_its_bar_light_up_together(page: Any, made: Path) -> None:
    page.evaluate(f"location.hash = '#/latent/{labelled(made)}'")
    page.locator(".windows mark.peak").first.hover()
    lit = page.locator(".chart rect.lit")
    assert lit.count() == 1
    counts = "[...document.querySelectorAll('.chart rect')].findIndex(r => r.matches('.lit'))"
    assert page.evaluate(counts) == 19, "the strongest token is in the last bin"
    lit.hover()
    assert page.locator(".windows mark.lit").count() >= 1


def test_measured_effects_decide_the_order_and_a_filter(
    browser: Any, made: Path, tmp_path: Path
) -> None:
    columns = {"latent": [5, 9, 12], "score": [0.1, 0.7, 0.4], "share": [None, 0.9, 0.2]}
    table = pa.table(columns | {"shows": [False, True, False]})
    pq.write_table(table, tmp_path / "effects.parquet")
    target = ["--html", str(tmp_path / "latents.html")]
    target += ["--effects_path", str(tmp_path / "effects.parquet")]
    latent_browser.main(arguments(made, *target))
    tab = browser.new_page()
    tab.goto((tmp_path / "latents.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    first = "+document.querySelector('#results a').dataset.latent"
    assert tab.evaluate(first) == 9
    tab.select_option("#sort", "effect")
    assert tab.evaluate("view.results.slice(0, 3).join()") == "9,12,5"
    tab.click(".filters summary")
    tab.check("#filter-steers")
    assert tab.locator("#status").inner_text().startswith("1 of ")
    tab.locator("#results a").first.click()
    assert "its word shows in the text" in tab.locator(".badges").inner_text()
    tab.close()
    pq.write_table(table.drop(["shows"]), tmp_path / "effects.parquet")
    with pytest.raises(UserError, match="not a readable file of effects"):
        latent_browser.main(arguments(made, *target))


def test_the_map_lays_directions_along_their_principal_components() -> None:
    wide, narrow = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    decoder = torch.zeros(300, 16)
    decoder[:, 3], decoder[:, 7] = 9 * wide, 3 * narrow
    places = pack.direction_map(decoder)
    for axis, wanted in ((0, wide), (1, narrow)):
        along = np.corrcoef(places[:, axis], wanted.numpy())[0, 1]
        assert abs(along) > 0.9 and places[:, axis].min() == 0 and places[:, axis].max() == 1
    np.testing.assert_array_equal(places, pack.direction_map(decoder))


def test_pictures_open_the_latent_that_is_clicked(browser: Any, made: Path, tmp_path: Path) -> None:
    target = ["--html", str(tmp_path / "latents.html"), "--sae_model_path", str(made / "sae.pt")]
    latent_browser.main(arguments(made, *target))
    context = browser.new_context(bypass_csp=True, viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.goto((tmp_path / "latents.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    for kind in ("map", "scatter"):
        tab.evaluate("location.hash = '#/'")
        tab.locator(f".pictures [data-kind={kind}]").click()
        spot = tab.evaluate(
            "kind => { const p = pointsOf(PICTURES[kind]), c = document.querySelector('canvas'),"
            " n = p.latents.length - 1; return [p.latents[n], 12 + (c.clientWidth - 24) * p.xs[n],"
            " 12 + (c.clientHeight - 24) * (1 - p.ys[n])]; }",
            kind,
        )
        tab.locator("canvas").click(position={"x": spot[1], "y": spot[2]})
        tab.wait_for_selector(f"article[data-latent='{spot[0]}']")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_no_barrier_for_anybody(browser: Any, made: Path, scheme: Any, width: int) -> None:
    """axe-core finds nothing on any of the page's views."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    tab = context.new_page()
    latent = labelled(made)
    for place in ("", f"#/latent/{latent}", f"#/compare/{latent}/9", "#/latent/999"):
        tab.goto("about:blank")
        tab.goto((made / "latents.html").as_uri() + place)
        tab.wait_for_selector("html[data-ready]")
        found = axe.Axe().run(tab).response["violations"]
        assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []
        if place == "":
            for summary in tab.locator("summary:visible").all():
                summary.click()  # filters, pictures
            found = axe.Axe().run(tab).response["violations"]
            assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []
    context.close()


def test_a_keyboard_is_enough(page: Any, made: Path) -> None:
    def walk(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                ring = page.locator(":focus").evaluate("e => getComputedStyle(e).outlineStyle")
                assert ring != "none", selector
                return
        raise AssertionError(f"no way to {selector} by keyboard")

    walk("#query")
    page.keyboard.type("words")
    page.wait_for_function("document.querySelectorAll('#results li').length === 3")
    walk(".filters summary")
    page.keyboard.press("Enter")
    walk("#filter-source")
    walk("#results a")
    chosen = page.locator(":focus").get_attribute("data-latent")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"article[data-latent='{chosen}']")
    page.keyboard.press("Escape")
    page.wait_for_selector(".welcome")


def prompt_case(maxima: np.ndarray | None) -> prompt_view.PromptActivations:
    return prompt_view.PromptActivations(
        tokens=["Sen", "ior", " <b>"],
        latents=np.array([[0, 1], [2, 1], [1, 0]]),
        values=np.array([[1.0, 2.0], [0.0, 3.0], [4.0, 0.5]], np.float32),
        maxima=maxima,
        names={1: "seniority & rank"},
    )


def test_prompt_table_orders_by_share_of_the_maximum() -> None:
    found = prompt_case(np.array([1.0, 8.0, 1.0], np.float32))
    lines = prompt_view.terminal_table(found, per_token=5, width=200).splitlines()
    assert lines[1] == "Sen   100 % #0 | 25 % #1 seniority & rank"
    assert lines[2] == "ior   38 % #1 seniority & rank"
    raw = prompt_view.terminal_table(prompt_case(None), per_token=1, width=200).splitlines()
    assert raw[1] == "Sen   2 #1 seniority & rank"


def test_prompt_page_marks_and_escapes() -> None:
    found = prompt_case(np.array([1.0, 8.0, 1.0], np.float32))
    text = prompt_view.prompt_page(found, title="a <b>", about="about &", per_token=1)
    assert "<title>Latents on: a &lt;b&gt;</title>" in text and "about &amp;" in text
    first, second = re.findall(r'<li><p class="name">.*?</li>', text, re.S)
    assert "Latent 0" in first and "seniority &amp; rank" in second
    assert second.count("<mark") == 3
    peak = '<mark class="peak" style="--share:0.500" title="50 %">&lt;b&gt;</mark>'
    assert f" {peak}</p>" in second
    assert "<b>50 %</b>" in text


def test_help_is_shown_and_errors_are_one_line() -> None:
    shown = program.call("latent_browser", "--help")
    assert shown.returncode == 0 and "--max_megabytes" in shown.stdout
    failed = program.call("latent_browser")
    assert failed.returncode == 1
    assert failed.last_line.startswith("error: --evidence_path and --html are needed")
    assert "Traceback" not in failed.stderr


def test_known_maxima_fall_back_to_the_evidence(made: Path) -> None:
    sae = stage.load_sae(made / "sae.pt", device="cpu")
    evidence = made / "top" / "evidence.parquet"
    known = latent_browser.known_maxima(sae, evidence)
    sae.max_activations = None
    seen = latent_browser.known_maxima(sae, evidence)
    assert known is not None and seen is not None
    torch.testing.assert_close(known, seen)
    assert latent_browser.known_maxima(sae, None) is None
