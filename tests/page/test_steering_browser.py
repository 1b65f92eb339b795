"""The steering page in a real browser, used as a visitor uses it."""

import base64
import json
from collections.abc import Iterator
from itertools import combinations

import pytest
from playwright import sync_api

from saint.page.handlers import DEFAULT_STRENGTH, TEMPERATURE, TOP_P
from saint.stage.terminal import visible
from saint.steering import completions, settings
from saint.steering.dose import dose_request, sweep
from saint.steering.studio import EXAMPLE_PROMPTS
from tests.support.steering_site import (
    PROMPT,
    Site,
    choose,
    compare,
    field,
    open_page,
    open_tab,
    running_browser,
    running_site,
)
from tests.support.tiny_steering import LABELS, one_thread


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture
def tab(site, browser) -> Iterator[sync_api.Page]:
    site.brake.seconds = 0.0
    with open_tab(site, browser) as page:
        yield page


def test_search_choose_steer_compare_and_reload_the_link(site, tab):
    choose(tab)
    assert "nuclear weapons" in tab.inner_text("#results .card")
    tab.locator("#mix input[type=number]").fill("2.5")
    tab.locator("#mix input[type=number]").press("Tab")
    field(tab, "prompts").fill(f"{PROMPT}\nthe court")
    plain, steered = compare(tab)
    assert plain.startswith(PROMPT) and plain != steered
    assert tab.locator("#result .pair").count() == 2
    request = settings.Request(
        (PROMPT, "the court"),
        (settings.Setting(3, "add", 2.5),),
        temperature=TEMPERATURE,
        top_p=TOP_P,
    )
    pairs = completions.complete_pairs(site.handlers.studio, request)
    texts = tab.locator("#result [data-side=steered] .tok").all_inner_texts()
    assert "".join(texts[: len(pairs[0].steered.tokens)]) == visible(
        "".join(pairs[0].steered.tokens)
    )
    cells = tab.locator("#result table.effects >> nth=0 >> td").all_inner_texts()
    assert cells[2] == f"{pairs[0].effects[0].realised:.2f}×"
    tab.wait_for_function("location.search.includes('steer=')")
    open_page(tab, tab.url)
    tab.wait_for_selector("#result .done")
    again = [tab.inner_text(f"#result [data-side={side}]") for side in ("plain", "steered")]
    assert again == [plain, steered]
    assert tab.locator("#mix input[type=number]").input_value() == "2.5"


def test_stop_leaves_the_text_and_ends_the_work(site, tab):
    choose(tab)
    site.brake.seconds = 0.15
    tab.click("#run")
    tab.wait_for_selector("#result .caret")
    tab.wait_for_timeout(700)
    tab.click("#stop")
    tab.wait_for_selector("#result .done")
    steps = site.brake.steps
    tab.wait_for_timeout(1000)
    assert site.brake.steps == steps
    assert PROMPT in tab.inner_text("#result") and "Stopped after" in tab.inner_text("#state")
    assert tab.locator("#result .caret").count() == 0
    site.brake.seconds = 0.0
    compare(tab)


def test_closing_the_tab_ends_the_work(site, browser):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(40_000)
    open_page(page, site.url)
    site.brake.seconds = 0.15
    start = site.brake.steps
    page.click("#run")
    page.wait_for_selector("#result .caret")
    context.close()
    site.wait_until_idle()
    site.brake.seconds = 0.0
    assert site.brake.steps - start < 2 * 40, "it ran to its end"


def test_a_waiting_visitor_sees_the_place_in_the_queue(site, browser, tab):
    with open_tab(site, browser) as second, open_tab(site, browser) as third:
        site.brake.seconds = 1.0
        tab.click("#run")
        tab.wait_for_selector("#result .caret")
        for page, place in ((second, "queue: 1/1"), (third, "queue: 2/2")):
            sync_api.expect(page.get_by_text("queue:")).to_have_count(0)
            page.click("#run")
            status = page.locator("#result").get_by_text(place)
            status.scroll_into_view_if_needed()
            sync_api.expect(status).to_be_in_viewport()  # nothing clips it
        site.brake.seconds = 0.0
        for page in (second, third):
            page.wait_for_selector("#result .done")
            sync_api.expect(page.locator("#result")).not_to_contain_text("queue")


