"""Many clients at once, some of whom hang up: everyone gets the answer they would get alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.demo_load import (
    Server,
    answer_as_soon_as_there_is_room,
    client_request,
    hang_up_together,
    load,
)
from tests.support.steering_site import Site, running_site
from tests.support.tiny_steering import N_LATENTS, one_thread


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with one_thread(), running_site(tmp_path_factory.mktemp("load")) as running:
        yield running


def test_every_client_gets_its_own_answer_in_turn(site: Site) -> None:
    server = Server(site.url, lambda: 1.0)
    seen = load(server, [client_request(i, N_LATENTS, 4) for i in range(10)], seconds=3)
    assert seen["answers"] > 10 and seen["dropped"] > 0
    assert seen["wrong"] == seen["refused"] == 0
    # One request runs at a time, and the rest keep their order.
    assert seen["overtaken"] <= 1 and seen["most"] - seen["least"] <= 2
    site.wait_until_idle()


def test_who_hangs_up_frees_the_place_in_a_queue_that_was_full(site: Site) -> None:
    server, request = Server(site.url, lambda: 1.0), client_request(0, N_LATENTS, 4)
    alone = server.ask(request)
    site.brake.seconds, before = 0.1, site.brake.steps
    try:
        joined = hang_up_together(server, [request] * 100)
        assert answer_as_soon_as_there_is_room(server, request) == alone
    finally:
        site.brake.seconds = 0.0
    assert 32 < joined < 100
    # Each that waited would have taken four steps.
    assert site.brake.steps - before < 2 * joined
