"""A running steering page and a browser to visit it with, for the page's tests."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

from llama_3_inference_text_completion_gradio import launch
from saint.page.handlers import PageHandlers
from saint.steering import completions
from saint.steering.concepts import ConceptFinder
from saint.steering.showcase import Shown, Text
from tests.support.tiny_steering import make_sae, make_studio, write_setup

PROMPT = "Senior diplomats met to discuss"
_CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@dataclass
class Brake:
    """Makes generation slow and counts its steps; shared with the server's thread."""

    seconds: float = 0.0
    steps: int = 0


@dataclass
class Site:
    """A running page."""

    url: str
    handlers: PageHandlers
    brake: Brake
    app: Any

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Wait until nothing is generated any more; fails when that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            steps = self.brake.steps
            time.sleep(1.5)
            if self.brake.steps == steps:
                return
            assert time.monotonic() < deadline, "generation goes on"


@contextmanager
def running_site(
    root: Path, *, auth: tuple[str, str] | None = None, latent_page: Path | None = None
) -> Iterator[Site]:
    """Serve a tiny model with two SAEs, on different layers; latent_page: of the second."""
    model_dir, _ = write_setup(root)
    studio, guides = make_studio(model_dir, make_sae(), make_sae(layer=2, seed=4))
    brake, original = Brake(), completions.generate

    def slow(*args, **kwargs):
        for step in original(*args, **kwargs):
            brake.steps += 1
            time.sleep(brake.seconds)
            yield step

    completions.generate = slow
    finder = ConceptFinder(studio, guides, [None, None])
    page, handlers = launch(
        studio,
        guides,
        finder=finder,
        shown_concepts=[example(finder)],
        latent_pages=[None, latent_page],
        host="127.0.0.1",
        port=None,
        share=False,
        auth=auth,
    )
    yield Site(str(page.local_url).rstrip("/"), handlers, brake, page.app)
    page.close()
    completions.generate = original


def example(finder: ConceptFinder) -> Shown:
    """A concept that is said to show."""
    texts = [Text(PROMPT, " plain", " the court", True, 5)]
    return Shown(finder.find("court"), 9.0, 1.0, 0.0, 0.5, ["ruling"], texts, [])


@contextmanager
def running_browser() -> Iterator[sync_api.Browser]:
    """Start Chromium, or skip the test where there is none."""
    if _CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS)
        yield running
        running.close()


@contextmanager
def open_tab(
    site: Site, browser: sync_api.Browser, *, width: int = 1200
) -> Iterator[sync_api.Page]:
    """An open page that has asked nobody but our server for anything."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(40_000)
    strangers, problems = [], []
    page.on("request", lambda r: strangers.append(r.url) if _foreign(r.url) else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    open_page(page, site.url)
    yield page
    context.close()
    assert strangers == [] and problems == []


def _foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:"))


def open_page(page: sync_api.Page, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#mix .dials > *")


def field(page: sync_api.Page, name: str) -> sync_api.Locator:
    return page.locator(f"#{name} textarea, #{name} input").first


def choose(page: sync_api.Page, query: str = "nuclear") -> None:
    """Put the first latent that a search finds into the mix."""
    before = page.locator("#mix .dial").count()
    field(page, "query").fill(query)
    field(page, "query").press("Enter")
    page.locator("#results .card", has_text=query).locator(".choose").first.click()
    sync_api.expect(page.locator("#mix .dial")).to_have_count(before + 1)


def compare(page: sync_api.Page) -> list[str]:
    """Press Compare; returns the plain and the steered text of the first prompt."""
    page.click("#run")
    page.wait_for_selector("#result .done")
    return [page.inner_text(f"#result [data-side={side}]") for side in ("plain", "steered")]