def test_labels_and_model_text_are_never_markup(site, tab):
    choose(tab, "bold")
    assert LABELS[9] in tab.inner_text("#results .card")
    assert LABELS[9] in tab.inner_text("#mix .dial")
    assert tab.locator("#results b, #mix b").count() == 0
    field(tab, "prompts").fill("<img src=x onerror=window.hacked=1> the")
    assert "<img" in compare(tab)[0]
    assert tab.evaluate("window.hacked") is None and tab.locator("#result img").count() == 0


def dials(tab):
    return tab.locator("#mix .dial .name").all_inner_texts()


def test_chosen_latents_can_be_removed_one_by_one(tab):
    for query in ("nuclear", "court", "bold"):
        choose(tab, query)
    names = dials(tab)
    assert [name.partition(" (#")[0] for name in names] == [LABELS[3], LABELS[5], LABELS[9]]
    tab.get_by_role("button", name="remove latent 5").click()
    assert dials(tab) == [names[0], names[2]]
    compare(tab)
    rows = tab.locator("#result table.effects tbody th").all_inner_texts()
    assert rows == [names[0], names[2]]
    choose(tab, "court")
    assert dials(tab) == [names[0], names[2], names[1]]


def test_dose_of_the_latent_that_is_picked(site, tab):
    for query in ("nuclear", "court"):
        choose(tab, query)
    tab.click("#settings button")
    tab.get_by_label("only new").check()
    tab.get_by_role("tab", name="Find the dose").click()
    which = field(tab, "dose_latent")
    sync_api.expect(which).to_have_value(f"{LABELS[3]} (#3)")
    which.click()
    tab.get_by_role("option", name=LABELS[5]).click()
    tab.click("#sweep")
    tab.wait_for_selector("#dose .plot")
    tab.wait_for_function("document.querySelectorAll('#dose tbody tr').length === 9")
    assert LABELS[5] in tab.inner_text("#dose .verdict")
    prompts = (PROMPT, *(p for p in EXAMPLE_PROMPTS if p != PROMPT))
    request = dose_request(site.handlers.studio, settings.Request(prompts, where="generated"))
    *_, report = sweep(site.handlers.studio, settings.Setting(5), request)
    concepts = tab.locator("#dose tbody tr td:nth-child(2)").all_inner_texts()
    assert concepts == [f"{point.concept:.2f}×" for point in report.points]
    tab.get_by_role("button", name="remove latent 5").click()
    sync_api.expect(which).to_have_value(f"{LABELS[3]} (#3)")


def test_modes_remove_prompt_view_and_export(site, tab):
    choose(tab)
    tab.select_option("#mix select", "scale")
    assert "multiplies" in tab.inner_text("#mix .says")
    tab.select_option("#mix select", "add")
    tab.click("#look")
    tab.wait_for_selector("#view table.heat")
    tab.get_by_role("tab", name="Keep and share").click()
    tab.click("#export")
    href = tab.get_attribute("#download a", "href")
    from safetensors.torch import load

    vector = load(base64.b64decode(href.split(",")[1]))["vector"]
    dictionary = site.handlers.studio.dictionaries[0]
    assert vector.tolist() == pytest.approx(
        (DEFAULT_STRENGTH * dictionary.units[3] * dictionary.sae.W_dec[3]).tolist(), rel=1e-5
    )
    tab.click("#mix .remove")
    assert "Nothing chosen" in tab.inner_text("#mix")


def test_json_and_presets_bring_settings_back(site, tab):
    choose(tab)
    tab.click("#settings button")
    sync_api.expect(field(tab, "seed")).to_have_value("0")
    while field(tab, "seed").input_value() != "17":  # a panel that has just opened fills itself
        field(tab, "seed").fill("17")
        field(tab, "seed").press("Tab")  # what is typed counts when the field is left
        tab.wait_for_timeout(1000)
    compare(tab)
    tab.get_by_role("tab", name="Keep and share").click()
    shown = "document.querySelector('#json').innerText"
    tab.wait_for_function(f"{shown}.includes('steered') && {shown}.includes('\"seed\": 17')")
    field(tab, "preset_name").fill("mine")
    kept = tab.evaluate("localStorage.saint_presets")
    tab.click("#preset_save")
    tab.wait_for_function("kept => localStorage.saint_presets !== kept", arg=kept)
    open_page(tab, site.url)
    assert "Nothing chosen" in tab.inner_text("#mix")
    tab.get_by_role("tab", name="Keep and share").click()
    field(tab, "preset_choice").click()
    tab.get_by_role("option", name="mine").click()
    tab.click("#settings button")
    sync_api.expect(field(tab, "seed")).to_have_value("0")
    tab.click("#preset_load")
    tab.wait_for_selector("#mix .dial")
    assert "nuclear weapons" in tab.inner_text("#mix .dial")
    sync_api.expect(field(tab, "seed")).to_have_value("17")


