"""A chat of several turns on the page, and what Stop leaves of a text."""

import json
from collections.abc import Iterator

import pytest
from playwright import sync_api

from saint.page.handlers import read_link
from saint.stage.errors import UserError
from saint.steering.completions import complete_pairs, stream_pairs
from saint.steering.settings import Request, Setting, request_from_json
from tests.support.steering_site import (
    PROMPT,
    Site,
    choose,
    field,
    open_page,
    open_tab,
    running_browser,
    running_site,
)
from tests.support.tiny_steering import one_thread

SAID = "document.querySelectorAll('#result .done .said').length"


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


def test_each_side_goes_on_from_its_own_answers(site):
    studio = site.handlers.studio
    request = Request(("and then?",), (Setting(3, "add", 2.0),), chat=True, max_new_tokens=6)
    earlier = ([("the court", "a ruling")], [("the court", "nuclear")])
    *_, last = stream_pairs(studio, request, earlier)
    for row, side, n in zip(last.rows, earlier, last.n_prompts, strict=True):
        ((user, answer),) = side
        messages = [("user", user), ("assistant", answer), ("user", "and then?")]
        wanted = [{"role": role, "content": text} for role, text in messages]
        assert row[:n] == studio.tokenizer.format_chat(wanted)
    alone = Request(("and then?",), request.settings, chat=True, max_new_tokens=6)
    (pair,) = complete_pairs(studio, alone)
    assert last.pairs and last.pairs[0].plain.ids != pair.plain.ids


def test_a_conversation_on_the_page_and_its_link(site, browser):
    with open_tab(site, browser) as tab:
        choose(tab)
        tab.locator("#chat input").check()
        sync_api.expect(tab.locator("#run")).to_have_text("Send")
        for n, message in enumerate(("the court", "and the treaty?"), 1):
            field(tab, "prompts").fill(message)
            tab.click("#run")
            tab.wait_for_function(f"{SAID} === {n}")
            sync_api.expect(field(tab, "prompts")).to_have_value("")
        assert tab.locator("#result .said").all_inner_texts() == [
            "YOU the court",
            "YOU and the treaty?",
        ]
        assert tab.locator("#result .past").count() == 1
        assert "Done" in tab.inner_text("#state")
        shown = tab.inner_text("#result .pairs")
        tab.wait_for_function("location.search.includes('steer=')")
        link = tab.url
        site.brake.seconds = 0.1
        tab.click("#run")  # no new message: the last one is answered anew
        tab.wait_for_selector("#result .running")
        site.brake.seconds = 0.0
        tab.wait_for_function(f"{SAID} === 2 && !document.querySelector('#result .running')")
        tab.click("#anew")
        sync_api.expect(tab.locator("#result")).to_contain_text("appear here")
        open_page(tab, link)
        tab.wait_for_function(f"{SAID} === 2")
        assert tab.inner_text("#result .pairs") == shown


def test_stop_keeps_colours_numbers_and_a_link_to_what_was_written(site, browser):
    with open_tab(site, browser) as tab:
        choose(tab)
        site.brake.seconds = 0.15
        tab.click("#run")
        tab.wait_for_selector("#result .running")
        sync_api.expect(tab.locator("#state")).to_contain_text("Writing")
        tab.wait_for_timeout(700)
        tab.click("#stop")
        tab.wait_for_selector("#result .done")
        site.brake.seconds = 0.0
        sync_api.expect(tab.locator("#state")).to_contain_text("Stopped after")
        assert tab.locator("#result table.effects").count() == 1
        assert tab.locator("#result .tok [style]").count() > 0
        tab.wait_for_function("location.search.includes('steer=')")
        record = json.loads(read_link(tab.url.partition("steer=")[2]))
        (pair,) = complete_pairs(site.handlers.studio, request_from_json(record))
        written = tab.locator("#result [data-side=steered]").get_attribute("data-ids")
        assert written == ",".join(map(str, pair.steered.ids)) and pair.prompt == PROMPT
        tab.click("#stop")  # nothing runs: nothing changes
        tab.wait_for_timeout(500)
        assert tab.locator("#result .done").count() == 1


def test_one_fault_is_one_message(site, browser):
    with open_tab(site, browser) as tab:
        field(tab, "prompts").fill("")
        tab.click("#run")
        tab.wait_for_selector(".toast-body")
        tab.wait_for_timeout(700)
        assert tab.locator(".toast-body").count() == 1
        sync_api.expect(tab.locator("#state")).to_have_text("Nothing was written.")


@pytest.mark.parametrize(
    "written",
    [
        "[]",
        "nothing",
        '{"rows": [[1, 2]], "n_prompts": [1]}',
        '{"rows": [[1, 2], [1, 2]], "n_prompts": [3, 1]}',
        '{"rows": [[1, 2], [1, 999999]], "n_prompts": [1, 1]}',
    ],
)
def test_what_a_stranger_says_was_written_is_checked(site, written):
    text = json.dumps({"request": Request((PROMPT,)).to_json()})
    with pytest.raises(UserError):
        site.handlers.stopped(text, written)


@pytest.mark.parametrize("turns", [{}, [1], [{"user": "a", "plain": "b"}], [{}] * 99])
def test_a_strangers_conversation_is_checked(site, turns):
    record = {"request": Request((PROMPT,), chat=True).to_json(), "turns": turns}
    with pytest.raises(UserError, match="conversation"):
        site.handlers.fields_and_turns(json.dumps(record))
