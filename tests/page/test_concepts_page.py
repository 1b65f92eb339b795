"""Concepts on the steering page: turned up by name, changed, linked, asked for through the API."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from playwright import sync_api

from saint.page.api import api_endpoints
from saint.page.handlers import link_query, read_link
from saint.stage.errors import UserError
from saint.steering.attribution import attribute, attribute_ids
from saint.steering.completions import complete_pairs
from saint.steering.concepts import find_concept
from saint.steering.settings import ConceptSetting, Request, Setting
from saint.steering.studio import concept_vector
from tests.support.steering_site import (
    PROMPT,
    Site,
    choose,
    compare,
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


def turn_up(tab, what: str) -> None:
    field(tab, "wish").fill(what)
    field(tab, "wish").press("Enter")
    tab.wait_for_selector("#result .done")


def test_a_word_becomes_a_dial_and_the_pair_runs(site, browser):
    with open_tab(site, browser) as tab:
        turn_up(tab, "talk like a court")
        assert tab.inner_text("#mix .dial .name") == "talk like a court"
        assert "moves every token by 8" in tab.inner_text("#mix .says")
        assert tab.inner_text("#result .legend").startswith("talk like a court")
        tab.wait_for_selector("#view table.heat")  # by itself, on the steered text
        studio = site.handlers.studio
        concept = site.handlers.concepts.find("talk like a court")
        assert "read as “court”" in concept.source
        wish = ConceptSetting(concept, "add", 8.0)
        request = Request((PROMPT,), concepts=(wish,), temperature=0.7, top_p=0.95)
        (pair,) = complete_pairs(studio, request)
        texts = tab.locator("#result [data-side=steered] .tok").all_inner_texts()
        assert "".join(texts[: pair.steered.n_prompt]) == PROMPT
        cells = tab.locator("#result table.effects >> nth=0 >> td").all_inner_texts()
        assert cells[1] == f"{pair.effects[0].target:+.1f} std"
        whole = tab.locator("#result .whole")
        (share,) = pair.moved.values()
        assert whole.count() == 1 and f"{share:.0%}" in whole.inner_text()


def test_a_latent_is_left_out_and_the_rest_steers(site, browser):
    with open_tab(site, browser) as tab:
        turn_up(tab, "court")
        tab.locator("#mix .dial summary").click()
        parts = tab.locator("#mix .parts li")
        n, before = parts.count(), tab.inner_text("#mix .dial summary")
        tab.locator("#mix .parts .remove").first.click()
        sync_api.expect(parts).to_have_count(n - 1)
        sync_api.expect(tab.locator("#mix .dial summary")).not_to_have_text(before)
        assert tab.locator("#mix details select").input_value() == "latents"
        tab.wait_for_function("location.search.includes('steer=')")
        first = tab.url
        tab.click("#run")
        tab.wait_for_function("first => location.href !== first", arg=first)
        link = tab.url.partition("steer=")[2]
        (wish,) = site.handlers.read_record(read_link(link)).concepts
        assert len(wish.concept.latents) == n - 1 and wish.concept.use == "latents"
        vector = concept_vector(site.handlers.studio.dictionaries[0], wish.concept)
        centre = site.handlers.concepts.average(0).z
        assert wish.concept.base == pytest.approx(float(centre @ vector), abs=1e-4)


def test_a_short_link_turns_concepts_and_latents_up(site, browser):
    with open_tab(site, browser) as tab:
        tab.goto(f"{site.url}/?steer=court=+6,3=-1&prompt=the%20nuclear")
        tab.wait_for_selector("#result .done")
        names = tab.locator("#mix .dial .name").all_inner_texts()
        assert names == [f"{LABELS[3]} (#3)", "court"]
        values = tab.locator("#mix input[type=number]").evaluate_all("es => es.map(e => e.value)")
        assert values == ["-1", "6"]
        assert tab.inner_text("#result [data-side=plain]").startswith("the nuclear")


def test_a_token_says_which_latents_caused_it(site, browser):
    with open_tab(site, browser) as tab:
        choose(tab)
        compare(tab)
        tab.locator("#result [data-side=steered] .tok:not(.prompt)").nth(2).click()
        tab.wait_for_selector("#why table")
        first = tab.inner_text("#why .verdict")
        tab.locator("#result [data-side=plain]").focus()
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            tab.keyboard.press(key)
        sync_api.expect(tab.locator("#why .verdict")).not_to_have_text(first)
        assert "what the SAE does not hold" in tab.inner_text("#why")
        tab.locator("#why .choose").first.click()
        sync_api.expect(tab.locator("#mix .dial")).to_have_count(2)


def test_causes_of_a_steered_token_are_those_of_the_edited_activations(site):
    studio = site.handlers.studio
    ids = studio.encode(PROMPT, chat=False)
    hook = studio.dictionaries[0].hook

    def nothing(x, positions):
        return x

    def shift(x, positions):
        return x + 3.0 * studio.dictionaries[0].sae.W_dec[3]

    plain = attribute(studio, PROMPT)
    same = attribute_ids(studio, ids, None, edits={hook: nothing})
    assert same.parts == plain.parts and same.token_id == plain.token_id
    edited = attribute_ids(studio, ids, plain.token_id, edits={hook: shift})
    with torch.no_grad():
        logits = studio.model(torch.tensor([ids]), edits={hook: shift})[0, -1]
    assert edited.logit == pytest.approx(float(logits[plain.token_id] - logits.mean()), abs=1e-4)
    assert edited.parts != plain.parts


def test_the_api_makes_concepts_and_takes_them_by_name(site):
    endpoints = api_endpoints(site.handlers)
    made = endpoints["concept"]("court")
    expected = find_concept(site.handlers.studio, "court", use="means")
    assert [int(i) for i in made["latents"]] == list(expected.latents)
    assert made["use"] == "means" and made == json.loads(json.dumps(made))
    assert all("label" in part for part in made["latents"].values())
    record = {"prompts": [PROMPT], "steer": ["court=+6", "0:3=add:1.0"], "max_new_tokens": 4}
    *_, last = endpoints["steer"](record)
    assert last["request"]["steer"] == ["0:3=add:1.0", "court=+6"]
    assert [effect["setting"] for effect in last["pairs"][0]["effects"]] == [
        "0:3=add:1.0",
        "court=+6",
    ]
    *_, swept = endpoints["dose"]("court=+1", [PROMPT])
    assert [point["strength"] for point in swept["points"]][:3] == [0.0, 2.0, 4.0]
    assert endpoints["steering_vector"](["court=+6"])["safetensors"]
    why = endpoints["attribute"](PROMPT, "", False, True)
    assert why["parts"] and set(why["ablated"]) == {"expected", "got"}
    with pytest.raises(UserError, match="2 loaded"):
        endpoints["attribute"](PROMPT, "", False, False, 7)


def test_a_strangers_mix_is_checked(site):
    handlers = site.handlers
    (dial,) = handlers.turn_up([], "court", "")
    assert handlers.turn_up([dial], "court", "") == [dial], "the same concept is no second dial"
    both = handlers.turn_up([dial], "court", "nuclear treaty")
    assert [one["concept"] for one in both] == ["court"] and both != [dial]
    definition = dial["definition"]
    for broken in (
        {"dose": "loud"},
        {"dose": 1e9},
        {"mode": "scale"},
        {"concept": "a=b"},
        {"definition": 3},
        {"definition": definition | {"latents": {"999": {"weight": 1, "share": 1}}}},
        {"definition": definition | {"means": "AAAA"}},
        {"definition": definition | {"sae": 9}},
    ):
        with pytest.raises(UserError):
            handlers.mixer.read([dial | broken])
    with pytest.raises(UserError, match="write a word"):
        handlers.turn_up([], "  ", "")
    with pytest.raises(UserError, match="no latent is left"):
        none = definition | {"latents": {}, "use": "latents"}
        handlers.reshape([dial | {"definition": none}])


def test_ids_of_a_token_are_checked(site):
    for ids in ([], "1,2", [1], [0, 10**9], [0.5, 1.5], [0] * 10_000):
        event = SimpleNamespace(ids=ids, side="plain", n_prompt=1)
        with pytest.raises(UserError, match="token"):
            site.handlers.why("", event)


def test_links_hold_concepts(site):
    concept = find_concept(site.handlers.studio, "court", use="means")
    request = Request((PROMPT,), (Setting(3),), concepts=(ConceptSetting(concept, "set", 2.0),))
    link = link_query(site.handlers.record(request)).partition("=")[2]
    read = site.handlers.read_record(read_link(link))
    assert read.settings == request.settings and str(read.concepts[0]) == "court=set:2"