def test_json_that_is_pasted_fills_the_fields(tab):
    request = settings.Request(
        (PROMPT, "the court"),
        (settings.Setting(5, "scale", 2.0),),
        "prompt",
        seed=23,
    )
    tab.get_by_role("tab", name="Keep and share").click()
    editor = tab.locator("#json .cm-content")
    editor.fill(json.dumps({"request": request.to_json()}))
    tab.click("#load")
    tab.wait_for_selector("#mix .dial")
    assert dials(tab) == [f"{LABELS[5]} (#5)"]
    assert tab.locator("#mix select").input_value() == "scale"
    assert field(tab, "prompts").input_value() == f"{PROMPT}\nthe court"
    tab.click("#settings button")
    sync_api.expect(field(tab, "seed")).to_have_value("23")
    sync_api.expect(tab.get_by_label("only the prompt's")).to_be_checked()
    editor.fill("nothing")
    tab.click("#load")
    sync_api.expect(tab.get_by_text("the settings are not JSON")).to_be_visible()
    assert dials(tab) == [f"{LABELS[5]} (#5)"]


def test_presets_can_be_deleted(tab):
    tab.get_by_role("tab", name="Keep and share").click()
    for name in ("one", "two"):
        kept = tab.evaluate("localStorage.saint_presets")
        field(tab, "preset_name").fill(name)
        tab.click("#preset_save")
        tab.wait_for_function("kept => localStorage.saint_presets !== kept", arg=kept)
    choice = field(tab, "preset_choice")
    choice.click()
    tab.get_by_role("option", name="one").click()
    kept = tab.evaluate("localStorage.saint_presets")
    tab.click("#preset_delete")
    tab.wait_for_function("kept => localStorage.saint_presets !== kept", arg=kept)
    tab.reload()
    tab.wait_for_selector("#mix .dials > *")
    tab.get_by_role("tab", name="Keep and share").click()
    choice.click()
    sync_api.expect(tab.get_by_role("option", name="two")).to_be_visible()
    assert tab.get_by_role("option").all_inner_texts() == ["two"]


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows_the_window_and_no_table_is_cut(site, browser, width):
    with open_tab(site, browser, width=width) as tab:
        choose(tab)
        choose(tab, "bold")
        compare(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        hidden = "e => [...document.querySelectorAll(e)].map(s => s.scrollWidth - s.clientWidth)"
        assert tab.evaluate(hidden, "#result .scroll") == [0]
        for name in ("Look inside", "Find the dose", "Keep and share"):
            tab.get_by_role("tab", name=name).click()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [390, 1200])
def test_the_numbers_of_plot_and_table_stay_apart(site, browser, width):
    boxes = "ts => ts.map(t => ({text: t.textContent, ...t.getBoundingClientRect().toJSON()}))"
    bottoms = "cells => cells.map(cell => cell.getBoundingClientRect().bottom)"
    with open_tab(site, browser, width=width) as tab:
        choose(tab)
        tab.click("#look")
        row = tab.locator("#view table.heat tbody tr").first
        row.wait_for()
        ends = row.locator("th, td").evaluate_all(bottoms)
        assert len(ends) > 3 and max(ends) - min(ends) < 0.5  # one line under the whole row
        tab.get_by_role("tab", name="Find the dose").click()
        tab.click("#sweep")
        tab.wait_for_function("document.querySelectorAll('#dose tbody tr').length === 9")
        texts = tab.locator("#dose .plot text").evaluate_all(boxes)
        assert len(texts) >= 8
        for a, b in combinations(texts, 2):
            apart = a["right"] + 3 <= b["left"] or b["right"] + 3 <= a["left"]
            assert apart or a["bottom"] <= b["top"] or b["bottom"] <= a["top"], (a, b)
