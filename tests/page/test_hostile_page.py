"""What others wrote stays text on the demo's page: labels, prompts, concepts, what a model says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright import sync_api

from saint.evidence.labels import Label
from tests.support.steering_site import (
    Site,
    choose,
    compare,
    field,
    open_tab,
    running_browser,
    running_site,
)
from tests.support.tiny_steering import one_thread

# U+202E would show what follows it backwards; the braces are a template's, `$$` is LaTeX.
HOSTILE = (
    "weapons </script></style><script>window.ran=1;alert(1)</script>"
    '<img src="http://127.0.0.1:9/x" onerror="window.ran=1">'
    '<a href="javascript:window.ran=1">go</a><iframe srcdoc="<script>parent.ran=1</script>">'
    '" onmouseover="window.ran=1" \u202egnp.exe\x1b[31m {{ 7 * 7 }} ${window.ran=1} $$x$$'
)
SHOWN = "<script>window.ran=1;alert(1)</script>"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with one_thread(), running_site(tmp_path_factory.mktemp("hostile")) as running:
        for guide in running.handlers.guides:
            guide.labels[3] = Label(HOSTILE, 0.9)
        yield running


def test_nothing_that_was_written_runs(site: Site) -> None:
    with running_browser() as browser, open_tab(site, browser) as tab:
        dialogs: list[str] = []

        def dismiss(dialog: sync_api.Dialog) -> None:
            dialogs.append(dialog.message)
            dialog.dismiss()

        tab.on("dialog", dismiss)
        field(tab, "prompts").fill(HOSTILE)
        field(tab, "wish").fill(HOSTILE)
        field(tab, "wish").press("Enter")
        tab.wait_for_selector("#mix .dial")
        choose(tab, "weapons")
        plain, _ = compare(tab)
        assert SHOWN in plain
        for part in ("#results", "#mix"):
            assert SHOWN in tab.inner_text(part)
        tab.wait_for_function("document.querySelector('#view table')")
        text = tab.inner_text("body")
        assert "{{ 7 * 7 }}" in text and not set("\u202e\x1b") & set(text)
        tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert tab.evaluate("window.ran") is None and dialogs == []
        strange = "img[src*='127.0.0.1:9'], a[href^='javascript'], [onmouseover], iframe[srcdoc]"
        sync_api.expect(tab.locator(strange)).to_have_count(0)
