"""Everything that opens on the demo's page keeps nobody out, and a keyboard is enough for it."""

from collections.abc import Iterator

import pytest
from playwright import sync_api

from tests.support.barriers import SCHEMES, WIDTHS, check_barriers
from tests.support.steering_site import (
    PROMPT,
    Site,
    compare,
    field,
    open_tab,
    running_browser,
    running_site,
)
from tests.support.tiny_steering import one_thread

_RING = "e => getComputedStyle(e).outlineStyle + getComputedStyle(e).boxShadow"


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


def settled(tab: sync_api.Page) -> None:
    """Look for barriers once nothing is under way, which Gradio shows paler."""
    tab.wait_for_function("!document.querySelector('.pending, .generating')")
    check_barriers(tab)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_opens_keeps_nobody_out(site, browser, scheme, width):
    with open_tab(site, browser, width=width) as tab:
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        field(tab, "prompts").fill(PROMPT)
        field(tab, "wish").fill("court")
        field(tab, "wish").press("Enter")
        tab.wait_for_selector("#result .done")
        tab.locator("#mix .dial summary").click()
        tab.locator("#result [data-side=steered] .tok:not(.prompt)").nth(2).click()
        tab.wait_for_selector("#why table")
        tab.wait_for_selector("#view table.heat")
        settled(tab)
        tab.get_by_role("tab", name="Find the dose").click()
        tab.click("#sweep")
        tab.wait_for_function("document.querySelectorAll('#dose tbody tr').length === 9")
        settled(tab)
        tab.get_by_role("tab", name="Keep and share").click()
        tab.locator("#chat input").check()
        field(tab, "prompts").fill("the court")
        compare(tab)
        settled(tab)


def test_a_keyboard_is_enough(site, browser):
    with open_tab(site, browser) as tab:

        def walk(selector: str) -> None:
            """Press Tab until it has the focus, visibly."""
            for _ in range(60):
                tab.keyboard.press("Tab")
                if tab.evaluate("s => document.activeElement.matches(s)", selector):
                    outline = (
                        "e => getComputedStyle(e).outlineStyle + getComputedStyle(e).boxShadow"
                    )
                    assert tab.locator(":focus").evaluate(outline) != "nonenone", selector
                    return
            raise AssertionError(f"no way to {selector} by keyboard")

        walk("#opening input[type=range]")
        tab.keyboard.press("End")
        assert tab.inner_text("#opening output") != "dose 9"
        walk("#wish textarea, #wish input")
        tab.keyboard.type("court")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#result .done")
        walk("#mix input[type=range]")
        before = tab.locator("#mix input[type=number]").input_value()
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#mix input[type=number]").input_value() != before
        walk("#mix summary")
        tab.keyboard.press("Enter")
        assert tab.locator("#mix .parts").is_visible()
        walk("#run")
        link = tab.url
        tab.keyboard.press("Enter")
        tab.wait_for_function("link => location.href !== link", arg=link)
        walk("#result [data-side=steered]")
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            tab.keyboard.press(key)
        tab.wait_for_selector("#why table")
        for _ in ("Look inside", "Find the dose"):
            walk("[role=tab]")
        tab.keyboard.press("Enter")
        walk("#sweep")
