"""From a latent in the demo to its own page, and from there back to a pair that it steers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright import sync_api

import capture_top_activating_sentences
import latent_browser
from saint.page.latents import find_pages
from tests.support.steering_site import Site, choose, open_tab, running_browser, running_site
from tests.support.tiny_steering import LABELS, N_LATENTS, one_thread
from tests.support.tiny_store import make_store


@pytest.fixture(scope="module")
def latent_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents' page of some SAE, beside its evidence."""
    root = tmp_path_factory.mktemp("latents")
    store = make_store(root, n_latents=N_LATENTS, n_sentences=40)
    words = ["--data_dir", store.data_dir, "--model_path", store.sae_path, "--device", "cpu"]
    capture_top_activating_sentences.main(
        [str(word) for word in (*words, "--captured_data_output_dir", root / "top")]
    )
    html = root / "latents.html"
    evidence = root / "top" / "evidence.parquet"
    latent_browser.main(["--evidence_path", str(evidence), "--html", str(html)])
    return html


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, latent_page: Path) -> Iterator[Site]:
    with (
        one_thread(),
        running_site(tmp_path_factory.mktemp("page"), latent_page=latent_page) as running,
    ):
        yield running


def test_only_the_page_of_the_same_sae_is_taken(latent_page: Path, tmp_path: Path) -> None:
    from saint.evidence.file import open_evidence

    evidence = open_evidence(latent_page.parent / "top" / "evidence.parquet")
    other = SimpleNamespace(meta=evidence.meta | {"sae_fingerprint": "0123"})
    beside, elsewhere = latent_page.parent / "sae.pt", tmp_path / "sae.pt"
    for path, known, wanted in (
        (beside, evidence, latent_page),
        (beside, other, None),
        (beside, None, None),
        (elsewhere, evidence, None),
    ):
        assert find_pages([path], [SimpleNamespace(evidence=known)]) == [wanted]  # type: ignore


def test_a_latent_leads_to_its_page_and_its_page_back_to_a_pair(site: Site) -> None:
    with running_browser() as browser, open_tab(site, browser) as tab:
        choose(tab)
        latent = next(i for i, text in LABELS.items() if text == "nuclear weapons")
        with tab.expect_popup() as opened:
            tab.locator("#results .card a", has_text="nuclear weapons").click()
        page = opened.value
        page.wait_for_selector(f"article[data-latent='{latent}']")
        assert page.url == f"{site.url}/latents-1?sae=1#/latent/{latent}"
        page.get_by_text("Steer by it, or try your own text").click()
        with page.expect_popup() as back:
            page.get_by_role("link", name="Steer this in the demo").click()
        pair: sync_api.Page = back.value
        pair.wait_for_selector("#result .done", timeout=40_000)
        assert pair.url.startswith(site.url)
        name = pair.locator("#result table.effects a", has_text=f"#{latent}")
        assert name.get_attribute("href") == f"latents-1?sae=1#/latent/{latent}"
