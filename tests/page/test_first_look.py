"""What a visitor sees and presses first: the finished pair, a chip, a dial's limits."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright import sync_api

from saint.page.fragments import pairs_html
from saint.page.handlers import OPENING_DOSES
from saint.stage.terminal import visible
from saint.steering.completions import Effect, Pair, Reading, complete_pairs
from saint.steering.dose import at_strength
from saint.steering.search import search_labels
from saint.steering.settings import Setting
from tests.support.steering_site import (
    PROMPT,
    Site,
    choose,
    field,
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


def readable(tokens: list[str]) -> str:
    """What HTML keeps of a tiny model's noise: a parser replaces what is no character."""
    return "".join(c for c in visible("".join(tokens)) if c.isascii() and c.isprintable())


def test_the_text_follows_the_slider_without_the_server(site, browser):
    with open_tab(site, browser) as tab:
        shown = tab.locator("#opening .variant:visible")
        assert shown.count() == 1 and tab.inner_text("#opening output") == "dose 9"
        tab.context.set_offline(True)
        slider = tab.locator("#opening input[type=range]")
        slider.focus()
        tab.keyboard.press("End")
        assert tab.inner_text("#opening output") == f"dose {OPENING_DOSES[-1]:g}"
        (name, request), *_ = site.handlers.showcase()
        assert name in tab.inner_text("#opening label")
        strongest = at_strength(request.concepts[0], OPENING_DOSES[-1])
        one = replace(request.only(strongest), max_new_tokens=24)
        (pair,) = complete_pairs(site.handlers.studio, one)
        assert readable(shown.locator(".tok").all_text_contents()) == readable(pair.steered.tokens)
        tab.keyboard.press("Home")
        plain = tab.locator("#opening .pane.plain .tok").all_text_contents()
        assert shown.locator(".tok").all_text_contents() == plain


def test_one_press_on_a_chip_fills_the_fields_and_runs(site, browser):
    with open_tab(site, browser) as tab:
        tab.locator("#chips button[data-show]").first.click()
        tab.wait_for_selector("#result .done")
        assert tab.locator("#mix .dial").count() == 1
        name, request = site.handlers.showcase()[0]
        assert name in tab.inner_text("#mix .dial")
        assert tab.inner_text("#result [data-side=plain]").startswith(request.prompts[0])
        tab.wait_for_function("location.search.includes('steer=')")


def test_a_strength_stays_within_the_limits_beside_it(site, browser):
    with open_tab(site, browser) as tab:
        choose(tab)
        assert "-4 to 4" in tab.inner_text("#mix .dial")
        number = tab.locator("#mix input[type=number]")
        number.fill("99")
        number.press("Tab")
        assert number.input_value() == "4"
        assert "by 4 ×" in tab.inner_text("#mix .says")


def test_a_misspelt_word_finds_the_label(site):
    guides = site.handlers.guides
    right, wrong = (search_labels(site.handlers.studio, guides, q) for q in ("nuclear", "nuclaer"))
    assert wrong and wrong == right
    assert search_labels(site.handlers.studio, guides, "qqqqqq") == []


def test_what_does_not_show_is_said_and_a_cut_character_is_not_shown(site):
    def reading(last: str, value: float) -> Reading:
        return Reading(["the", " court", last], 1, [None, 1.0, 1.0], [[0.0], [value], [value]])

    def page(value: float) -> str:
        effect = Effect(Setting(3), 0.0, 1.0, 0.9, 0.25)
        pair = Pair(
            "the", reading(" ok", 0.1), reading(" \ufffd", value), [effect], {"layer 1": 0.25}
        )
        return pairs_html([pair], site.handlers.guides)

    assert f"{LABELS[3]} (#3) does not show in the text." in page(0.1)
    assert "does not show" not in page(0.5)
    assert "\ufffd" not in page(0.5) and page(0.5).count("25%") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_no_barrier_for_anybody(site, browser, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with open_tab(site, browser, width=width) as tab:
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        tab.reload()
        tab.wait_for_selector("#mix .dials > *")
        field(tab, "prompts").fill(PROMPT)
        choose(tab)
        tab.click("#run")
        tab.wait_for_selector("#result .done")
        found = axe.Axe().run(tab).response["violations"]
        assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []
